//! Runs guest scripts on the kernels of the lane, with the binaries just built.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

const REPO: &str = env!("CARGO_MANIFEST_DIR");

/// Says how long something took, past the harness that keeps what tests print.
#[must_use]
pub struct Timed {
    name: String,
    began: Instant,
}

/// Times `name` until the result is dropped.
pub fn timed(name: impl Into<String>) -> Timed {
    Timed {
        name: name.into(),
        began: Instant::now(),
    }
}

impl Drop for Timed {
    fn drop(&mut self) {
        let took = self.began.elapsed().as_secs();
        // A closed standard error is no reason to fail a test.
        let _unheard = writeln!(std::io::stderr(), "guest: {}: {took} s", self.name);
    }
}

/// A number that a soak run sets by an environment variable.
pub fn number(variable: &str, usual: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().expect("the variable is a number"),
        Err(_) => usual,
    }
}

/// What else the machine does: times mean little beside it.
pub fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    format!("load {}", text.split(' ').next().unwrap_or_default())
}

/// Runs `tests/kernel/guest/SCRIPT` on `kernel`; its output goes to the
/// test's.
pub fn run(kernel: &str, options: &[&str], script: &str, args: &[&str]) {
    let _timed = timed(format!("{script} {} on {kernel}", args.join(" ")));
    let bin = Path::new(env!("CARGO_BIN_EXE_dyskd"))
        .parent()
        .expect("binaries lie in a folder");
    let (output, input) = std::io::pipe().expect("a pipe");
    let mut command = Command::new(format!("{REPO}/tests/kernel/run"));
    command
        .args(["--kernel", kernel])
        .args(options)
        .arg("--env")
        .arg(format!("DYSK_BIN={}", bin.display()))
        .arg("--")
        .arg(format!("{REPO}/tests/kernel/guest/{script}"))
        .args(args)
        .stdout(input.try_clone().expect("a second handle"))
        .stderr(input);
    let mut running = command.spawn().expect("tests/kernel/run starts");
    // Its ends of the pipe are the child's alone now.
    drop(command);
    for line in BufReader::new(output).split(b'\n') {
        let line = line.expect("the pipe is read");
        println!("{}", String::from_utf8_lossy(&line));
    }
    let status = running.wait().expect("tests/kernel/run ends");
    assert!(status.success(), "{script} on {kernel}: {status}");
}

/// The host's address as a guest has it.
#[allow(dead_code, reason = "each test binary uses its part")]
pub fn seen_by_guest(endpoint: &str) -> String {
    endpoint.replacen("127.0.0.1", "10.0.2.2", 1)
}
