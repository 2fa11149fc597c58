//! Databases on volumes that cache writes: the power goes, and every row that
//! was committed is there on the next node.

use std::time::Duration;

use crate::support::guest::{Guest, Witness};
use crate::support::lane;
use crate::support::outside_store::OutsideStore;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

const PATIENCE: Duration = Duration::from_secs(120);
const ROWS: &str = "python3 $DYSK_REPO/tests/kernel/guest/rows.py";
const POSTGRES: &str = "$DYSK_REPO/tests/kernel/guest/postgres";

/// A database, and where its rows are written to: a file or a socket.
struct Database {
    name: &'static str,
    place: &'static str,
}

const DATABASES: [Database; 2] = [
    Database {
        name: "sqlite",
        place: "/mnt/sqlite/rows",
    },
    Database {
        name: "postgres",
        place: "/tmp",
    },
];

impl Database {
    fn make(&self, guest: &Guest) {
        let name = self.name;
        let policy = "--caching read-write";
        guest.run(&format!(
            "device=$(attach {name}.vhd --create --size 512MiB {policy}); mkfs.ext4 -q $device; \
             mkdir -p /mnt/{name}; mount $device /mnt/{name}"
        ));
        if name == "postgres" {
            guest.run(&format!(
                "{POSTGRES} make /mnt/{name}; {POSTGRES} start /mnt/{name}"
            ));
        }
    }

    /// What the last guest left in the store: recovered and compared.
    fn recover(&self, guest: &Guest, witness: &Witness) {
        let Self { name, place } = self;
        guest.run(&format!(
            "device=$(attach {name}.vhd --break-lease --caching read-write); mkdir -p /mnt/{name}; \
             mount $device /mnt/{name}"
        ));
        if *name == "postgres" {
            guest.run(&format!("{POSTGRES} start /mnt/{name}"));
        }
        let last = witness
            .count(name)
            .checked_sub(1)
            .expect("rows were committed");
        let said = guest.run(&format!("{ROWS} {name} check {place} {last}"));
        println!("    {name}: {said}");
    }

    fn load(&self, guest: &Guest, witness: &Witness) {
        let Self { name, place } = self;
        let (port, first) = (witness.port(), witness.count(name));
        drop(guest.start(&format!(
            "{ROWS} {name} write {place} {name} {port} {first}"
        )));
    }
}

#[test]
fn committed_rows_survive_power_cuts() {
    let _timed = lane::timed("databases");
    let cuts = lane::number("DYSK_DATABASE_CUTS", 1);
    let seed = lane::number("DYSK_SEED", rand::random());
    println!("seed {seed}, {cuts} cuts");
    let mut dice = StdRng::seed_from_u64(seed);
    let store = OutsideStore::start(&["--latency", "2ms"]);
    let witness = Witness::start();
    for cut in 0..=cuts {
        let guest = Guest::boot(
            &format!("guest {cut}"),
            "6.12",
            &[("endpoint", &store.endpoint())],
        );
        guest.start_daemon();
        std::thread::scope(|scope| {
            for database in &DATABASES {
                scope.spawn(|| match cut {
                    0 => database.make(&guest),
                    _ => database.recover(&guest, &witness),
                });
            }
        });
        guest.no_kernel_errors();
        if cut == cuts {
            return;
        }
        for database in &DATABASES {
            database.load(&guest, &witness);
        }
        for database in &DATABASES {
            witness.goes_on(database.name, 10, PATIENCE);
        }
        std::thread::sleep(Duration::from_millis(dice.random_range(0..5000)));
        guest.cut();
        let counts = DATABASES.map(|one| format!("{} {}", one.name, witness.count(one.name)));
        println!("cut {}: committed rows: {}", cut + 1, counts.join(", "));
    }
}
