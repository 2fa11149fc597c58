//! Disks that grow and are snapshotted under mounted filesystems, on each
//! kernel of the lane. In the short run each kernel has a half of it.

#[path = "support/lane.rs"]
mod lane;

const ONE_HALF: [&str; 4] = [
    "ext4_grows_under_load",
    "daemon_dies_while_the_blob_grows",
    "ext4_snapshots_cached",
    "xfs_snapshots_written_through",
];
const THE_OTHER: [&str; 4] = [
    "xfs_grows_under_load",
    "daemon_dies_while_the_footer_moves",
    "ext4_snapshots_written_through",
    "xfs_snapshots_cached",
];

fn run(kernel: &str, half: [&str; 4]) {
    let all = [ONE_HALF, THE_OTHER].concat();
    let scenarios = match lane::number("DYSK_ALL_SCENARIOS", 0) {
        0 => &half[..],
        _ => &all,
    };
    let options = ["--timeout", "900"];
    lane::run(kernel, &options, "grow_and_snapshot", scenarios);
}

#[test]
fn disks_grow_and_are_snapshotted_in_use_on_6_1() {
    run("6.1", ONE_HALF);
}

#[test]
fn disks_grow_and_are_snapshotted_in_use_on_6_12() {
    run("6.12", THE_OTHER);
}
