//! Daemons that are killed, on real kernels: what they leave behind is taken
//! up again, under load too, and nobody is told an error.

use std::path::Path;
use std::process::Command;

const REPO: &str = env!("CARGO_MANIFEST_DIR");

/// Runs a guest script on `kernel`; its output goes to the test's.
fn lane(kernel: &str, timeout: u32, script: &str) {
    let bin = Path::new(env!("CARGO_BIN_EXE_dyskd"))
        .parent()
        .expect("binaries lie in a folder");
    let mut command = Command::new(format!("{REPO}/tests/kernel/run"));
    command.args(["--kernel", kernel, "--timeout", &timeout.to_string()]);
    command.args(["--env", &format!("DYSK_BIN={}", bin.display())]);
    for name in ["DYSK_KILLS", "DYSK_SEED", "DYSK_TAKEOVERS"] {
        if let Ok(value) = std::env::var(name) {
            command.args(["--env", &format!("{name}={value}")]);
        }
    }
    command.args(["--", &format!("{REPO}/tests/kernel/guest/{script}")]);
    let status = command.status().expect("tests/kernel/run starts");
    assert!(status.success(), "{script} on {kernel}: {status}");
}

/// Kills of a run; a soak run sets more.
fn kills() -> u32 {
    match std::env::var("DYSK_KILLS") {
        Ok(text) => text.parse().expect("DYSK_KILLS is a number"),
        Err(_) => 10,
    }
}

#[test]
fn what_a_killed_daemon_leaves_is_taken_up_on_6_1() {
    lane("6.1", 600, "recover");
}

#[test]
fn what_a_killed_daemon_leaves_is_taken_up_on_6_12() {
    lane("6.12", 600, "recover");
}

#[test]
fn kills_under_load_lose_nothing_on_6_1() {
    lane("6.1", 300 + 60 * kills(), "kill");
}

#[test]
fn kills_under_load_lose_nothing_on_6_12() {
    lane("6.12", 300 + 60 * kills(), "kill");
}

#[test]
fn a_new_daemon_takes_over_without_an_error_on_6_1() {
    lane("6.1", 600, "takeover");
}

#[test]
fn a_new_daemon_takes_over_without_an_error_on_6_12() {
    lane("6.12", 600, "takeover");
}
