//! One list of checks on a page-blob service, run against every store at
//! hand: our emulator and Azurite, both over HTTP and HTTPS, and a real account
//! when `DYSK_TEST_ACCOUNT` and `DYSK_TEST_KEY` are set.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use dysk::blob::sas::{Grant, account_sas};
use dysk::blob::{
    Account, AccountConfig, BlobType, Checksum, Conditions, CopyStatus, Credential,
    DeleteSnapshots, ETag, Effect, LeaseId, LeaseState, PageBlob, Range, SequenceNumber, SharedKey,
    StorageError,
};
use dysk::emulator::{Config, Emulator, TlsFiles};

#[path = "support/azurite.rs"]
mod azurite;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// The bound on every attempt of the suite.
const SOON: Duration = Duration::from_secs(30);

/// A store under test.
#[derive(Clone)]
struct Store {
    account: Account,
    config: AccountConfig,
    key: SharedKey,
    container: String,
}

impl Store {
    fn new(name: &str, key: &str, endpoint: &str, ca_file: Option<std::path::PathBuf>) -> Self {
        let key = SharedKey::from_base64(key).expect("a key");
        let config = AccountConfig {
            name: name.to_owned(),
            endpoint: endpoint.to_owned(),
            credential: Credential::SharedKey(key.clone()),
            ca_file,
            connect_timeout: Duration::from_secs(10),
            max_connections: 8,
            idle_timeout: Duration::from_secs(60),
        };
        Self {
            account: Account::new(config.clone()).expect("a configuration"),
            config,
            key,
            container: format!("conformance-{}", LeaseId::random().as_str()),
        }
    }

    /// The same store for somebody with other credentials.
    fn with(&self, credential: Credential) -> Account {
        Account::new(AccountConfig {
            credential,
            ..self.config.clone()
        })
        .expect("a configuration")
    }

    fn named(&self, name: &str) -> PageBlob {
        self.account.page_blob(&self.container, name)
    }

    /// A new blob of `size` bytes with a name of its own.
    async fn blob(&self, size: u64) -> PageBlob {
        let blob = self.named(&format!("{}.vhd", LeaseId::random().as_str()));
        blob.create(size, &[], &Conditions::not_existing(), SOON)
            .await
            .expect("a new blob");
        blob
    }

    fn grant(&self, permissions: &str) -> Grant {
        Grant {
            permissions: permissions.into(),
            start: None,
            expiry: SystemTime::now() + Duration::from_secs(3600),
            https_only: self.config.endpoint.starts_with("https"),
        }
    }
}

fn any() -> Conditions {
    Conditions::default()
}

fn pattern(len: u64, seed: u8) -> Bytes {
    (0..len)
        .map(|at| (at % 251) as u8 ^ (at >> 9) as u8 ^ seed)
        .collect()
}

async fn put(blob: &PageBlob, offset: u64, data: &Bytes) {
    blob.put_page(offset, data.clone(), Checksum::Off, &any(), SOON)
        .await
        .expect("put page");
}

async fn get(blob: &PageBlob, range: Range) -> Bytes {
    let read = blob
        .get_range(range, Checksum::Off, &any(), SOON)
        .await
        .expect("get blob");
    read.pieces.concat().into()
}

/// The error of a request that must be refused with one of `codes`.
fn refused<T: std::fmt::Debug>(
    result: Result<T, StorageError>,
    status: u16,
    codes: &[&str],
) -> StorageError {
    let error = result.expect_err("it must be refused");
    assert_eq!(error.status(), Some(status), "{error}");
    assert!(codes.contains(&error.code()), "{error}");
    assert_eq!(error.effect(), Effect::NotApplied);
    error
}

async fn containers(store: Store) {
    let name = format!("conformance-{}", LeaseId::random().as_str());
    let account = &store.account;
    assert!(!account.container_exists(&name, SOON).await.expect("asked"));
    account
        .create_container(&name, SOON)
        .await
        .expect("created");
    assert!(account.container_exists(&name, SOON).await.expect("asked"));
    refused(
        account.create_container(&name, SOON).await,
        409,
        &["ContainerAlreadyExists"],
    );
    account
        .delete_container(&name, SOON)
        .await
        .expect("deleted");
    refused(
        account.delete_container(&name, SOON).await,
        404,
        &["ContainerNotFound"],
    );
}

async fn creation(store: Store) {
    let blob = store.named("creation.vhd");
    let metadata = [("owner".to_owned(), "some one".to_owned())];
    let made = blob
        .create(MIB, &metadata, &Conditions::not_existing(), SOON)
        .await
        .expect("created");
    let seen = blob.properties(&any(), SOON).await.expect("properties");
    assert_eq!(
        (seen.size, seen.blob_type, seen.sequence_number),
        (MIB, BlobType::Page, 0)
    );
    assert_eq!(seen.etag, made.etag);
    assert_eq!(seen.metadata, metadata);
    assert_eq!(seen.lease_state, LeaseState::Available);
    assert!(!seen.lease_infinite && seen.copy.is_none());
    refused(
        blob.create(MIB, &[], &Conditions::not_existing(), SOON)
            .await,
        409,
        &["BlobAlreadyExists"],
    );
    assert!(get(&blob, Range::at(0, MIB)).await.iter().all(|&b| b == 0));
    let odd = blob.create(513, &[], &any(), SOON).await;
    assert_eq!(odd.expect_err("no whole page").status(), Some(400));
}

