//! Disks that grow and are snapshotted under mounted filesystems, on each
//! kernel of the lane. In the short run each kernel has a part of it.

use crate::support::lane;

const ALL: [&str; 10] = [
    "ext4_grows_under_load",
    "xfs_grows_under_load",
    "daemon_dies_while_the_blob_grows",
    "daemon_dies_while_the_footer_moves",
    "ext4_snapshots_cached",
    "ext4_snapshots_read_cached",
    "ext4_snapshots_written_through",
    "xfs_snapshots_cached",
    "xfs_snapshots_read_cached",
    "xfs_snapshots_written_through",
];

fn run(kernel: &str, short: &[&str]) {
    let scenarios = match lane::number("DYSK_ALL_SCENARIOS", 0) {
        0 => short,
        _ => &ALL,
    };
    let options = ["--timeout", "900"];
    lane::run(kernel, &options, "grow_and_snapshot", scenarios);
}

#[test]
fn disks_grow_and_are_snapshotted_in_use_on_6_1() {
    let short = ["xfs_grows_under_load", "ext4_snapshots_written_through"];
    run("6.1", &short);
}

#[test]
fn disks_grow_and_are_snapshotted_in_use_on_6_12() {
    let short = [
        "ext4_grows_under_load",
        "daemon_dies_while_the_footer_moves",
        "xfs_snapshots_cached",
    ];
    run("6.12", &short);
}
