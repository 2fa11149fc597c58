//! The targets of docs/performance.md, each as a ratio inside one run:
//! `cargo bench --bench targets`. One emulator a latency is the store of
//! everybody; a raw client against the same store is the ceiling, `nbdkit
//! memory`, `nbdkit null` and `qemu-nbd` run in the same rounds.
//!
//! Prints a table; writes `target/bench/targets.json` and `targets.svg`. It
//! asserts nothing about time. DYSK_BENCH_ROUNDS and DYSK_BENCH_SECONDS make it
//! longer.

#[path = "support/chart.rs"]
mod chart;
#[path = "support/processes.rs"]
mod processes;
#[path = "support/raw.rs"]
mod raw;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use processes::{Measured, Servers};
use serde_json::{Value, json};

/// A job as fio and the raw client know it.
#[derive(Clone, Copy, Debug)]
struct Load {
    rw: &'static str,
    block: u64,
    depth: u32,
}

const fn load(rw: &'static str, block: u64, depth: u32) -> Load {
    Load { rw, block, depth }
}

/// What a figure is held against.
#[derive(Clone, Copy, Debug)]
enum Against {
    /// Another one of the same round.
    Peer(Who),
    /// The mean latency of the same load in the raw client, in milliseconds
    /// above it; less is better.
    Above,
    /// Depth / latency.
    Ideal,
    /// Microseconds of CPU time for each request; less is better.
    Cpu,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Who {
    Raw,
    /// `dyskctl serve` of a volume that is filled.
    Dysk,
    /// The same with `--caching read-write`.
    Cached,
    /// Of a volume nobody wrote to.
    Empty,
    Memory,
    Null,
    Qemu,
}

const NAMES: [(Who, &str); 7] = [
    (Who::Raw, "raw client"),
    (Who::Dysk, "dysk"),
    (Who::Cached, "dysk read-write"),
    (Who::Empty, "dysk, never written"),
    (Who::Memory, "nbdkit memory"),
    (Who::Null, "nbdkit null"),
    (Who::Qemu, "qemu-nbd"),
];

fn name(who: Who) -> &'static str {
    let found = NAMES.iter().find(|(one, _)| *one == who);
    found.map_or("?", |(_, name)| name)
}

/// One row of the table.
struct Target {
    what: &'static str,
    slow: bool,
    load: Load,
    who: Who,
    against: Against,
    /// At least this, or at most.
    target: f64,
}

const SLOW: f64 = 5.0;

const TARGETS: [Target; 17] = [
    row(
        "4k read, depth 1, 5 ms",
        true,
        load("randread", 4096, 1),
        Who::Dysk,
        Against::Above,
        0.15,
    ),
    row(
        "4k write, depth 1, 5 ms",
        true,
        load("randwrite", 4096, 1),
        Who::Dysk,
        Against::Above,
        0.15,
    ),
    row(
        "4k read, depth 32, 5 ms",
        true,
        load("randread", 4096, 32),
        Who::Dysk,
        Against::Ideal,
        0.97,
    ),
    row(
        "4k write, depth 32, 5 ms",
        true,
        load("randwrite", 4096, 32),
        Who::Dysk,
        Against::Ideal,
        0.97,
    ),
    row(
        "4k read, depth 64, 5 ms",
        true,
        load("randread", 4096, 64),
        Who::Dysk,
        Against::Ideal,
        0.97,
    ),
    row(
        "4k write, depth 64, 5 ms",
        true,
        load("randwrite", 4096, 64),
        Who::Dysk,
        Against::Ideal,
        0.97,
    ),
    row(
        "4k read, depth 32, 0 ms",
        false,
        load("randread", 4096, 32),
        Who::Dysk,
        Against::Peer(Who::Raw),
        0.55,
    ),
    row(
        "4k write, depth 32, 0 ms",
        false,
        load("randwrite", 4096, 32),
        Who::Dysk,
        Against::Peer(Who::Raw),
        0.55,
    ),
    row(
        "1m read, depth 4, 0 ms",
        false,
        load("read", 1 << 20, 4),
        Who::Dysk,
        Against::Peer(Who::Raw),
        0.60,
    ),
    row(
        "1m write, depth 4, 0 ms",
        false,
        load("write", 1 << 20, 4),
        Who::Dysk,
        Against::Peer(Who::Raw),
        0.60,
    ),
    row(
        "cpu per 4k read",
        false,
        load("randread", 4096, 32),
        Who::Dysk,
        Against::Cpu,
        20.0,
    ),
    row(
        "cpu per 4k write",
        false,
        load("randwrite", 4096, 32),
        Who::Dysk,
        Against::Cpu,
        20.0,
    ),
    row(
        "cached 4k write, depth 1",
        false,
        load("randwrite", 4096, 1),
        Who::Cached,
        Against::Peer(Who::Memory),
        0.90,
    ),
    row(
        "cached 4k write, depth 32",
        false,
        load("randwrite", 4096, 32),
        Who::Cached,
        Against::Peer(Who::Memory),
        0.90,
    ),
    row(
        "cached 4k read, depth 32",
        false,
        load("randread", 4096, 32),
        Who::Cached,
        Against::Peer(Who::Memory),
        0.90,
    ),
    row(
        "never-written 4k read, depth 32",
        false,
        load("randread", 4096, 32),
        Who::Empty,
        Against::Peer(Who::Memory),
        0.90,
    ),
    row(
        "never-written 128k read, depth 8",
        false,
        load("randread", 128 << 10, 8),
        Who::Empty,
        Against::Peer(Who::Memory),
        0.90,
    ),
];