async fn reads_and_writes(store: Store) {
    let blob = store.blob(8 * MIB).await;
    let (small, large) = (pattern(4 * KIB, 1), pattern(4 * MIB, 2));
    put(&blob, 512, &small).await;
    put(&blob, 4 * MIB, &large).await;
    assert_eq!(get(&blob, Range::at(512, 4 * KIB)).await, small);
    assert_eq!(get(&blob, Range::at(4 * MIB, 4 * MIB)).await, large);
    // Reads need no alignment.
    assert_eq!(
        get(&blob, Range::at(700, 1000)).await,
        small.slice(188..1188)
    );
    let read = blob
        .get_range(Range::at(0, 1024), Checksum::Off, &any(), SOON)
        .await
        .expect("read");
    assert_eq!(read.blob_size, 8 * MIB);
    assert_eq!(read.pieces.concat()[..512], [0; 512]);
    refused(
        blob.get_range(Range::at(9 * MIB, 512), Checksum::Off, &any(), SOON)
            .await,
        416,
        &["InvalidRange"],
    );
    // Overwriting replaces, and only what was named.
    put(&blob, 1024, &pattern(512, 9)).await;
    let mut expected = small.to_vec();
    expected[512..1024].copy_from_slice(&pattern(512, 9));
    assert_eq!(get(&blob, Range::at(512, 4 * KIB)).await, expected);
}

async fn alignment(store: Store) {
    let blob = store.blob(MIB).await;
    for (offset, len) in [(1, 512), (0, 511), (512, 700)] {
        let result = blob
            .put_page(offset, pattern(len, 1), Checksum::Off, &any(), SOON)
            .await;
        // The status and code differ by store and by version.
        let error = result.expect_err("no page boundary");
        assert!(matches!(error.status(), Some(400 | 416)), "{error}");
        assert_eq!(error.effect(), Effect::NotApplied);
    }
}

async fn size_limits(store: Store) {
    let blob = store.blob(8 * MIB).await;
    let large = pattern(4 * MIB + 512, 1);
    refused(
        blob.put_page(0, large, Checksum::Off, &any(), SOON).await,
        413,
        &["RequestBodyTooLarge"],
    );
    refused(
        blob.put_page(8 * MIB - 512, pattern(1024, 1), Checksum::Off, &any(), SOON)
            .await,
        416,
        &["InvalidPageRange"],
    );
    let at_the_end = Range::at(8 * MIB, 512);
    refused(
        blob.get_range(at_the_end, Checksum::Off, &any(), SOON)
            .await,
        416,
        &["InvalidRange"],
    );
}

async fn huge_blobs(store: Store) {
    let blob = store.blob(8 << 40).await;
    let last = Range::at((8 << 40) - 4096, 4096);
    put(&blob, last.start, &pattern(4096, 3)).await;
    assert_eq!(get(&blob, last).await, pattern(4096, 3));
    blob.clear_pages(Range::at(0, 8 << 40), &any(), SOON)
        .await
        .expect("cleared");
    assert_eq!(get(&blob, last).await, vec![0; 4096]);
}

async fn odd_names(store: Store) {
    for name in [
        "a b/c.vhd",
        "dir/über/日本.vhd",
        "plus+percent%25 &=?#;,'()!*@:$~^`.vhd",
        "brackets[1]{2}|.vhd",
    ] {
        let blob = store.named(name);
        blob.create(KIB, &[], &Conditions::not_existing(), SOON)
            .await
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        put(&blob, 512, &pattern(512, 5)).await;
        assert_eq!(get(&blob, Range::at(512, 512)).await, pattern(512, 5));
        let (found, _) = store
            .account
            .list_blobs(&store.container, name, false, None, SOON)
            .await
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(found.len(), 1, "{name}");
        assert_eq!(found[0].name, name);
        let time = blob
            .create_snapshot(&[], &any(), SOON)
            .await
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(
            get(&blob.at_snapshot(time), Range::at(512, 512)).await,
            pattern(512, 5)
        );
    }
}

async fn md5(store: Store) {
    checksum(store, Checksum::Md5).await;
}

async fn crc64(store: Store) {
    checksum(store, Checksum::Crc64).await;
}

