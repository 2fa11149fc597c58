//! The kernel lane tells the truth: a script's exit status comes through, and
//! a guest that panics, hangs or loses its power is a failure that says so.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const RUN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kernel/run");

/// A folder with a guest script in it, and room for the lane's results.
fn script(text: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("script");
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("the script is written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is made executable");
    folder
}

fn lane(folder: &Path, options: &[&str]) -> Command {
    let mut command = Command::new(RUN);
    command
        .args(options)
        .arg("--results")
        .arg(folder.join("results"));
    command.arg("--").arg(folder.join("script"));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(folder: &Path, options: &[&str]) -> (Option<i32>, String, String) {
    told(
        &lane(folder, options)
            .output()
            .expect("tests/kernel/run starts"),
    )
}

fn told(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

/// Waits for the script to say that it runs, and returns QEMU's process id.
fn wait_for_guest(results: &Path) -> i32 {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !results.join("running").exists() {
        assert!(Instant::now() < deadline, "the guest script never ran");
        thread::sleep(Duration::from_millis(20));
    }
    let pid = fs::read_to_string(results.join("qemu.pid")).expect("QEMU writes its process id");
    pid.trim().parse().expect("a process id")
}

fn kill(signal: rustix::process::Signal, pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a process id is not 0");
    rustix::process::kill_process(pid, signal).expect("the process is there");
}

#[test]
fn output_status_arguments_and_results_come_through() {
    let folder = script(
        "echo \"$K|$#|$2\"; uname -r; echo kept >$DYSK_RESULTS/file; echo gone >/etc/gone; printf end; exit 7",
    );
    let mut command = lane(folder.path(), &["--kernel", "6.1", "--env", "K=a 'b"]);
    let (status, out, _) = told(
        &command
            .args(["1", "x  y"])
            .output()
            .expect("the lane starts"),
    );
    assert_eq!(status, Some(7));
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(lines[0], "a 'b|2|x  y");
    assert!(lines[1].starts_with("6.1."), "{out}");
    assert_eq!(lines[2..], ["end"]);
    let kept = fs::read_to_string(folder.path().join("results/file"));
    assert_eq!(kept.expect("results are the host's"), "kept\n");
    assert!(!Path::new("/etc/gone").exists());
}

#[test]
fn a_panic_is_a_loud_failure() {
    // A panic takes along what is still on its way out of the guest.
    let folder = script(
        "echo before; until [ -e $DYSK_RESULTS/heard ]; do sleep 0.1; done; echo c >/proc/sysrq-trigger; sleep 1000",
    );
    let mut lane = lane(folder.path(), &[]).spawn().expect("the lane starts");
    let mut before = [0; 7];
    lane.stdout
        .as_mut()
        .expect("its output is ours")
        .read_exact(&mut before)
        .expect("the script's output comes through");
    assert_eq!(&before, b"before\n");
    fs::write(folder.path().join("results/heard"), "").expect("the results are the host's");
    let (status, out, errors) = told(&lane.wait_with_output().expect("the lane ends"));
    assert_eq!((status, out.as_str()), (Some(125), ""));
    assert!(
        errors.contains("Kernel panic - not syncing: sysrq triggered crash"),
        "{errors}"
    );
}

#[test]
fn a_hang_ends_at_the_timeout() {
    let folder = script("echo before; sleep 1000");
    let (status, _, errors) = run(folder.path(), &["--timeout", "15"]);
    assert_eq!(status, Some(124));
    assert!(errors.contains("timed out after 15 s"), "{errors}");
}

#[test]
fn a_power_cut_is_no_success() {
    let folder = script("touch $DYSK_RESULTS/running; sleep 1000");
    let lane = lane(folder.path(), &[]).spawn().expect("the lane starts");
    kill(
        rustix::process::Signal::KILL,
        wait_for_guest(&folder.path().join("results")),
    );
    let (status, _, errors) = told(&lane.wait_with_output().expect("the lane ends"));
    assert_eq!(status, Some(125));
    assert!(errors.contains("ended without a status"), "{errors}");
}

#[test]
fn a_lane_told_to_stop_takes_its_guest_along() {
    let folder = script("touch $DYSK_RESULTS/running; sleep 1000");
    let lane = lane(folder.path(), &[]).spawn().expect("the lane starts");
    let qemu = wait_for_guest(&folder.path().join("results"));
    let own = i32::try_from(lane.id()).expect("process ids are small");
    kill(rustix::process::Signal::TERM, own);
    let (status, ..) = told(&lane.wait_with_output().expect("the lane ends"));
    assert_eq!(status, Some(143));
    assert!(!Path::new(&format!("/proc/{qemu}")).exists());
    assert!(!folder.path().join("results/qemu.pid").exists());
}
