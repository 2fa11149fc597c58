//! Runs guest scripts on the kernels of the lane, with the binaries just built.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

const REPO: &str = env!("CARGO_MANIFEST_DIR");

/// One guest at a time: two emulated processors are all that a small machine
/// gives without starving both.
static LANE: Mutex<()> = Mutex::new(());

/// Waits until no other test of this binary runs guests.
pub fn alone() -> MutexGuard<'static, ()> {
    LANE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number that a soak run sets by an environment variable.
pub fn number(variable: &str, usual: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().expect("the variable is a number"),
        Err(_) => usual,
    }
}

/// Runs `tests/kernel/guest/SCRIPT` on `kernel`; its output goes to the
/// test's.
pub fn run(kernel: &str, options: &[&str], script: &str, args: &[&str]) {
    let _alone = alone();
    let bin = Path::new(env!("CARGO_BIN_EXE_dyskd"))
        .parent()
        .expect("binaries lie in a folder");
    let status = Command::new(format!("{REPO}/tests/kernel/run"))
        .args(["--kernel", kernel])
        .args(options)
        .arg("--env")
        .arg(format!("DYSK_BIN={}", bin.display()))
        .arg("--")
        .arg(format!("{REPO}/tests/kernel/guest/{script}"))
        .args(args)
        .status()
        .expect("tests/kernel/run starts");
    assert!(status.success(), "{script} on {kernel}: {status}");
}

/// The host's address as a guest has it.
#[allow(dead_code, reason = "each test binary uses its part")]
pub fn seen_by_guest(endpoint: &str) -> String {
    endpoint.replacen("127.0.0.1", "10.0.2.2", 1)
}
