//! What a commit costs: requests, and round trips beside those that the kernel
//! asks for.

use std::time::Duration;

use super::{Counts, boot, set_latency, timed};
use crate::support::guest::Guest;
use crate::support::lane;
use crate::support::outside_store::OutsideStore;

const POSTGRES: &str = "$DYSK_REPO/tests/kernel/guest/postgres";
const COMMITS: u32 = 200;
/// More than a commit needs: data, journal and commit record, and what the
/// write-back sends beside them.
const MOST_A_COMMIT: f64 = 12.0;
const QUICK: Duration = Duration::from_millis(0);
/// Long enough that the emulated CPU's moods do not show.
const SLOW: Duration = Duration::from_millis(40);
/// Of the round trips that the kernel waits for one after the other.
const MOST_TRIPS: f64 = 1.3;

/// Flushes of the device, and commits of its journal, so far. A commit of the
/// journal is a flush and then a write that has to be in the store: two round
/// trips. What a database syncs within its file is one flush.
fn waits(guest: &Guest) -> f64 {
    let counted = guest.run(
        "device=$(readlink /dev/dysk/rows); device=${device#/dev/}; \
         flushes=$(awk '{ print $16 }' /sys/block/$device/stat); \
         commits=$(awk 'NR == 1 { print $1 }' /proc/fs/jbd2/$device-8/info); \
         echo $((flushes + commits))",
    );
    counted.parse().expect("a count")
}

/// Runs what commits `COMMITS` times on a store without latency and on a slow
/// one; the difference is its round trips.
fn commits(name: &str, guest: &Guest, store: &OutsideStore, command: &str) {
    let each = |of: f64| of / f64::from(COMMITS);
    set_latency(store, QUICK);
    let (quick, _) = timed(guest, command);
    set_latency(store, SLOW);
    let (counts, waits_before) = (Counts::of(store), waits(guest));
    let (slow, said) = timed(guest, command);
    let cost = Counts::of(store).since(&counts);
    let needed = each(waits(guest) - waits_before);
    set_latency(store, QUICK);
    let trips = each(slow.as_secs_f64() - quick.as_secs_f64()) / SLOW.as_secs_f64();
    let requests = each(cost.requests() as f64);
    println!(
        "figure: {name}: {requests:.2} requests and {:.1} KiB a commit; {trips:.2} round trips, \
         the kernel waits for {needed:.2}: {:.2} times what is needed; {:.1} ms a commit without \
         latency; it says: {}; {}",
        each(cost.bytes_in as f64 / 1024.0),
        trips / needed,
        each(quick.as_secs_f64()) * 1e3,
        said.replace('\n', "; "),
        lane::load()
    );
    assert!(needed >= 1.0, "a commit that nothing waited for");
    assert!(requests >= 1.0, "a commit that was not in the store");
    assert!(requests <= MOST_A_COMMIT, "{requests} requests a commit");
    assert!(trips <= needed * MOST_TRIPS, "{trips} trips, not {needed}");
}

#[test]
#[ignore = "long; part of make soak"]
fn a_commit_costs_what_its_durability_needs() {
    let _timed = lane::timed("commits");
    let store = OutsideStore::start(&[]);
    let guest = boot("6.12", &store);
    guest.run(
        "device=$(attach rows.vhd --create --size 1GiB --caching read-write); \
         mkfs.ext4 -q $device; mkdir -p /mnt/rows; mount $device /mnt/rows",
    );
    let sqlite = format!(
        r#"python3 - <<'END'
import sqlite3, time
rows = sqlite3.connect("/mnt/rows/one", isolation_level=None)
rows.execute("PRAGMA journal_mode=WAL")
rows.execute("PRAGMA synchronous=FULL")
rows.execute("CREATE TABLE IF NOT EXISTS rows (number INTEGER PRIMARY KEY, text TEXT)")
begun = time.monotonic()
for number in range({COMMITS}):
    rows.execute("INSERT INTO rows (text) VALUES (?)", ("x" * 100,))
print(f"{{(time.monotonic() - begun) * 1000 / {COMMITS}:.1f}} ms a commit")
END"#
    );
    commits("SQLite, WAL", &guest, &store, &sqlite);
    guest.run(&format!(
        "{POSTGRES} make /mnt/rows; {POSTGRES} start /mnt/rows; \
         pgbench=$(printf '%s\\n' /usr/lib/postgresql/*/bin/pgbench | tail -n 1); \
         $pgbench -h /tmp -U postgres -i -q -s 1 postgres >/dev/null 2>&1; sync -f /mnt/rows"
    ));
    let pgbench = format!(
        "pgbench=$(printf '%s\\n' /usr/lib/postgresql/*/bin/pgbench | tail -n 1); \
         $pgbench -h /tmp -U postgres -n -N -c 1 -t {COMMITS} postgres | grep latency"
    );
    commits("PostgreSQL, pgbench -N", &guest, &store, &pgbench);
    guest.run(&format!("{POSTGRES} stop /mnt/rows; umount /mnt/rows"));
    guest.no_kernel_errors();
}