async fn checksum(store: Store, kind: Checksum) {
    let blob = store.blob(4 * MIB).await;
    for len in [512, 64 * KIB, 4 * MIB] {
        let data = pattern(len, 7);
        blob.put_page(0, data.clone(), kind, &any(), SOON)
            .await
            .expect("written with a checksum");
        let read = blob
            .get_range(Range::at(0, len), kind, &any(), SOON)
            .await
            .expect("read with a checksum");
        assert_eq!(read.pieces.concat(), data);
    }
}

async fn clearing(store: Store) {
    let blob = store.blob(MIB).await;
    put(&blob, 0, &pattern(64 * KIB, 1)).await;
    blob.clear_pages(Range::at(4 * KIB, 8 * KIB), &any(), SOON)
        .await
        .expect("cleared");
    let mut expected = pattern(64 * KIB, 1).to_vec();
    expected[4096..12288].fill(0);
    assert_eq!(get(&blob, Range::at(0, 64 * KIB)).await, expected);
    blob.clear_pages(Range::at(0, MIB), &any(), SOON)
        .await
        .expect("cleared whole");
    let ranges = blob
        .page_ranges(None, None, None, None, &any(), SOON)
        .await
        .expect("ranges");
    assert_eq!(ranges.filled, []);
}

/// Neighbours joined, as a store is free to list them apart.
fn joined(ranges: &[Range]) -> Vec<Range> {
    let mut all: Vec<Range> = Vec::new();
    for &range in ranges {
        match all.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => all.push(range),
        }
    }
    all
}

async fn page_ranges(store: Store) {
    let blob = store.blob(MIB).await;
    for offset in [0, 8 * KIB, 12 * KIB, 64 * KIB] {
        put(&blob, offset, &pattern(4 * KIB, 1)).await;
    }
    let list = |within| {
        let blob = blob.clone();
        async move {
            blob.page_ranges(within, None, None, None, &any(), SOON)
                .await
                .expect("ranges")
        }
    };
    let all = list(None).await;
    assert_eq!(all.blob_size, MIB);
    assert_eq!(all.next_marker, None);
    assert_eq!(all.cleared, []);
    assert_eq!(
        joined(&all.filled),
        [
            Range::at(0, 4 * KIB),
            Range::at(8 * KIB, 8 * KIB),
            Range::at(64 * KIB, 4 * KIB)
        ]
    );
    let some = list(Some(Range::at(4 * KIB, 8 * KIB))).await;
    assert_eq!(joined(&some.filled), [Range::at(8 * KIB, 4 * KIB)]);
}

async fn page_range_paging(store: Store) {
    let blob = store.blob(MIB).await;
    let offsets: Vec<u64> = (0..10).map(|n| n * 16 * KIB).collect();
    for &offset in &offsets {
        put(&blob, offset, &pattern(512, 1)).await;
    }
    let (mut found, mut marker, mut pages) = (Vec::new(), None, 0);
    loop {
        let page = blob
            .page_ranges(None, None, marker.as_deref(), Some(3), &any(), SOON)
            .await
            .expect("a page");
        assert!(page.filled.len() <= 3);
        found.extend(page.filled);
        pages += 1;
        marker = page.next_marker;
        if marker.is_none() {
            break;
        }
    }
    assert_eq!(pages, 4);
    let expected: Vec<Range> = offsets.iter().map(|&at| Range::at(at, 512)).collect();
    assert_eq!(found, expected);
}

async fn page_range_diff(store: Store) {
    let blob = store.blob(MIB).await;
    put(&blob, 0, &pattern(16 * KIB, 1)).await;
    let before = blob
        .create_snapshot(&[], &any(), SOON)
        .await
        .expect("a snapshot");
    put(&blob, 64 * KIB, &pattern(4 * KIB, 2)).await;
    blob.clear_pages(Range::at(4 * KIB, 4 * KIB), &any(), SOON)
        .await
        .expect("cleared");
    let diff = blob
        .page_ranges(None, Some(&before), None, None, &any(), SOON)
        .await
        .expect("the difference");
    assert_eq!(diff.filled, [Range::at(64 * KIB, 4 * KIB)]);
    assert_eq!(diff.cleared, [Range::at(4 * KIB, 4 * KIB)]);
}

