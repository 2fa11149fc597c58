//! The targets of docs/performance.md, each as a ratio inside one run:
//! `cargo bench --bench targets`. An emulator of each kind is the store of
//! everybody; a raw client against the same store is the ceiling, `nbdkit
//! memory`, `nbdkit null` and `qemu-nbd` run in the same rounds, and at 5 ms
//! `nbdkit memory` that waits as long and asks no store, and others who ask one.
//!
//! Prints a table; writes `target/bench/targets.json` and `targets.svg`. It
//! asserts nothing about time. DYSK_BENCH_ROUNDS and DYSK_BENCH_SECONDS make it
//! longer, DYSK_BENCH_ONLY takes the rows with that in their name.

#[path = "support/chart.rs"]
mod chart;
#[path = "support/idle.rs"]
mod idle;
#[path = "support/processes.rs"]
mod processes;
#[path = "support/raw.rs"]
mod raw;
#[path = "support/report.rs"]
mod report;
#[path = "support/rows.rs"]
mod rows;
#[path = "support/s3backer.rs"]
mod s3backer;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use processes::Servers;
use rows::{STORES, Who};
use serde_json::{Value, json};

/// Attachments of 8 TiB each in the row about memory, and KiB for each.
const IDLE: u32 = 500;
const IDLE_KIB: f64 = 256.0;
/// Share of a request's CPU time that measuring it may cost.
const METERED: f64 = 0.01;

fn setting(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().expect("a number"))
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.as_slice() {
        [_, raw, address, rw, block, depth, seconds] if raw == "raw" => {
            return raw_client(address, rw, block, depth, seconds);
        }
        [_, idle, address, count] if idle == "idle" => return idle::attach(address, count),
        _ => {}
    }
    let seconds = setting("DYSK_BENCH_SECONDS", 3);
    let rounds = setting("DYSK_BENCH_ROUNDS", 3);
    let only = std::env::var("DYSK_BENCH_ONLY").unwrap_or_default();
    // Staging files are in memory by default; /tmp may be a disk.
    let folder = tempfile::tempdir_in("/dev/shm").expect("a tmpfs");
    let rows = rows::rows(&only);
    let runs = rows::runs(&rows);
    let mut measured = vec![Vec::new(); runs.len()];
    let (mut never_written, mut idle_kib) = (None, None);
    // One store after the other: what is idle takes time too.
    for (number, store) in STORES.iter().enumerate() {
        let here: Vec<usize> = (0..runs.len())
            .filter(|at| runs[*at].store == number)
            .collect();
        let mut who: Vec<Who> = here.iter().map(|at| runs[*at].who).collect();
        who.sort();
        who.dedup();
        if who.is_empty() {
            continue;
        }
        eprint!("\r\x1b[K{}: filling the disks", store.name);
        let servers = Servers::start(&folder.path().join(store.name), store, &who);
        for round in 0..rounds {
            for at in &here {
                let name = runs[*at].name();
                eprint!("\r\x1b[Kround {} of {rounds}: {name}", round + 1);
                measured[*at].push(servers.measure(runs[*at].who, runs[*at].load, seconds));
            }
        }
        if who.contains(&Who::Empty) {
            never_written = Some(servers.requests_of_never_written_reads());
            idle_kib = Some(idle::measure(servers.address(), IDLE));
        }
    }
    eprint!("\r\x1b[K");
    println!("{rounds} interleaved rounds of {seconds} s, medians\n");
    let figures = report::Figures {
        runs: &runs,
        measured: &measured,
    };
    let mut targets = figures.targets(&rows);
    if let Some(kib) = idle_kib {
        let what = format!("memory of {IDLE} idle, each");
        targets.push(report::single(&what, kib, "KiB", IDLE_KIB));
    }
    if let Some(us) = figures.cpu_of(&rows) {
        let what = "metrics: of a request's CPU, %";
        let share = 100.0 * metered_us() / us;
        targets.push(report::single(what, share, "%", 100.0 * METERED));
    }
    if let Some(requests) = never_written {
        let what = "requests for never-written reads";
        targets.push(report::single(what, requests as f64, "", 0.0));
    }
    write(&json!({
        "rounds": rounds, "seconds": seconds, "targets": targets, "loads": figures.loads(),
    }));
}

