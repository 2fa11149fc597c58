//! What was never written: who need not ask the store for it, and for how long.

// All of this file is tests, also outside of `#[test]` functions.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use crate::support::sim_store::SimStore;
use bytes::Bytes;
use dysk::blob::LeaseId;
use dysk::device::{BlockDevice as _, DeviceError};
use dysk::volume::{OpenOptions, Volume};
use tokio::time::{sleep, timeout};

const SECOND: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);
const PAGE: usize = 512;

fn store() -> SimStore {
    SimStore::new(1 << 20, 7)
}

async fn open(store: &SimStore) -> Arc<Volume<SimStore>> {
    let options = OpenOptions {
        keeper: Some(tokio::runtime::Handle::current()),
        ..OpenOptions::new(LeaseId::random())
    };
    Volume::open(store.clone(), options).await.unwrap()
}

/// A volume that has learned what is empty.
async fn learned(store: &SimStore) -> Arc<Volume<SimStore>> {
    let volume = open(store).await;
    sleep(SECOND).await;
    volume
}

/// Reads a page; and whether the store was asked for it.
async fn read(
    volume: &Volume<SimStore>,
    store: &SimStore,
    offset: u64,
) -> Result<(u8, bool), DeviceError> {
    let before = store.blob().gets;
    let data = volume.read(offset, 512).await?.to_bytes();
    assert!(data.iter().all(|byte| *byte == data[0]));
    Ok((data[0], store.blob().gets > before))
}

fn page(value: u8) -> Bytes {
    vec![value; PAGE].into()
}

fn is_fenced<T>(result: &Result<T, DeviceError>) -> bool {
    matches!(result, Err(DeviceError::Io(cause)) if cause.starts_with("fenced: "))
}

#[tokio::test(start_paused = true)]
async fn nobody_asks_for_what_was_never_written_until_the_lease_is_uncertain() {
    let store = store();
    store.blob().bytes[4096..4096 + PAGE].fill(5);
    let volume = learned(&store).await;
    assert_eq!(read(&volume, &store, 0).await.unwrap(), (0, false));
    assert_eq!(read(&volume, &store, 4096).await.unwrap(), (5, true));
    volume.write(8192, page(6), false).await.unwrap();
    assert_eq!(read(&volume, &store, 8192).await.unwrap(), (6, true));
    volume.trim(8192, PAGE as u64, false).await.unwrap();
    assert_eq!(read(&volume, &store, 8192).await.unwrap(), (0, false));

    store.blob().leases_stalled = true;
    sleep(30 * SECOND).await;
    assert_eq!(read(&volume, &store, 0).await.unwrap(), (0, false));
    // It was renewed every 15 s; now it may have run out.
    sleep(29 * SECOND).await;
    store.blob().bytes[..PAGE].fill(9);
    assert_eq!(read(&volume, &store, 0).await.unwrap(), (9, true));
    assert_eq!(read(&volume, &store, 512).await.unwrap(), (0, true));
    store.resume();
    sleep(20 * SECOND).await;
    assert_eq!(read(&volume, &store, 512).await.unwrap(), (0, false));
}

#[tokio::test(start_paused = true)]
async fn zeroes_that_need_not_be_sent_are_acknowledged_by_the_holder_alone() {
    for way in 0..3 {
        let store = store();
        let volume = learned(&store).await;
        let zero = async || match way {
            0 => volume.write(0, page(0), false).await,
            1 => volume.trim(0, PAGE as u64, true).await,
            _ => volume.write_zeroes(0, PAGE as u64, false, false).await,
        };
        zero().await.unwrap();
        assert!(store.blob().puts.is_empty());
        store.blob().lease = Some(LeaseId::random());
        assert!(is_fenced(&zero().await), "way {way}");
    }
}

