//! Brings dirty blocks to the store: when somebody flushes, when they are old,
//! and when room is short. Oldest first, neighbours together, many at a time.

use std::sync::{Arc, PoisonError, Weak};

use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Duration, Instant};

use super::Cache;
use super::core::SECTION;
use super::index::Picked;
use super::layout::BLOCK;
use crate::blob::Range;
use crate::device::DeviceError;
use crate::volume::Volume;
use crate::volume::io::Change;
use crate::volume::store::PageStore;

/// Put Pages under way at once, and their bytes.
const MOST_PUTS: usize = 32;
const MOST_BYTES: u64 = 32 << 20;
/// What was written this long ago is written back without being asked for.
const AGE: Duration = Duration::from_secs(5);
const TICK: Duration = Duration::from_secs(1);
/// After a write-back that failed.
const PAUSE: Duration = Duration::from_secs(1);

/// Starts writing back for `volume`, which has a cache.
pub(super) fn start<S: PageStore>(volume: &Arc<Volume<S>>, cache: &Arc<Cache>) {
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(run(Arc::downgrade(volume), Arc::clone(cache), stopped));
    let mut writer = cache.writer.lock().unwrap_or_else(PoisonError::into_inner);
    *writer = Some(Writer { stop, task });
}

/// A write-back that runs.
#[derive(Debug)]
pub(super) struct Writer {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Writer {
    /// Ends it where it is: afterwards nothing of it is under way here. What
    /// it had sent may still come to the store.
    pub(super) async fn end(self) {
        // One that has ended already, or panicked, has nothing under way.
        self.stop.send(()).ok();
        self.task.await.ok();
    }
}

/// Ends when the volume is fenced or gone, or when it is told to.
async fn run<S: PageStore>(
    weak: Weak<Volume<S>>,
    cache: Arc<Cache>,
    mut stopped: oneshot::Receiver<()>,
) {
    let Some(standing) = weak.upgrade().map(|volume| Arc::clone(&volume.io.standing)) else {
        return;
    };
    let mut jobs: JoinSet<(u64, bool)> = JoinSet::new();
    let mut bytes = 0;
    let mut paused_until: Option<Instant> = None;
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut recorded = standing.number();
    loop {
        while paused_until.is_none() && jobs.len() < MOST_PUTS && bytes < MOST_BYTES {
            let Some(picked) = cache.with(super::Core::pick).await else {
                break;
            };
            let Some(volume) = weak.upgrade() else {
                return;
            };
            let size = (picked.blocks.end - picked.blocks.start) * BLOCK;
            bytes += size;
            let cache = Arc::clone(&cache);
            jobs.spawn(async move { (size, volume.write_back(&cache, picked).await) });
        }
        let resume = async {
            match paused_until {
                Some(until) => tokio::time::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        // In this order: what is rare first, so that nothing is starved, and
        // the same each time.
        tokio::select! {
            biased;
            _ = &mut stopped => return jobs.shutdown().await,
            news = standing.news(recorded) => match news {
                Ok(number) => {
                    recorded = number;
                    let record = move |core: &mut super::Core| {
                        core.staging.record(|header| header.epoch = number)
                    };
                    if let Err(error) = cache.with(record).await {
                        tracing::warn!("staging file: {error}: not told of sequence number {number}");
                    }
                }
                Err(_) => {
                    jobs.shutdown().await;
                    cache.keep_aside().await;
                    cache.progress.notify_waiters();
                    return;
                }
            },
            () = resume => paused_until = None,
            _ = tick.tick() => {
                if weak.strong_count() == 0 {
                    return;
                }
                let now = Instant::now();
                cache.with(move |core| core.tick(now, AGE)).await;
            }
            Some(joined) = jobs.join_next(), if !jobs.is_empty() => match joined {
                Ok((size, delivered)) => {
                    bytes -= size;
                    if !delivered {
                        paused_until = Some(Instant::now() + PAUSE);
                    }
                }
                Err(error) => {
                    // Its blocks would stay picked for ever.
                    standing.fence(format!("internal error in the write-back: {error}"));
                }
            },
            () = cache.work.notified() => {}
        }
    }
}

impl<S: PageStore> Volume<S> {
    /// Writes one run back; says whether it is in the store.
    async fn write_back(&self, cache: &Arc<Cache>, picked: Picked) -> bool {
        let range = Range {
            start: picked.blocks.start * BLOCK,
            end: picked.blocks.end * BLOCK,
        };
        let locked = self.locks.lock(range).await;
        let sent = self.deliver(cache, &picked).await;
        let delivered = sent.is_ok();
        let mut noted = true;
        for section in sections(&picked) {
            noted &= cache
                .with(move |core| core.finish(section, delivered))
                .await;
        }
        cache.with(move |core| core.index.finished(&picked)).await;
        drop(locked);
        match sent {
            Ok(()) if noted => cache.progress.notify_waiters(),
            Ok(()) => cache.failed("staging file: a write-back could not be noted".into()),
            Err(DeviceError::Io(cause)) => cache.failed(cause),
            Err(error) => cache.failed(error.to_string()),
        }
        delivered && noted
    }

    async fn deliver(&self, cache: &Arc<Cache>, picked: &Picked) -> Result<(), DeviceError> {
        let mut pieces = Vec::new();
        let end = picked.blocks.end;
        for section in sections(picked) {
            let copied = cache.with(move |core| {
                let result = core.send(section, end, &mut pieces);
                (result, pieces)
            });
            let result;
            (result, pieces) = copied.await;
            result.map_err(|error| DeviceError::Io(format!("staging file: {error}")))?;
        }
        for (offset, data) in pieces {
            let data = data.share();
            self.io.change(&Change::Put { offset, data }).await?;
        }
        Ok(())
    }
}

fn sections(picked: &Picked) -> impl Iterator<Item = std::ops::Range<u64>> + use<> {
    let blocks = picked.blocks.clone();
    let step = SECTION / BLOCK;
    let count = (blocks.end - blocks.start).div_ceil(step);
    (0..count).map(move |at| {
        let start = blocks.start + at * step;
        start..blocks.end.min(start + step)
    })
}