/// Microseconds that measuring a request takes: once where the kernel asks for
/// it, once where the store is asked. The least of some batches, short enough
/// for one to have a core for itself.
fn metered_us() -> f64 {
    const TIMES: u32 = 20_000;
    let meters = [(); 2].map(|()| dysk::metrics::Meter::default());
    let batch = |_| {
        let begun = Instant::now();
        for _ in 0..TIMES {
            for meter in &meters {
                std::hint::black_box(meter).ended(Instant::now(), 4096, false);
            }
        }
        begun.elapsed().as_secs_f64() * 1e6 / f64::from(TIMES)
    };
    (0..50).map(batch).fold(f64::INFINITY, f64::min)
}

fn write(report: &Value) {
    let out = out();
    std::fs::create_dir_all(&out).expect("target/bench can be made");
    let text = format!("{report:#}\n");
    std::fs::write(out.join("targets.json"), text).expect("the report is written");
    std::fs::write(out.join("targets.svg"), chart::targets(report)).expect("the chart is written");
    println!("\n{}", out.join("targets.json").display());
}

fn out() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("target"),
        PathBuf::from,
    );
    target.join("bench")
}

/// The ceiling, in a process of its own so that its CPU time is its own:
/// prints IOPS and mean latency.
fn raw_client(address: &str, rw: &str, block: &str, depth: &str, seconds: &str) {
    let address: SocketAddr = address.parse().expect("an address");
    let block: u64 = block.parse().expect("bytes");
    let depth: u64 = depth.parse().expect("a depth");
    let seconds: u64 = seconds.parse().expect("seconds");
    let rw = rw.to_owned();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (count, busy) = runtime.block_on(async move {
        let until = Instant::now() + Duration::from_secs(seconds);
        let mut clients = tokio::task::JoinSet::new();
        for number in 0..depth {
            let rw = rw.clone();
            clients.spawn(async move {
                one_raw_client(address, &rw, block, (number, depth), until).await
            });
        }
        let mut sum = (0, Duration::ZERO);
        while let Some(done) = clients.join_next().await {
            let (count, busy) = done.expect("a client ends");
            sum = (sum.0 + count, sum.1 + busy);
        }
        sum
    });
    let mean = busy.as_secs_f64() * 1e3 / f64::from(u32::try_from(count.max(1)).expect("few"));
    println!(
        "{}",
        json!({ "iops": count as f64 / seconds as f64, "meanMs": mean })
    );
}

async fn one_raw_client(
    address: SocketAddr,
    rw: &str,
    block: u64,
    (number, of): (u64, u64),
    until: Instant,
) -> (u64, Duration) {
    let mut connection = raw::Connection::open(address).await;
    let blocks = processes::SIZE / block;
    let data = vec![7; usize::try_from(block).expect("a small block")];
    let (mut count, mut busy) = (0_u64, Duration::ZERO);
    while Instant::now() < until {
        let begun = Instant::now();
        let at = if rw.starts_with("rand") {
            (number + count * of).wrapping_mul(2_654_435_761) % blocks
        } else {
            (number + count * of) % blocks
        } * block;
        let range = format!("bytes={at}-{}", at + block - 1);
        let request = if rw.ends_with("write") {
            let headers = [("x-ms-page-write", "update".into()), ("x-ms-range", range)];
            raw::request("PUT", "dysks/raw.vhd?comp=page", &headers, &data)
        } else {
            raw::request("GET", "dysks/raw.vhd", &[("x-ms-range", range)], &[])
        };
        connection.call(&request).await;
        busy += begun.elapsed();
        count += 1;
    }
    (count, busy)
}
