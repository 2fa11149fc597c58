//! What filesystems and databases cost at the store, in figures that do not
//! depend on how fast the guest's CPU is emulated: requests and bytes. Too long
//! for every run: `make soak` asks for them.

use std::time::Instant;

use crate::support::guest::Guest;
use crate::support::lane;
use crate::support::outside_store::OutsideStore;
use serde_json::Value;

const POSTGRES: &str = "$DYSK_REPO/tests/kernel/guest/postgres";
const COMMITS: u32 = 200;
/// Of the store, in each request.
const LATENCY_MS: f64 = 5.0;
/// More than a commit needs: data, journal and commit record, and what the
/// write-back sends beside them.
const MOST_A_COMMIT: f64 = 12.0;

/// What the store was asked for between two looks.
#[derive(Clone, Copy)]
struct Counts {
    requests: u64,
    puts: u64,
    bytes: u64,
}

impl Counts {
    fn of(store: &OutsideStore) -> Self {
        let stats = store.stats();
        let operations = stats["operations"].as_object().expect("operations");
        let of = |one: &Value| one["requests"].as_u64().expect("a count");
        Self {
            requests: operations.values().map(of).sum(),
            puts: operations.get("put-page").map_or(0, of),
            bytes: stats["bytesIn"].as_u64().expect("bytes"),
        }
    }

    fn since(self, earlier: Self) -> Self {
        Self {
            requests: self.requests - earlier.requests,
            puts: self.puts - earlier.puts,
            bytes: self.bytes - earlier.bytes,
        }
    }
}

fn boot(kernel: &str, store: &OutsideStore) -> Guest {
    let guest = Guest::boot("figures", kernel, &[("endpoint", &store.endpoint())]);
    guest.start_daemon();
    guest
}

fn terabyte(kernel: &str) {
    let _timed = lane::timed("1 TiB of ext4");
    let store = OutsideStore::start(&[]);
    let guest = boot(kernel, &store);
    guest.run("attach big.vhd --create --size 1TiB --caching read-write >/tmp/device");
    let before = Counts::of(&store);
    guest.run(
        "device=$(</tmp/device); mkfs.ext4 -q $device; mkdir -p /mnt/big; \
         mount $device /mnt/big; sync -f /mnt/big",
    );
    let cost = Counts::of(&store).since(before);
    println!(
        "1 TiB of ext4 made and mounted on {kernel}: {} requests, {} of them puts, {:.1} MiB",
        cost.requests,
        cost.puts,
        cost.bytes as f64 / f64::from(1 << 20)
    );
    guest.run("umount /mnt/big; fsck.ext4 -fn $(</tmp/device)");
    guest.no_kernel_errors();
    assert!(cost.requests <= 1000, "{} requests", cost.requests);
    assert!(cost.bytes <= 20 << 20, "{} bytes", cost.bytes);
}

#[test]
#[ignore = "long; part of make soak"]
fn a_terabyte_is_made_and_mounted_in_few_requests_on_6_1() {
    terabyte("6.1");
}

#[test]
#[ignore = "long; part of make soak"]
fn a_terabyte_is_made_and_mounted_in_few_requests_on_6_12() {
    terabyte("6.12");
}

/// Runs what commits `COMMITS` times; prints what each cost.
fn commits(name: &str, guest: &Guest, store: &OutsideStore, command: &str) {
    let (before, begun) = (Counts::of(store), Instant::now());
    let said = guest.run(command);
    let each = |of: f64| of / f64::from(COMMITS);
    let (cost, ms) = (
        Counts::of(store).since(before),
        begun.elapsed().as_secs_f64() * 1e3,
    );
    let requests = each(cost.requests as f64);
    println!(
        "{name}: {requests:.2} requests and {:.1} KiB a commit, {:.1} ms, \
         {:.2} round trips of the store; it says: {}",
        each(cost.bytes as f64 / 1024.0),
        each(ms),
        each(ms) / LATENCY_MS,
        said.replace('\n', "; ")
    );
    assert!(requests >= 1.0, "a commit that was not in the store");
    assert!(requests <= MOST_A_COMMIT, "{requests} requests a commit");
}

#[test]
#[ignore = "long; part of make soak"]
fn a_commit_costs_what_its_durability_needs() {
    let _timed = lane::timed("commits");
    let store = OutsideStore::start(&["--latency", "5ms"]);
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
rows.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, text TEXT)")
begun = time.monotonic()
for number in range({COMMITS}):
    rows.execute("INSERT INTO rows VALUES (?, ?)", (number, "x" * 100))
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
