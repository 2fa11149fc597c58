//! Disks that are open while they grow or a snapshot of them is taken: ended at
//! every point, with writers that never pause, with requests that come late,
//! and through the daemon.

use std::sync::Arc;
use std::time::Duration;

use crate::support::node::{ACCOUNT, Node, Store, end_at, eventually};
use bytes::Bytes;
use dysk::blob::vhd::Layout;
use dysk::blob::{Checksum, Conditions, LeaseId, PageBlob, Range, SequenceNumber};
use dysk::device::BlockDevice;
use dysk::emulator::{Effect, Operation, Rule};
use dysk::volume::{self, Caching, OpenOptions, StagingOptions, Volume};

const DEADLINE: Duration = Duration::from_secs(10);
const OLD: u64 = 1 << 20;
const NEW: u64 = 3 << 20;

fn page(byte: u8) -> Bytes {
    Bytes::from(vec![byte; 512])
}

async fn write(volume: &Volume, offset: u64, byte: u8) {
    let written = volume.write(offset, page(byte), false).await;
    written.expect("it is written");
}

async fn read(volume: &Volume, offset: u64) -> Vec<u8> {
    let read = volume.read(offset, 512).await.expect("it is read");
    read.to_bytes().to_vec()
}

fn open(store: &Store, name: &str, lease: &LeaseId, resume: bool) -> Arc<Volume> {
    let options = OpenOptions {
        resume,
        ..OpenOptions::new(lease.clone())
    };
    let opened = store.block_on(Volume::open(store.blob(name), options));
    opened.expect("it opens")
}

fn as_it_lies(store: &Store, name: &str) -> (u64, Layout) {
    let disk = store.block_on(volume::inspect(&store.blob(name), DEADLINE));
    let disk = disk.expect("it is a disk");
    (disk.size, disk.layout)
}

/// Every request of an open disk's growing that changes the blob.
const STEPS: [Operation; 4] = [
    Operation::SetBlobMetadata,
    Operation::SetBlobProperties,
    Operation::ClearPages,
    Operation::PutPage,
];

#[test]
fn growing_in_use_that_ends_anywhere_leaves_the_old_disk_or_the_new() {
    let store = Store::start();
    for operation in STEPS {
        for applied in [false, true] {
            for dies in [false, true] {
                let name = format!("{operation:?}{applied}{dies}.vhd");
                store.create(&name, OLD);
                let lease = LeaseId::random();
                let volume = open(&store, &name, &lease, false);
                store.block_on(async {
                    write(&volume, 0, 1).await;
                    write(&volume, OLD - 512, 2).await;
                });
                store
                    .running
                    .faults()
                    .set(vec![end_at(operation, 0, applied)]);
                let ended = store.block_on(volume.grow(NEW));
                ended.expect_err("the injected end");
                assert_eq!(store.running.faults().report()[0].struck, 1, "{name}");
                store.running.faults().set(Vec::new());
                assert_eq!(volume.status().size, OLD, "{name}");

                let volume = if dies {
                    // The daemon dies here: its lease stays, and the next one
                    // of the node resumes it.
                    std::mem::forget(volume);
                    let size = as_it_lies(&store, &name);
                    assert!(matches!(size, (OLD | NEW, Layout::Vhd)), "{name}: {size:?}");
                    open(&store, &name, &lease, true)
                } else {
                    // What went wrong keeps nobody from its old part.
                    store.block_on(write(&volume, 512, 3));
                    volume
                };
                store.block_on(async {
                    let grown = volume.grow(NEW).await.expect("the repeat succeeds");
                    assert_eq!(grown, NEW, "{name}");
                    assert_eq!(read(&volume, 0).await, page(1), "{name}");
                    assert_eq!(read(&volume, OLD - 512).await, page(2), "{name}");
                    for offset in (OLD..NEW).step_by(512) {
                        assert_eq!(read(&volume, offset).await, page(0), "{name}: {offset}");
                    }
                    write(&volume, NEW - 512, 4).await;
                    volume.close().await.expect("it closes");
                });
                assert_eq!(as_it_lies(&store, &name), (NEW, Layout::Vhd), "{name}");
            }
        }
    }
}

