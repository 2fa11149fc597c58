//! Disks in the store, without a daemon: growing ended at every point,
//! snapshots whose answer was lost, copies that are interrupted and repeated.

use std::time::Duration;

use crate::support::node::{ACCOUNT, Node, Store, end_at, eventually};
use bytes::Bytes;
use dysk::blob::vhd::Layout;
use dysk::blob::{Checksum, Conditions, LeaseId, LeaseState, PageBlob, Range};
use dysk::emulator::{Effect, Operation, Rule, SettingsChange};
use dysk::volume::{self, Copied, CopyPlan, OpenOptions, Volume};

const DEADLINE: Duration = Duration::from_secs(10);
const OLD: u64 = 1 << 20;
const NEW: u64 = 3 << 20;

fn write(store: &Store, blob: &PageBlob, offset: u64, byte: u8) {
    let data = Bytes::from(vec![byte; 512]);
    let none = Conditions::default();
    store
        .block_on(blob.put_page(offset, data, Checksum::Off, &none, DEADLINE))
        .expect("the page is written");
}

fn read(store: &Store, blob: &PageBlob, range: Range) -> Vec<u8> {
    let none = Conditions::default();
    let read = store
        .block_on(blob.get_range(range, Checksum::Off, &none, DEADLINE))
        .expect("the range is read");
    read.pieces.concat()
}

fn size(store: &Store, blob: &PageBlob) -> (u64, Layout) {
    let disk = store.block_on(volume::inspect(blob, DEADLINE));
    let disk = disk.expect("it is a disk");
    (disk.size, disk.layout)
}

/// The old disk's bytes are there, and what is beyond them is zero.
fn assert_content(store: &Store, blob: &PageBlob, size: u64) {
    let all = read(store, blob, Range::at(0, size));
    let at = |offset: u64| &all[usize::try_from(offset).expect("small")..][..512];
    assert_eq!(at(0), [1; 512]);
    assert_eq!(at(OLD - 512), [2; 512]);
    let beyond = &all[usize::try_from(OLD).expect("small")..];
    assert!(beyond.iter().all(|&byte| byte == 0), "zeroes beyond");
}

/// Opens it as a daemon does, and gives it back: size and layout.
fn open(store: &Store, blob: &PageBlob, read_only: bool) -> (u64, Layout) {
    store.block_on(async {
        let options = OpenOptions {
            read_only,
            ..OpenOptions::new(LeaseId::random())
        };
        let opened = Volume::open(blob.clone(), options).await.expect("opens");
        let status = opened.status();
        opened.close().await.expect("closes");
        (status.size, status.layout)
    })
}

/// Every request that changes the blob while it grows, by operation and how
/// many of that operation come before it.
const STEPS: [(Operation, u64); 6] = [
    (Operation::SetBlobProperties, 0),
    (Operation::SetBlobMetadata, 0),
    (Operation::SetBlobProperties, 1),
    (Operation::ClearPages, 0),
    (Operation::PutPage, 0),
    (Operation::SetBlobMetadata, 1),
];

#[test]
fn growing_that_ends_anywhere_leaves_the_old_disk_or_the_new() {
    let store = Store::start();
    for (step, (operation, skip)) in STEPS.into_iter().enumerate() {
        for applied in [false, true] {
            for opened in [false, true] {
                let name = format!("grow{step}{applied}{opened}.vhd");
                store.create(&name, OLD);
                let blob = store.blob(&name);
                write(&store, &blob, 0, 1);
                write(&store, &blob, OLD - 512, 2);
                let end = end_at(operation, skip, applied);
                store.running.faults().set(vec![end]);
                let ended = store.block_on(volume::grow(&blob, NEW, DEADLINE));
                ended.expect_err("the injected end");
                assert_eq!(store.running.faults().report()[0].struck, 1, "{name}");
                store.running.faults().set(Vec::new());

                let (now, layout) = open(&store, &blob, true);
                assert!(matches!(now, OLD | NEW), "{name}: {now}");
                assert_eq!(layout, Layout::Vhd, "{name}");
                assert_eq!(size(&store, &blob), (now, Layout::Vhd), "{name}");
                if opened {
                    // A daemon opens what is there, and completes it.
                    let (size, layout) = open(&store, &blob, false);
                    assert!(matches!(size, OLD | NEW), "{name}: {size}");
                    assert_eq!(layout, Layout::Vhd, "{name}");
                    assert_content(&store, &blob, size);
                }
                let grown = store.block_on(volume::grow(&blob, NEW, DEADLINE));
                assert_eq!(grown.expect("the repeat succeeds"), NEW, "{name}");
                assert_eq!(size(&store, &blob), (NEW, Layout::Vhd), "{name}");
                assert_content(&store, &blob, NEW);
                assert_eq!(store.lease(&name), LeaseState::Available, "{name}");
            }
        }
    }
}

