//! A deterministic simulation of the engine: volumes on several nodes, a store
//! in trouble and a clock that obeys, thousands of histories a minute; see
//! `docs/simulation.md`.

mod awake;
mod blob;
mod check;
mod cuts;
mod driver;
mod ending;
mod falls;
mod fate;
mod files;
mod heirs;
mod operation;
mod outcome;
mod plan;
mod register;
mod sabotage;
mod scenarios;
mod session;
mod show;
mod shrink;
mod store;
mod timelines;
mod world;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use outcome::Tally;
use plan::{PROFILES, Plan};

/// Seeds of each profile in the short form.
const HISTORIES: u64 = 1000;
/// A history takes milliseconds; one that takes this long has no end.
const HANGS_AFTER: Duration = Duration::from_secs(120);

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// `DYSK_SIM_HISTORIES` seeds of each profile from `DYSK_SIM_FIRST` on; or the
/// one history that `DYSK_SIM_PROFILE` and `DYSK_SIM_SEED` name.
#[test]
fn no_write_is_lost_comes_back_or_gets_in_from_the_wrong_node() {
    if let Some(seed) = number("DYSK_SIM_SEED") {
        return replay(seed);
    }
    let histories = number("DYSK_SIM_HISTORIES").unwrap_or(HISTORIES);
    let first = number("DYSK_SIM_FIRST").unwrap_or(0);
    let began = Instant::now();
    let (tally, failed) = run_all(first..first + histories);
    if let Some(plan) = failed {
        panic!("{}", shrink::report(&plan, None));
    }
    let took = began.elapsed();
    let count = histories * PROFILES.len() as u64;
    println!(
        "{count} histories from seed {first} in {took:.1?}, {:.0} a minute: {tally:?}",
        count as f64 / took.as_secs_f64() * 60.0
    );
    // A simulation in which nothing happens proves nothing.
    for (what, least) in [
        (tally.requests, 10 * count),
        (tally.unsettled, count / 2),
        (tally.openings, count),
        (tally.fenced, count / 20),
        (tally.troubled, count),
        (tally.late, count / 2),
        (tally.inherited, count / 10),
        (tally.bereft, count / 20),
        (tally.handed_over, count / 50),
        (tally.taken_back, count / 50),
    ] {
        assert!(what >= least, "{tally:?} in {count} histories");
    }
}

fn locked<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().expect("nothing panics with the list locked")
}

/// Runs these seeds of every profile on all cores, until one fails.
fn run_all(seeds: std::ops::Range<u64>) -> (Tally, Option<Plan>) {
    let next = AtomicU64::new(seeds.start);
    let failed: Mutex<Vec<Plan>> = Mutex::new(Vec::new());
    let (done, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let running: Mutex<BTreeSet<(u64, String)>> = Mutex::default();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let tally = thread::scope(|scope| {
        let work = || {
            let mut tally = Tally::default();
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= seeds.end || !locked(&failed).is_empty() {
                    return tally;
                }
                for profile in PROFILES {
                    let plan = Plan::draw(profile, seed);
                    let name = (seed, format!("{profile:?}"));
                    locked(&running).insert(name.clone());
                    if shrink::failure(&plan, None, |outcome| tally.add(outcome.tally)).is_some() {
                        locked(&failed).push(plan);
                    }
                    locked(&running).remove(&name);
                }
                done.fetch_add(1, Ordering::Relaxed);
            }
        };
        let workers: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        scope.spawn(|| watch(&done, &running, &over));
        let tallies = workers
            .into_iter()
            .map(|worker| worker.join().expect("workers catch panics"));
        let mut sum = Tally::default();
        tallies.for_each(|tally| sum.add(tally));
        over.store(true, Ordering::Relaxed);
        sum
    });
    let mut failed = std::mem::take(&mut *locked(&failed));
    failed.sort_by_key(|plan| plan.seed);
    (tally, failed.into_iter().next())
}

/// Ends the process when a history hangs without letting time pass.
fn watch(done: &AtomicU64, running: &Mutex<BTreeSet<(u64, String)>>, over: &AtomicBool) {
    let (mut seen, mut since) = (0, Instant::now());
    while !over.load(Ordering::Relaxed) {
        thread::park_timeout(Duration::from_millis(50));
        let now = done.load(Ordering::Relaxed);
        if now != seen {
            (seen, since) = (now, Instant::now());
        } else if since.elapsed() > HANGS_AFTER {
            for (seed, profile) in &*locked(running) {
                eprintln!("DYSK_SIM_PROFILE={profile} DYSK_SIM_SEED={seed} hangs, perhaps");
            }
            std::process::abort();
        }
    }
}

#[test]
fn one_seed_gives_one_history() {
    for seed in 0..50 {
        for profile in PROFILES {
            let plan = Plan::draw(profile, seed);
            let one = driver::run(&plan, None, true);
            let two = driver::run(&plan, None, true);
            assert!(one.trace.len() > 20, "{:?}", one.trace);
            assert_eq!(one.trace, two.trace, "{profile:?} {seed}");
            assert_eq!(one.events, two.events, "{profile:?} {seed}");
        }
    }
}

/// Replays what a failure named.
fn replay(seed: u64) {
    let name = std::env::var("DYSK_SIM_PROFILE").expect("DYSK_SIM_PROFILE");
    let profile = PROFILES.into_iter().find(|p| format!("{p:?}") == name);
    let plan = Plan::draw(profile.expect("a profile's name"), seed);
    println!("{plan}");
    if shrink::failure(&plan, None, |_| {}).is_some() {
        panic!("{}", shrink::report(&plan, None));
    }
}
