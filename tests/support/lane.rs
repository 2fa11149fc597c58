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
