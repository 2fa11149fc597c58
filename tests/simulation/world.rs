//! All that one history shares: the blob, the clock's beginning, which nodes
//! stand still or are dead, what was attempted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

use crate::blob::Blob;
use crate::fate::{Actor, AttemptKey};
use crate::plan::{NODES, Plan};

/// A safety mechanism that the store renders void, so that its loss is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// Without bounds: writes lose their sequence-number bound.
    Bound,
    /// Without raises: they are answered and not done.
    Raise,
    /// Without lease checks: writes and raises are taken under any lease id.
    Lease,
    /// Without conditions on acquires.
    AcquireConditions,
}

/// All that one history shares.
#[derive(Debug)]
pub struct World {
    start: Instant,
    pub blob: Blob,
    pub plan: Arc<Plan>,
    pub sabotage: Option<Sabotage>,
    /// The step whose future is being polled.
    pub current: Option<u32>,
    pub attempts: BTreeMap<Actor, u32>,
    pub frozen_until: [Duration; NODES],
    /// Volumes, by the step that opened them, whose node died.
    pub dead: BTreeSet<u32>,
    /// Attempts that met with trouble.
    pub troubled: BTreeSet<AttemptKey>,
    /// Requests that may execute yet.
    pub under_way: u32,
    /// Requests executed after their senders had given up.
    pub late: u64,
    trace: Option<Vec<String>>,
}

pub type SharedWorld = Arc<Mutex<World>>;

/// Locks the world; nothing panics while it is locked but the simulation itself.
pub fn lock(world: &SharedWorld) -> MutexGuard<'_, World> {
    world.lock().expect("the simulation panicked before")
}

impl World {
    /// A world at its beginning; within a paused runtime.
    pub fn new(plan: Arc<Plan>, blob: Blob, sabotage: Option<Sabotage>, traced: bool) -> Self {
        Self {
            start: Instant::now(),
            blob,
            plan,
            sabotage,
            current: None,
            attempts: BTreeMap::new(),
            frozen_until: [Duration::ZERO; NODES],
            dead: BTreeSet::new(),
            troubled: BTreeSet::new(),
            under_way: 0,
            late: 0,
            trace: traced.then(Vec::new),
        }
    }

    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    pub fn instant(&self, at: Duration) -> Instant {
        self.start + at
    }

    /// Adds a line to the trace, if one is kept.
    pub fn note(&mut self, line: fmt::Arguments<'_>) {
        let now = self.now().as_secs_f64();
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{now:>12.6} {line}"));
        }
    }

    pub fn take_trace(&mut self) -> Vec<String> {
        self.trace.take().unwrap_or_default()
    }
}
