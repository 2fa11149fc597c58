//! Containers and blobs as wholes: creation, names, snapshots, copies, listings.

use super::data::joined;
use super::*;

pub(super) async fn containers(store: Store) {
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

pub(super) async fn creation(store: Store) {
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

pub(super) async fn odd_names(store: Store) {
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

pub(super) async fn snapshots(store: Store) {
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

pub(super) async fn copies(store: Store) {
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

pub(super) async fn copies_are_independent(store: Store) {
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

pub(super) async fn put_page_from_url(store: Store) {
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

pub(super) async fn metadata(store: Store) {
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

pub(super) async fn listing(store: Store) {
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
