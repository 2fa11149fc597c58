//! Says in the log what a volume's I/O waits for or fails of, often enough to
//! be seen and seldom enough not to bury everything else.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{error, warn};

const AT_MOST_EVERY: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
struct Heard {
    last: Option<Instant>,
    unsaid: u64,
}

/// One volume's troubles.
#[derive(Debug, Default)]
pub struct Trouble {
    waits: Mutex<Heard>,
    blocks: Mutex<Heard>,
    failures: Mutex<Heard>,
}

fn due(heard: &Mutex<Heard>) -> Option<u64> {
    let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
    if heard
        .last
        .is_some_and(|last| last.elapsed() < AT_MOST_EVERY)
    {
        heard.unsaid += 1;
        return None;
    }
    heard.last = Some(Instant::now());
    Some(std::mem::take(&mut heard.unsaid))
}

impl Trouble {
    /// An attempt failed and will be repeated.
    pub fn waiting(&self, cause: &dyn std::fmt::Display, then: &str) {
        if let Some(unsaid) = due(&self.waits) {
            warn!(unsaid, "{cause}: {then}");
        }
    }

    /// An attempt was refused access; it will be repeated until a person has
    /// mended that.
    pub fn blocked(&self, cause: &dyn std::fmt::Display) {
        if let Some(unsaid) = due(&self.blocks) {
            error!(unsaid, "i/o is blocked: {cause}");
        }
    }

    /// A request is answered with an error.
    pub fn failed(&self, cause: &dyn std::fmt::Display) {
        if let Some(unsaid) = due(&self.failures) {
            error!(unsaid, "i/o error: {cause}");
        }
    }
}
