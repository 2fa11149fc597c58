//! What the emulator has done, counted.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::operation::{ALL, OPERATIONS, Operation};

/// Counters; all start at 0 and can be set back to it.
#[derive(Debug, Default)]
pub(super) struct Stats {
    requests: [AtomicU64; OPERATIONS],
    refused: [AtomicU64; OPERATIONS],
    errors: Mutex<BTreeMap<String, u64>>,
    faults: Mutex<BTreeMap<String, u64>>,
    pub bytes_in: AtomicU64,
    pub bytes_out: AtomicU64,
    pub connections: AtomicU64,
    /// Not set back: a state, no count.
    pub open_connections: AtomicU64,
    pub throttled: AtomicU64,
    /// Not set back either.
    pub held: AtomicU64,
    pub late_scheduled: AtomicU64,
    pub late_applied: AtomicU64,
    pub late_refused: AtomicU64,
}

/// Counts of one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationStats {
    /// Requests, whatever became of them.
    pub requests: u64,
    /// Those that were answered with an error (throttling and faults included).
    pub refused: u64,
}

/// Late executions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LateStats {
    /// Requests whose connection was cut and whose execution was put off.
    pub scheduled: u64,
    /// Those that have been executed since.
    pub applied: u64,
    /// Those that were refused when their time came.
    pub refused: u64,
}

/// The JSON of `/-/stats`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct StatsReport {
    /// By operation, such as `put-page`; those never asked for are left out.
    pub operations: BTreeMap<String, OperationStats>,
    /// Answers with an error, by status and code, such as `412 LeaseIdMissing`.
    pub errors: BTreeMap<String, u64>,
    /// Faults that struck, by kind, such as `reset-after`.
    pub faults: BTreeMap<String, u64>,
    /// Bytes of request bodies.
    pub bytes_in: u64,
    /// Bytes of answers' bodies.
    pub bytes_out: u64,
    /// Connections accepted.
    pub connections: u64,
    /// Connections open now.
    pub open_connections: u64,
    /// Requests refused with 503 because of a cap.
    pub throttled: u64,
    /// Requests that a rule holds now, before their execution.
    pub held: u64,
    /// Late executions.
    pub late: LateStats,
}

impl StatsReport {
    /// Requests for `operation`.
    #[must_use]
    pub fn requests(&self, operation: Operation) -> u64 {
        self.operations
            .get(&operation.name())
            .map_or(0, |counts| counts.requests)
    }
}

impl Stats {
    pub(super) fn count(&self, operation: Operation) {
        self.requests[operation as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_error(&self, operation: Option<Operation>, status: u16, code: &str) {
        if let Some(operation) = operation {
            self.refused[operation as usize].fetch_add(1, Ordering::Relaxed);
        }
        add(&self.errors, format!("{status} {code}"));
    }

    pub(super) fn count_fault(&self, kind: &str) {
        add(&self.faults, kind.to_owned());
    }

    pub(super) fn report(&self) -> StatsReport {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut operations = BTreeMap::new();
        for operation in ALL {
            let counts = OperationStats {
                requests: get(&self.requests[operation as usize]),
                refused: get(&self.refused[operation as usize]),
            };
            if counts != OperationStats::default() {
                operations.insert(operation.name(), counts);
            }
        }
        StatsReport {
            operations,
            errors: self
                .errors
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            faults: self
                .faults
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            bytes_in: get(&self.bytes_in),
            bytes_out: get(&self.bytes_out),
            connections: get(&self.connections),
            open_connections: get(&self.open_connections),
            throttled: get(&self.throttled),
            held: get(&self.held),
            late: LateStats {
                scheduled: get(&self.late_scheduled),
                applied: get(&self.late_applied),
                refused: get(&self.late_refused),
            },
        }
    }

    pub(super) fn reset(&self) {
        let single = [
            &self.bytes_in,
            &self.bytes_out,
            &self.connections,
            &self.throttled,
            &self.late_scheduled,
            &self.late_applied,
            &self.late_refused,
        ];
        for counter in single
            .into_iter()
            .chain(&self.requests)
            .chain(&self.refused)
        {
            counter.store(0, Ordering::Relaxed);
        }
        for map in [&self.errors, &self.faults] {
            map.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }
}

fn add(map: &Mutex<BTreeMap<String, u64>>, name: String) {
    *map.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .entry(name)
        .or_default() += 1;
}
