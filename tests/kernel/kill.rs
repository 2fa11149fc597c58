//! Daemons that are killed, on real kernels: what they leave behind is taken
//! up again, under load too, and nobody is told an error.

use crate::support::lane;

/// `DYSK_KILLS` and `DYSK_SEED` choose how many kills and which. A raw disk and
/// a filesystem, in different modes of caching.
fn kill(kernel: &str, raw: &str, filesystem: &str) {
    let kills = lane::number("DYSK_KILLS", 10);
    let timeout = (600 + 20 * kills).to_string();
    let mut settings = vec![
        format!("DYSK_KILLS={kills}"),
        format!("DYSK_CACHING={raw}"),
        format!("DYSK_FS_CACHING={filesystem}"),
    ];
    settings.extend(std::env::var("DYSK_SEED").map(|seed| format!("DYSK_SEED={seed}")));
    let mut options = vec!["--timeout", &timeout];
    for setting in &settings {
        options.extend(["--env", setting]);
    }
    lane::run(kernel, &options, "kill", &[]);
}

/// The raw disk and the filesystem, likewise.
fn take_over(kernel: &str, raw: &str, filesystem: &str) {
    let times = lane::number("DYSK_TAKEOVERS", 3);
    let timeout = (300 + 30 * times).to_string();
    let times = format!("DYSK_TAKEOVERS={times}");
    let options = ["--timeout", &timeout, "--env", &times];
    lane::run(kernel, &options, "takeover", &[raw, filesystem]);
}

#[test]
fn what_a_killed_daemon_leaves_is_taken_up_on_6_1() {
    lane::run("6.1", &["--timeout", "600"], "recover", &[]);
}

#[test]
#[ignore = "part of make soak: the other tests here run on this kernel each time"]
fn what_a_killed_daemon_leaves_is_taken_up_on_6_12() {
    lane::run("6.12", &["--timeout", "600"], "recover", &[]);
}

#[test]
fn kills_under_load_lose_nothing_on_6_1() {
    kill("6.1", "none", "read-write");
}

/// And the check notices when what is staged goes with the daemon.
#[test]
fn kills_under_load_lose_nothing_on_6_12() {
    kill("6.12", "read-write", "none");
}

#[test]
#[ignore = "part of make soak: the other tests here run on this kernel each time"]
fn a_new_daemon_takes_over_without_an_error_on_6_1() {
    take_over("6.1", "none", "read-write");
}

#[test]
fn a_new_daemon_takes_over_without_an_error_on_6_12() {
    take_over("6.12", "read-write", "none");
}