#[test]
fn every_layout_grows_and_keeps_its_own() {
    let store = Store::start();
    store.create("vhd.vhd", OLD);
    let raw = store.blob("raw.img");
    store
        .block_on(volume::create(&raw, OLD, Layout::Raw, DEADLINE))
        .expect("made");
    let legacy = store.blob("legacy.vhd");
    let none = Conditions::default();
    store
        .block_on(legacy.create(OLD, &[], &none, DEADLINE))
        .expect("made");
    let footer = dysk::blob::vhd::footer(OLD, 1, [7; 16]);
    let footer = Bytes::copy_from_slice(&footer);
    store
        .block_on(legacy.put_page(OLD - 512, footer, Checksum::Off, &none, DEADLINE))
        .expect("written");
    for (name, layout) in [
        ("vhd.vhd", Layout::Vhd),
        ("raw.img", Layout::Raw),
        ("legacy.vhd", Layout::LegacyVhd),
    ] {
        let blob = store.blob(name);
        assert_eq!(size(&store, &blob).1, layout, "{name}");
        let grown = store.block_on(volume::grow(&blob, NEW, DEADLINE));
        assert_eq!(grown.expect("it grows"), NEW, "{name}");
        assert_eq!(size(&store, &blob), (NEW, layout), "{name}");
        // Never smaller.
        let kept = store.block_on(volume::grow(&blob, OLD, DEADLINE));
        assert_eq!(kept.expect("it is large enough"), NEW, "{name}");
        assert_eq!(open(&store, &blob, false), (NEW, layout), "{name}");
    }
}

#[test]
fn a_resize_that_comes_late_does_not_shrink_what_has_grown_since() {
    let store = Store::start();
    store.create("late.vhd", OLD);
    let blob = store.blob("late.vhd");
    let late = Effect::late(Duration::from_millis(700));
    let faults = store.running.faults();
    faults.set(vec![Rule {
        skip: 1,
        ..Rule::on(Operation::SetBlobProperties, late).times(1)
    }]);
    let grow = |to| store.block_on(volume::grow(&blob, to, DEADLINE));
    assert_eq!(grow(NEW).expect("it grows"), NEW);
    assert_eq!(grow(2 * NEW).expect("it grows again"), 2 * NEW);
    let settled = || {
        let late = store.running.stats().late;
        late.scheduled == 1 && late.applied + late.refused == 1
    };
    eventually("the late resize is judged", settled);
    assert_eq!(size(&store, &blob), (2 * NEW, Layout::Vhd));
}

#[test]
fn a_half_made_blob_becomes_the_disk_it_was_meant_to_be() {
    let store = Store::start();
    store.create("first.vhd", OLD);
    let blob = store.blob("half.vhd");
    // The footer does not get there, nor does the request that takes the blob
    // back: as if the maker had died in between.
    store.running.faults().set(vec![
        end_at(Operation::PutPage, 0, false),
        end_at(Operation::DeleteBlob, 0, false),
    ]);
    let made = store.block_on(volume::create(&blob, OLD, Layout::Vhd, DEADLINE));
    made.expect_err("the injected end");
    store.running.faults().set(Vec::new());
    assert_eq!(size(&store, &blob), (0, Layout::Vhd));
    assert_eq!(open(&store, &blob, false), (OLD, Layout::Vhd));
    assert_eq!(size(&store, &blob), (OLD, Layout::Vhd));
}

