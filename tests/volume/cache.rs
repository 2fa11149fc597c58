//! The caching modes, one behaviour a test: what reaches the store when, what
//! is kept when it cannot, and who may take up what was left.

// All of this file is tests, also outside of `#[test]` functions.
#![allow(clippy::unwrap_used)]

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::support::sim_store::SimStore;
use bytes::Bytes;
use dysk::blob::LeaseId;
use dysk::device::{BlockDevice as _, DeviceError};
use dysk::volume::{
    Budget, Caching, OpenError, OpenOptions, Recover, StagingFile, StagingFiles, StagingOptions,
    System, Volume, discard_staging, inspect_staging,
};

const MIB: usize = 1 << 20;

struct Node {
    folder: tempfile::TempDir,
    caching: Caching,
    budget: Arc<Budget>,
    size: u64,
    boot: String,
}

impl Node {
    fn new(caching: Caching) -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            caching,
            budget: Budget::unlimited(),
            size: 16 << 20,
            boot: "this boot".into(),
        }
    }

    fn options(&self) -> OpenOptions {
        OpenOptions {
            caching: self.caching,
            staging: StagingOptions {
                dir: self.folder.path().to_owned(),
                size: self.size,
                budget: self.budget.clone(),
                boot: Some(self.boot.clone()),
                survives_power_cut: Some(false),
                ..StagingOptions::default()
            },
            keeper: Some(tokio::runtime::Handle::current()),
            ..OpenOptions::new(LeaseId::random())
        }
    }

    async fn open(&self, store: &SimStore) -> Arc<Volume<SimStore>> {
        Volume::open(store.clone(), self.options())
            .await
            .expect("opens")
    }

    fn files(&self) -> Vec<PathBuf> {
        let files = std::fs::read_dir(self.folder.path()).unwrap();
        files.map(|entry| entry.unwrap().path()).collect()
    }

    /// A daemon that writes `data` at 0 and is killed before it is flushed.
    fn left_behind(&self, store: &SimStore, data: &Bytes) -> LeaseId {
        let lease = LeaseId::random();
        let life = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let volume = life.block_on(async {
            let options = OpenOptions {
                lease: lease.clone(),
                ..self.options()
            };
            let volume = Volume::open(store.clone(), options).await.expect("opens");
            volume.write(0, data.clone(), false).await.expect("staged");
            volume
        });
        drop(life);
        drop(volume);
        assert_ne!(&store.blob().bytes[..data.len()], &data[..], "not flushed");
        lease
    }
}

fn store() -> SimStore {
    SimStore::new(8 * MIB, 7)
}

fn bytes(value: u8, len: usize) -> Bytes {
    vec![value; len].into()
}

fn dirty(volume: &Volume<SimStore>) -> u64 {
    volume.status().cache.expect("cached").dirty_bytes
}

#[tokio::test(start_paused = true)]
async fn a_write_waits_for_flush_and_a_run_goes_in_one_request() {
    let (node, store) = (Node::new(Caching::ReadWrite), store());
    let volume = node.open(&store).await;
    for at in (0..MIB).step_by(4096) {
        volume
            .write(at as u64, bytes(1, 4096), false)
            .await
            .unwrap();
    }
    assert!(store.blob().puts.is_empty());
    assert_eq!(dirty(&volume), MIB as u64);
    volume.flush().await.unwrap();
    assert_eq!(store.blob().puts, [MIB], "neighbours go together");
    assert_eq!(dirty(&volume), 0);
    assert!(store.blob().bytes[..MIB].iter().all(|byte| *byte == 1));
    volume.flush().await.unwrap();
    assert_eq!(store.blob().puts.len(), 1, "nothing is written twice");
    let before = store.blob().gets;
    assert_eq!(
        volume.read(512, 8192).await.unwrap().to_bytes(),
        bytes(1, 8192)
    );
    assert_eq!(store.blob().gets, before, "flushed blocks stay cached");
    volume.close().await.unwrap();
    assert_eq!(node.files(), [] as [PathBuf; 0]);
}

