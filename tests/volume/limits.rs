//! A volume's own limits, from the device's side to the store's: what is sent
//! stays under them, and nearly all of them can be used.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dysk::blob::LeaseId;
use dysk::device::BlockDevice as _;
use dysk::volume::{Limits, OpenOptions, Volume};
use tokio::task::JoinSet;

use crate::support::sim_store::SimStore;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
/// Callers at a time.
const DEPTH: u64 = 64;
/// Between two looks at what the store has served.
const LOOK: Duration = Duration::from_millis(100);
/// Looks: ten seconds.
const LOOKS: usize = 100;

#[derive(Clone, Copy, Debug)]
enum Load {
    Reads(u64),
    Writes(u64),
    /// Every other caller writes.
    Both(u64),
}

struct World {
    store: SimStore,
    volume: Arc<Volume<SimStore>>,
    callers: JoinSet<()>,
}

impl World {
    async fn open(limits: Limits) -> Self {
        let store = SimStore::new(usize::try_from(SIZE).expect("it fits"), 11);
        // Nothing of it reads as zeroes without a request.
        store.blob().bytes.fill(1);
        let options = OpenOptions {
            limits,
            ..OpenOptions::new(LeaseId::random())
        };
        let volume = Volume::open(store.clone(), options).await.expect("opens");
        Self {
            store,
            volume,
            callers: JoinSet::new(),
        }
    }

    /// Callers that send one request after the other, each in its own part of
    /// the disk.
    fn load(&mut self, load: Load) {
        let part = SIZE / DEPTH;
        for caller in 0..DEPTH {
            let volume = Arc::clone(&self.volume);
            let (bytes, writes) = match load {
                Load::Reads(bytes) => (bytes, false),
                Load::Writes(bytes) => (bytes, true),
                Load::Both(bytes) => (bytes, caller % 2 == 0),
            };
            self.callers.spawn(async move {
                let data = Bytes::from(vec![7; usize::try_from(bytes).expect("it fits")]);
                for at in (0..part / bytes).cycle() {
                    let at = caller * part + at * bytes;
                    if writes {
                        let written = volume.write(at, data.clone(), false).await;
                        written.expect("written");
                    } else {
                        let len = u32::try_from(bytes).expect("it fits");
                        volume.read(at, len).await.expect("read");
                    }
                }
            });
        }
    }

    /// Requests for pages that the store has served.
    fn served(&self) -> u64 {
        let blob = self.store.blob();
        blob.gets + blob.puts.len() as u64
    }

    /// Served by the store, at the ends of [`LOOKS`].
    async fn looks(&self) -> Vec<u64> {
        let mut looks = vec![self.served()];
        for _ in 0..LOOKS {
            tokio::time::sleep(LOOK).await;
            looks.push(self.served());
        }
        looks
    }
}

/// What was served between the first look and the last.
fn all(looks: &[u64]) -> u64 {
    looks[looks.len() - 1] - looks[0]
}

/// At least 99% of `cap` requests a second, and never more: in no second, and
/// in no ten, but for the tenth of a second that may come at once and the
/// requests that were admitted before it began.
fn is_used_and_kept(looks: &[u64], cap: u64, what: &str) {
    let (all, seconds) = (all(looks), 10);
    assert!(
        all * 100 >= cap * seconds * 99,
        "{what}: {all} of {} in ten seconds",
        cap * seconds
    );
    assert!(
        all <= cap * seconds + cap / 50 + 1,
        "{what}: {all} in ten seconds, the limit is {cap} a second"
    );
    for second in looks.windows(11) {
        let served = second[10] - second[0];
        let most = cap + cap / 10 + cap / 50 + 1;
        assert!(
            served <= most,
            "{what}: {served} in a second, the limit is {cap}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn what_reaches_the_store_is_the_limit_and_no_more() {
    let requests = |iops| Limits {
        iops: Some(iops),
        bandwidth: None,
    };
    let bytes = |bandwidth| Limits {
        iops: None,
        bandwidth: Some(bandwidth),
    };
    for (limits, load, cap) in [
        (requests(500), Load::Reads(4096), 500),
        (requests(500), Load::Writes(4096), 500),
        (requests(300), Load::Both(4096), 300),
        (bytes(32 * MIB), Load::Reads(256 << 10), 128),
        (bytes(32 * MIB), Load::Writes(256 << 10), 128),
    ] {
        let what = format!("{limits:?}, {load:?}");
        let mut world = World::open(limits).await;
        world.load(load);
        tokio::time::sleep(Duration::from_secs(1)).await;
        is_used_and_kept(&world.looks().await, cap, &what);
        // The same load without the limit goes far beyond it.
        world.volume.set_limits(Limits::default());
        tokio::time::sleep(Duration::from_secs(1)).await;
        let free = all(&world.looks().await);
        assert!(free > 2 * cap * 10, "{what}: {free} requests without it");
        // And it holds again at once.
        world.volume.set_limits(limits);
        tokio::time::sleep(Duration::from_secs(1)).await;
        is_used_and_kept(&world.looks().await, cap, &what);
    }
}

/// Large requests pay for all their bytes, at whatever size the store is sent
/// them.
#[tokio::test(start_paused = true)]
async fn a_request_that_moves_much_waits_for_all_of_it() {
    let limits = Limits {
        iops: None,
        bandwidth: Some(8 * MIB),
    };
    let world = World::open(limits).await;
    let data = Bytes::from(vec![7; 16 << 20]);
    let begun = tokio::time::Instant::now();
    for _ in 0..5 {
        let written = world.volume.write(0, data.clone(), false).await;
        written.expect("written");
    }
    let took = begun.elapsed();
    // 80 MiB, the last request's own on credit, and the bucket full before.
    let (least, most) = (Duration::from_millis(9300), Duration::from_millis(10_300));
    assert!((least..most).contains(&took), "{took:?}");
}
