//! Who may do what: sequence numbers, leases, conditions, signatures.

use super::*;

pub(super) async fn sequence_numbers(store: Store) {
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

pub(super) async fn leases(store: Store) {
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

pub(super) async fn lease_expiry(store: Store) {
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

pub(super) async fn conditional_headers(store: Store) {
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

pub(super) async fn shared_access_signatures(store: Store) {
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

pub(super) async fn wrong_key(store: Store) {
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

pub(super) async fn not_found(store: Store) {
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
