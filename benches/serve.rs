//! `dyskctl serve` against a store of known latency: 4 KiB random reads and
//! writes at depth 32 over one connection, as a share of depth / latency, and
//! `nbdkit memory` in the same rounds as the transport's ceiling.
//!
//! Prints a table, and JSON into `build/bench/serve.json`. Asserts nothing.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const LATENCY_MS: f64 = 5.0;
const DEPTH: u32 = 32;
const ROUNDS: usize = 3;
const KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// A process that ends with the bench.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        if rustix::process::kill_process(pid, rustix::process::Signal::TERM).is_ok() {
            self.0.wait().expect("a child of ours can be waited for");
        }
    }
}

fn emulator() -> (Running, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_dysk-emulator"))
        .args([
            "--listen",
            "127.0.0.1:0",
            "--memory",
            "--latency",
            &format!("{LATENCY_MS}ms"),
        ])
        .stdout(Stdio::piped())
        .spawn()
        .expect("dysk-emulator starts");
    let mut line = String::new();
    let stdout = child.stdout.take().expect("stdout is piped");
    BufReader::new(stdout)
        .read_line(&mut line)
        .expect("the emulator says where it listens");
    let url = line
        .trim()
        .strip_prefix("listening on ")
        .expect("its URL")
        .to_owned();
    (Running(child), url)
}

fn dyskctl(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dyskctl"));
    command.args(args).env("AZURE_STORAGE_KEY", KEY);
    command
}

fn appears(path: &Path) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !path.exists() {
        assert!(
            Instant::now() < deadline,
            "{} did not appear",
            path.display()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// One fio job; answers with its IOPS.
fn fio(socket: &Path, rw: &str) -> f64 {
    let output = Command::new("fio")
        .args([
            "--name=bench",
            "--ioengine=nbd",
            "--bs=4k",
            "--time_based",
            "--runtime=8",
            "--ramp_time=2",
        ])
        .args([
            "--size=256M",
            "--norandommap",
            "--randrepeat=0",
            "--output-format=json",
        ])
        .arg(format!("--iodepth={DEPTH}"))
        .arg(format!("--rw={rw}"))
        .arg(format!("--uri=nbd+unix:///?socket={}", socket.display()))
        .output()
        .expect("fio runs (Debian package fio)");
    assert!(
        output.status.success(),
        "fio: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    // The engine may say a word of its own before the report.
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.find('{').map_or("", |at| &text[at..]);
    let report: Value = serde_json::from_str(json)
        .unwrap_or_else(|error| panic!("fio prints no JSON: {error}: {text}"));
    let side = if rw == "randread" { "read" } else { "write" };
    report["jobs"][0][side]["iops"]
        .as_f64()
        .expect("fio reports IOPS")
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn main() {
    let folder = tempfile::tempdir().expect("a folder for the sockets");
    let (_store, endpoint) = emulator();
    let created = dyskctl(&[
        "create",
        "devstoreaccount1/dysks/bench.vhd",
        "--size",
        "256MiB",
    ])
    .args(["--endpoint", &endpoint])
    .output()
    .expect("dyskctl starts");
    assert!(
        created.status.success(),
        "{}",
        String::from_utf8_lossy(&created.stderr)
    );
    let served = folder.path().join("dysk.sock");
    let _serve = Running(
        dyskctl(&[
            "serve",
            "devstoreaccount1/dysks/bench.vhd",
            "--endpoint",
            &endpoint,
            "--unix",
        ])
        .arg(&served)
        .spawn()
        .expect("dyskctl starts"),
    );
    let memory = folder.path().join("nbdkit.sock");
    let _nbdkit = Running(
        Command::new("nbdkit")
            .args(["-f", "-U"])
            .arg(&memory)
            .args(["memory", "256M"])
            .spawn()
            .expect("nbdkit starts (Debian package nbdkit)"),
    );
    appears(&served);
    appears(&memory);

    let ideal = f64::from(DEPTH) / LATENCY_MS * 1000.0;
    println!(
        "4 KiB, depth {DEPTH}, one connection, store latency {LATENCY_MS} ms: ideal {ideal:.0} IOPS"
    );
    println!(
        "{:<28} {:>8} {:>8} {:>8} {:>10}",
        "", "min", "median", "max", "of ideal"
    );
    let mut rows = Vec::new();
    let jobs = [("dyskctl serve", &served), ("nbdkit memory", &memory)];
    let mut figures = vec![Vec::new(); jobs.len() * 2];
    for _ in 0..ROUNDS {
        for (at, (_, socket)) in jobs.iter().enumerate() {
            figures[2 * at].push(fio(socket, "randwrite"));
            figures[2 * at + 1].push(fio(socket, "randread"));
        }
    }
    for (at, (name, _)) in jobs.iter().enumerate() {
        for (side, rw) in ["randwrite", "randread"].iter().enumerate() {
            let values = &figures[2 * at + side];
            let middle = median(values);
            let min = values.iter().copied().fold(f64::INFINITY, f64::min);
            let max = values.iter().copied().fold(0.0, f64::max);
            let share = if at == 0 {
                format!("{:.1} %", 100.0 * middle / ideal)
            } else {
                "ceiling".into()
            };
            println!(
                "{:<28} {min:>8.0} {middle:>8.0} {max:>8.0} {share:>10}",
                format!("{name} {rw}")
            );
            rows.push(json!({ "server": name, "rw": rw, "iops": values, "median": middle }));
        }
    }
    let out = Path::new(env!("CARGO_MANIFEST_DIR")).join("build/bench");
    std::fs::create_dir_all(&out).expect("build/bench can be made");
    let report =
        json!({ "latencyMs": LATENCY_MS, "depth": DEPTH, "idealIops": ideal, "rows": rows });
    std::fs::write(out.join("serve.json"), format!("{report:#}\n")).expect("the report is written");
}
