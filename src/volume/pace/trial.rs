//! The limits against a simulated store on a simulated clock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{AccountPace, Pace};
use crate::blob::retry::Backoff;
use crate::blob::{Attempt, BlobAddress, Failure, StorageError};
use crate::volume::progress::Progress;

const MS: Duration = Duration::from_millis(1);
const MIB: u64 = 1 << 20;
/// Of one attempt.
const DEADLINE: Duration = Duration::from_secs(10);

/// A bucket as the store keeps it: a request waits its turn, and is refused
/// when that is longer than the queue.
struct Bucket {
    requests: f64,
    bytes: f64,
    queue: Duration,
    next: Instant,
    /// Nothing is answered before that.
    silent_until: Instant,
}

impl Bucket {
    fn new(requests: f64, bytes: f64, queue: Duration) -> Self {
        Self {
            requests,
            bytes,
            queue,
            next: Instant::now(),
            silent_until: Instant::now(),
        }
    }

    /// For how long it says nothing.
    fn silence(&self) -> Duration {
        self.silent_until.saturating_duration_since(Instant::now())
    }

    fn wait(&mut self, bytes: u64) -> Option<Duration> {
        let now = Instant::now();
        let wait = self.next.saturating_duration_since(now);
        if wait > self.queue {
            return None;
        }
        let cost = (1.0 / self.requests).max(bytes as f64 / self.bytes);
        self.next = self.next.max(now) + Duration::from_secs_f64(cost);
        Some(wait)
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    passed: u64,
    refused: u64,
}

impl Seen {
    fn since(self, then: Self) -> Self {
        Self {
            passed: self.passed - then.passed,
            refused: self.refused - then.refused,
        }
    }

    /// Passed requests as a share of `cap` a second in `time`.
    fn used(self, cap: f64, time: Duration) -> f64 {
        self.passed as f64 / (cap * time.as_secs_f64())
    }

    fn refused(self) -> f64 {
        self.refused as f64 / (self.passed + self.refused).max(1) as f64
    }
}

/// One volume under load.
struct Load {
    passed: Arc<AtomicU64>,
    pace: Arc<Pace>,
    /// Callers; they end with this.
    _callers: JoinSet<()>,
}

impl Load {
    /// `depth` callers with requests of `bytes`, to a store of 5 ms.
    fn start(
        pace: &AccountPace,
        buckets: &[&Arc<Mutex<Bucket>>],
        depth: usize,
        bytes: u64,
    ) -> Self {
        Self::of(Arc::new(pace.join()), buckets, depth, bytes)
    }

    /// The same, of a volume that is there already.
    fn of(pace: Arc<Pace>, buckets: &[&Arc<Mutex<Bucket>>], depth: usize, bytes: u64) -> Self {
        let passed = Arc::new(AtomicU64::new(0));
        let mut callers = JoinSet::new();
        let progress = Arc::new(Progress::default());
        for _ in 0..depth {
            let buckets: Vec<_> = buckets.iter().map(|b| Arc::clone(b)).collect();
            let (pace, progress, passed) = (pace.clone(), progress.clone(), passed.clone());
            callers.spawn(call(pace, progress, buckets, bytes, passed));
        }
        Self {
            passed,
            pace,
            _callers: callers,
        }
    }

    fn seen(&self) -> Seen {
        Seen {
            passed: self.passed.load(Ordering::Relaxed),
            refused: self.pace.refused(),
        }
    }

