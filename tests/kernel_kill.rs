//! Daemons that are killed, on real kernels: what they leave behind is taken
//! up again, under load too, and nobody is told an error.

#[path = "support/lane.rs"]
mod lane;

/// A number that a soak run sets higher.
fn count(variable: &str, usual: u32) -> u32 {
    match std::env::var(variable) {
        Ok(text) => text.parse().expect("the variable is a number"),
        Err(_) => usual,
    }
}

fn kill(kernel: &str, usual: u32) {
    let kills = count("DYSK_KILLS", usual);
    let timeout = (300 + 60 * kills).to_string();
    let kills = format!("DYSK_KILLS={kills}");
    let mut options = vec!["--timeout", &timeout, "--env", &kills];
    let seed = std::env::var("DYSK_SEED").map(|seed| format!("DYSK_SEED={seed}"));
    if let Ok(seed) = &seed {
        options.extend(["--env", seed]);
    }
    lane::run(kernel, &options, "kill", &[]);
}

fn take_over(kernel: &str, caching: &str) {
    let times = count("DYSK_TAKEOVERS", 5);
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
    kill("6.1", 3);
}

#[test]
fn kills_under_load_lose_nothing_on_6_12() {
    kill("6.12", 10);
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