#[test]
fn another_size_after_an_end_half_way_goes_over_the_first() {
    let store = Store::start();
    store.create("twice.vhd", OLD);
    let volume = open(&store, "twice.vhd", &LeaseId::random(), false);
    let end = end_at(Operation::ClearPages, 0, false);
    store.running.faults().set(vec![end]);
    let ended = store.block_on(volume.grow(NEW));
    ended.expect_err("the injected end");
    // The blob has the first size and no footer: ended once more, now before
    // the second size, it must not be taken for a raw disk.
    let end = end_at(Operation::SetBlobProperties, 0, false);
    store.running.faults().set(vec![end]);
    let ended = store.block_on(volume.grow(2 * NEW));
    ended.expect_err("the injected end");
    assert_eq!(as_it_lies(&store, "twice.vhd"), (NEW, Layout::Vhd));
    store.running.faults().set(Vec::new());
    assert_eq!(
        store.block_on(volume.grow(2 * NEW)).expect("grows"),
        2 * NEW
    );
    assert_eq!(as_it_lies(&store, "twice.vhd"), (2 * NEW, Layout::Vhd));
}

#[test]
fn every_layout_grows_in_use() {
    let store = Store::start();
    // It makes the container.
    store.create("vhd.vhd", OLD);
    let raw = store.blob("raw.img");
    store
        .block_on(volume::create(&raw, OLD, Layout::Raw, DEADLINE))
        .expect("made");
    let legacy = store.blob("legacy.vhd");
    let none = Conditions::default();
    let footer = dysk::blob::vhd::footer(OLD, 1, [7; 16]);
    let footer = Bytes::copy_from_slice(&footer);
    store.block_on(async {
        let made = legacy.create(OLD, &[], &none, DEADLINE).await;
        made.expect("made");
        let put = legacy.put_page(OLD - 512, footer, Checksum::Off, &none, DEADLINE);
        put.await.expect("written");
    });
    for (name, layout) in [
        ("vhd.vhd", Layout::Vhd),
        ("raw.img", Layout::Raw),
        ("legacy.vhd", Layout::LegacyVhd),
    ] {
        let volume = open(&store, name, &LeaseId::random(), false);
        let grown = store.block_on(volume.grow(NEW)).expect("it grows");
        assert_eq!(grown, NEW, "{name}");
        let kept = store.block_on(volume.grow(OLD)).expect("large enough");
        assert_eq!(kept, NEW, "{name}: never smaller");
        store.block_on(write(&volume, NEW - 512, 5));
        store.block_on(volume.close()).expect("it closes");
        assert_eq!(as_it_lies(&store, name), (NEW, layout), "{name}");
    }
}

/// The request is executed long after it was repeated.
fn late() -> Effect {
    Effect::late(Duration::from_millis(700))
}

fn wait_for_the_late_one(store: &Store) {
    eventually("the late request is judged", || {
        let late = store.running.stats().late;
        late.scheduled == 1 && late.applied + late.refused == 1
    });
}

#[test]
fn the_old_footers_place_is_never_emptied_after_it_was_written_to() {
    let store = Store::start();
    store.create("late.vhd", OLD);
    let volume = open(&store, "late.vhd", &LeaseId::random(), false);
    let faults = store.running.faults();
    faults.set(vec![Rule::on(Operation::ClearPages, late()).times(1)]);
    store.block_on(async {
        assert_eq!(volume.grow(NEW).await.expect("it grows"), NEW);
        // The place of the old footer is the disk's first new page.
        write(&volume, OLD, 7).await;
    });
    wait_for_the_late_one(&store);
    assert_eq!(store.block_on(read(&volume, OLD)), page(7));
    assert_eq!(store.running.stats().late.refused, 1);
}

#[test]
fn without_the_raise_the_late_emptying_would_take_what_was_written() {
    // The contrast of the test above: the same requests, the fence left as it is.
    let store = Store::start();
    store.create("contrast.vhd", OLD);
    let blob: PageBlob = store.blob("contrast.vhd");
    store.block_on(async {
        let none = Conditions::default();
        let raise = SequenceNumber::Increment;
        let raised = blob.set_sequence_number(raise, &none, DEADLINE).await;
        let fence = Conditions {
            if_sequence_number_lt: Some(raised.expect("raised").sequence_number + 1),
            ..Conditions::default()
        };
        let old_footer = Range::at(OLD, 512);
        let faults = store.running.faults();
        faults.set(vec![Rule::on(Operation::ClearPages, late()).times(1)]);
        let first = blob.clear_pages(old_footer, &fence, DEADLINE).await;
        first.expect_err("its answer is lost");
        let again = blob.clear_pages(old_footer, &fence, DEADLINE).await;
        again.expect("repeated");
        let put = blob.put_page(OLD, page(7), Checksum::Off, &fence, DEADLINE);
        put.await.expect("written");
    });
    wait_for_the_late_one(&store);
    let none = Conditions::default();
    let read = blob.get_range(Range::at(OLD, 512), Checksum::Off, &none, DEADLINE);
    let read = store.block_on(read).expect("it is read");
    assert_eq!(read.pieces.concat(), page(0), "the write is lost");
}