#[test]
fn an_attached_disk_is_not_resized_behind_its_holders_back() {
    let store = Store::start();
    store.create("held.vhd", OLD);
    store.hold_lease("held.vhd");
    let blob = store.blob("held.vhd");
    let grown = store.block_on(volume::grow(&blob, NEW, DEADLINE));
    let text = grown.expect_err("it is leased").to_string();
    assert!(text.contains("leased elsewhere"), "{text}");
    assert_eq!(size(&store, &blob), (OLD, Layout::Vhd));
}

#[test]
fn a_snapshot_whose_answer_is_lost_is_taken_once() {
    let store = Store::start();
    store.create("snap.vhd", OLD);
    store.create("snap.vhd2", OLD);
    store.hold_lease("snap.vhd");
    let blob = store.blob("snap.vhd");
    let name = "nightly / \u{fc} \"1\"";
    let lost = Rule::on(Operation::SnapshotBlob, Effect::ResetAfter).times(1);
    store.running.faults().set(vec![lost]);
    let take = || store.block_on(volume::create_snapshot(&blob, name, DEADLINE));
    let first = take().expect("it is found again");
    assert_eq!(store.running.faults().report()[0].struck, 1);
    assert_eq!(take().expect("found"), first);
    let list = || store.block_on(volume::list_snapshots(&blob, DEADLINE));
    assert_eq!(list().expect("a list"), std::slice::from_ref(&first));
    assert_eq!(first.name.as_deref(), Some(name));
    let other = store.block_on(volume::create_snapshot(&blob, "other", DEADLINE));
    assert_ne!(other.expect("taken").time, first.time);
    let neighbour = store.blob("snap.vhd2");
    let none = store.block_on(volume::list_snapshots(&neighbour, DEADLINE));
    assert!(none.expect("a list").is_empty());
    for _ in 0..2 {
        store
            .block_on(volume::delete_snapshot(&blob, &first.time, DEADLINE))
            .expect("deleted");
    }
    assert_eq!(list().expect("a list").len(), 1);
}

fn plan(mark: &str, disk_size: Option<u64>) -> CopyPlan {
    CopyPlan {
        mark: mark.into(),
        disk_size,
        metadata: vec![("owner".into(), "me".into())],
    }
}

/// A store with `source.vhd`, which holds the pages of [`assert_content`].
fn with_source() -> (Store, PageBlob) {
    let store = Store::start();
    store.create("source.vhd", OLD);
    let source = store.blob("source.vhd");
    write(&store, &source, 0, 1);
    write(&store, &source, OLD - 512, 2);
    (store, source)
}

#[test]
fn a_copy_shares_nothing_with_its_source_and_may_be_larger() {
    let (store, source) = with_source();
    store.hold_lease("source.vhd");
    let new = store.blob("copy.vhd");
    let lost = Rule::on(Operation::CopyBlob, Effect::ResetAfter).times(1);
    store.running.faults().set(vec![lost]);
    let mut last = (0, 0);
    let mut copy = |mark| {
        let progress = |done, all| last = (done, all);
        store.block_on(volume::copy(
            &source,
            &new,
            &plan(mark, Some(NEW)),
            progress,
            DEADLINE,
        ))
    };
    assert_eq!(copy("a").expect("it is copied"), Copied::Now(NEW));
    assert_eq!(copy("a").expect("it was copied"), Copied::Before(NEW));
    let text = copy("b").expect_err("another's").to_string();
    assert!(text.contains("a blob of this name already"), "{text}");
    assert_eq!(last, (OLD + 512, OLD + 512));
    assert_eq!(size(&store, &new), (NEW, Layout::Vhd));
    assert_content(&store, &new, NEW);
    let seen = store.block_on(new.properties(&Conditions::default(), DEADLINE));
    let metadata = seen.expect("it is there").metadata;
    assert!(
        metadata.contains(&("owner".into(), "me".into())),
        "{metadata:?}"
    );
    // Neither sees the other's writes, and nothing is left of the snapshot.
    write(&store, &new, 0, 9);
    assert_eq!(read(&store, &source, Range::at(0, 512)), [1; 512]);
    let left = store.block_on(volume::list_snapshots(&source, DEADLINE));
    assert!(left.expect("a list").is_empty());
    let small = store.blob("small.vhd");
    let copied = store.block_on(volume::copy(
        &source,
        &small,
        &plan("a", Some(512)),
        |_, _| {},
        DEADLINE,
    ));
    let text = copied.expect_err("too small").to_string();
    assert!(text.contains("cannot hold"), "{text}");
    assert!(!store.exists("small.vhd"));
}