const fn row(
    what: &'static str,
    slow: bool,
    load: Load,
    who: Who,
    against: Against,
    target: f64,
) -> Target {
    Target {
        what,
        slow,
        load,
        who,
        against,
        target,
    }
}

/// What has to run in a round: each once, though several rows may ask for it.
fn runs() -> Vec<(bool, Who, Load)> {
    let mut runs: Vec<(bool, Who, Load)> = Vec::new();
    let mut add = |run: (bool, Who, Load)| {
        let same = |one: &(bool, Who, Load)| {
            (one.0, one.1, one.2.rw, one.2.block, one.2.depth)
                == (run.0, run.1, run.2.rw, run.2.block, run.2.depth)
        };
        if !runs.iter().any(same) {
            runs.push(run);
        }
    };
    for target in &TARGETS {
        add((target.slow, target.who, target.load));
        add((target.slow, Who::Raw, target.load));
        if !target.slow {
            for peer in [Who::Memory, Who::Null, Who::Qemu] {
                add((false, peer, target.load));
            }
        }
    }
    runs
}

fn setting(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().expect("a number"))
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, raw, address, rw, block, depth, seconds] = arguments.as_slice()
        && raw == "raw"
    {
        return raw_client(address, rw, block, depth, seconds);
    }
    let seconds = setting("DYSK_BENCH_SECONDS", 3);
    let rounds = setting("DYSK_BENCH_ROUNDS", 3);
    let folder = tempfile::tempdir().expect("a folder for the sockets");
    let slow = Servers::start(&folder.path().join("slow"), SLOW);
    let fast = Servers::start(&folder.path().join("fast"), 0.0);
    let runs = runs();
    let mut figures: Vec<Vec<Measured>> = vec![Vec::new(); runs.len()];
    for round in 0..rounds {
        for (at, (is_slow, who, load)) in runs.iter().enumerate() {
            eprint!(
                "\r\x1b[Kround {} of {rounds}: {} {} {}k depth {}",
                round + 1,
                name(*who),
                load.rw,
                load.block >> 10,
                load.depth
            );
            let servers = if *is_slow { &slow } else { &fast };
            figures[at].push(servers.measure(*who, *load, seconds));
        }
    }
    eprint!("\r\x1b[K");
    let requests = fast.requests_of_never_written_reads();
    report(&runs, &figures, requests, (rounds, seconds));
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn report(
    runs: &[(bool, Who, Load)],
    figures: &[Vec<Measured>],
    requests: u64,
    (rounds, seconds): (u64, u64),
) {
    let of = |slow: bool, who: Who, load: Load| {
        let at = runs.iter().position(|run| {
            (run.0, run.1, run.2.rw, run.2.block, run.2.depth)
                == (slow, who, load.rw, load.block, load.depth)
        });
        &figures[at.expect("it ran")]
    };
    println!("{rounds} interleaved rounds of {seconds} s, 2 threads of tokio each side, medians\n");
    println!(
        "{:<34} {:>10} {:>8} {:>8} {:>8}   {:>10}  ",
        "", "median", "least", "most", "target", "absolute"
    );
    let mut rows = Vec::new();
    for target in &TARGETS {
        let mine = of(target.slow, target.who, target.load);
        let raw = of(target.slow, Who::Raw, target.load);
        let ratios = sorted(
            mine.iter()
                .enumerate()
                .map(|(round, one)| match target.against {
                    Against::Peer(peer) => {
                        one.iops / of(target.slow, peer, target.load)[round].iops
                    }
                    Against::Above => one.mean_ms - raw[round].mean_ms,
                    Against::Ideal => one.iops / (f64::from(target.load.depth) / SLOW * 1e3),
                    Against::Cpu => one.cpu_us,
                }),
        );
        let (unit, less) = match target.against {
            Against::Above => ("ms", true),
            Against::Cpu => ("us", true),
            _ => ("", false),
        };
        let median = ratios[ratios.len() / 2];
        let met = if less {
            median <= target.target
        } else {
            median >= target.target
        };
        let absolute = sorted(mine.iter().map(|one| one.iops));
        let absolute = absolute[absolute.len() / 2];
        println!(
            "{:<34} {:>8.2}{:<2} {:>8.2} {:>8.2} {:>7}{:.2}   {:>7.0}/s  {}",
            target.what,
            median,
            unit,
            ratios[0],
            ratios[ratios.len() - 1],
            if less { "<= " } else { ">= " },
            target.target,
            absolute,
            if met { "met" } else { "MISSED" }
        );
        rows.push(json!({
            "what": target.what, "median": median, "least": ratios[0],
            "most": ratios[ratios.len() - 1], "target": target.target, "unit": unit,
            "lessIsBetter": less, "met": met, "iops": absolute,
        }));
    }
    println!("\nstore requests for all never-written reads: {requests}\n");
    println!(
        "{:<34} {:>10} {:>10} {:>10} {:>8} {:>8} {:>8}",
        "IOPS", "least", "median", "most", "cpu us", "store us", "fio us"
    );
    let mut loads = Vec::new();
    for ((slow, who, load), measured) in runs.iter().zip(figures) {
        let iops = sorted(measured.iter().map(|one| one.iops));
        let middle = |of: fn(&Measured) -> f64| {
            let values = sorted(measured.iter().map(of));
            values[values.len() / 2]
        };
        let what = format!(
            "{} {} {}k x{} {}",
            name(*who),
            load.rw,
            load.block >> 10,
            load.depth,
            if *slow { "5 ms" } else { "0 ms" }
        );
        let cpus = [
            middle(|one| one.cpu_us),
            middle(|one| one.store_us),
            middle(|one| one.fio_us),
        ];
        println!(
            "{what:<34} {:>10.0} {:>10.0} {:>10.0} {:>8.1} {:>8.1} {:>8.1}",
            iops[0],
            iops[iops.len() / 2],
            iops[iops.len() - 1],
            cpus[0],
            cpus[1],
            cpus[2]
        );
        loads.push(json!({
            "who": name(*who), "rw": load.rw, "block": load.block, "depth": load.depth,
            "storeLatencyMs": if *slow { SLOW } else { 0.0 }, "iops": iops,
            "cpuMicroseconds": cpus[0], "storeMicroseconds": cpus[1], "fioMicroseconds": cpus[2],
        }));
    }
    let report = json!({
        "rounds": rounds, "seconds": seconds, "targets": rows, "loads": loads,
        "neverWrittenStoreRequests": requests,
    });
    write(&report);
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
