//! The kernel's nbd client, driven by netlink, on real kernels.
//!
//! The host's part boots the kernel lane and runs this very test binary in the
//! guest, where the scenarios of [`guest`] do the work. They are `#[ignore]`d
//! on the host alone: the host's part fails unless each of them is reported
//! as passed.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a test reports by panicking, and its sizes are small constants"
)]

mod attached;
mod guest;
mod server;

use std::process::Command;

/// Every scenario a guest with nbd has to pass.
const SCENARIOS: [&str; 15] = [
    "data::attach_has_the_geometry_asked_for_and_carries_data",
    "data::read_only_refuses_writes",
    "data::resize_while_open",
    "data::fifty_devices_at_once",
    "data::status_lists_devices",
    "failure::io_waits_out_a_dead_server_and_completes_after_reconfigure",
    "failure::io_fails_at_the_dead_connection_timeout_and_flows_after_reconfigure",
    "failure::a_lost_reply_is_asked_for_again_on_another_connection",
    "failure::abandoned_attach_leaves_no_device",
    "refusal::mounts_swap_loops_and_claims_make_it_busy",
    "refusal::bad_arguments_and_foreign_devices_are_refused",
    "refusal::a_held_index_is_in_use_and_the_kernel_chooses_another",
    "refusal::sockets_do_not_leak_into_children",
    "refusal::nobody_but_root_may_connect",
    "refusal::a_network_namespace_is_named_where_the_family_hides",
];

/// Runs `scenarios`, and nothing else, in a guest; each must pass there.
fn run_in_guest(kernel: &str, nbd: &[&str], scenarios: &[&str]) {
    let binary = std::env::current_exe().expect("this test has a path");
    let names = scenarios
        .iter()
        .map(|name| format!("netlink::guest::{name}"));
    let output = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kernel/run"))
        .args(["--kernel", kernel, "--timeout", "300"])
        .args(nbd)
        .arg("--")
        .arg(&binary)
        .args(["--ignored", "--test-threads=1", "--nocapture", "--exact"])
        .args(names)
        .output()
        .expect("tests/kernel/run starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    println!("{text}\n{errors}");
    assert!(output.status.success(), "{kernel}: {}", output.status);
    let passed = format!("test result: ok. {} passed; 0 failed;", scenarios.len());
    assert!(text.contains(&passed), "{kernel}: not {passed}");
}

#[test]
fn scenarios_pass_on_6_1() {
    run_in_guest("6.1", &[], &SCENARIOS);
}

#[test]
fn scenarios_pass_on_6_12() {
    run_in_guest("6.12", &[], &SCENARIOS);
}

#[test]
fn a_kernel_without_the_module_is_told_what_to_load() {
    let scenario = ["bare::open_names_modprobe"];
    run_in_guest("6.12", &["--nbd", "none"], &scenario);
}
