//! A fresh filesystem on a large disk.

use std::time::Duration;

use super::{Counts, boot, set_latency};
use crate::support::lane;
use crate::support::outside_store::OutsideStore;

const MOST_REQUESTS: u64 = 1000;
const MOST_BYTES: u64 = 20 << 20;
/// A store that answers at once has no two questions to answer together.
const LATENCY: Duration = Duration::from_millis(5);

/// With the defaults of mkfs, and a mount whose background initialisation has
/// had a few of its rounds: that goes on for an hour, a group of inodes a round.
fn terabyte(kernel: &str, caching: &str) {
    let _timed = lane::timed(format!("1 TiB of ext4, {caching}, on {kernel}"));
    let store = OutsideStore::start(&[]);
    let guest = boot(kernel, &store);
    guest.run(&format!(
        "attach big.vhd --create --size 1TiB --caching {caching} >/tmp/device"
    ));
    set_latency(&store, LATENCY);
    let before = Counts::of(&store);
    guest.run("mkfs.ext4 -q $(</tmp/device); sync");
    let made = Counts::of(&store).since(&before);
    guest.run("mkdir -p /mnt/big; mount $(</tmp/device) /mnt/big; sync -f /mnt/big");
    let cost = Counts::of(&store).since(&before);
    guest.run("sleep 20; sync -f /mnt/big");
    let later = Counts::of(&store).since(&before);
    let print = |what: &str, cost: &Counts| {
        println!(
            "figure: {kernel}, {caching}: 1 TiB of ext4 {what}: {cost}, {:.1} MiB; {}",
            cost.bytes_in as f64 / f64::from(1 << 20),
            lane::load()
        );
    };
    print("made", &made);
    print("made and mounted", &cost);
    print("and 20 s later", &later);
    guest.run("umount /mnt/big; fsck.ext4 -fn $(</tmp/device)");
    guest.no_kernel_errors();
    assert!(cost.requests() <= MOST_REQUESTS, "{cost}");
    assert!(cost.bytes_in <= MOST_BYTES, "{} bytes", cost.bytes_in);
}

#[test]
#[ignore = "long; part of make soak"]
fn a_terabyte_is_made_and_mounted_in_few_requests_on_6_1() {
    terabyte("6.1", "read-write");
}

#[test]
#[ignore = "long; part of make soak"]
fn a_terabyte_is_made_and_mounted_in_few_requests_on_6_12() {
    terabyte("6.12", "read-write");
}

#[test]
#[ignore = "long; part of make soak"]
fn a_terabyte_is_made_and_mounted_in_few_requests_without_a_cache() {
    terabyte("6.12", "none");
}
