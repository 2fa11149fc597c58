//! How fast the emulator is, so that nobody measures it by accident:
//! `cargo bench --bench emulator`. Client and emulator share the machine.
//! Prints; asserts nothing about time.

#[path = "support/raw.rs"]
mod raw;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use dysk::emulator::{Config, Emulator, SettingsChange, Span, Storage};
use raw::{Connection, request};

const SIZE: u64 = 256 << 20;
const MEASURE: Duration = Duration::from_secs(3);

/// Runs `connections` clients that repeat their own request; gives the latency
/// of every call.
fn load(
    address: SocketAddr,
    connections: u64,
    make: impl Fn(u64) -> Vec<u8>,
) -> (Vec<Duration>, Duration) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime");
    runtime.block_on(async {
        let start = Instant::now();
        let tasks: Vec<_> = (0..connections)
            .map(|number| {
                let request = make(number);
                tokio::spawn(async move {
                    let mut connection = Connection::open(address).await;
                    let mut times = Vec::new();
                    while start.elapsed() < MEASURE {
                        let sent = Instant::now();
                        connection.call(&request).await;
                        times.push(sent.elapsed());
                    }
                    times
                })
            })
            .collect();
        let mut times = Vec::new();
        for task in tasks {
            times.extend(task.await.expect("no panic"));
        }
        (times, start.elapsed())
    })
}

fn report(what: &str, bytes: usize, (mut times, elapsed): (Vec<Duration>, Duration)) {
    times.sort_unstable();
    let per_second =
        u128::try_from(times.len()).unwrap_or(0) * 1_000_000 / elapsed.as_micros().max(1);
    let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_micros();
    println!(
        "{what:<34} {per_second:>7}/s {:>6} MB/s   p50 {} us  p99 {} us",
        per_second * bytes as u128 / 1_000_000,
        at(50),
        at(99)
    );
}

fn range(offset: u64, len: u64) -> (&'static str, String) {
    ("x-ms-range", format!("bytes={offset}-{}", offset + len - 1))
}

fn measure(what: &str, storage: Storage) {
    let config = Config {
        storage,
        ..Config::default()
    };
    let running = Emulator::start(config).expect("emulator");
    let address = running.address();
    let update = ("x-ms-page-write", "update".to_owned());
    let put = |offset: u64, data: &[u8]| {
        let headers = [range(offset, data.len() as u64), update.clone()];
        request("PUT", "dysks/a?comp=page", &headers, data)
    };
    let get = |offset: u64, len: u64| request("GET", "dysks/a", &[range(offset, len)], &[]);
    let setup = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime");
    setup.block_on(async {
        let mut connection = Connection::open(address).await;
        let container = request("PUT", "dysks?restype=container", &[], &[]);
        connection.call(&container).await;
        let headers = [
            ("x-ms-blob-type", "PageBlob".to_owned()),
            ("x-ms-blob-content-length", SIZE.to_string()),
        ];
        connection
            .call(&request("PUT", "dysks/a", &headers, &[]))
            .await;
        let data = vec![1; 4 << 20];
        for offset in (0..SIZE).step_by(4 << 20) {
            connection.call(&put(offset, &data)).await;
        }
    });
    println!("{what}");
    let spot = |number: u64| number * (4 << 20);
    report(
        "  get 4 KiB, 32 connections",
        4096,
        load(address, 32, |n| get(spot(n), 4096)),
    );
    report(
        "  put 4 KiB, 32 connections",
        4096,
        load(address, 32, |n| put(spot(n), &[2; 4096])),
    );
    report(
        "  get 4 MiB, 4 connections",
        4 << 20,
        load(address, 4, |n| get(spot(n), 4 << 20)),
    );
    let data = vec![3; 4 << 20];
    report(
        "  put 4 MiB, 4 connections",
        4 << 20,
        load(address, 4, |n| put(spot(n), &data)),
    );
    let change = SettingsChange {
        latency: Some(Span(Duration::from_millis(5))),
        ..SettingsChange::default()
    };
    running.change(&change).expect("no key in it");
    report(
        "  get 4 KiB at 5 ms, 1 connection",
        4096,
        load(address, 1, |n| get(spot(n), 4096)),
    );
    report(
        "  get 4 KiB at 5 ms, 64 connections",
        4096,
        load(address, 64, |n| get(spot(n % 60), 4096)),
    );
    running.stop();
}

fn main() {
    // Cargo's own arguments, such as --bench, mean nothing here.
    measure("in memory", Storage::Memory);
    let dir = tempfile::tempdir().expect("temporary directory");
    measure("in a directory", Storage::Dir(dir.path().into()));
}