    async fn run(&self, time: Duration) -> Seen {
        let then = self.seen();
        tokio::time::sleep(time).await;
        self.seen().since(then)
    }
}

async fn call(
    pace: Arc<Pace>,
    progress: Arc<Progress>,
    buckets: Vec<Arc<Mutex<Bucket>>>,
    bytes: u64,
    passed: Arc<AtomicU64>,
) {
    loop {
        let (mut again, mut backoff) = (false, Backoff::new(20 * MS, Duration::from_secs(5)));
        let under_way = progress.begin();
        loop {
            let permit = pace.permit_for(bytes, again).await;
            tokio::time::sleep(2 * MS).await;
            let attempt = attempt(&buckets, bytes).await;
            permit.settle(&attempt);
            match attempt {
                Ok(()) => break,
                Err(error) if error.status() == Some(503) && !again => {}
                Err(_) => progress.pause(backoff.pause(None)).await,
            }
            again = true;
        }
        under_way.done();
        passed.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the store makes of one request.
async fn attempt(buckets: &[Arc<Mutex<Bucket>>], bytes: u64) -> Attempt<()> {
    let silence = |bucket: &Arc<Mutex<Bucket>>| bucket.lock().expect("lock").silence();
    let silence = buckets.iter().map(silence).max().unwrap_or_default();
    tokio::time::sleep(silence.min(DEADLINE)).await;
    if silence > DEADLINE {
        return Err(failed(Failure::Deadline { written: true }));
    }
    let waits: Vec<_> = buckets
        .iter()
        .map(|bucket| bucket.lock().expect("lock").wait(bytes))
        .collect();
    let longest = |longest: Duration, wait: Option<Duration>| Some(longest.max(wait?));
    match waits.into_iter().try_fold(Duration::ZERO, longest) {
        Some(wait) => {
            tokio::time::sleep(wait + 3 * MS).await;
            Ok(())
        }
        None => Err(busy()),
    }
}

fn bucket(requests: f64, bytes: f64, queue: Duration) -> Arc<Mutex<Bucket>> {
    Arc::new(Mutex::new(Bucket::new(requests, bytes, queue)))
}

const NONE: f64 = 1e12;
const SECOND: Duration = Duration::from_secs(1);

/// Share of the cap used and of requests refused within a minute, the first
/// second apart.
async fn minute(
    pace: &AccountPace,
    (requests, bandwidth): (f64, f64),
    bytes: u64,
    queue: Duration,
    depth: usize,
) -> (f64, f64) {
    let store = bucket(requests, bandwidth, queue);
    let load = Load::start(pace, &[&store], depth, bytes);
    let first = load.run(SECOND).await;
    let seen = load.run(60 * SECOND).await;
    let cap = requests.min(bandwidth / bytes as f64);
    let (used, refused) = (seen.used(cap, 60 * SECOND), seen.refused());
    println!(
        "{cap:.0}/s, queue {queue:?}, depth {depth}: used {:.2} %, refused {:.3} %; first second {:.1} %, {}",
        100.0 * used,
        100.0 * refused,
        100.0 * first.used(cap, SECOND),
        first.refused
    );
    (used, refused)
}

const CASES: [(f64, f64, u64, Duration); 8] = [
    (500.0, NONE, 4096, Duration::from_millis(100)),
    (2300.0, NONE, 4096, Duration::from_millis(100)),
    (120.0, NONE, 4096, Duration::from_millis(100)),
    (7500.0, NONE, 4096, Duration::from_millis(30)),
    (2300.0, NONE, 4096, Duration::from_millis(20)),
    (NONE, 60.0 * MIB as f64, MIB, Duration::from_millis(100)),
    (NONE, 150e6, MIB / 4, Duration::from_millis(100)),
    (
        500.0,
        60.0 * MIB as f64,
        MIB / 8,
        Duration::from_millis(100),
    ),
];

#[tokio::test(start_paused = true)]
async fn at_each_cap_nearly_all_of_it_is_used_and_little_refused() {
    for (requests, bandwidth, bytes, queue) in CASES {
        for depth in [64, 256] {
            let pace = AccountPace::default();
            let (used, refused) = minute(&pace, (requests, bandwidth), bytes, queue, depth).await;
            assert!(used >= 0.985, "used {used}");
            assert!(refused <= 0.01, "refused {refused}");
        }
    }
}

/// What was learned from requests of one size is no measure for those of
/// another, nor is what was let through while nobody asked for more.
#[tokio::test(start_paused = true)]
async fn a_volume_that_changes_its_load_uses_its_cap_at_once() {
    let (requests, bandwidth) = (500.0, 60.0 * MIB as f64);
    let store = bucket(requests, bandwidth, 100 * MS);
    let pace = Arc::new(AccountPace::default().join());
    for round in 0..4 {
        for (depth, bytes) in [(8, MIB / 2), (64, 4096), (2, 4 * MIB)] {
            let load = Load::of(Arc::clone(&pace), &[&store], depth, bytes);
            let cap = requests.min(bandwidth / bytes as f64);
            let first = load.run(2 * SECOND).await.used(cap, 2 * SECOND);
            let then = load.run(14 * SECOND).await.used(cap, 14 * SECOND);
            println!("round {round}, {bytes} bytes: used {first:.2}, then {then:.2}");
            assert!(first > 0.65, "used {first}");
            assert!(then > 0.96, "used {then}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn switched_off_it_is_refused_far_more() {
    for (requests, bandwidth, bytes, queue) in CASES {
        // What fits into the store's own queue is not refused.
        if requests.min(bandwidth / bytes as f64) * queue.as_secs_f64() > 150.0 {
            continue;
        }
        let pace = AccountPace::off();
        let (_, refused) = minute(&pace, (requests, bandwidth), bytes, queue, 256).await;
        assert!(refused > 0.1, "refused {refused}");
    }
}

/// What `depth` callers get of a store without caps.
async fn free(depth: usize) -> f64 {
    let store = bucket(NONE, NONE, 100 * MS);
    let load = Load::start(&AccountPace::off(), &[&store], depth, 4096);
    load.run(SECOND).await;
    load.run(10 * SECOND).await.passed as f64 / 10.0
}

#[tokio::test(start_paused = true)]
async fn a_store_that_never_throttles_is_never_held_back() {
    let free = free(256).await;
    let store = bucket(NONE, NONE, 100 * MS);
    let pace = AccountPace::default();
    let load = Load::start(&pace, &[&store], 256, 4096);
    load.run(SECOND).await;
    let seen = load.run(10 * SECOND).await;
    assert!(seen.used(free, 10 * SECOND) > 0.999, "{seen:?} of {free}");
    assert_eq!((seen.refused, load.pace.throttled()), (0, None));
}

#[tokio::test(start_paused = true)]
async fn a_cap_that_rises_or_falls_is_followed_and_one_that_goes_forgotten() {
    let store = bucket(500.0, NONE, 100 * MS);
    let pace = AccountPace::default();
    let load = Load::start(&pace, &[&store], 256, 4096);
    load.run(20 * SECOND).await;
    let set = |requests| store.lock().expect("lock").requests = requests;
    set(2300.0);
    load.run(25 * SECOND).await;
    let seen = load.run(30 * SECOND).await;
    assert!(seen.used(2300.0, 30 * SECOND) > 0.97, "risen: {seen:?}");
    set(500.0);
    let seen = load.run(SECOND).await;
    assert!(seen.refused < 2000, "fallen: {seen:?}");
    let seen = load.run(30 * SECOND).await;
    assert!(seen.used(500.0, 30 * SECOND) > 0.97, "fallen: {seen:?}");
    assert!(seen.refused() < 0.01, "fallen: {seen:?}");
    set(NONE);
    load.run(25 * SECOND).await;
    let seen = load.run(10 * SECOND).await;
    let free = free(256).await;
    assert!(seen.used(free, 10 * SECOND) > 0.97, "gone: {seen:?}");
    load.run(60 * SECOND).await;
    assert_eq!(load.pace.throttled(), None);
}

/// An outage of `time` at full load, however the store spends it: the rate of
/// before is back within five seconds.
async fn an_outage(cap: f64, depth: usize, time: Duration, begin: impl Fn(&mut Bucket)) {
    let store = bucket(cap, NONE, 100 * MS);
    let pace = AccountPace::default();
    let load = Load::start(&pace, &[&store], depth, 4096);
    load.run(10 * SECOND).await;
    let before = load.run(5 * SECOND).await;
    begin(&mut store.lock().expect("lock"));
    let out = load.run(time).await;
    assert!(out.refused <= 100 * time.as_secs(), "{out:?}");
    let healing = load.run(5 * SECOND).await;
    let after = load.run(5 * SECOND).await;
    let ratio = |seen: Seen| seen.passed as f64 / before.passed as f64;
    println!(
        "cap {cap:.0}, depth {depth}, outage {time:?}: {} refused; of the rate before {:.2} in the \
         first 5 s, then {:.2}",
        out.refused,
        ratio(healing),
        ratio(after)
    );
    assert!(ratio(after) >= 0.9, "{before:?}, then {after:?}");
}

#[tokio::test(start_paused = true)]
async fn after_an_outage_the_rate_is_back_within_seconds() {
    for time in [20 * SECOND, 600 * SECOND] {
        for (cap, depth) in [(NONE, 1), (NONE, 64), (NONE, 256), (500.0, 256)] {
            // Every request is refused.
            an_outage(cap, depth, time, |store| store.next += time).await;
            // None is answered.
            an_outage(cap, depth, time, |store| {
                store.silent_until = Instant::now() + time;
            })
            .await;
        }
    }
}

/// A single caller pauses between its attempts and waits for no limit: the rate
/// from before is known all the same however long it is refused.
#[tokio::test(start_paused = true)]
async fn a_single_callers_rate_is_back_with_the_first_request_let_through() {
    for time in [5 * SECOND, 40 * SECOND, 600 * SECOND] {
        let store = bucket(NONE, NONE, 100 * MS);
        let load = Load::start(&AccountPace::default(), &[&store], 1, 4096);
        let before = load.run(10 * SECOND).await.passed / 10;
        store.lock().expect("lock").next += time;
        load.run(time).await;
        while load.run(100 * MS).await.passed == 0 {}
        let after = load.run(SECOND).await.passed;
        println!("outage {time:?}: {before}/s, then {after}/s");
        assert!(after * 10 >= before * 9, "{before}/s, then {after}/s");
    }
}

#[tokio::test(start_paused = true)]
async fn an_accounts_limit_is_shared_fairly() {
    let account = bucket(1000.0, NONE, 100 * MS);
    let pace = AccountPace::default();
    let loads = [64, 64, 200].map(|depth| Load::start(&pace, &[&account], depth, 4096));
    tokio::time::sleep(10 * SECOND).await;
    let then = loads.each_ref().map(Load::seen);
    tokio::time::sleep(30 * SECOND).await;
    let mut passed = 0.0;
    for (load, then) in loads.iter().zip(then) {
        let seen = load.seen().since(then);
        let used = seen.used(1000.0, 30 * SECOND);
        println!("used {used}, refused {}", seen.refused());
        assert!((used - 1.0 / 3.0).abs() < 0.03, "{used}");
        assert!(seen.refused() < 0.01, "{seen:?}");
        passed += used;
    }
    assert!(passed > 0.98, "{passed}");
}

#[tokio::test(start_paused = true)]
async fn a_greedy_volume_does_not_starve_a_modest_one() {
    let account = bucket(1000.0, NONE, 100 * MS);
    let pace = AccountPace::default();
    let modest = Load::start(&pace, &[&account], 1, 4096);
    let alone = modest.run(5 * SECOND).await;
    let _greedy = Load::start(&pace, &[&account], 200, 4096);
    modest.run(10 * SECOND).await;
    let beside = modest.run(30 * SECOND).await;
    let kept = beside.used(1.0, 30 * SECOND) / alone.used(1.0, 5 * SECOND);
    println!("keeps {kept:.2} of its speed");
    // What the store lets wait is nobody's to share out.
    assert!(kept > 0.1, "{kept}");
}

#[tokio::test(start_paused = true)]
async fn volumes_at_caps_of_their_own_do_not_hold_each_other_back() {
    let (slow, fast) = (
        bucket(500.0, NONE, 100 * MS),
        bucket(2300.0, NONE, 100 * MS),
    );
    let pace = AccountPace::default();
    let loads = [(&slow, 500.0), (&fast, 2300.0)]
        .map(|(store, cap)| (Load::start(&pace, &[store], 256, 4096), cap));
    tokio::time::sleep(20 * SECOND).await;
    for (load, cap) in &loads {
        let seen = load.run(30 * SECOND).await;
        println!(
            "{cap}: used {}, refused {}",
            seen.used(*cap, 30 * SECOND),
            seen.refused()
        );
        assert!(seen.used(*cap, 30 * SECOND) > 0.97, "{cap}: {seen:?}");
        assert!(seen.refused() < 0.01, "{cap}: {seen:?}");
    }
}

fn busy() -> StorageError {
    failed(Failure::Status {
        status: 503,
        code: "ServerBusy".into(),
    })
}

fn failed(failure: Failure) -> StorageError {
    let address = BlobAddress::new("acct", "dysks", "vol1");
    StorageError::new("put page 0+4096", &address, failure)
}

#[tokio::test(start_paused = true)]
async fn refused_ones_go_first_then_in_order_and_who_gives_up_leaves() {
    let pace = Arc::new(AccountPace::default().join());
    let refused = pace.at_once(4096).expect("nothing was refused yet");
    refused.settle::<()>(&Err(busy()));
    assert!(pace.at_once(4096).is_none(), "from now on they queue");
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut callers = Vec::new();
    for (name, again) in [
        ("first", false),
        ("gone", false),
        ("second", false),
        ("again", true),
    ] {
        let (pace, order) = (Arc::clone(&pace), Arc::clone(&order));
        callers.push(tokio::spawn(async move {
            let permit = pace.permit_for(4096, again).await;
            order.lock().expect("lock").push(name);
            permit.settle(&Ok(()));
        }));
        tokio::task::yield_now().await;
    }
    assert_eq!(pace.throttled().map(|throttled| throttled.waiting), Some(4));
    callers[1].abort();
    tokio::time::sleep(10 * SECOND).await;
    assert_eq!(*order.lock().expect("lock"), ["again", "first", "second"]);
    assert_eq!(pace.shared.under_way.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn silence_that_is_asked_for_is_kept() {
    let pace = AccountPace::default().join();
    let asked = Instant::now();
    let error = StorageError {
        retry_after: Some(3 * SECOND),
        ..busy()
    };
    pace.at_once(512)
        .expect("not throttled")
        .settle::<()>(&Err(error));
    drop(pace.permit_for(512, true).await);
    assert!(asked.elapsed() >= 3 * SECOND);
}