#[test]
fn an_interrupted_copy_is_no_disk_until_a_repeat_brings_it_to_its_end() {
    let (store, source) = with_source();
    let slow = SettingsChange {
        copy_bandwidth: Some(400 << 10),
        ..SettingsChange::default()
    };
    store.running.change(&slow).expect("taken");
    let new = store.blob("copy.vhd");
    let begun = store.block_on(async {
        let (began, mut under_way) = tokio::sync::mpsc::unbounded_channel();
        let wanted = plan("a", None);
        let copy = volume::copy(
            &source,
            &new,
            &wanted,
            |_, _| began.send(()).expect("the test waits"),
            DEADLINE,
        );
        // Dropped in the middle.
        tokio::select! {
            ended = copy => Some(ended),
            _ = under_way.recv() => None,
        }
    });
    assert!(begun.is_none(), "too fast to be interrupted: {begun:?}");
    let opened = store.block_on(Volume::open(
        new.clone(),
        OpenOptions::new(LeaseId::random()),
    ));
    let text = opened.expect_err("it is not complete").to_string();
    assert!(text.contains("still being copied"), "{text}");
    let fast = SettingsChange {
        copy_bandwidth: Some(0),
        ..SettingsChange::default()
    };
    store.running.change(&fast).expect("taken");
    let repeated = store.block_on(volume::copy(
        &source,
        &new,
        &plan("a", None),
        |_, _| {},
        DEADLINE,
    ));
    assert_eq!(repeated.expect("it ends"), Copied::Now(OLD));
    assert_content(&store, &new, OLD);
    let left = store.block_on(volume::list_snapshots(&source, DEADLINE));
    assert!(left.expect("a list").is_empty());
    assert_eq!(store.running.stats().requests(Operation::CopyBlob), 1);
}

#[test]
fn a_copy_takes_no_old_snapshot_and_leaves_none() {
    let (store, source) = with_source();
    let new = store.blob("copy.vhd");
    let copy = |size| {
        let wanted = plan("a", size);
        store.block_on(volume::copy(&source, &new, &wanted, |_, _| {}, DEADLINE))
    };
    let left = || {
        let left = store.block_on(volume::list_snapshots(&source, DEADLINE));
        left.expect("a list").len()
    };
    // A call that died between its snapshot and the copy, long ago.
    let name = format!("copy to {}", new.address());
    store
        .block_on(volume::create_snapshot(&source, &name, DEADLINE))
        .expect("taken");
    write(&store, &source, 512, 7);
    copy(Some(512)).expect_err("too small");
    assert_eq!(left(), 0, "of a copy that was refused");
    store
        .block_on(volume::create_snapshot(&source, &name, DEADLINE))
        .expect("taken");
    write(&store, &source, 1024, 8);
    assert_eq!(copy(None).expect("copied"), Copied::Now(OLD));
    assert_eq!(read(&store, &new, Range::at(512, 512)), [7; 512]);
    assert_eq!(read(&store, &new, Range::at(1024, 512)), [8; 512]);
    assert_eq!(left(), 0);
    // One that died after the copy, before it deleted the snapshot.
    store
        .block_on(volume::create_snapshot(&source, &name, DEADLINE))
        .expect("taken");
    assert_eq!(copy(None).expect("copied"), Copied::Before(OLD));
    assert_eq!(left(), 0);
}

