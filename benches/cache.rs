//! The cost of one cached operation within the process, beside that of the
//! system calls it cannot do without. Prints a table; asserts nothing.

#[path = "../tests/support/sim_store.rs"]
mod sim_store;

use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use bytes::Bytes;
use dysk::blob::LeaseId;
use dysk::device::BlockDevice as _;
use dysk::volume::{Caching, OpenOptions, StagingOptions, Volume};
use rand::RngExt as _;
use sim_store::SimStore;

const SIZE: usize = 128 << 20;
const OPERATIONS: u32 = 200_000;

fn report(what: &str, operations: u32, took: Duration) {
    let each = took.as_secs_f64() / f64::from(operations) * 1e6;
    println!("| {what} | {each:.2} |");
}

/// What is left when everything but the kernel's work is taken away.
fn system_calls(folder: &std::path::Path) {
    let file = std::fs::File::create_new(folder.join("floor")).expect("a new file");
    let (data, entry) = ([1; 4096], [1; 64]);
    let mut rng = rand::rng();
    for round in 0..2 {
        let began = Instant::now();
        for _ in 0..OPERATIONS {
            let slot = rng.random_range(0..SIZE as u64 / 4096);
            file.write_all_at(&data, (4 << 20) + slot * 4096)
                .expect("room in the tmpfs");
            file.write_all_at(&entry, slot * 64)
                .expect("room in the tmpfs");
        }
        if round == 1 {
            report(
                "pwrite 4096 + pwrite 64, nothing else",
                OPERATIONS,
                began.elapsed(),
            );
        }
    }
}

async fn cached(folder: &std::path::Path, survives: bool) {
    let store = SimStore::new(SIZE, 1);
    let options = OpenOptions {
        caching: Caching::ReadWrite,
        staging: StagingOptions {
            dir: folder.join("staging"),
            size: 2 * SIZE as u64,
            survives_power_cut: Some(survives),
            ..StagingOptions::default()
        },
        ..OpenOptions::new(LeaseId::random())
    };
    let volume = Volume::open(store, options).await.expect("opens");
    let medium = if survives { "as on a disk" } else { "tmpfs" };
    let data = Bytes::from(vec![7; 4096]);
    let mut rng = rand::rng();
    let mut at = |unit: u64| rng.random_range(0..SIZE as u64 / unit) * unit;
    for round in 0..2 {
        let began = Instant::now();
        for _ in 0..OPERATIONS {
            volume
                .write(at(4096), data.clone(), false)
                .await
                .expect("staged");
        }
        let what = ["random 4 KiB write, first touch", "random 4 KiB write"][round];
        report(&format!("{what}, {medium}"), OPERATIONS, began.elapsed());
    }
    for offset in (0..SIZE as u64).step_by(1 << 20) {
        volume
            .write(offset, vec![7; 1 << 20].into(), false)
            .await
            .expect("staged");
    }
    let began = Instant::now();
    for _ in 0..OPERATIONS {
        volume.read(at(4096), 4096).await.expect("cached");
    }
    report(
        &format!("random 4 KiB read, {medium}"),
        OPERATIONS,
        began.elapsed(),
    );
    let mib = Bytes::from(vec![7; 1 << 20]);
    let began = Instant::now();
    for _ in 0..1000 {
        volume
            .write(at(1 << 20), mib.clone(), false)
            .await
            .expect("staged");
    }
    report(
        &format!("random 1 MiB write, {medium}"),
        1000,
        began.elapsed(),
    );
    let began = Instant::now();
    for _ in 0..1000 {
        volume.read(at(1 << 20), 1 << 20).await.expect("cached");
    }
    report(
        &format!("random 1 MiB read, {medium}"),
        1000,
        began.elapsed(),
    );
    volume.close().await.expect("closes");
}

fn main() {
    let folder = tempfile::tempdir_in("/dev/shm").expect("a tmpfs");
    println!("| operation | us |\n|---|---|");
    system_calls(folder.path());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(cached(folder.path(), false));
    runtime.block_on(cached(folder.path(), true));
}
