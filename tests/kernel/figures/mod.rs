//! What attaches, filesystems and databases cost on a real kernel, in figures
//! that do not depend on how fast the guest's CPU is emulated: requests, bytes
//! and round trips are judged, times are printed. Too long for every run:
//! `make soak` asks for them, with release builds.

mod attaches;
mod buffered;
mod commits;
mod terabyte;

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use crate::support::guest::Guest;
use crate::support::outside_store::OutsideStore;
use serde_json::{Value, json};

/// What the store was asked for between two looks.
#[derive(Clone)]
struct Counts {
    /// By operation.
    operations: BTreeMap<String, u64>,
    bytes_in: u64,
}

impl Counts {
    fn of(store: &OutsideStore) -> Self {
        let stats = store.stats();
        let operations = stats["operations"].as_object().expect("operations");
        let of = |one: &Value| one["requests"].as_u64().expect("a count");
        Self {
            operations: operations
                .iter()
                .map(|(name, one)| (name.clone(), of(one)))
                .collect(),
            bytes_in: stats["bytesIn"].as_u64().expect("bytes"),
        }
    }

    fn since(&self, earlier: &Self) -> Self {
        let operations = self.operations.iter().map(|(name, requests)| {
            let before = earlier.operations.get(name).copied().unwrap_or_default();
            (name.clone(), requests - before)
        });
        Self {
            operations: operations.filter(|(_, requests)| *requests > 0).collect(),
            bytes_in: self.bytes_in - earlier.bytes_in,
        }
    }

    fn requests(&self) -> u64 {
        self.operations.values().sum()
    }

    fn gets(&self) -> u64 {
        self.operations.get("get-blob").copied().unwrap_or_default()
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each = self.operations.iter();
        let each: Vec<_> = each
            .map(|(name, requests)| format!("{requests} {name}"))
            .collect();
        write!(f, "{} requests ({})", self.requests(), each.join(", "))
    }
}

/// A guest with a daemon, whose log tells how long the kernel's calls take.
fn boot(kernel: &str, store: &OutsideStore) -> Guest {
    let environment = [
        ("endpoint", &*store.endpoint()),
        ("RUST_LOG", "info,dysk::nbd::kernel=debug"),
    ];
    let guest = Guest::boot("figures", kernel, &environment);
    guest.start_daemon();
    guest
}

/// The store's latency, from the next request on.
fn set_latency(store: &OutsideStore, latency: Duration) {
    let settings = json!({"latency": format!("{}ms", latency.as_millis())});
    store.admin("PUT", "settings", &settings.to_string());
}

/// Runs a command that has to succeed, however long it takes; answers with how
/// long that was, and its output.
fn timed(guest: &Guest, command: &str) -> (Duration, String) {
    let begun = Instant::now();
    let answer = guest.start(command).answer(Duration::from_secs(900));
    let answer = answer.expect("the guest is there");
    assert!(
        answer.succeeded(),
        "{command}: {}{}",
        answer.out,
        answer.err
    );
    (begun.elapsed(), answer.out.trim().to_owned())
}