async fn sequence_numbers(store: Store) {
    let blob = store.blob(MIB).await;
    let set = |action| {
        let blob = blob.clone();
        async move {
            blob.set_sequence_number(action, &any(), SOON)
                .await
                .expect("set")
                .sequence_number
        }
    };
    assert_eq!(set(SequenceNumber::Increment).await, 1);
    assert_eq!(set(SequenceNumber::Max(7)).await, 7);
    assert_eq!(set(SequenceNumber::Max(3)).await, 7);
    assert_eq!(set(SequenceNumber::Update(5)).await, 5);

    let bounded = |lt, le, eq| Conditions {
        if_sequence_number_lt: lt,
        if_sequence_number_le: le,
        if_sequence_number_eq: eq,
        ..any()
    };
    for (conditions, holds) in [
        (bounded(Some(6), None, None), true),
        (bounded(Some(5), None, None), false),
        (bounded(None, Some(5), None), true),
        (bounded(None, Some(4), None), false),
        (bounded(None, None, Some(5)), true),
        (bounded(None, None, Some(6)), false),
    ] {
        let data = pattern(512, u8::from(holds));
        let put = blob
            .put_page(0, data.clone(), Checksum::Off, &conditions, SOON)
            .await;
        let cleared = blob
            .clear_pages(Range::at(512, 512), &conditions, SOON)
            .await;
        if holds {
            assert_eq!(put.expect("written").sequence_number, 5);
            cleared.expect("cleared");
            assert_eq!(get(&blob, Range::at(0, 512)).await, data);
        } else {
            for result in [put, cleared] {
                let error = refused(result, 412, &["SequenceNumberConditionNotMet"]);
                assert!(error.is_sequence_number_not_met());
            }
            assert_eq!(get(&blob, Range::at(0, 512)).await, pattern(512, 1));
        }
    }
}

async fn resizing(store: Store) {
    let blob = store.blob(MIB).await;
    put(&blob, 0, &pattern(4 * KIB, 1)).await;
    let grown = blob.resize(2 * MIB, &any(), SOON).await.expect("grown");
    let seen = blob.properties(&any(), SOON).await.expect("properties");
    assert_eq!((seen.size, &seen.etag), (2 * MIB, &grown.etag));
    put(&blob, 2 * MIB - 512, &pattern(512, 2)).await;
    assert_eq!(get(&blob, Range::at(0, 4 * KIB)).await, pattern(4 * KIB, 1));
    blob.resize(KIB, &any(), SOON).await.expect("shrunk");
    refused(
        blob.get_range(Range::at(MIB, 512), Checksum::Off, &any(), SOON)
            .await,
        416,
        &["InvalidRange"],
    );
    // What was cut off does not come back.
    blob.resize(2 * MIB, &any(), SOON)
        .await
        .expect("grown again");
    assert_eq!(
        get(&blob, Range::at(2 * MIB - 512, 512)).await,
        vec![0; 512]
    );
}

async fn leases(store: Store) {
    let blob = store.blob(MIB).await;
    let (mine, other) = (LeaseId::random(), LeaseId::random());
    let state = || async {
        blob.properties(&any(), SOON)
            .await
            .expect("properties")
            .lease_state
    };
    for seconds in [14, 61] {
        let result = blob.acquire_lease(&mine, Some(seconds), &any(), SOON).await;
        refused(result, 400, &["InvalidHeaderValue"]);
    }
    blob.acquire_lease(&mine, Some(60), &any(), SOON)
        .await
        .expect("acquired");
    assert_eq!(state().await, LeaseState::Leased);
    let second = refused(
        blob.acquire_lease(&other, Some(60), &any(), SOON).await,
        409,
        &["LeaseAlreadyPresent"],
    );
    assert!(second.is_leased_elsewhere());
    blob.renew_lease(&mine, SOON).await.expect("renewed");

    let write = |conditions: Conditions| {
        let blob = blob.clone();
        async move {
            blob.put_page(0, pattern(512, 1), Checksum::Off, &conditions, SOON)
                .await
        }
    };
    write(Conditions::lease(&mine)).await.expect("the holder's");
    let without = write(any()).await.expect_err("no id");
    assert!(without.is_lease_lost(), "{without}");
    assert_eq!(without.code(), "LeaseIdMissing");
    let wrong = write(Conditions::lease(&other))
        .await
        .expect_err("wrong id");
    assert_eq!(wrong.code(), "LeaseIdMismatchWithBlobOperation");
    assert!(wrong.is_lease_lost());
    // Reading needs none; resizing does.
    assert_eq!(get(&blob, Range::at(0, 512)).await, pattern(512, 1));
    let resize = blob.resize(2 * MIB, &any(), SOON).await;
    assert_eq!(resize.expect_err("no id").code(), "LeaseIdMissing");
    blob.resize(2 * MIB, &Conditions::lease(&mine), SOON)
        .await
        .expect("the holder's");

    blob.change_lease(&mine, &other, SOON)
        .await
        .expect("changed");
    let stale = blob.renew_lease(&mine, SOON).await.expect_err("changed");
    assert!(stale.is_lease_lost(), "{stale}");
    blob.release_lease(&other, SOON).await.expect("released");
    assert_eq!(state().await, LeaseState::Available);

    // An infinite lease breaks at once.
    blob.acquire_lease(&mine, None, &any(), SOON)
        .await
        .expect("acquired for ever");
    let seen = blob.properties(&any(), SOON).await.expect("properties");
    assert!(seen.lease_infinite);
    assert_eq!(
        blob.break_lease(None, &any(), SOON).await.expect("broken"),
        0
    );
    assert_eq!(state().await, LeaseState::Broken);
    let broken = blob.renew_lease(&mine, SOON).await.expect_err("broken");
    assert!(broken.is_lease_lost(), "{broken}");
    let late = write(Conditions::lease(&mine)).await.expect_err("broken");
    assert!(late.is_lease_lost(), "{late}");

    // A finite one breaks within its period, and blocks others till then.
    blob.acquire_lease(&mine, Some(60), &any(), SOON)
        .await
        .expect("acquired");
    let left = blob
        .break_lease(Some(30), &any(), SOON)
        .await
        .expect("breaking");
    assert!((1..=30).contains(&left), "{left}");
    assert_eq!(state().await, LeaseState::Breaking);
    let blocked = blob
        .acquire_lease(&other, Some(60), &any(), SOON)
        .await
        .expect_err("breaking");
    assert!(blocked.is_leased_elsewhere(), "{blocked}");
    blob.break_lease(Some(0), &any(), SOON)
        .await
        .expect("broken now");
    blob.acquire_lease(&other, Some(60), &any(), SOON)
        .await
        .expect("the next holder");
}

