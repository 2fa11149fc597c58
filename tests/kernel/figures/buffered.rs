//! Sequential streams through the page cache, which the kernel cuts into
//! requests as it likes.

use std::time::Duration;

use super::{Counts, boot, set_latency, timed};
use crate::support::lane;
use crate::support::outside_store::OutsideStore;
use serde_json::json;

const FILE_MIB: u64 = 512;
const MIB: u64 = 1 << 20;
const MOST_A_GIB: u64 = 300;
const LATENCY: Duration = Duration::from_millis(5);
/// A standard page blob's, in bytes a second.
const CAP: u64 = 60 * MIB;
/// A cap above this percentage of what the emulated CPU can do at all would
/// measure the CPU.
const OF_THE_CEILING: u64 = 60;

/// ext4 commits every 5 s, which takes two requests. The emulated CPU stretches the
/// stream to two to six times what it takes at that cap: with three times the
/// seconds between commits about as many fall into it as at the cap.
const COMMIT_SECONDS: u64 = 15;

/// How long a request may wait in a store with that cap.
const QUEUE_MILLISECONDS: u64 = 100;

/// A store as slow as that is so in everything: a request takes longer of the
/// cap, and waits longer before it is refused.
fn set_cap(store: &OutsideStore, bytes: u64) {
    let queue = QUEUE_MILLISECONDS * CAP / bytes.clamp(1, CAP);
    let settings = json!({"bandwidth": bytes, "queue": format!("{queue}ms")});
    store.admin("PUT", "settings", &settings.to_string());
}

/// Bytes a second.
fn rate(took: Duration) -> u64 {
    let milliseconds = u64::try_from(took.as_millis()).expect("no eternity");
    FILE_MIB * MIB * 1000 / milliseconds.max(1)
}

fn streams(kernel: &str, caching: &str) {
    let _timed = lane::timed(format!("buffered streams, {caching}, on {kernel}"));
    let store = OutsideStore::start(&[]);
    let guest = boot(kernel, &store);
    // All of the filesystem is made before, so that what follows is the file's.
    guest.run(&format!(
        "device=$(attach stream.vhd --create --size 2GiB --caching {caching}); \
         mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 $device; \
         mount -o commit={COMMIT_SECONDS} $device /mnt/a; sync -f /mnt/a"
    ));
    let before = Counts::of(&store);
    let write = format!(
        r#"python3 -c '
import os
file = os.open("/mnt/a/file", os.O_WRONLY | os.O_CREAT)
for number in range({FILE_MIB}):
    os.write(file, bytes([number % 255 + 1]) * (1 << 20))
os.fsync(file)'"#
    );
    let (took, _) = timed(&guest, &write);
    let written = Counts::of(&store).since(&before);
    println!(
        "figure: {kernel}, {caching}: {FILE_MIB} MiB written through ext4: {written}, \
         {} MiB/s; {}",
        rate(took) / MIB,
        lane::load()
    );

    // Nothing of it is to be found in memory or a staging file.
    let cold_read = || {
        guest.run(&format!(
            "umount /mnt/a; dyskctl detach stream; \
             mount $(attach stream.vhd --caching {caching}) /mnt/a"
        ));
        let before = Counts::of(&store);
        let (took, _) = timed(&guest, "dd if=/mnt/a/file of=/dev/null bs=1M status=none");
        (rate(took), Counts::of(&store).since(&before).gets())
    };
    set_latency(&store, LATENCY);
    let (ceiling, gets) = cold_read();
    let cap = CAP.min(ceiling * OF_THE_CEILING / 100);
    set_cap(&store, cap);
    let (capped, capped_gets) = cold_read();
    println!(
        "figure: {kernel}, {caching}: {FILE_MIB} MiB read back cold, 5 ms: {gets} gets; {} \
         MiB/s without a cap; of a cap of {:.1} MiB/s {:.1} %, with {} gets; {}",
        ceiling / MIB,
        cap as f64 / MIB as f64,
        capped as f64 / cap as f64 * 100.0,
        capped_gets,
        lane::load()
    );
    set_cap(&store, 0);
    guest.run("umount /mnt/a; dyskctl detach stream");
    guest.no_kernel_errors();
    let most = MOST_A_GIB * FILE_MIB / 1024;
    assert!(written.requests() <= most, "{written}");
    assert!(gets <= most, "{gets} to read");
}

#[test]
#[ignore = "long; part of make soak"]
fn buffered_streams_take_few_requests_on_6_1() {
    streams("6.1", "none");
}

#[test]
#[ignore = "long; part of make soak"]
fn buffered_streams_take_few_requests_on_6_12() {
    streams("6.12", "none");
}

#[test]
#[ignore = "long; part of make soak"]
fn buffered_streams_take_few_requests_with_a_cache() {
    streams("6.12", "read-write");
}
