//! Learns in the background which parts of the volume hold no pages: Get Page
//! Ranges, one piece at a time.
//!
//! It delays nobody: one request is under way at a time, it takes at most a
//! tenth of the time, and while the store throttles one a second is sent. A
//! piece that the store cannot answer in time is asked for again in halves.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::Instant;
use tracing::debug;

use super::Volume;
use super::store::PageStore;
use crate::blob::Range;
use crate::device::{DeviceError, PAGE};

/// Where it begins; a whole disk of 8 TiB is 32 requests.
const LARGEST_PIECE: u64 = 256 << 30;
/// Below this halving does not help.
const SMALLEST_PIECE: u64 = 1 << 30;
/// Most ranges asked for at once; the rest of a piece is asked for next.
const MOST_RANGES: u32 = 5000;
const PAUSE: Duration = Duration::from_millis(5);
const THROTTLED_PAUSE: Duration = Duration::from_secs(1);
const FAILED_PAUSE: Duration = Duration::from_secs(5);
/// The longest that one question may take, waiting for a throttled store included.
const LONGEST: Duration = Duration::from_secs(60);
const ANSWER: Duration = Duration::from_secs(30);
/// One request in so many times its own duration.
const SHARE: u32 = 9;
/// A piece in which too much is written to follow is left out after so many tries.
const MOST_TRIES: u32 = 3;

/// Starts to learn about `volume`, whose lease is held.
pub(super) fn start<S: PageStore>(volume: &Arc<Volume<S>>) {
    tokio::spawn(run(Arc::downgrade(volume), volume.size()));
}

/// Ends when all is known, or the volume is fenced, closed or gone.
async fn run<S: PageStore>(weak: Weak<Volume<S>>, size: u64) {
    let (mut at, mut piece, mut tries) = (0, LARGEST_PIECE, 0);
    while at < size {
        let Some(volume) = weak.upgrade() else {
            return;
        };
        let within = Range {
            start: at,
            end: size.min(at + piece),
        };
        if volume.is_fenced() {
            return;
        }
        let begun = Instant::now();
        // Its end is sure, so that a volume that is dropped meanwhile goes.
        let asked = volume.io.learn(within, MOST_RANGES);
        let asked = tokio::select! {
            biased;
            () = volume.gate.closed() => return,
            asked = tokio::time::timeout(LONGEST, asked) => asked,
        };
        let took = begun.elapsed();
        let throttled = volume.io.pace.throttled().is_some();
        drop(volume);
        let mut pause = (took * SHARE).max(PAUSE);
        match asked {
            Ok(Ok(Learned::UpTo(known_to))) => (at, tries) = (known_to, 0),
            // Nothing is known of it then, which is always right.
            Ok(Ok(Learned::Nothing(known_to))) if tries >= MOST_TRIES => {
                (at, tries) = (known_to, 0);
            }
            Ok(Ok(Learned::Nothing(_))) => tries += 1,
            failed => {
                let why = match failed {
                    Ok(Err(error)) => error.to_string(),
                    _ => format!("no answer within {LONGEST:?}"),
                };
                // Nobody waits for it: reads ask the store meanwhile.
                debug!("page ranges {within}: {why}: asking again");
                piece = (piece / 2).max(SMALLEST_PIECE);
                pause = pause.max(FAILED_PAUSE);
            }
        }
        if throttled {
            pause = pause.max(THROTTLED_PAUSE);
        }
        if at < size {
            tokio::time::sleep(pause).await;
        }
    }
}

/// What one question brought.
pub(super) enum Learned {
    /// All up to here.
    UpTo(u64),
    /// Nothing, because too much was written meanwhile; it would have been
    /// known up to here.
    Nothing(u64),
}

impl<S: PageStore> super::io::Io<S> {
    /// Asks once which parts of `within` hold no pages.
    async fn learn(&self, within: Range, most: u32) -> Result<Learned, DeviceError> {
        debug_assert!(within.start.is_multiple_of(PAGE) && !within.is_empty());
        let Some(unwritten) = &self.unwritten else {
            return Ok(Learned::UpTo(within.end));
        };
        let question = unwritten.ask(within);
        // What was given up before it asked, and is not in `putting` any more,
        // is dead after this.
        let owed = self.standing.nothing_owed().await;
        owed.map_err(|fenced| self.fenced(&fenced))?;
        let page = match self.ranges_once(within, most, false, ANSWER).await? {
            Ok(page) => page,
            Err(error) => return Err(DeviceError::Io(error.to_string())),
        };
        // Another holder may have emptied what it fills later: what is learned
        // has to be of a time when the disk was ours.
        let ours = self.standing.confirm_lease().await;
        ours.map_err(|fenced| self.fenced(&fenced))?;
        // A store that ignores the bound sends more.
        let known_to = page.known_to(within).min(within.end);
        if known_to <= within.start {
            return Err(DeviceError::Io(
                "the store's list of ranges goes nowhere".into(),
            ));
        }
        Ok(
            match unwritten.answered(&question, &page.filled, known_to) {
                true => Learned::UpTo(known_to),
                false => Learned::Nothing(known_to),
            },
        )
    }
}