/// What is empty is trimmed without a request, as it is read.
#[tokio::test(start_paused = true)]
async fn nothing_is_trimmed_without_a_request_until_the_lease_is_uncertain() {
    let store = store();
    let volume = learned(&store).await;
    let asked = async |offset| {
        let before = store.blob().requests;
        volume.trim(offset, PAGE as u64, false).await.unwrap();
        store.blob().requests > before
    };
    assert!(!asked(0).await, "never written");
    volume.write(0, page(6), false).await.unwrap();
    assert!(asked(0).await, "written");
    assert!(!asked(0).await, "cleared");
    store.blob().leases_stalled = true;
    sleep(59 * SECOND).await;
    assert!(asked(0).await, "another may have written there");
}

#[tokio::test(start_paused = true)]
async fn what_is_learned_is_of_a_time_when_the_disk_was_ours() {
    let store = store();
    store.blob().bytes[..PAGE].fill(5);
    let volume = open(&store).await;
    {
        // Somebody takes the disk and trims before the store is asked.
        let mut blob = store.blob();
        blob.lease = Some(LeaseId::random());
        blob.bytes[..PAGE].fill(0);
    }
    sleep(SECOND).await;
    store.blob().bytes[..PAGE].fill(9);
    let seen = read(&volume, &store, 0).await;
    assert!(is_fenced(&seen), "{seen:?}");
}

#[tokio::test(start_paused = true)]
async fn who_hands_a_volume_over_forgets_what_it_knew() {
    let store = store();
    let volume = learned(&store).await;
    volume.let_go().await.unwrap();
    store.blob().bytes[..PAGE].fill(9);
    volume.take_back().await.unwrap();
    assert_eq!(read(&volume, &store, 0).await.unwrap(), (9, true));
    sleep(SECOND).await;
    assert_eq!(read(&volume, &store, 0).await.unwrap(), (9, true));
    assert_eq!(read(&volume, &store, 512).await.unwrap(), (0, false));
}

/// Writers of zeroes have the lease confirmed, one of them at any time; the
/// raise that a write that was given up asks for has its turn all the same.
#[tokio::test(start_paused = true)]
async fn confirmations_do_not_keep_a_raise_from_being_made() {
    let store = store();
    let volume = learned(&store).await;
    let mut writers = Vec::new();
    for at in 1..17u32 {
        let volume = Arc::clone(&volume);
        writers.push(tokio::spawn(async move {
            // Half of them ask while the others' question is under way.
            sleep(at * MS).await;
            loop {
                sleep(MS).await;
                let offset = u64::from(at) << 15;
                let zeroed = volume.write_zeroes(offset, PAGE as u64, false, false);
                zeroed.await.unwrap();
            }
        }));
    }
    store.blob().stalled = true;
    let given_up = timeout(100 * MS, volume.write(0, page(1), false)).await;
    given_up.expect_err("the store is silent");
    store.resume();
    let written = timeout(60 * SECOND, volume.write(0, page(2), false)).await;
    written.expect("the raise is made").unwrap();
    writers.into_iter().for_each(|writer| writer.abort());
}

/// Who stops a daemon does not wait for a volume that gets nothing done.
#[tokio::test(start_paused = true)]
async fn zeroes_that_wait_for_the_store_are_seen_to_wait() {
    let store = store();
    let volume = learned(&store).await;
    store.blob().leases_stalled = true;
    let zeroing = Arc::clone(&volume);
    let zero =
        tokio::spawn(async move { zeroing.write_zeroes(0, PAGE as u64, false, false).await });
    sleep(4 * SECOND).await;
    assert!(!volume.is_stuck(5 * SECOND));
    sleep(2 * SECOND).await;
    assert!(volume.is_stuck(5 * SECOND) && !zero.is_finished());
    store.resume();
    zero.await.unwrap().unwrap();
    assert!(!volume.is_stuck(5 * SECOND));
}

#[tokio::test(start_paused = true)]
async fn a_closed_volume_is_held_by_nobody() {
    let store = store();
    let volume = open(&store).await;
    volume.close().await.unwrap();
    let left = Arc::downgrade(&volume);
    drop(volume);
    sleep(SECOND).await;
    assert!(left.upgrade().is_none());
}
