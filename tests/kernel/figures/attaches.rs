//! Attaches, one after the other and a hundred at once.

use super::{Counts, boot};
use crate::support::guest::Guest;
use crate::support::lane;
use crate::support::outside_store::OutsideStore;
use serde_json::Value;

const LOAD: &str = "python3 $DYSK_REPO/tests/kernel/guest/attaches.py";
const TIMES: usize = 40;
const AT_ONCE: usize = 100;
const SIZE: u64 = 1 << 30;
/// Get Blob Properties, Acquire Lease, the raise with the last page beside it;
/// Release Lease ends it. And room for what looks at the disk's allocation.
const REQUESTS: f64 = 7.0;

/// Milliseconds until each of `calls` came to `stage`, shortest first. A stage
/// that is over at once may not be told.
fn times(calls: &Value, stage: &str) -> Vec<f64> {
    let calls = calls.as_array().expect("calls");
    let told = calls.iter().filter_map(|call| call[stage].as_f64());
    let mut times: Vec<f64> = told.collect();
    times.sort_by(f64::total_cmp);
    times
}

fn percentile(times: &[f64], percent: usize) -> f64 {
    times[(times.len() * percent).div_ceil(100) - 1]
}

fn spread(times: &[f64]) -> String {
    let [median, p95] = [50, 95].map(|percent| percentile(times, percent));
    format!("median {median:.0} ms, p95 {p95:.0} ms")
}

/// Runs a load that prints JSON; `variables` are set for it.
fn load(guest: &Guest, variables: &str, arguments: &str) -> Value {
    let printed = guest.run(&format!("export endpoint; {variables} {LOAD} {arguments}"));
    serde_json::from_str(&printed).expect("JSON")
}

/// Milliseconds of each of the kernel's connect calls since the log was
/// `seen` bytes long. It carries them out one at a time.
fn calls_since(guest: &Guest, seen: usize) -> Vec<f64> {
    let log = guest.daemon_log();
    let lines = log[seen..]
        .lines()
        .filter(|line| line.contains("connect answered"));
    let mut times: Vec<f64> = lines
        .filter_map(|line| line.split_once("microseconds=")?.1.parse().ok())
        .map(|microseconds: f64| microseconds / 1e3)
        .collect();
    times.sort_by(f64::total_cmp);
    times
}

/// Attaches all of `blobs` at once, and detaches them; answers with the
/// milliseconds until all were attached.
fn at_once(guest: &Guest, variables: &str, what: &str, blobs: &[String]) -> f64 {
    let seen = guest.daemon_log().len();
    let all = load(guest, variables, &format!("at-once {}", blobs.join(" ")));
    let took = |what: &str| all[what]["took"].as_f64().expect("a time");
    let calls = &all["attaches"]["calls"];
    let connects = calls_since(guest, seen);
    assert_eq!(connects.len(), blobs.len(), "connect calls");
    let kernel: f64 = connects.iter().sum();
    let attached = took("attaches");
    println!(
        "figure: {} at once, {what}: {attached:.0} ms, {:.0} % of it in the kernel's connect \
         calls, one at a time, {} each; volumes open after {:.0} to {:.0} ms; an attach: {}; \
         detached in {:.0} ms; {}",
        blobs.len(),
        kernel / attached * 100.0,
        spread(&connects),
        times(calls, "connecting")[0],
        percentile(&times(calls, "connecting"), 100),
        spread(&times(calls, "end")),
        took("detaches"),
        lane::load()
    );
    attached
}

fn hundred_by_command(guest: &Guest, blobs: &[String]) {
    let printed = guest.run(&format!(
        "export endpoint; from=$EPOCHREALTIME; pids=(); \
         for blob in {}; do attach $blob >/dev/null & pids+=($!); done; \
         for pid in ${{pids[@]}}; do wait $pid; done; \
         awk -v a=$from -v b=$EPOCHREALTIME 'BEGIN {{ print (b - a) * 1000 }}'",
        blobs.join(" ")
    ));
    let all: f64 = printed.parse().expect("milliseconds");
    println!(
        "figure: {} at once by as many dyskctl: {all:.0} ms; {}",
        blobs.len(),
        lane::load()
    );
}

fn attaches(kernel: &str) {
    let _timed = lane::timed(format!("attaches on {kernel}"));
    println!("figure: attaches on {kernel}");
    let store = OutsideStore::start(&[]);
    let blobs: Vec<String> = (1..=AT_ONCE)
        .map(|number| format!("{number}.vhd"))
        .collect();
    for blob in &blobs {
        store.create(blob, SIZE);
    }
    let guest = boot(kernel, &store);

    // The kernel makes the devices for the first, the others find them.
    at_once(&guest, "", "new devices", &blobs);
    let again = at_once(&guest, "", "devices there already", &blobs);
    at_once(&guest, "connections=2", "two connections each", &blobs);

    let (before, seen) = (Counts::of(&store), guest.daemon_log().len());
    let one = load(&guest, "", &format!("one-by-one {} {TIMES}", blobs[0]));
    let each = Counts::of(&store).since(&before).requests() as f64 / TIMES as f64;
    let single = times(&one["attaches"], "end");
    println!(
        "figure: {TIMES} one by one: {}, volume open: {}, the kernel's call: {}; detaches: {}; \
         {each:.2} requests for both; {}",
        spread(&single),
        spread(&times(&one["attaches"], "connecting")),
        spread(&calls_since(&guest, seen)),
        spread(&times(&one["detaches"], "end")),
        lane::load()
    );
    assert!(each <= REQUESTS, "{each} requests for both");
    // As they would take one after the other.
    let alone = percentile(&single, 50) * AT_ONCE as f64;
    assert!(
        again < alone,
        "{again:.0} ms at once, {alone:.0} one by one"
    );

    hundred_by_command(&guest, &blobs);
    let devices = guest.run("dyskctl list -o json | grep -o '/dev/nbd[0-9]*' | sort -u | wc -l");
    assert_eq!(devices, AT_ONCE.to_string(), "devices of their own");
    guest.no_kernel_errors();
}

#[test]
#[ignore = "long; part of make soak"]
fn a_hundred_disks_are_attached_at_once_on_6_1() {
    attaches("6.1");
}

#[test]
#[ignore = "long; part of make soak"]
fn a_hundred_disks_are_attached_at_once_on_6_12() {
    attaches("6.12");
}