#[tokio::test(start_paused = true)]
async fn fua_is_in_the_store_before_its_answer_and_takes_nothing_along() {
    let (node, store) = (Node::new(Caching::ReadWrite), store());
    let volume = node.open(&store).await;
    volume.write(0, bytes(1, 4096), false).await.unwrap();
    volume.write(8192, bytes(2, 1024), true).await.unwrap();
    volume.write(8192 + 700, bytes(3, 10), true).await.unwrap();
    volume.write_zeroes(512, 512, true, false).await.unwrap();
    {
        let blob = store.blob();
        assert!(blob.bytes[..4096].iter().all(|byte| *byte == 0));
        assert!(blob.bytes[8192..8192 + 700].iter().all(|byte| *byte == 2));
        assert!(
            blob.bytes[8192 + 700..8192 + 710]
                .iter()
                .all(|byte| *byte == 3)
        );
        assert!(
            blob.bytes[8192 + 710..8192 + 1024]
                .iter()
                .all(|byte| *byte == 2)
        );
    }
    let read = volume.read(0, 4096).await.unwrap().to_bytes();
    assert!(read[512..1024].iter().all(|byte| *byte == 0));
    assert!(read[1024..].iter().all(|byte| *byte == 1));
    assert_eq!(dirty(&volume), 3584);
}

#[tokio::test(start_paused = true)]
async fn a_write_reaches_the_store_without_being_asked_for() {
    let (node, store) = (Node::new(Caching::ReadWrite), store());
    let volume = node.open(&store).await;
    volume.write(4096, bytes(9, 512), false).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(store.blob().puts.is_empty());
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(store.blob().puts, [512]);
    assert_eq!(dirty(&volume), 0);
}

