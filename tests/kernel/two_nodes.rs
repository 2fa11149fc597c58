//! Two nodes and one store. The first one is stalled, cut off or dead while it
//! writes at full load; the second takes its disks. Exactly one can write: what
//! the first sends late, or finds in its cache when it comes back, stays out.

use std::time::{Duration, Instant};

use crate::pods::Pods;
use crate::support::guest::{Guest, Pending};
use crate::support::lane;
use crate::support::outside_store::{OutsideStore, endpoint};
use crate::support::proxy::Proxy;

const MIB: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(120);
/// What an emulated processor on a busy machine may add to any figure.
const EMULATED: Duration = Duration::from_secs(30);
const CACHING: [&str; 2] = ["none", "read-write"];

/// What the first node has flushed, and what it writes all the time over it.
const OLD: u8 = 0xa0;
const FIRST: u8 = 0xaa;
/// What the second node writes over the first half, and once more over the
/// first quarter while the first node comes back.
const SECOND: u8 = 0xbb;
const AGAIN: u8 = 0xbc;

/// The disks that both nodes want, in MiB.
const SIZE: usize = 8;

/// One of them.
struct Disk {
    name: String,
    caching: &'static str,
    load: Pending,
}

/// Writes `mib` MiB of `byte` to the front of a disk, and flushes.
fn fill(name: &str, byte: u8, mib: usize) -> String {
    format!(
        "head -c {mib}M /dev/zero | tr '\\0' '\\{byte:o}' | \
         dd of=/dev/dysk/{name} bs=1M iflag=fullblock oflag=direct conv=fsync status=none"
    )
}

impl Disk {
    /// Attached by the first node and under load.
    fn under_load(first: &Guest, case: &str, caching: &'static str) -> Self {
        let name = format!("{case}-{caching}");
        first.run(&format!(
            "attach {name}.vhd --create --size {SIZE}MiB --caching {caching}; {}",
            fill(&name, OLD, SIZE)
        ));
        let load = first.start(&format!(
            "fio --name=load --filename=/dev/dysk/{name} --rw=randwrite --bs=4k --direct=1 \
             --ioengine=libaio --iodepth=16 --size={SIZE}M --buffer_pattern=0x{FIRST:x} --randrepeat=0 \
             --time_based --runtime=36000"
        ));
        // Beyond what filled it.
        let filled = SIZE * MIB / 512;
        first.run(&format!("eventually 60 moves {name} {}", filled + 1000));
        Self {
            name,
            caching,
            load,
        }
    }

    /// Attached by the second node, which can write; says how long that took.
    fn taken_by(&self, second: &Guest, how: &str, since: Instant) -> Duration {
        let (name, caching) = (&self.name, self.caching);
        second.run(&format!(
            "attach {name}.vhd {how} --caching {caching}; \
             dd if=/dev/zero of=/dev/dysk/{name} bs=4k count=1 oflag=direct conv=fsync status=none"
        ));
        let took = since.elapsed();
        println!("figure: {name}: writable on the second node after {took:.1?} with {how}");
        took
    }

    /// The second node's data is in the store, and of the first one's only
    /// what was there before the take-over: whole blocks, old or new.
    fn compare(&self, store: &OutsideStore, again: usize) -> Vec<u8> {
        let bytes = store.bytes(&format!("{}.vhd", self.name), (SIZE * MIB) as u64);
        let (ours, theirs) = bytes.split_at(SIZE / 2 * MIB);
        for (at, block) in ours.chunks(4096).enumerate() {
            let wanted = if at * 4096 < again { AGAIN } else { SECOND };
            let found = block[0];
            assert!(
                block.iter().all(|&byte| byte == wanted),
                "{}: block {at} is {found:x}, the second node wrote {wanted:x}",
                self.name
            );
        }
        for (at, block) in theirs.chunks(4096).enumerate() {
            let found = block[0];
            assert!(
                [OLD, FIRST].contains(&found) && block.iter().all(|&byte| byte == found),
                "{}: block {at} of the second half is lost or torn",
                self.name
            );
        }
        theirs.to_vec()
    }

    /// The first node is back: it is told EIO, and says why.
    fn fenced_on(&self, first: &Guest) {
        let name = &self.name;
        let load = self.load.answer(PATIENCE).expect("the guest is there");
        assert!(
            load.status != 0 && load.out.contains("err= 5"),
            "the load was told no EIO: {load:?}"
        );
        first.run(&format!("eventually 60 is_fenced {name}"));
        for access in ["if=/dev/zero of=/dev/dysk", "of=/dev/null if=/dev/dysk"] {
            let flag = if access.starts_with("if") { "o" } else { "i" };
            let tried = first.attempt(&format!(
                "dd {access}/{name} bs=4k count=1 {flag}flag=direct status=none"
            ));
            assert!(
                tried.err.contains("Input/output error"),
                "{name}: {access}: {tried:?}"
            );
        }
        if self.caching == "read-write" {
            first.run("ls /run/dysk/staging/*.aside");
        }
    }
}