async fn lease_expiry(store: Store) {
    let (kept, lost) = (store.blob(MIB).await, store.blob(MIB).await);
    let id = LeaseId::random();
    for blob in [&kept, &lost] {
        blob.acquire_lease(&id, Some(15), &any(), SOON)
            .await
            .expect("acquired");
    }
    for blob in [&kept, &lost] {
        while blob
            .properties(&any(), SOON)
            .await
            .expect("properties")
            .lease_state
            != LeaseState::Expired
        {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
    // Nobody else came: still ours.
    kept.renew_lease(&id, SOON).await.expect("renewed late");
    kept.put_page(
        0,
        pattern(512, 1),
        Checksum::Off,
        &Conditions::lease(&id),
        SOON,
    )
    .await
    .expect("ours");
    // Somebody else wrote: fenced.
    put(&lost, 0, &pattern(512, 1)).await;
    let error = lost.renew_lease(&id, SOON).await.expect_err("lost");
    assert!(error.is_lease_lost(), "{error}");
}

async fn snapshots(store: Store) {
    let blob = store.blob(MIB).await;
    put(&blob, 0, &pattern(4 * KIB, 1)).await;
    let metadata = [("mark".to_owned(), "1".to_owned())];
    let time = blob
        .create_snapshot(&metadata, &any(), SOON)
        .await
        .expect("a snapshot");
    put(&blob, 0, &pattern(4 * KIB, 2)).await;
    let old = blob.at_snapshot(&time);
    assert_eq!(get(&old, Range::at(0, 4 * KIB)).await, pattern(4 * KIB, 1));
    assert_eq!(get(&blob, Range::at(0, 4 * KIB)).await, pattern(4 * KIB, 2));
    let seen = old.properties(&any(), SOON).await.expect("its properties");
    assert_eq!(seen.metadata, metadata);
    let ranges = old
        .page_ranges(None, None, None, None, &any(), SOON)
        .await
        .expect("its ranges");
    assert_eq!(joined(&ranges.filled), [Range::at(0, 4 * KIB)]);

    let name = &blob.address().blob;
    let (listed, _) = store
        .account
        .list_blobs(&store.container, name, true, None, SOON)
        .await
        .expect("a listing");
    let times: Vec<_> = listed.iter().map(|blob| blob.snapshot.as_deref()).collect();
    assert_eq!(times.len(), 2);
    assert!(times.contains(&None) && times.contains(&Some(time.as_str())));

    let none = any();
    refused(
        blob.delete(DeleteSnapshots::Refuse, &none, SOON).await,
        409,
        &["SnapshotsPresent"],
    );
    old.delete(DeleteSnapshots::Refuse, &none, SOON)
        .await
        .expect("the snapshot alone");
    blob.create_snapshot(&[], &none, SOON)
        .await
        .expect("another");
    blob.delete(DeleteSnapshots::Only, &none, SOON)
        .await
        .expect("only the snapshots");
    blob.create_snapshot(&[], &none, SOON)
        .await
        .expect("a third");
    blob.delete(DeleteSnapshots::Include, &none, SOON)
        .await
        .expect("all");
    assert!(
        blob.properties(&none, SOON)
            .await
            .expect_err("gone")
            .is_not_found()
    );
}

/// Copies `source`'s snapshot and waits for the copy.
async fn copied(store: &Store, source: &PageBlob) -> PageBlob {
    let time = source
        .create_snapshot(&[], &any(), SOON)
        .await
        .expect("a snapshot");
    let copy = store.named(&format!("{}.vhd", LeaseId::random().as_str()));
    let url = source.at_snapshot(time).url();
    let started = copy
        .start_copy(&url, &[], &Conditions::not_existing(), SOON)
        .await
        .expect("started");
    loop {
        let seen = copy.properties(&any(), SOON).await.expect("properties");
        let state = seen.copy.expect("a copy");
        assert_eq!(state.id, started.id);
        match state.status {
            CopyStatus::Pending => tokio::time::sleep(Duration::from_millis(200)).await,
            CopyStatus::Success => {
                assert!(state.progress.is_none_or(|(done, all)| done == all));
                break;
            }
            other => panic!("{other:?}: {:?}", state.description),
        }
    }
    refused(
        copy.abort_copy(&started.id, &any(), SOON).await,
        409,
        &["NoPendingCopyOperation"],
    );
    copy
}

async fn copies(store: Store) {
    let source = store.blob(MIB).await;
    put(&source, 4 * KIB, &pattern(4 * KIB, 1)).await;
    let copy = copied(&store, &source).await;
    assert_eq!(
        get(&copy, Range::at(0, MIB)).await,
        get(&source, Range::at(0, MIB)).await
    );
    let elsewhere = source
        .account()
        .page_blob(&store.container, "nowhere")
        .url();
    let result = store
        .named("copy-of-nothing")
        .start_copy(&elsewhere, &[], &any(), SOON)
        .await;
    assert!(result.expect_err("no source").is_not_found());
}

async fn copies_are_independent(store: Store) {
    let source = store.blob(MIB).await;
    put(&source, 0, &pattern(4 * KIB, 1)).await;
    let copy = copied(&store, &source).await;
    put(&copy, 0, &pattern(4 * KIB, 2)).await;
    assert_eq!(
        get(&source, Range::at(0, 4 * KIB)).await,
        pattern(4 * KIB, 1)
    );
    put(&source, 0, &pattern(4 * KIB, 3)).await;
    assert_eq!(get(&copy, Range::at(0, 4 * KIB)).await, pattern(4 * KIB, 2));
}

async fn put_page_from_url(store: Store) {
    let (source, blob) = (store.blob(MIB).await, store.blob(MIB).await);
    put(&source, 8 * KIB, &pattern(8 * KIB, 4)).await;
    let url = source.signed_url(&store.key, &store.grant("r"));
    let conditions = Conditions {
        if_sequence_number_lt: Some(1),
        ..any()
    };
    blob.put_page_from_url(512, &url, Range::at(8 * KIB, 8 * KIB), &conditions, SOON)
        .await
        .expect("copied");
    assert_eq!(
        get(&blob, Range::at(512, 8 * KIB)).await,
        pattern(8 * KIB, 4)
    );
}

async fn conditional_headers(store: Store) {
    let blob = store.blob(MIB).await;
    let before = blob.properties(&any(), SOON).await.expect("properties");
    put(&blob, 0, &pattern(512, 1)).await;
    let now = blob.properties(&any(), SOON).await.expect("properties");
    assert_ne!(before.etag, now.etag);
    let matching = |tag: &ETag| Conditions {
        if_match: Some(tag.clone()),
        ..any()
    };
    for result in [
        blob.resize(2 * MIB, &matching(&before.etag), SOON)
            .await
            .map(drop),
        blob.delete(DeleteSnapshots::Refuse, &matching(&before.etag), SOON)
            .await,
        blob.break_lease(Some(0), &matching(&before.etag), SOON)
            .await
            .map(drop),
    ] {
        refused(result, 412, &["ConditionNotMet"]);
    }
    blob.put_page(
        0,
        pattern(512, 2),
        Checksum::Off,
        &matching(&now.etag),
        SOON,
    )
    .await
    .expect("it matches");

    let now = blob.properties(&any(), SOON).await.expect("properties");
    let unchanged = Conditions {
        if_none_match: Some(now.etag.clone()),
        ..any()
    };
    let result = blob
        .get_range(Range::at(0, 512), Checksum::Off, &unchanged, SOON)
        .await;
    assert_eq!(result.expect_err("unchanged").status(), Some(304));
    let since = |time| Conditions {
        if_modified_since: Some(time),
        ..any()
    };
    let hour = Duration::from_secs(3600);
    let result = blob.properties(&since(now.last_modified), SOON).await;
    assert_eq!(result.expect_err("unchanged").status(), Some(304));
    blob.properties(&since(now.last_modified - hour), SOON)
        .await
        .expect("changed since");
    let unmodified = Conditions {
        if_unmodified_since: Some(now.last_modified - hour),
        ..any()
    };
    refused(
        blob.put_page(0, pattern(512, 3), Checksum::Off, &unmodified, SOON)
            .await,
        412,
        &["ConditionNotMet"],
    );
}

async fn metadata(store: Store) {
    let blob = store.blob(KIB).await;
    let metadata = [
        ("a".to_owned(), "1".to_owned()),
        ("b".to_owned(), "x y; z=\"q\"".to_owned()),
    ];
    blob.set_metadata(&metadata, &any(), SOON)
        .await
        .expect("set");
    let seen = blob.properties(&any(), SOON).await.expect("properties");
    assert_eq!(seen.metadata, metadata);
    blob.set_metadata(&[], &any(), SOON).await.expect("removed");
    let seen = blob.properties(&any(), SOON).await.expect("properties");
    assert_eq!(seen.metadata, []);
    for (name, value) in [("no good", "x"), ("a", "ü"), ("a", "line\nbreak")] {
        let metadata = [(name.to_owned(), value.to_owned())];
        let result = blob.set_metadata(&metadata, &any(), SOON).await;
        let error = refused(result, 400, &["InvalidHeaderValue"]);
        assert!(error.to_string().contains("not sent"), "{error}");
    }
}

async fn listing(store: Store) {
    let prefix = LeaseId::random().as_str().to_owned();
    for n in 0..3 {
        let metadata = [("n".to_owned(), n.to_string())];
        store
            .named(&format!("{prefix}/{n}"))
            .create(KIB, &metadata, &any(), SOON)
            .await
            .expect("created");
    }
    let (found, marker) = store
        .account
        .list_blobs(&store.container, &prefix, false, None, SOON)
        .await
        .expect("a listing");
    assert_eq!(marker, None);
    assert_eq!(found.len(), 3);
    for (n, blob) in found.iter().enumerate() {
        let seen = store
            .named(&blob.name)
            .properties(&any(), SOON)
            .await
            .expect("properties");
        assert_eq!(blob.name, format!("{prefix}/{n}"));
        assert_eq!((blob.size, blob.blob_type), (KIB, BlobType::Page));
        assert_eq!((&blob.snapshot, &blob.etag), (&None, &seen.etag));
        assert_eq!(blob.metadata, [("n".to_owned(), n.to_string())]);
    }
}

async fn shared_access_signatures(store: Store) {
    let blob = store.blob(MIB).await;
    put(&blob, 0, &pattern(512, 1)).await;
    let name = &blob.address().blob;
    let range = Range::at(0, 512);
    let sas = dysk::blob::sas::blob_sas(&store.key, blob.address(), None, &store.grant("r"));
    let reader = store
        .with(Credential::Sas(sas))
        .page_blob(&store.container, name);
    assert_eq!(get(&reader, range).await, pattern(512, 1));
    let result = reader
        .put_page(0, pattern(512, 2), Checksum::Off, &any(), SOON)
        .await;
    let error = refused(
        result,
        403,
        &["AuthorizationPermissionMismatch", "AuthorizationFailure"],
    );
    assert!(!error.to_string().contains("sig="), "{error}");
    assert!(!format!("{reader:?}{error:?}").contains("sig="));

    // A snapshot's own signature, beside the snapshot in the query.
    let time = blob
        .create_snapshot(&[], &any(), SOON)
        .await
        .expect("a snapshot");
    let all = account_sas(&store.key, store.account.name(), &store.grant("rwdlac"));
    let everything = store.with(Credential::Sas(all));
    let same = everything.page_blob(&store.container, name);
    put(&same, 512, &pattern(512, 3)).await;
    assert_eq!(get(&same.at_snapshot(time), range).await, pattern(512, 1));
    everything
        .list_blobs(&store.container, name, true, None, SOON)
        .await
        .expect("a listing");

    let mut forged = account_sas(&store.key, "someoneelse", &store.grant("r"));
    forged.push_str("%3D");
    let result = store
        .with(Credential::Sas(forged))
        .page_blob(&store.container, name)
        .properties(&any(), SOON)
        .await;
    assert_eq!(result.expect_err("forged").status(), Some(403));
}

async fn wrong_key(store: Store) {
    let key = SharedKey::from_base64("d3Jvbmcga2V5").expect("base64");
    let account = store.with(Credential::SharedKey(key));
    let blob = account.page_blob(&store.container, "x");
    let result = blob
        .get_range(Range::at(0, 512), Checksum::Off, &any(), SOON)
        .await;
    let error = refused(
        result,
        403,
        &["AuthenticationFailed", "AuthorizationFailure"],
    );
    let text = error.to_string();
    assert!(text.contains(&format!("{}/x", store.container)), "{text}");
    // The right key takes over without a new handle.
    account.set_credential(Credential::SharedKey(store.key.clone()));
    let result = blob.properties(&any(), SOON).await;
    refused(result, 404, &["BlobNotFound"]);
}

async fn not_found(store: Store) {
    let missing = store.named("missing");
    let result = missing
        .put_page(0, pattern(512, 1), Checksum::Off, &any(), SOON)
        .await;
    let error = refused(result, 404, &["BlobNotFound"]);
    assert!(error.to_string().contains("create it"), "{error}");
    let nowhere = store.account.page_blob("no-such-container", "x");
    let result = nowhere.create(KIB, &[], &any(), SOON).await;
    let error = refused(result, 404, &["ContainerNotFound"]);
    assert!(
        error.to_string().contains("no container no-such-container"),
        "{error}"
    );
}

/// More requests at once than connections, each with its own answer.
async fn concurrency(store: Store) {
    let blob = store.blob(MIB).await;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..64_u64 {
        let blob = blob.clone();
        tasks.spawn(async move {
            let data = pattern(4 * KIB, u8::try_from(n).expect("small"));
            put(&blob, n * 4 * KIB, &data).await;
            assert_eq!(get(&blob, Range::at(n * 4 * KIB, 4 * KIB)).await, data);
        });
    }
    while let Some(result) = tasks.join_next().await {
        result.expect("a write and its read");
    }
}

type Check = fn(Store) -> Pin<Box<dyn Future<Output = ()> + Send>>;

macro_rules! checks {
    ($($name:ident),* $(,)?) => {
        &[$((stringify!($name), |store| Box::pin($name(store)))),*]
    };
}

const CHECKS: &[(&str, Check)] = checks![
    containers,
    creation,
    reads_and_writes,
    alignment,
    size_limits,
    huge_blobs,
    odd_names,
    md5,
    crc64,
    clearing,
    page_ranges,
    page_range_paging,
    page_range_diff,
    sequence_numbers,
    resizing,
    leases,
    lease_expiry,
    snapshots,
    copies,
    copies_are_independent,
    put_page_from_url,
    conditional_headers,
    metadata,
    listing,
    shared_access_signatures,
    wrong_key,
    not_found,
    concurrency,
];

/// What Azurite is known not to do as the service does.
const AZURITE_SKIPS: &[&str] = &[
    "size_limits",
    "crc64",
    "page_range_paging",
    "page_range_diff",
    "copies_are_independent",
    "put_page_from_url",
];

/// Runs all checks at once against `store`, in a container of their own.
fn conform(store: &Store, skips: &[&str]) {
    for skip in skips {
        assert!(CHECKS.iter().any(|(name, _)| name == skip), "{skip}?");
        println!("skipped: {skip}");
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let failed = runtime.block_on(async {
        let container = &store.container;
        store
            .account
            .create_container(container, SOON)
            .await
            .expect("a container");
        let mut running = Vec::new();
        for &(name, check) in CHECKS {
            if !skips.contains(&name) {
                running.push((name, tokio::spawn(check(store.clone()))));
            }
        }
        let mut failed = Vec::new();
        for (name, check) in running {
            match check.await {
                Ok(()) => println!("passed: {name}"),
                Err(_) => failed.push(name),
            }
        }
        store
            .account
            .delete_container(container, SOON)
            .await
            .expect("the container is removed");
        failed
    });
    assert!(failed.is_empty(), "failed: {failed:?}");
}

#[test]
fn the_emulator_conforms() {
    let config = Config::default();
    let (account, key) = (config.account.clone(), config.key.clone());
    let server = Emulator::start(config).expect("an emulator");
    conform(&Store::new(&account, &key, &server.url(), None), &[]);
}

#[test]
fn the_emulator_conforms_over_https() {
    let certificates = azurite::Certificates::make();
    let config = Config {
        tls: Some(TlsFiles {
            cert: certificates.certificate(),
            key: certificates.key(),
        }),
        ..Config::default()
    };
    let (account, key) = (config.account.clone(), config.key.clone());
    let server = Emulator::start(config).expect("an emulator");
    let ca_file = Some(certificates.authority());
    conform(&Store::new(&account, &key, &server.url(), ca_file), &[]);
}

#[test]
fn azurite_conforms() {
    let server = azurite::Azurite::start(None);
    let store = Store::new(azurite::ACCOUNT, azurite::KEY, &server.endpoint, None);
    conform(&store, AZURITE_SKIPS);
}

#[test]
fn azurite_conforms_over_https() {
    let certificates = azurite::Certificates::make();
    let server = azurite::Azurite::start(Some(&certificates));
    let store = Store::new(
        azurite::ACCOUNT,
        azurite::KEY,
        &server.endpoint,
        Some(certificates.authority()),
    );
    conform(&store, AZURITE_SKIPS);

    // Without the authority nobody is trusted, and the remedy is named.
    let stranger = Store::new(azurite::ACCOUNT, azurite::KEY, &server.endpoint, None);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let error = runtime
        .block_on(stranger.account.container_exists("dysks", SOON))
        .expect_err("nobody vouches for it");
    assert_eq!(error.failure, dysk::blob::Failure::Tls);
    assert_eq!(error.effect(), Effect::NotApplied);
    assert!(error.to_string().contains("--ca-file"), "{error}");
}

#[test]
fn a_real_account_conforms() {
    let (Ok(account), Ok(key)) = (
        std::env::var("DYSK_TEST_ACCOUNT"),
        std::env::var("DYSK_TEST_KEY"),
    ) else {
        println!("skipped: DYSK_TEST_ACCOUNT and DYSK_TEST_KEY name no account");
        return;
    };
    let endpoint = std::env::var("DYSK_TEST_ENDPOINT")
        .unwrap_or_else(|_| format!("https://{account}.blob.core.windows.net"));
    conform(&Store::new(&account, &key, &endpoint, None), &[]);
}
