//! The product on real kernels: the guest scripts of `tests/kernel/guest` with
//! the binaries just built, on each kernel of the lane.

use std::process::Command;

use crate::support::azurite::Azurite;
use crate::support::lane;
use dysk::emulator::{DEFAULT_ACCOUNT, DEFAULT_KEY};

const REPO: &str = env!("CARGO_MANIFEST_DIR");

#[test]
fn first_light_on_6_1() {
    lane::run("6.1", &["--timeout", "900"], "first_light", &["50"]);
}

#[test]
fn first_light_on_6_12() {
    lane::run("6.12", &["--timeout", "900"], "first_light", &["20"]);
}

#[test]
fn the_module_with_its_defaults_serves_too() {
    lane::run(
        "6.12",
        &["--nbd", "default", "--timeout", "300"],
        "module_defaults",
        &[],
    );
}

#[test]
fn no_module_and_no_root_are_told_apart() {
    lane::run(
        "6.12",
        &["--nbd", "none", "--timeout", "300"],
        "no_module",
        &[],
    );
}

#[test]
fn bytes_written_through_the_kernel_are_found_by_azures_sdk() {
    let azurite = Azurite::start(None);
    let folder = tempfile::tempdir_in(format!("{REPO}/build")).expect("a folder for the pattern");
    let pattern = folder.path().join("pattern");
    let bytes: Vec<u8> = (0..1u32 << 20)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    std::fs::write(&pattern, bytes).expect("the pattern is written");
    let pattern = pattern.to_str().expect("a UTF-8 path");
    lane::run(
        "6.12",
        &["--timeout", "300"],
        "foreign_bytes",
        &[&azurite.endpoint, pattern],
    );
    let status = Command::new(format!("{REPO}/build/venv/bin/python"))
        .arg(format!("{REPO}/tests/python/find_bytes.py"))
        .arg(format!(
            "DefaultEndpointsProtocol=http;AccountName={DEFAULT_ACCOUNT};\
             AccountKey={DEFAULT_KEY};BlobEndpoint={}",
            azurite.endpoint
        ))
        .args(["dysks", "foreign.vhd", &(3 << 20).to_string(), pattern])
        .status()
        .expect("build/venv has python: tests/setup makes it");
    assert!(status.success(), "the SDK did not find the bytes: {status}");
}