/// Disks under load, one for each mode of caching named.
fn under_load(first: &Guest, case: &str, caching: &[&'static str]) -> Vec<Disk> {
    std::thread::scope(|scope| {
        let start = |&caching| scope.spawn(move || Disk::under_load(first, case, caching));
        let starting: Vec<_> = caching.iter().map(start).collect();
        let started = starting.into_iter();
        started
            .map(|disk| disk.join().expect("the load starts"))
            .collect()
    })
}

/// The first node is away and comes back while the second one writes.
fn away_and_back(
    case: &str,
    store: &OutsideStore,
    (first, second): (&Guest, &Guest),
    go_away: impl FnOnce(),
    come_back: impl FnOnce(),
) {
    let disks = under_load(first, case, &CACHING);
    let since = Instant::now();
    go_away();
    std::thread::scope(|scope| {
        for disk in &disks {
            scope.spawn(|| {
                let took = disk.taken_by(second, "--break-lease", since);
                assert!(took < Duration::from_secs(2) + EMULATED, "{took:?}");
                second.run(&fill(&disk.name, SECOND, SIZE / 2));
            });
        }
    });
    let before: Vec<_> = disks.iter().map(|disk| disk.compare(store, 0)).collect();
    let writing: Vec<_> = disks
        .iter()
        .map(|disk| second.start(&fill(&disk.name, AGAIN, SIZE / 4)))
        .collect();
    come_back();
    for (disk, writing) in disks.iter().zip(writing) {
        disk.fenced_on(first);
        let written = writing.answer(PATIENCE).expect("the guest is there");
        assert!(written.succeeded(), "the second node: {written:?}");
    }
    for (disk, before) in disks.iter().zip(before) {
        let after = disk.compare(store, SIZE / 4 * MIB);
        assert!(
            after == before,
            "{}: the first node wrote after it lost the disk",
            disk.name
        );
        first.run(&format!("dyskctl detach {} --force", disk.name));
        second.run(&format!("dyskctl detach {}", disk.name));
    }
    println!("ok {case}");
}

/// The first node is dead. Its disks are waited for, or taken.
fn dead(store: &OutsideStore, first: Guest, second: &Guest) {
    let waited = under_load(&first, "waited", &["none"]);
    let broken = under_load(&first, "broken", &["read-write"]);
    let pods = Pods::run(store, &first, second);
    let since = Instant::now();
    first.cut();
    std::thread::scope(|scope| {
        for disk in &waited {
            scope.spawn(|| {
                let took = disk.taken_by(second, "--wait 90s", since);
                assert!(took < Duration::from_secs(60) + EMULATED, "{took:?}");
            });
        }
        for disk in &broken {
            scope.spawn(|| {
                let took = disk.taken_by(second, "--break-lease", since);
                assert!(took < Duration::from_secs(2) + EMULATED, "{took:?}");
            });
        }
        scope.spawn(|| {
            let (lease, at_once) = (Duration::from_secs(60), Duration::from_secs(2));
            pods.move_to(second, since, (lease + EMULATED, at_once + EMULATED));
        });
    });
    for disk in waited.iter().chain(&broken) {
        second.run(&fill(&disk.name, SECOND, SIZE / 2));
        disk.compare(store, 0);
        second.run(&format!("dyskctl detach {}", disk.name));
    }
    println!("ok dead");
}

#[test]
fn exactly_one_of_two_nodes_can_write() {
    let _timed = lane::timed("two nodes");
    let store = OutsideStore::start(&["--latency", "2ms"]);
    let network = Proxy::to(store.port());
    let first = Guest::boot("first", "6.12", &[("endpoint", &endpoint(network.port()))]);
    let second = Guest::boot("second", "6.1", &[("endpoint", &store.endpoint())]);
    first.start_daemon();
    second.start_daemon();
    let both = (&first, &second);
    let signal = |name| drop(first.run(&format!("kill -{name} $(<$work/daemon)")));
    away_and_back(
        "stalled",
        &store,
        both,
        || signal("STOP"),
        || signal("CONT"),
    );
    away_and_back(
        "severed",
        &store,
        both,
        || network.sever(),
        || network.heal(),
    );
    // The whole machine, so that its clock jumps as well.
    away_and_back("frozen", &store, both, || first.freeze(), || first.thaw());
    second.no_kernel_errors();
    dead(&store, first, &second);
    second.no_kernel_errors();
}