#[test]
fn a_copy_that_was_aborted_leaves_nothing() {
    let (store, source) = with_source();
    let slow = SettingsChange {
        copy_bandwidth: Some(100 << 10),
        ..SettingsChange::default()
    };
    store.running.change(&slow).expect("taken");
    let new = store.blob("copy.vhd");
    let copied = store.block_on(async {
        let wanted = plan("a", None);
        let (began, mut under_way) = tokio::sync::mpsc::unbounded_channel();
        let copy = volume::copy(
            &source,
            &new,
            &wanted,
            |_, _| began.send(()).expect("the test waits"),
            DEADLINE,
        );
        let abort = async {
            under_way.recv().await;
            let none = Conditions::default();
            let seen = new.properties(&none, DEADLINE).await.expect("it is there");
            let id = seen.copy.expect("a copy").id;
            new.abort_copy(&id, &none, DEADLINE).await.expect("aborted");
        };
        tokio::join!(copy, abort).0
    });
    let text = copied.expect_err("it was aborted").to_string();
    assert!(text.contains("create it again"), "{text}");
    assert!(!store.exists("copy.vhd"));
    let left = store.block_on(volume::list_snapshots(&source, DEADLINE));
    assert!(left.expect("a list").is_empty());
}

#[test]
fn the_commands_say_what_they_did() {
    let store = Store::start();
    store.create("vol1.vhd", OLD);
    let ctl = Node::prepare().ctl();
    let endpoint = store.endpoint();
    let run = |arguments: &[&str]| {
        let mut all = arguments.to_vec();
        all.extend(["--endpoint", &endpoint]);
        ctl.run(&all)
    };
    let volume = format!("{ACCOUNT}/dysks/vol1.vhd");
    run(&["resize", &volume, "--size", "3MiB"]).says("");
    run(&["resize", &volume, "--size", "3MiB"]).says("");
    run(&["resize", &volume, "--size", "1MiB"]).fails(
        "devstoreaccount1/dysks/vol1.vhd: it has 3MiB already and never shrinks: \
         copy its content to a smaller volume",
    );
    run(&["resize", &volume, "--size", "5000000"]).fails(
        "devstoreaccount1/dysks/vol1.vhd: size 5000000 is no multiple of 512 bytes: use 5000192",
    );
    let said = run(&["snapshot", "create", &volume, "--name", "one"]);
    let snapshot = said.ok().trim().to_owned();
    assert!(snapshot.starts_with(&format!("{volume}@20")), "{snapshot}");
    run(&["snapshot", "create", &volume, "--name", "one"]).says(&format!("{snapshot}\n"));
    let time = snapshot.rsplit('@').next().expect("a time");
    run(&["snapshot", "list", &volume]).says(&format!(
        "NAME  TIME                          SIZE  SNAPSHOT\none   {time}  3MiB  {snapshot}\n"
    ));
    let copy = format!("{ACCOUNT}/copies/new.vhd");
    for from in [&snapshot, &volume] {
        let said = run(&["create", &copy, "--from", from]);
        assert_eq!((said.code, said.out.as_str()), (Some(0), ""), "{said:?}");
        assert!(
            said.err.ends_with("copied 3MiB of 3MiB (100%)\n"),
            "{said:?}"
        );
        run(&["create", &copy, "--from", from]).fails(
            "devstoreaccount1/copies/new.vhd: there is a blob of this name already: \
             choose another, or delete it first",
        );
        run(&["delete", &copy]).says("");
    }
    run(&["create", &copy, "--from", &volume, "--size", "1MiB"]).fails(
        "devstoreaccount1/copies/new.vhd: a copy of 1048576 bytes cannot hold the source's \
         3145728: choose a size of at least that",
    );
    for _ in 0..2 {
        run(&["snapshot", "delete", &snapshot]).says("");
    }
    run(&["snapshot", "delete", &volume]).fails(
        "snapshot \"devstoreaccount1/dysks/vol1.vhd\" names no time: \
         write VOLUME@TIME as snapshot list shows it",
    );
    let missing = format!("{ACCOUNT}/dysks/none.vhd");
    for arguments in [
        &["resize", &missing, "--size", "1MiB"][..],
        &["snapshot", "list", &missing],
    ] {
        run(arguments).fails(
            "get blob properties on devstoreaccount1/dysks/none.vhd: 404 BlobNotFound: \
             there is no such blob: check its name or create it",
        );
    }
    store.hold_lease("vol1.vhd");
    run(&["resize", &volume, "--size", "1GiB"]).fails(
        "devstoreaccount1/dysks/vol1.vhd: leased elsewhere: its holder alone can resize it: \
         detach it first, or resize it where it is attached",
    );
}

