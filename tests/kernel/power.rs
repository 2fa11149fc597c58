//! The power goes: a whole guest is killed at a random moment under load, and
//! the next one attaches what is left in the store.

use std::time::{Duration, Instant};

use crate::support::guest;
use crate::support::guest::{Guest, Witness};
use crate::support::lane;
use crate::support::outside_store::OutsideStore;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

const PATIENCE: Duration = Duration::from_secs(60);

/// A file system that lives through the cuts.
struct Disk {
    name: &'static str,
    kind: &'static str,
    policy: &'static str,
}

const DISKS: [Disk; 3] = [
    Disk {
        name: "ext4",
        kind: "ext4",
        policy: "--caching read-write",
    },
    Disk {
        name: "xfs",
        kind: "xfs",
        policy: "--caching read-write",
    },
    Disk {
        name: "through",
        kind: "ext4",
        policy: "--caching none",
    },
];

/// Nobody flushes it: the kernel is told that what this disk acknowledges is
/// durable. The check that finds nothing missing here would find nothing at all.
const NEVER_FLUSHED: Disk = Disk {
    name: "unflushed",
    kind: "ext4",
    policy: "--caching read-write",
};

fn boot(cut: u64, store: &OutsideStore) -> Guest {
    let kernel = if cut.is_multiple_of(2) { "6.12" } else { "6.1" };
    Guest::boot(
        &format!("guest {cut}"),
        kernel,
        &[("endpoint", &store.endpoint())],
    )
}

impl Disk {
    fn make(&self, guest: &Guest) {
        let Self { name, kind, policy } = self;
        guest.run(&format!(
            "device=$(attach {name}.vhd --create --size 320MiB {policy}); mkfs.{kind} -q $device; \
             mkdir -p /mnt/{name}; mount $device /mnt/{name}; sync -f /mnt/{name}"
        ));
    }

    /// Keeps the kernel from sending it any FLUSH or FUA from now on.
    fn stop_flushing(&self, guest: &Guest) {
        guest.run(&format!(
            "echo 'write through' >/sys/block/$(basename $(readlink /dev/dysk/{}))/queue/write_cache",
            self.name
        ));
    }

    /// Attaches what the last guest left, and lets the journal recover.
    fn mount(&self, guest: &Guest) {
        let Self { name, policy, .. } = self;
        guest.run(&format!(
            "device=$(attach {name}.vhd --break-lease {policy}); mkdir -p /mnt/{name}; \
             mount $device /mnt/{name}"
        ));
    }

    /// Looks for what was promised, and for damage.
    fn recover(&self, guest: &Guest, witness: &Witness) {
        let Self { name, kind, .. } = self;
        self.mount(guest);
        let said = self.check(guest, witness);
        assert!(said.succeeded(), "{name}: {}{}", said.out, said.err);
        println!("    {name}: {}", said.out.trim());
        let fsck = match *kind {
            "ext4" => "e2fsck -fn",
            _ => "xfs_repair -n",
        };
        guest.run(&format!(
            "device=$(readlink -f /dev/dysk/{name}); umount /mnt/{name}; {fsck} $device; \
             mount $device /mnt/{name}"
        ));
    }

    fn check(&self, guest: &Guest, witness: &Witness) -> guest::Answer {
        let name = self.name;
        let count = witness.count(name);
        assert!(count > 0, "{name}: nothing was acknowledged");
        guest.attempt(&format!(
            "python3 $DYSK_REPO/tests/kernel/guest/records.py check /mnt/{name} {}",
            count - 1
        ))
    }

    /// The writer that is promised something, and others that are not.
    fn load(&self, guest: &Guest, witness: &Witness) {
        let (name, port, first) = (self.name, witness.port(), witness.count(self.name));
        drop(guest.start(&format!(
            "python3 $DYSK_REPO/tests/kernel/guest/records.py write /mnt/{name} {name} {port} {first}"
        )));
        drop(guest.start(&format!(
            "fio --name=noise --directory=/mnt/{name} --size=32M --rw=randwrite --bsrange=4k-64k \
             --ioengine=libaio --iodepth=4 --direct=1 --rate_iops=60 --time_based --runtime=36000 \
             --fallocate=none >/dev/null"
        )));
        drop(guest.start(&format!(
            "while :; do cp -r /etc/default /mnt/{name}/churn; rm -r /mnt/{name}/churn; sleep 0.1; done"
        )));
    }
}

#[test]
fn what_was_fsynced_survives_power_cuts() {
    let _timed = lane::timed("power cuts");
    let cuts = lane::number("DYSK_POWER_CUTS", 1);
    let seed = lane::number("DYSK_SEED", rand::random());
    println!("seed {seed}, {cuts} cuts");
    let mut dice = StdRng::seed_from_u64(seed);
    let store = OutsideStore::start(&["--latency", "2ms"]);
    let witness = Witness::start();
    for cut in 0..=cuts {
        let began = Instant::now();
        let guest = boot(cut, &store);
        guest.up();
        println!("    booted in {:.1} s", began.elapsed().as_secs_f64());
        guest.start_daemon();
        std::thread::scope(|scope| {
            for disk in &DISKS {
                scope.spawn(|| match cut {
                    0 => disk.make(&guest),
                    _ => disk.recover(&guest, &witness),
                });
            }
        });
        guest.no_kernel_errors();
        println!(
            "    up and checked in {:.1} s",
            began.elapsed().as_secs_f64()
        );
        if cut == cuts {
            NEVER_FLUSHED.mount(&guest);
            let said = NEVER_FLUSHED.check(&guest, &witness);
            assert!(said.err.contains("are lost or torn"), "{said:?}");
            println!("    without flushes: {}", said.err.trim());
            return;
        }
        for disk in &DISKS {
            disk.load(&guest, &witness);
        }
        if cut == cuts - 1 {
            NEVER_FLUSHED.make(&guest);
            NEVER_FLUSHED.stop_flushing(&guest);
            NEVER_FLUSHED.load(&guest, &witness);
            witness.goes_on(NEVER_FLUSHED.name, 20, PATIENCE);
        }
        for disk in &DISKS {
            witness.goes_on(disk.name, 4, PATIENCE);
        }
        std::thread::sleep(Duration::from_millis(dice.random_range(0..4000)));
        guest.cut();
        let counts = DISKS.map(|disk| format!("{} {}", disk.name, witness.count(disk.name)));
        println!("cut {}: acknowledged: {}", cut + 1, counts.join(", "));
    }
}
