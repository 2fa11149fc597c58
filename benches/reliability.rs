//! How long I/O stands still when a daemon is replaced or killed, and how long
//! it takes until another node can write when a node dies: on a real kernel
//! with an emulated processor, so every figure is an upper bound.
//!
//! Prints a table, and JSON into `build/bench/reliability.json`. Asserts nothing but
//! that everything goes through.

#[path = "../tests/support/guest.rs"]
mod guest;
#[path = "../tests/support/outside_store.rs"]
mod outside_store;

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use guest::Guest;
use outside_store::OutsideStore;
use serde_json::json;

const REPO: &str = env!("CARGO_MANIFEST_DIR");
const KERNEL: &str = "6.12";

/// Runs a guest script of the lane; answers with those of the figures it prints
/// that speak of `what`.
fn figures(script: &[&str], environment: &[&str], what: &str) -> String {
    let bin = Path::new(env!("CARGO_BIN_EXE_dyskd"))
        .parent()
        .expect("binaries lie in a folder");
    let mut command = Command::new(format!("{REPO}/tests/kernel/run"));
    command.args(["--kernel", KERNEL, "--timeout", "900"]);
    for variable in environment {
        command.args(["--env", variable]);
    }
    let output = command
        .arg("--env")
        .arg(format!("DYSK_BIN={}", bin.display()))
        .arg("--")
        .arg(format!("{REPO}/tests/kernel/guest/{}", script[0]))
        .args(&script[1..])
        .output()
        .expect("tests/kernel/run starts");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{script:?}: {}\n{text}",
        output.status
    );
    let figures: Vec<_> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("figure: "))
        .filter(|figure| figure.contains(what))
        .collect();
    assert!(
        !figures.is_empty(),
        "{script:?} says nothing of {what}: {text}"
    );
    figures.join("; ")
}

/// A node dies while it holds two disks; another one waits for the first and
/// breaks the lease of the second. Seconds until each can be written to.
fn failover() -> (f64, f64) {
    let store = OutsideStore::start(&["--latency", "2ms"]);
    let endpoint = store.endpoint();
    let boot = |name| Guest::boot(name, KERNEL, &[("endpoint", &endpoint)]);
    let (first, second) = (boot("first"), boot("second"));
    first.start_daemon();
    second.start_daemon();
    let write = |name: &str| {
        format!(
            "dd if=/dev/zero of=/dev/dysk/{name} bs=4k count=1 oflag=direct conv=fsync status=none"
        )
    };
    for name in ["waited", "broken"] {
        let attach = format!("attach {name}.vhd --create --size 64MiB");
        first.run(&format!("{attach}; {}", write(name)));
    }
    let dead = Instant::now();
    first.cut();
    let take = |name: &str, how: &str| {
        second.run(&format!("attach {name}.vhd {how}; {}", write(name)));
        dead.elapsed().as_secs_f64()
    };
    let broken = take("broken", "--break-lease");
    (take("waited", "--wait 90s"), broken)
}

fn main() {
    let mut rows: Vec<(&str, String)> = Vec::new();
    for (what, modes) in [
        // The filesystem's mode comes second, and there the time is taken.
        ("planned restart", ["read-write", "none"]),
        ("planned restart, cached", ["none", "read-write"]),
    ] {
        let script = [&["takeover"][..], &modes].concat();
        let gaps = figures(&script, &["DYSK_TAKEOVERS=5"], "at a takeover");
        rows.push((what, gaps));
    }
    for (what, mode) in [
        ("killed under load", "DYSK_CACHING=none"),
        ("killed under load, cached", "DYSK_CACHING=read-write"),
    ] {
        let gap = figures(&["kill"], &["DYSK_KILLS=3", mode], "a burst's end");
        rows.push((what, gap));
    }
    let (waited, broken) = failover();
    rows.push(("failover, waiting for the lease", format!("{waited:.1} s")));
    rows.push(("failover, --break-lease", format!("{broken:.2} s")));
    for (what, figure) in &rows {
        println!("{what:<34} {figure}");
    }
    let json: serde_json::Map<_, _> = rows
        .iter()
        .map(|(what, figure)| ((*what).to_owned(), json!(figure)))
        .collect();
    let folder = Path::new(REPO).join("build/bench");
    std::fs::create_dir_all(&folder).expect("build/bench can be made");
    let text = serde_json::to_string_pretty(&json).expect("JSON");
    std::fs::write(folder.join("reliability.json"), text).expect("the figures are written");
}