#[tokio::test(start_paused = true)]
async fn flush_ends_although_its_blocks_are_overwritten_all_the_while() {
    let (node, store) = (Node::new(Caching::ReadWrite), store());
    let volume = node.open(&store).await;
    let (acknowledged, stop) = (
        Arc::new(AtomicU64::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let writer = tokio::spawn({
        let (volume, acknowledged, stop) = (volume.clone(), acknowledged.clone(), stop.clone());
        async move {
            for stamp in 1u64.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let data = Bytes::from(stamp.to_le_bytes().repeat(512));
                volume.write(0, data, false).await.unwrap();
                acknowledged.store(stamp, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_micros(300)).await;
            }
        }
    });
    for _ in 0..50 {
        tokio::time::sleep(Duration::from_millis(7)).await;
        let before = acknowledged.load(Ordering::Relaxed);
        volume.flush().await.unwrap();
        let stored = u64::from_le_bytes(store.blob().bytes[..8].try_into().unwrap());
        assert!(stored >= before, "{stored} in the store, {before} flushed");
    }
    let puts = store.blob().puts.len();
    assert!(puts <= 150, "{puts} puts for 50 flushes");
    stop.store(true, Ordering::Relaxed);
    writer.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn unaligned_writers_of_one_sector_lose_nothing() {
    let (node, store) = (Node::new(Caching::ReadWrite), store());
    let volume = node.open(&store).await;
    let mut writers = tokio::task::JoinSet::new();
    for n in 0..128u8 {
        let volume = volume.clone();
        writers.spawn(async move {
            volume
                .write(u64::from(n) * 4, bytes(n + 1, 4), n % 5 == 0)
                .await
                .unwrap();
        });
    }
    while writers.join_next().await.transpose().unwrap().is_some() {}
    let expected: Vec<u8> = (1..=128u8).flat_map(|n| [n; 4]).collect();
    assert_eq!(volume.read(0, 512).await.unwrap().to_bytes(), expected);
    volume.flush().await.unwrap();
    assert_eq!(store.blob().bytes[..512], expected);
}

#[tokio::test(start_paused = true)]
async fn a_full_cache_makes_writers_wait_and_never_grows() {
    let (mut node, store) = (Node::new(Caching::ReadWrite), store());
    node.size = 256 << 10;
    let volume = node.open(&store).await;
    store.blob().stalled = true;
    let mut writers = tokio::task::JoinSet::new();
    for at in (0..4 * MIB).step_by(64 << 10) {
        let volume = volume.clone();
        writers.spawn(async move { volume.write(at as u64, bytes(5, 64 << 10), false).await });
    }
    tokio::time::sleep(Duration::from_secs(60)).await;
    let status = volume.status().cache.unwrap();
    assert_eq!(status.dirty_bytes, 256 << 10);
    assert_eq!(status.cached_bytes, status.capacity_bytes);
    assert!(volume.status().in_flight >= 60);
    store.resume();
    while let Some(written) = writers.join_next().await {
        written.unwrap().unwrap();
    }
    volume.flush().await.unwrap();
    assert!(store.blob().bytes[..4 * MIB].iter().all(|byte| *byte == 5));
    let file = std::fs::metadata(&node.files()[0]).unwrap();
    assert!(file.len() <= 256 << 10 | 16 << 10, "{} bytes", file.len());
}

#[tokio::test(start_paused = true)]
async fn the_budget_of_the_node_bounds_all_volumes_together() {
    let mut node = Node::new(Caching::ReadWrite);
    node.budget = Budget::new(512 << 10);
    let (store, other_store) = (store(), SimStore::new(8 * MIB, 3));
    let volume = node.open(&store).await;
    for at in (0..2 * MIB).step_by(4096) {
        volume
            .write(at as u64, bytes(1, 4096), false)
            .await
            .unwrap();
    }
    assert_eq!(node.budget.used(), 512 << 10);
    // All of it is taken: the second writes through, at first.
    let other = Node::new(Caching::ReadWrite);
    let options = OpenOptions {
        staging: StagingOptions {
            budget: node.budget.clone(),
            ..other.options().staging
        },
        ..other.options()
    };
    let second = Volume::open(other_store.clone(), options).await.unwrap();
    second.write(0, bytes(2, 4096), false).await.unwrap();
    assert_eq!(other_store.blob().puts, [4096]);
    assert_eq!(dirty(&second), 0);
    // The first gives back what is above its half.
    tokio::time::sleep(Duration::from_secs(30)).await;
    second.write(0, bytes(2, 256 << 10), false).await.unwrap();
    assert_eq!(other_store.blob().puts, [4096], "staged now");
    assert!(node.budget.used() <= 512 << 10);
    second.close().await.unwrap();
    volume.close().await.unwrap();
    assert!(store.blob().bytes[..2 * MIB].iter().all(|byte| *byte == 1));
    drop((volume, second));
    assert_eq!(node.budget.used(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_fenced_volume_keeps_its_unflushed_writes_aside() {
    let (node, store) = (Node::new(Caching::ReadWrite), store());
    let volume = node.open(&store).await;
    volume.write(0, bytes(1, 8192), false).await.unwrap();
    store.blob().lease = Some(LeaseId::random());
    let error = volume.flush().await.unwrap_err();
    assert!(
        matches!(&error, DeviceError::Io(cause) if cause.contains("fenced")),
        "{error}"
    );
    assert!(volume.write(0, bytes(2, 4096), false).await.is_err());
    assert!(volume.read(0, 4096).await.is_err());
    tokio::time::sleep(Duration::from_secs(1)).await;
    let aside = volume
        .status()
        .cache
        .unwrap()
        .set_aside
        .expect("kept aside");
    assert_eq!(aside.dirty_bytes, 8192);
    assert_eq!(node.files(), std::slice::from_ref(&aside.path));
    volume.close().await.unwrap();
    assert!(store.blob().puts.is_empty());
    drop(volume);

    // Nothing replays it.
    store.blob().lease = None;
    let volume = node.open(&store).await;
    assert_eq!(
        volume.read(0, 4096).await.unwrap().to_bytes(),
        bytes(0, 4096)
    );
    volume.close().await.unwrap();
    let info = inspect_staging(&aside.path).unwrap();
    assert_eq!(
        (info.volume.as_str(), info.dirty_bytes),
        ("acct/dysks/vol1.vhd", 8192)
    );
    discard_staging(&aside.path).unwrap();
    assert_eq!(node.files(), [] as [PathBuf; 0]);
}

#[tokio::test(start_paused = true)]
async fn giving_up_keeps_unflushed_writes_aside() {
    let (node, store) = (Node::new(Caching::ReadWrite), store());
    let volume = node.open(&store).await;
    volume.write(0, bytes(1, 4096), false).await.unwrap();
    store.blob().stalled = true;
    let closing = tokio::spawn({
        let volume = volume.clone();
        async move { volume.close().await }
    });
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert!(!closing.is_finished(), "a close waits for the store");
    volume.abandon();
    closing.await.unwrap().unwrap();
    let aside = volume
        .status()
        .cache
        .unwrap()
        .set_aside
        .expect("kept aside");
    assert_eq!(aside.dirty_bytes, 4096);
    assert!(aside.path.exists());
    assert_eq!(store.blob().lease, None);
}

#[tokio::test(start_paused = true)]
async fn a_flush_that_cannot_be_done_fails_and_loses_nothing() {
    let (node, store) = (Node::new(Caching::ReadWrite), store());
    let volume = node.open(&store).await;
    volume.write(0, bytes(1, 4096), false).await.unwrap();
    store.blob().failing = Some((416, "InvalidPageRange"));
    let error = volume.flush().await.unwrap_err();
    assert!(error.to_string().contains("416"), "{error}");
    assert_eq!(dirty(&volume), 4096);
    store.blob().failing = None;
    tokio::time::sleep(Duration::from_secs(2)).await;
    volume.flush().await.unwrap();
    assert_eq!(store.blob().bytes[..4096], bytes(1, 4096));
}

/// The write-back pauses after a failure; meanwhile the block that a flush
/// waits for is written through or trimmed.
#[tokio::test(start_paused = true)]
async fn a_flush_ends_when_what_it_waits_for_became_clean_otherwise() {
    for trim in [false, true] {
        let (node, store) = (Node::new(Caching::ReadWrite), store());
        let volume = node.open(&store).await;
        volume.write(0, bytes(1, 4096), false).await.unwrap();
        store.blob().failing = Some((416, "InvalidPageRange"));
        volume.flush().await.unwrap_err();
        store.blob().failing = None;
        let flush = tokio::spawn({
            let volume = volume.clone();
            async move { volume.flush().await }
        });
        tokio::task::yield_now().await;
        if trim {
            volume.trim(0, 4096, false).await.unwrap();
        } else {
            volume.write(0, bytes(2, 4096), true).await.unwrap();
        }
        let flushed = tokio::time::timeout(Duration::from_secs(600), flush).await;
        flushed.expect("not stuck").unwrap().unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn unflushed_blocks_are_data() {
    let (node, store) = (Node::new(Caching::ReadWrite), store());
    store.blob().bytes[65536..65536 + 512].fill(1);
    let volume = node.open(&store).await;
    volume.write(4096, bytes(1, 1024), false).await.unwrap();
    let extents = volume.extents(0, 1 << 20).await.unwrap();
    let seen: Vec<(u64, bool)> = extents
        .iter()
        .map(|extent| (extent.len, extent.allocated))
        .collect();
    assert_eq!(
        seen,
        [
            (4096, false),
            (1024, true),
            (60416, false),
            (512, true),
            ((1 << 20) - 66048, false)
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn read_only_caching_keeps_reads_and_no_writes() {
    let (node, store) = (Node::new(Caching::ReadOnly), store());
    store.blob().bytes.fill(3);
    let volume = node.open(&store).await;
    assert_eq!(
        node.files(),
        [] as [PathBuf; 0],
        "nothing to recover, so nothing by name"
    );
    assert_eq!(
        volume.read(0, 8192).await.unwrap().to_bytes(),
        bytes(3, 8192)
    );
    let gets = store.blob().gets;
    assert_eq!(
        volume.read(4096, 4096).await.unwrap().to_bytes(),
        bytes(3, 4096)
    );
    assert_eq!(store.blob().gets, gets);
    volume.write(4096, bytes(4, 4096), false).await.unwrap();
    assert_eq!(
        store.blob().bytes[4096..8192],
        bytes(4, 4096),
        "in the store when acknowledged"
    );
    assert_eq!(
        volume.read(4096, 4096).await.unwrap().to_bytes(),
        bytes(4, 4096)
    );
    volume.trim(4096, 4096, false).await.unwrap();
    assert_eq!(
        volume.read(4096, 4096).await.unwrap().to_bytes(),
        bytes(0, 4096)
    );
    let status = volume.status().cache.unwrap();
    assert_eq!((status.mode, status.dirty_bytes), (Caching::ReadOnly, 0));
    volume.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn without_a_lease_nothing_is_cached() {
    let (node, store) = (Node::new(Caching::ReadOnly), store());
    let options = OpenOptions {
        read_only: true,
        ..node.options()
    };
    let volume = Volume::open(store.clone(), options).await.unwrap();
    volume.read(0, 4096).await.unwrap();
    store.blob().bytes.fill(8);
    assert_eq!(
        volume.read(0, 4096).await.unwrap().to_bytes(),
        bytes(8, 4096)
    );
    assert_eq!(volume.status().cache, None);
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

#[test]
fn a_new_daemon_resumes_the_lease_and_the_unflushed_writes() {
    let (node, store) = (Node::new(Caching::ReadWrite), store());
    let lease = node.left_behind(&store, &bytes(6, 12288));
    runtime().block_on(async {
        let options = OpenOptions {
            lease: lease.clone(),
            resume: true,
            ..node.options()
        };
        let volume = Volume::open(store.clone(), options).await.unwrap();
        assert_eq!(dirty(&volume), 12288);
        assert_eq!(
            volume.read(4096, 4096).await.unwrap().to_bytes(),
            bytes(6, 4096)
        );
        volume.close().await.unwrap();
        assert_eq!(store.blob().bytes[..12288], bytes(6, 12288));
    });
}

#[test]
fn a_resume_that_comes_too_late_is_fenced_and_keeps_the_writes_aside() {
    let (node, store) = (Node::new(Caching::ReadWrite), store());
    let lease = node.left_behind(&store, &bytes(6, 4096));
    let taken = LeaseId::random();
    store.blob().lease = Some(taken.clone());
    runtime().block_on(async {
        let options = OpenOptions {
            lease,
            resume: true,
            ..node.options()
        };
        let error = Volume::open(store.clone(), options).await.unwrap_err();
        assert!(matches!(error, OpenError::Fenced { .. }), "{error}");
        assert!(
            error
                .to_string()
                .contains("4096 bytes of unflushed writes kept in"),
            "{error}"
        );
    });
    assert_eq!(
        store.blob().lease,
        Some(taken),
        "another's lease is left alone"
    );
    assert_eq!(inspect_staging(&node.files()[0]).unwrap().dirty_bytes, 4096);
}

/// What a daemon leaves that is killed while it makes its staging file.
#[test]
fn half_a_staging_file_is_in_nobodys_way() {
    let (node, store) = (Node::new(Caching::ReadWrite), store());
    let lease = node.left_behind(&store, &bytes(6, 4096));
    let whole = node.files().remove(0);
    std::fs::remove_file(&whole).unwrap();
    std::fs::write(whole.with_extension("making"), bytes(0, 8192)).unwrap();
    runtime().block_on(async {
        let options = OpenOptions {
            lease,
            resume: true,
            ..node.options()
        };
        let volume = Volume::open(store.clone(), options).await.unwrap();
        assert_eq!(node.files(), [whole]);
        volume.close().await.unwrap();
    });
    assert_eq!(node.files(), [] as [PathBuf; 0]);
}

/// A file system that renames nothing.
#[derive(Debug)]
struct Rigid(System);

impl StagingFiles for Rigid {
    fn create(&self, path: &Path) -> io::Result<Box<dyn StagingFile>> {
        self.0.create(path)
    }

    fn open(&self, path: &Path) -> io::Result<Option<Box<dyn StagingFile>>> {
        self.0.open(path)
    }

    fn rename(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        Err(io::Error::other("nothing is renamed here"))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.remove(path)
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        self.0.sync_folder(folder)
    }
}

/// What cannot be read is in the way until somebody decides; kept, it is kept
/// beside what was kept before.
#[test]
fn a_damaged_staging_file_is_kept_or_dropped_when_told() {
    let (node, store) = (Node::new(Caching::ReadWrite), store());
    node.left_behind(&store, &bytes(6, 4096));
    store.blob().lease = None;
    let whole = node.files().remove(0);
    let open = |recover, rigid| {
        std::fs::write(&whole, bytes(9, 8192)).unwrap();
        runtime().block_on(async {
            let mut options = node.options();
            options.staging.recover = recover;
            if rigid {
                options.staging.files = Arc::new(Rigid(System));
            }
            let volume = Volume::open(store.clone(), options).await?;
            volume.close().await.unwrap();
            Ok::<_, OpenError>(())
        })
    };
    let refused = open(Recover::Replay, false).unwrap_err().to_string();
    assert!(refused.contains("--recover set-aside"), "{refused}");
    let refused = open(Recover::SetAside, true).unwrap_err().to_string();
    assert!(refused.contains("nothing is renamed here"), "{refused}");
    assert_eq!(node.files(), std::slice::from_ref(&whole));
    for kept in [1, 2] {
        open(Recover::SetAside, false).unwrap();
        let files = node.files();
        assert_eq!(files.len(), kept, "{files:?}");
        for file in files {
            assert_eq!(file.extension().unwrap(), "damaged");
            assert_eq!(std::fs::read(file).unwrap(), bytes(9, 8192));
        }
    }
    open(Recover::Discard, false).unwrap();
    assert_eq!(node.files().len(), 2);
}

/// After somebody else has held the volume, the choice is spelled out.
#[test]
fn what_may_be_out_of_date_is_never_replayed_by_itself() {
    for recover in [Recover::SetAside, Recover::Discard] {
        let (node, store) = (Node::new(Caching::ReadWrite), store());
        node.left_behind(&store, &bytes(6, 4096));
        store.blob().lease = None;
        runtime().block_on(async {
            let elsewhere = Node::new(Caching::None);
            let volume = elsewhere.open(&store).await;
            volume.write(0, bytes(7, 4096), false).await.unwrap();
            volume.close().await.unwrap();

            let error = Volume::open(store.clone(), node.options())
                .await
                .unwrap_err();
            let text = error.to_string();
            assert!(text.contains("4096 bytes of unflushed writes in"), "{text}");
            assert!(text.contains("--recover force"), "{text}");
            assert_eq!(store.blob().lease, None, "a refused attach leaves no lease");

            let mut options = node.options();
            options.staging.recover = recover;
            let volume = Volume::open(store.clone(), options).await.unwrap();
            assert_eq!(
                volume.read(0, 4096).await.unwrap().to_bytes(),
                bytes(7, 4096)
            );
            volume.close().await.unwrap();
            let kept = if recover == Recover::SetAside { 1 } else { 0 };
            assert_eq!(node.files().len(), kept);
        });
    }
}

#[test]
fn a_fresh_attach_takes_up_what_nobody_can_have_overwritten() {
    let (mut node, store) = (Node::new(Caching::ReadWrite), store());
    node.left_behind(&store, &bytes(6, 4096));
    store.blob().lease = None;
    // Another mode cannot honour them, and says so.
    node.caching = Caching::None;
    runtime().block_on(async {
        let error = Volume::open(store.clone(), node.options())
            .await
            .unwrap_err();
        assert!(
            error.to_string().contains("--caching read-write"),
            "{error}"
        );
    });
    node.caching = Caching::ReadWrite;
    runtime().block_on(async {
        let volume = node.open(&store).await;
        assert_eq!(
            volume.read(0, 4096).await.unwrap().to_bytes(),
            bytes(6, 4096)
        );
        volume.close().await.unwrap();
    });
    assert_eq!(store.blob().bytes[..4096], bytes(6, 4096));
}

/// After a power cut an SSD may hold any earlier state of a page of the file:
/// here the table and the slots of before the flush, or of before the FUA.
#[test]
fn an_old_slot_undoes_neither_a_flush_nor_a_fua() {
    for fua in [false, true] {
        let (mut node, store) = (Node::new(Caching::ReadWrite), store());
        let disk = |node: &Node| {
            let mut options = node.options();
            options.staging.survives_power_cut = Some(true);
            options.break_lease = true;
            options
        };
        let life = runtime();
        let volume = life.block_on(async {
            let volume = Volume::open(store.clone(), disk(&node)).await.unwrap();
            volume.write(0, bytes(1, 4096), false).await.unwrap();
            let old = std::fs::read(&node.files()[0]).unwrap();
            if fua {
                volume.write(0, bytes(2, 4096), true).await.unwrap();
            } else {
                volume.flush().await.unwrap();
                volume.write(0, bytes(2, 4096), false).await.unwrap();
                volume.flush().await.unwrap();
            }
            volume.write(8192, bytes(3, 4096), false).await.unwrap();
            // The header is written durably each time, the rest is not.
            let mut now = std::fs::read(&node.files()[0]).unwrap();
            let slot = now.len() - 4096;
            now[8192..slot].copy_from_slice(&old[8192..slot]);
            now[8192 + 64..8192 + 128]
                .copy_from_slice(&std::fs::read(&node.files()[0]).unwrap()[8192 + 64..8192 + 128]);
            std::fs::write(&node.files()[0], now).unwrap();
            volume
        });
        drop(life);
        drop(volume);
        node.boot = "the next boot".into();
        runtime().block_on(async {
            let volume = Volume::open(store.clone(), disk(&node)).await.unwrap();
            assert_eq!(
                volume.read(0, 4096).await.unwrap().to_bytes(),
                bytes(2, 4096),
                "fua {fua}"
            );
            let later = volume.read(8192, 4096).await.unwrap().to_bytes();
            assert_eq!(later, bytes(3, 4096), "what is newer and whole is taken up");
            volume.close().await.unwrap();
        });
    }
}

#[test]
fn an_heir_reads_what_a_change_that_was_cut_off_may_have_put() {
    for cut_off in ["write", "part of a page", "zeroes", "trim"] {
        let (node, store) = (Node::new(Caching::ReadWrite), store());
        let lease = LeaseId::random();
        let life = runtime();
        let volume = life.block_on(async {
            let options = OpenOptions {
                lease: lease.clone(),
                ..node.options()
            };
            let volume = Volume::open(store.clone(), options).await.unwrap();
            volume.write(0, bytes(1, 8192), false).await.unwrap();
            store.blob().mute = true;
            let change = async {
                match cut_off {
                    "write" => volume.write(1024, bytes(2, 4096), true).await,
                    "part of a page" => volume.write(100, bytes(2, 300), true).await,
                    "zeroes" => volume.write_zeroes(512, 6144, true, false).await,
                    _ => volume.trim(0, 8192, false).await,
                }
            };
            tokio::select! {
                _ = change => panic!("it is never answered"),
                () = store.muted() => {}
            }
            volume.clone()
        });
        // Whatever the write-back sends from here on is lost with the daemon.
        let in_store = Bytes::copy_from_slice(&store.blob().bytes[..8192]);
        drop(life);
        drop(volume);
        store.blob().mute = false;
        runtime().block_on(async {
            let options = OpenOptions {
                lease,
                resume: true,
                ..node.options()
            };
            let volume = Volume::open(store.clone(), options).await.unwrap();
            let read = volume.read(0, 8192).await.unwrap().to_bytes();
            for (page, (ours, theirs)) in read.chunks(512).zip(in_store.chunks(512)).enumerate() {
                let put = cut_off == "trim" || theirs[0] != 0 || theirs[500] != 0;
                let zeroed = cut_off == "zeroes" && (1..13).contains(&page);
                if put || zeroed {
                    assert_eq!(ours, theirs, "{cut_off}, page {page}");
                } else {
                    assert_eq!(ours, bytes(1, 512), "{cut_off}, page {page}");
                }
            }
            volume.close().await.unwrap();
        });
    }
}

#[test]
fn one_daemon_at_a_time_stages_a_volume() {
    let (node, store) = (Node::new(Caching::ReadWrite), store());
    runtime().block_on(async {
        let mut options = node.options();
        // Whoever asks the store for ranges would notice that the lease is gone.
        options.allocation_map = false;
        let _volume = Volume::open(store.clone(), options).await.unwrap();
        store.blob().lease = None;
        let error = Volume::open(store.clone(), node.options())
            .await
            .unwrap_err();
        assert!(error.to_string().contains("another daemon"), "{error}");
    });
}

#[test]
fn a_staging_folder_that_cannot_be_made_refuses_the_attach() {
    let (node, store) = (Node::new(Caching::ReadWrite), store());
    runtime().block_on(async {
        let mut options = node.options();
        options.staging.dir = Path::new("/dev/null/staging").to_owned();
        let error = Volume::open(store.clone(), options).await.unwrap_err();
        assert!(error.to_string().contains("/dev/null/staging"), "{error}");
    });
    assert_eq!(store.blob().lease, None);
}

/// Opens the volume as the daemon does that will hand it over.
async fn owner(node: &Node, store: &SimStore, lease: &LeaseId) -> Arc<Volume<SimStore>> {
    let options = OpenOptions {
        lease: lease.clone(),
        ..node.options()
    };
    Volume::open(store.clone(), options).await.expect("opens")
}

/// Opens the volume as the next daemon does that takes over.
async fn heir(
    node: &Node,
    store: &SimStore,
    lease: &LeaseId,
) -> Result<Arc<Volume<SimStore>>, OpenError> {
    let options = OpenOptions {
        lease: lease.clone(),
        resume: true,
        hold_back: true,
        ..node.options()
    };
    Volume::open(store.clone(), options).await
}

#[tokio::test(start_paused = true)]
async fn a_volume_changes_hands_without_a_flush() {
    let (node, store) = (Node::new(Caching::ReadWrite), store());
    let lease = LeaseId::random();
    let old = owner(&node, &store, &lease).await;
    old.write(0, bytes(1, 8192), false).await.unwrap();
    let error = heir(&node, &store, &lease)
        .await
        .expect_err("one at a time");
    assert!(error.to_string().contains("is in use"), "{error}");
    old.let_go().await.unwrap();

    // Opened by the next one, nothing moves before it is told to go on.
    let new = heir(&node, &store, &lease).await.expect("it was let go of");
    assert_eq!(dirty(&new), 8192);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(
        store.blob().puts.is_empty(),
        "neither of the two writes back"
    );
    assert_eq!(
        old.take_back()
            .await
            .expect_err("the other one has it")
            .kind(),
        std::io::ErrorKind::WouldBlock
    );

    // It fails: the old one goes on with what it had.
    new.let_go().await.unwrap();
    std::mem::forget(new);
    old.take_back().await.expect("nobody else has it");
    assert_eq!(dirty(&old), 8192);
    old.write(4096, bytes(2, 4096), false).await.unwrap();
    assert_eq!(old.read(0, 4096).await.unwrap().to_bytes(), bytes(1, 4096));
    old.let_go().await.unwrap();

    // Another one succeeds.
    let new = heir(&node, &store, &lease).await.expect("it was let go of");
    std::mem::forget(old);
    new.go_on();
    assert_eq!(
        new.read(4096, 4096).await.unwrap().to_bytes(),
        bytes(2, 4096)
    );
    new.flush().await.unwrap();
    assert_eq!(&store.blob().bytes[..4096], &bytes(1, 4096)[..]);
    assert_eq!(&store.blob().bytes[4096..8192], &bytes(2, 4096)[..]);
    new.close().await.unwrap();
    assert_eq!(node.files(), [] as [PathBuf; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_volume_without_unflushed_writes_comes_back_to_its_owner() {
    let (node, store) = (Node::new(Caching::ReadWrite), store());
    let lease = LeaseId::random();
    let old = owner(&node, &store, &lease).await;
    old.write(0, bytes(1, 4096), false).await.unwrap();
    old.flush().await.unwrap();
    old.let_go().await.unwrap();
    let new = heir(&node, &store, &lease).await.expect("it was let go of");
    new.let_go().await.unwrap();
    std::mem::forget(new);
    old.take_back().await.expect("nobody else has it");
    old.write(4096, bytes(2, 4096), false).await.unwrap();
    assert_eq!(old.read(0, 4096).await.unwrap().to_bytes(), bytes(1, 4096));
    old.close().await.unwrap();
    assert_eq!(&store.blob().bytes[4096..8192], &bytes(2, 4096)[..]);
    assert_eq!(node.files(), [] as [PathBuf; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_write_back_that_is_cut_off_is_kept_out_of_the_heir_s_disk() {
    let (node, store) = (Node::new(Caching::ReadWrite), store());
    let lease = LeaseId::random();
    let old = owner(&node, &store, &lease).await;
    let number = store.blob().number;
    old.write(0, bytes(1, 4096), false).await.unwrap();
    old.let_go().await.unwrap();
    let new = heir(&node, &store, &lease).await.expect("it was let go of");
    assert!(
        store.blob().number > number + 64,
        "past everything that the old one may have sent"
    );
    new.go_on();
    new.close().await.unwrap();
}
