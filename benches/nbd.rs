//! IOPS of the transmission server on a device in memory, beside `nbdkit
//! memory` on the same machine in the same run, as `fio --ioengine=nbd` sees
//! them: `cargo bench --bench nbd [-- SECONDS] [LOAD]...`.

#[path = "../tests/support/memory_disk.rs"]
mod memory_disk;

use std::error::Error;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use dysk::nbd::server::Server;
use dysk::nbd::transmission::Stop;
use memory_disk::MemoryDisk;
use tokio::sync::watch;

const SIZE: u64 = 256 << 20;

/// Runs of each load, taking turns; the median counts.
const ROUNDS: usize = 3;

/// Name, fio's arguments.
const LOADS: &[(&str, &[&str])] = &[
    (
        "randread 4k d32",
        &["--rw=randread", "--bs=4k", "--iodepth=32"],
    ),
    (
        "randwrite 4k d32",
        &["--rw=randwrite", "--bs=4k", "--iodepth=32"],
    ),
    ("randrw 4k d32", &["--rw=randrw", "--bs=4k", "--iodepth=32"]),
    (
        "randwrite 4k d1",
        &["--rw=randwrite", "--bs=4k", "--iodepth=1"],
    ),
    ("read 256k d8", &["--rw=read", "--bs=256k", "--iodepth=8"]),
    ("write 256k d8", &["--rw=write", "--bs=256k", "--iodepth=8"]),
];

fn main() -> Result<(), Box<dyn Error>> {
    let (numbers, names): (Vec<_>, Vec<_>) = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .partition(|arg| arg.parse::<u32>().is_ok());
    let seconds = numbers.into_iter().next().unwrap_or_else(|| "3".into());
    let wanted = |load: &str| names.is_empty() || names.iter().any(|name| load.contains(name));
    let folder = tempfile::tempdir()?;
    let ours = folder.path().join("ours");
    let theirs = folder.path().join("nbdkit");

    let mut nbdkit = Command::new("nbdkit")
        .args(["--foreground", "--unix"])
        .arg(&theirs)
        .args(["memory", &SIZE.to_string()])
        .spawn()
        .map_err(|error| format!("cannot run nbdkit (apt-get install nbdkit): {error}"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let (stop, stopped) = watch::channel(Stop::Run);
    let server = runtime.block_on(async { Server::bind_unix(&ours) })?;
    let served = runtime.spawn(async move {
        let disk = Arc::new(MemoryDisk::new(SIZE));
        server.run(disk, "bench", stopped).await;
    });
    while !theirs.exists() {
        std::thread::sleep(Duration::from_millis(10));
    }

    println!(
        "{:<18} {:>12} {:>12} {:>7}",
        "load", "dysk IOPS", "nbdkit IOPS", "ratio"
    );
    for (name, load) in LOADS.iter().filter(|(name, _)| wanted(name)) {
        let mut found = [Vec::new(), Vec::new()];
        for _ in 0..ROUNDS {
            for (socket, found) in [&ours, &theirs].into_iter().zip(&mut found) {
                found.push(fio(socket, load, &seconds)?);
            }
        }
        let [dysk, other] = found.map(|mut found| {
            found.sort_by(f64::total_cmp);
            found[ROUNDS / 2]
        });
        println!(
            "{name:<18} {dysk:>12.0} {other:>12.0} {:>7.2}",
            dysk / other
        );
    }

    stop.send_replace(Stop::Close);
    runtime.block_on(served)?;
    nbdkit.kill()?;
    nbdkit.wait()?;
    Ok(())
}

/// Reads and writes a second that fio reports.
fn fio(socket: &Path, load: &[&str], seconds: &str) -> Result<f64, Box<dyn Error>> {
    let output = Command::new("fio")
        .args(["--name=bench", "--ioengine=nbd", "--output-format=json"])
        .args(["--time_based", "--randrepeat=0", "--ramp_time=1"])
        .arg(format!("--uri=nbd+unix:///?socket={}", socket.display()))
        .arg(format!("--runtime={seconds}"))
        .arg(format!("--size={SIZE}"))
        .args(load)
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cannot run fio (apt-get install fio): {error}"))?;
    if !output.status.success() {
        return Err(format!("fio failed: {}", String::from_utf8_lossy(&output.stdout)).into());
    }
    let text = String::from_utf8(output.stdout)?;
    let start = text.find('{').ok_or("fio printed no result")?;
    let report: serde_json::Value = serde_json::from_str(&text[start..])?;
    let job = &report["jobs"][0];
    let iops = |side: &str| job[side]["iops"].as_f64().ok_or("fio printed no iops");
    Ok(iops("read")? + iops("write")?)
}
