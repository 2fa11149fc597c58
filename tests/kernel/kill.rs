//! Daemons that are killed, on real kernels: what they leave behind is taken
//! up again, under load too, and nobody is told an error.

use crate::support::lane;

/// `DYSK_KILLS` and `DYSK_SEED` choose how many kills and which.
fn kill(kernel: &str, caching: &str, usual: u64) {
    let kills = lane::number("DYSK_KILLS", usual);
    let timeout = (600 + 20 * kills).to_string();
    let kills = format!("DYSK_KILLS={kills}");
    let caching = format!("DYSK_CACHING={caching}");
    let mut options = vec!["--timeout", &timeout, "--env", &kills, "--env", &caching];
    let seed = std::env::var("DYSK_SEED").map(|seed| format!("DYSK_SEED={seed}"));
    if let Ok(seed) = &seed {
        options.extend(["--env", seed]);
    }
    lane::run(kernel, &options, "kill", &[]);
}

fn take_over(kernel: &str, caching: &str) {
    let times = lane::number("DYSK_TAKEOVERS", 3);
    let timeout = (300 + 30 * times).to_string();
    let times = format!("DYSK_TAKEOVERS={times}");
    lane::run(
        kernel,
        &["--timeout", &timeout, "--env", &times],
        "takeover",
        &[caching],
    );
}

#[test]
fn what_a_killed_daemon_leaves_is_taken_up_on_6_1() {
    lane::run("6.1", &["--timeout", "600"], "recover", &[]);
}

#[test]
fn what_a_killed_daemon_leaves_is_taken_up_on_6_12() {
    lane::run("6.12", &["--timeout", "600"], "recover", &[]);
}

#[test]
fn kills_under_load_lose_nothing_on_6_1() {
    kill("6.1", "none", 3);
}

#[test]
fn kills_under_load_lose_nothing_on_6_12() {
    kill("6.12", "none", 10);
}

#[test]
fn kills_under_load_lose_nothing_that_is_staged() {
    kill("6.12", "read-write", 10);
}

/// The contrast: the same check, when the last kill takes the staging file
/// along.
#[test]
fn losing_what_is_staged_is_noticed() {
    let options = [
        "--env",
        "DYSK_KILLS=1",
        "--env",
        "DYSK_CACHING=read-write",
        "--env",
        "DYSK_SABOTAGE=staging",
    ];
    lane::run("6.12", &options, "kill", &[]);
}

#[test]
fn a_new_daemon_takes_over_without_an_error_on_6_1() {
    take_over("6.1", "read-write");
}

#[test]
fn a_new_daemon_takes_over_without_an_error_on_6_12() {
    take_over("6.12", "none");
}

#[test]
fn a_new_daemon_takes_over_what_is_cached_on_6_12() {
    take_over("6.12", "read-write");
}
