//! All that one history shares: the blob, the clock's beginning, which nodes
//! stand still or are dead, what was attempted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::blob::Blob;
use crate::fate::{Actor, AttemptKey, generator};
use crate::files::SharedDisk;
use crate::plan::{Cut, NODES, Plan};

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
    /// Get Page Ranges finds nothing written.
    Ranges,
    /// Who has lost the lease is told for another minute that it is its own.
    Certain,
    /// Write-backs are answered before they are done, so that nothing orders
    /// two of one block.
    Order,
    /// Flushes are answered and not made.
    Flush,
    /// Writes with FUA are made without.
    Fua,
    /// Staging files always name the blob's present sequence number.
    Epoch,
    /// Staging files always name the present boot.
    Boot,
    /// A daemon that hands over lets go of nothing, and locks do not hold.
    LetGo,
    /// Entries of the staging file's table are not written.
    Commit,
    /// They are not taken out again.
    Clean,
    /// Nothing in a staging file is made durable.
    Sync,
}

/// How a daemon ends that was told nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fall {
    /// It is killed.
    Kill,
    /// Its node loses power.
    PowerCut,
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
    /// The nodes' staging folders, and the judge's.
    pub disks: [SharedDisk; NODES + 1],
    /// How often each node's power was cut.
    pub boots: [u32; NODES + 1],
    /// How many moments each node had in which it could have died.
    pub points: [u32; NODES + 1],
    /// Cuts of the plan that are still to come.
    cuts: Vec<Cut>,
    /// Cuts that have come, for the driver.
    pub fallen: Vec<Cut>,
    /// Told when one comes.
    pub bell: Arc<Notify>,
    /// The openings of each node, dead or alive.
    pub openings: Vec<(usize, u32)>,
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
        let cuts = plan.cuts.clone();
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
            disks: Default::default(),
            boots: [0; NODES + 1],
            points: [0; NODES + 1],
            cuts,
            fallen: Vec::new(),
            bell: Arc::default(),
            openings: Vec::new(),
            trace: traced.then(Vec::new),
        }
    }

    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    pub fn instant(&self, at: Duration) -> Instant {
        self.start + at
    }

    /// A moment in which the node's daemon may die; says whether it does.
    pub fn point(&mut self, node: usize) -> bool {
        self.points[node] += 1;
        let now = self.points[node];
        let due = |cut: &Cut| cut.node == node && cut.point == now;
        let Some(at) = self.cuts.iter().position(due) else {
            return false;
        };
        let cut = self.cuts.remove(at);
        self.note(format_args!("node {node}: {:?} at point {now}", cut.fall));
        self.bury(node);
        self.fallen.push(cut);
        self.bell.notify_one();
        true
    }

    /// The plan has been carried out: nothing dies any more.
    pub fn last_points(&mut self) -> [u32; NODES + 1] {
        self.cuts.clear();
        self.points
    }

    /// Nothing of what is open on the node does anything any more.
    pub fn bury(&mut self, node: usize) {
        let here = self.openings.iter().filter(|(on, _)| *on == node);
        self.dead.extend(here.map(|(_, opening)| *opening));
    }

    /// The node's daemon died just now, in a write to its staging file; and
    /// how many whole pages of that came before.
    pub fn died_in_write(&self, node: usize) -> (bool, u64) {
        let here = self.fallen.iter().any(|cut| cut.node == node);
        (here, u64::from(self.points[node]) % 4)
    }

    /// The node's power is cut: it loses what it had in memory.
    pub fn lose_power(&mut self, node: usize) {
        self.boots[node] += 1;
        let mut rng = generator(self.plan.seed, [8, node as u64, self.boots[node].into()]);
        let mut disk = self.disks[node].lock().expect("nothing panics with it");
        disk.cut(self.plan.disk, &mut rng);
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