#[test]
fn a_resize_that_comes_late_does_not_shrink_a_disk_in_use() {
    let store = Store::start();
    store.create("shrink.vhd", OLD);
    let volume = open(&store, "shrink.vhd", &LeaseId::random(), false);
    let faults = store.running.faults();
    faults.set(vec![
        Rule::on(Operation::SetBlobProperties, late()).times(1),
    ]);
    store.block_on(async {
        assert_eq!(volume.grow(NEW).await.expect("it grows"), NEW);
        assert_eq!(volume.grow(2 * NEW).await.expect("again"), 2 * NEW);
        write(&volume, 2 * NEW - 512, 8).await;
    });
    wait_for_the_late_one(&store);
    assert_eq!(as_it_lies(&store, "shrink.vhd"), (2 * NEW, Layout::Vhd));
    assert_eq!(store.block_on(read(&volume, 2 * NEW - 512)), page(8));
}

/// Writers that never pause change the entity tag all the time: without the
/// hold no resize would find the blob as it saw it.
#[test]
fn a_disk_grows_under_writers_that_never_pause() {
    for caching in [Caching::None, Caching::ReadWrite] {
        let store = Store::start();
        store.create("busy.vhd", OLD);
        let staging = tempfile::tempdir().expect("a folder");
        let options = OpenOptions {
            caching,
            staging: StagingOptions {
                dir: staging.path().into(),
                ..StagingOptions::default()
            },
            ..OpenOptions::new(LeaseId::random())
        };
        let blob = store.blob("busy.vhd");
        store.block_on(async {
            let volume = Volume::open(blob, options).await;
            let volume = volume.expect("it opens");
            let stop = tokio::sync::watch::Sender::new(false);
            let writers: Vec<_> = (0..8u64)
                .map(|writer| {
                    let (volume, stop) = (volume.clone(), stop.subscribe());
                    tokio::spawn(async move {
                        let mut rounds = 0u64;
                        while !*stop.borrow() || rounds < 6 {
                            let round = u8::try_from(rounds % 251).expect("small");
                            write(&volume, writer * 4096, round).await;
                            volume.flush().await.expect("flushed");
                            rounds += 1;
                        }
                        (writer, rounds)
                    })
                })
                .collect();
            for step in 1..=5 {
                let size = OLD + (step << 20);
                assert_eq!(volume.grow(size).await.expect("it grows"), size);
                write(&volume, size - 512, 9).await;
            }
            stop.send_replace(true);
            for done in writers {
                let (writer, rounds) = done.await.expect("no writer failed");
                assert!(rounds > 5, "writer {writer}: {rounds}");
                let last = u8::try_from((rounds - 1) % 251).expect("small");
                assert_eq!(read(&volume, writer * 4096).await, page(last));
            }
            for step in 1..=5u64 {
                assert_eq!(read(&volume, OLD + (step << 20) - 512).await, page(9));
            }
            volume.close().await.expect("it closes");
        });
        assert_eq!(
            as_it_lies(&store, "busy.vhd"),
            (OLD + (5 << 20), Layout::Vhd)
        );
    }
}

#[test]
fn a_store_that_does_not_answer_holds_writes_for_a_bounded_time() {
    let store = Store::start();
    store.create("silent.vhd", OLD);
    let volume = open(&store, "silent.vhd", &LeaseId::random(), false);
    let silent = Rule::on(Operation::SetBlobMetadata, Effect::ResetBefore);
    store.running.faults().set(vec![silent]);
    store.block_on(async {
        let other = volume.clone();
        let growing = tokio::spawn(async move { other.grow(NEW).await });
        // Writes come through, at the latest when the hold has ended.
        for round in 0..100u8 {
            write(&volume, 0, round).await;
        }
        let text = growing
            .await
            .expect("ends")
            .expect_err("no answer")
            .to_string();
        assert!(text.contains("no answer in time"), "{text}");
        write(&volume, 0, 200).await;
    });
    store.running.faults().set(Vec::new());
    assert_eq!(store.block_on(volume.grow(NEW)).expect("it grows"), NEW);
}