#[test]
fn a_persistent_volume_is_printed_for_a_blob_that_is_there() {
    let store = Store::start();
    store.create("vol1.vhd", 2 << 30);
    let ctl = Node::prepare().ctl();
    let endpoint = store.endpoint();
    let volume = format!("{ACCOUNT}/dysks/vol1.vhd");
    let expected = |size: &str| {
        format!(
            "apiVersion: v1
kind: PersistentVolume
metadata:
  name: vol1
spec:
  accessModes:
    - ReadWriteOnce
  capacity:
    storage: \"{size}\"
  csi:
    controllerExpandSecretRef:
      name: dyskcreds
      namespace: dysk
    driver: csi-dysk
    fsType: ext4
    nodeExpandSecretRef:
      name: dyskcreds
      namespace: dysk
    nodeStageSecretRef:
      name: dyskcreds
      namespace: dysk
    readOnly: false
    volumeAttributes:
      blob: vol1.vhd
      container: dysks
      endpoint: \"{endpoint}\"
    volumeHandle: devstoreaccount1/dysks/vol1.vhd
  persistentVolumeReclaimPolicy: Retain
  storageClassName: csi-dysk
  volumeMode: Filesystem
"
        )
    };
    let named = ["pv", &volume, "--endpoint", &endpoint];
    ctl.run(&named).says(&expected("2Gi"));
    // With a size, neither store nor credential is needed.
    let bare = ctl.with(&[]);
    bare.run(&[&named[..], &["--size", "1025MiB"]].concat())
        .says(&expected("1025Mi"));
    let said = bare.run(&named);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(
        said.err.ends_with("or say how large it is with --size\n"),
        "{said:?}"
    );
    let said = ctl.run(
        &[
            &named[..],
            &[
                "--name",
                "my-volume",
                "--secret",
                "apps/key",
                "--caching",
                "read-write",
            ],
            &[
                "--storage-class",
                "fast",
                "--read-only",
                "--block",
                "-o",
                "json",
            ],
        ]
        .concat(),
    );
    let object: serde_json::Value = serde_json::from_str(said.ok()).expect("json");
    assert_eq!(object["metadata"]["name"], "my-volume");
    let spec = &object["spec"];
    assert_eq!(spec["accessModes"][0], "ReadOnlyMany");
    assert_eq!(spec["storageClassName"], "fast");
    assert_eq!(spec["volumeMode"], "Block");
    assert_eq!(spec["csi"]["readOnly"], true);
    assert_eq!(spec["csi"]["fsType"], serde_json::Value::Null);
    assert_eq!(spec["csi"]["volumeAttributes"]["cachingMode"], "read-write");
    assert_eq!(spec["csi"]["nodeStageSecretRef"]["namespace"], "apps");
    ctl.run(&["pv", &volume, "--size", "1GiB", "--name", "My Volume"])
        .fails(
            "name \"My Volume\": a cluster takes lower-case letters, digits, - and . of at most \
         253 bytes, such as \"my-volume\"",
        );
    ctl.run(&["pv", &volume, "--size", "1GiB", "--secret", "key"])
        .fails("secret \"key\": write NAMESPACE/NAME");
}
