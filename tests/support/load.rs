//! Writers on a volume of a capped store, and what becomes of their requests.
#![allow(dead_code, reason = "each binary uses its part")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dysk::blob::LeaseId;
use dysk::device::BlockDevice;
use dysk::emulator::{SettingsChange, Span};
use dysk::node::account::open_blob;
use dysk::volume::{AccountPace, OpenOptions, Volume};
use tokio::task::JoinSet;

use super::node::Store;

pub const SIZE: u64 = 64 << 20;
/// A share of a busy machine's time is nobody's: the best of so many rounds.
pub const ROUNDS: usize = 4;

pub async fn open(store: &Store, name: &str, pace: &AccountPace) -> Arc<Volume> {
    let (_, blob) = open_blob(&store.spec(), "dysks", name)
        .await
        .expect("the account opens");
    let options = OpenOptions {
        pace: Some(pace.clone()),
        ..OpenOptions::new(LeaseId::random())
    };
    Volume::open(blob, options).await.expect("the volume opens")
}

/// Writers that go on until this is dropped; any error fails the test.
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    writers: JoinSet<()>,
    pub volume: Arc<Volume>,
}

/// Requests that were let through and refused, and how long that took.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    pub passed: u64,
    pub refused: u64,
    pub took: Duration,
}

impl Seen {
    pub fn rate(self) -> f64 {
        self.passed as f64 / self.took.as_secs_f64()
    }

    pub fn refused(self) -> f64 {
        self.refused as f64 / (self.passed + self.refused).max(1) as f64
    }
}

impl Load {
    pub fn start(volume: Arc<Volume>, depth: u64, bytes: u64) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let mut writers = JoinSet::new();
        let data = Bytes::from(vec![7; usize::try_from(bytes).expect("small")]);
        for writer in 0..depth {
            let (volume, stop) = (Arc::clone(&volume), Arc::clone(&stop));
            let (done, data) = (Arc::clone(&done), data.clone());
            let mut at = writer;
            writers.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let offset = (at * bytes) % SIZE;
                    volume
                        .write(offset, data.clone(), false)
                        .await
                        .expect("throttling is no error");
                    at += depth;
                    let done: &AtomicU64 = &done;
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Self {
            stop,
            done,
            writers,
            volume,
        }
    }

    fn now(&self) -> (u64, u64) {
        (
            self.done.load(Ordering::Relaxed),
            self.volume.status().refused,
        )
    }

    pub async fn run(&self, time: Duration) -> Seen {
        let ((passed, refused), began) = (self.now(), Instant::now());
        tokio::time::sleep(time).await;
        let now = self.now();
        Seen {
            passed: now.0 - passed,
            refused: now.1 - refused,
            took: began.elapsed(),
        }
    }

    /// Every writer ends without an error.
    pub async fn stop(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.writers.join_next().await {
            ended.expect("a writer failed");
        }
        self.volume.close().await.expect("the lease is released");
    }
}

pub fn change(store: &Store, change: &SettingsChange) {
    store.running.change(change).expect("settings");
}

pub fn slow_store() -> Store {
    let store = Store::start();
    change(
        &store,
        &SettingsChange {
            latency: Some(Span(Duration::from_millis(5))),
            ..SettingsChange::default()
        },
    );
    store
}

/// Best share of the cap in a round; share refused in all of them together.
pub fn measure(caps: &SettingsChange, cap: f64, bytes: u64, pace: &AccountPace) -> (f64, f64) {
    let store = slow_store();
    store.create("a.vhd", SIZE);
    change(&store, caps);
    let (mut best, mut refused, mut all) = (0.0, 0, 0);
    store.block_on(async {
        let load = Load::start(open(&store, "a.vhd", pace).await, 128, bytes);
        load.run(Duration::from_secs(2)).await;
        for _ in 0..ROUNDS {
            let seen = load.run(Duration::from_secs(2)).await;
            best = f64::max(best, seen.rate() / cap);
            refused += seen.refused;
            all += seen.refused + seen.passed;
        }
        load.stop().await;
    });
    (best, refused as f64 / all as f64)
}