#[test]
fn the_daemon_grows_what_is_attached_and_the_commands_say_so() {
    let store = Store::start();
    store.create("vol1.vhd", OLD);
    let node = Node::start();
    let ctl = node.ctl();
    let endpoint = store.endpoint();
    let volume = format!("{ACCOUNT}/dysks/vol1.vhd");
    let attached = ctl.run(&["attach", &volume, "--endpoint", &endpoint]);
    let device = attached.ok().trim().to_owned();
    for (named, size, bytes) in [
        ("vol1", "2MiB", 2u64 << 20),
        (device.as_str(), "3MiB", 3 << 20),
        (volume.as_str(), "4MiB", 4 << 20),
        ("vol1", "4MiB", 4 << 20),
    ] {
        let said = ctl.run(&["resize", named, "--size", size]);
        assert_eq!((said.code, said.out.as_str()), (Some(0), ""), "{said:?}");
        let remedy = format!("vol1: {device} has {size}: grow its filesystem with `resize2fs");
        assert!(said.err.contains(&remedy), "{said:?}");
        let record = std::fs::read_to_string(node.record("vol1")).expect("a record");
        assert!(record.contains(&format!("\"size\": {bytes}")), "{record}");
        let log = node.transport.log.lock().expect("lock").clone();
        assert_eq!(log.last(), Some(&format!("resize vol1 to {bytes}")));
        let lies = as_it_lies(&store, "vol1.vhd");
        assert_eq!(lies, (bytes, Layout::Vhd));
    }
    ctl.run(&["resize", "vol1", "--size", "1MiB"])
        .fails("vol1: it has 4MiB already and never shrinks: copy its content to a smaller volume");
    ctl.run(&["resize", "vol1", "--size", "5000000"]).fails(
        "devstoreaccount1/dysks/vol1.vhd: size 5000000 is no multiple of 512 bytes: use 5000192",
    );
    // Attached on another node: only that one can.
    let elsewhere = Node::prepare().ctl();
    elsewhere
        .run(&["resize", &volume, "--size", "1GiB", "--endpoint", &endpoint])
        .fails(
            "devstoreaccount1/dysks/vol1.vhd: leased elsewhere: its holder alone can resize it: \
             detach it first, or resize it where it is attached",
        );
    ctl.run(&["resize", "/dev/nothing", "--size", "1GiB"])
        .fails("/dev/nothing is not attached by dyskd: see `dyskctl list`");
    ctl.run(&["detach", "vol1"]).says("");
    let attached = ctl.run(&["attach", &volume, "--read-only", "--endpoint", &endpoint]);
    attached.ok();
    ctl.run(&["resize", "vol1", "--size", "1GiB"]).fails(
        "vol1 is attached read-only, without the lease that a resize needs: \
         detach it, or resize it where it is attached for writing",
    );
}

fn cached(store: &Store, name: &str, staging: &std::path::Path) -> Arc<Volume> {
    let options = OpenOptions {
        caching: Caching::ReadWrite,
        staging: StagingOptions {
            dir: staging.into(),
            ..StagingOptions::default()
        },
        ..OpenOptions::new(LeaseId::random())
    };
    let opened = store.block_on(Volume::open(store.blob(name), options));
    opened.expect("it opens")
}

fn page_of_snapshot(store: &Store, name: &str, time: &str, offset: u64) -> Vec<u8> {
    let blob = store.blob(name).at_snapshot(time);
    let none = Conditions::default();
    let read = blob.get_range(Range::at(offset, 512), Checksum::Off, &none, DEADLINE);
    store.block_on(read).expect("it is read").pieces.concat()
}

#[test]
fn a_snapshot_of_an_open_disk_has_what_its_cache_holds_and_one_from_outside_has_not() {
    let store = Store::start();
    store.create("cached.vhd", OLD);
    let staging = tempfile::tempdir().expect("a folder");
    let volume = cached(&store, "cached.vhd", staging.path());
    let blob = store.blob("cached.vhd");
    store.block_on(async {
        write(&volume, 0, 1).await;
        volume.flush().await.expect("flushed");
        write(&volume, 512, 2).await;
    });
    // From outside: as a power cut would leave it. What was flushed is there.
    let outside = store.block_on(volume::create_snapshot(&blob, "outside", DEADLINE));
    let outside = outside.expect("taken").time;
    let unflushed = volume.status().cache.expect("a cache").dirty_bytes;
    assert_eq!(page_of_snapshot(&store, "cached.vhd", &outside, 0), page(1));
    assert!(
        unflushed > 0,
        "written back before the snapshot: no contrast"
    );
    assert_eq!(
        page_of_snapshot(&store, "cached.vhd", &outside, 512),
        page(0)
    );
    let inside = store.block_on(volume.snapshot("inside")).expect("taken");
    assert_eq!(
        page_of_snapshot(&store, "cached.vhd", &inside.time, 512),
        page(2)
    );
    let again = store.block_on(volume.snapshot("inside")).expect("found");
    assert_eq!(again, inside);
    // What is written afterwards is in neither.
    store.block_on(async {
        write(&volume, 512, 3).await;
        volume.close().await.expect("it closes");
    });
    assert_eq!(
        page_of_snapshot(&store, "cached.vhd", &inside.time, 512),
        page(2)
    );
}

#[test]
fn a_snapshot_that_is_not_answered_lets_writes_go_on_and_is_taken_once() {
    let store = Store::start();
    store.create("lost.vhd", OLD);
    let volume = open(&store, "lost.vhd", &LeaseId::random(), false);
    let list = || {
        let listed = store.block_on(volume::list_snapshots(&store.blob("lost.vhd"), DEADLINE));
        listed.expect("a list").len()
    };
    // An answer that is lost: it is found again.
    let faults = store.running.faults();
    faults.set(vec![
        Rule::on(Operation::SnapshotBlob, Effect::ResetAfter).times(1),
    ]);
    let found = store.block_on(volume.snapshot("lost")).expect("found");
    assert_eq!(found.name.as_deref(), Some("lost"));
    assert_eq!(list(), 1);
    // One that comes late, after a write: it is refused, not of another moment.
    faults.set(vec![Rule::on(Operation::SnapshotBlob, late()).times(1)]);
    store.block_on(async {
        let text = volume
            .snapshot("late")
            .await
            .expect_err("no answer")
            .to_string();
        assert!(text.contains("connection broken"), "{text}");
        write(&volume, 0, 1).await;
    });
    wait_for_the_late_one(&store);
    assert_eq!(store.running.stats().late.refused, 1);
    assert_eq!(list(), 1);
    // A store that holds the request holds no writes beyond the bound.
    let stall = Effect::Stall {
        delay: "60s".parse().expect("a span"),
        after: false,
    };
    faults.set(vec![Rule::on(Operation::SnapshotBlob, stall).times(1)]);
    store.block_on(async {
        let other = volume.clone();
        let taking = tokio::spawn(async move { other.snapshot("stalled").await });
        for round in 0..100u8 {
            write(&volume, 0, round).await;
        }
        taking.await.expect("ends").expect_err("no answer");
        write(&volume, 0, 200).await;
    });
    faults.set(Vec::new());
    assert_eq!(store.block_on(read(&volume, 0)), page(200));
    store.block_on(volume.snapshot("stalled")).expect("taken");
    assert_eq!(list(), 2);
}

#[test]
fn dyskctl_has_the_daemon_take_the_snapshot_of_what_is_attached_here() {
    let store = Store::start();
    store.create("vol1.vhd", OLD);
    let node = Node::start();
    let ctl = node.ctl();
    let endpoint = store.endpoint();
    let volume = format!("{ACCOUNT}/dysks/vol1.vhd");
    let staging = node.dir.path().join("staging");
    let staging = staging.to_str().expect("utf-8");
    let attach = ["attach", &volume, "--endpoint", &endpoint];
    let cached = ["--caching", "read-write", "--staging-dir", staging];
    let said = ctl.run(&[&attach[..], &cached].concat());
    let device = said.ok().trim().to_owned();
    // No credential of the person's: the daemon has them.
    let bare = ctl.with(&[]);
    let said = bare.run(&["snapshot", "create", "vol1", "--name", "one"]);
    let snapshot = said.ok().trim().to_owned();
    assert!(snapshot.starts_with(&format!("{volume}@20")), "{snapshot}");
    for named in [volume.as_str(), device.as_str()] {
        bare.run(&["snapshot", "create", named, "--name", "one"])
            .says(&format!("{snapshot}\n"));
    }
    assert_eq!(store.running.stats().requests(Operation::SnapshotBlob), 1);
}
