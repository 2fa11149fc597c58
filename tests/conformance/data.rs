//! Bytes: reads, writes, clears, checksums, page ranges, sizes.

use super::*;

pub(super) async fn reads_and_writes(store: Store) {
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

pub(super) async fn alignment(store: Store) {
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

pub(super) async fn size_limits(store: Store) {
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

pub(super) async fn huge_blobs(store: Store) {
    let blob = store.blob(8 << 40).await;
    let last = Range::at((8 << 40) - 4096, 4096);
    put(&blob, last.start, &pattern(4096, 3)).await;
    assert_eq!(get(&blob, last).await, pattern(4096, 3));
    blob.clear_pages(Range::at(0, 8 << 40), &any(), SOON)
        .await
        .expect("cleared");
    assert_eq!(get(&blob, last).await, vec![0; 4096]);
}

pub(super) async fn md5(store: Store) {
    checksum(store, Checksum::Md5).await;
}

pub(super) async fn crc64(store: Store) {
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

pub(super) async fn clearing(store: Store) {
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
pub(super) fn joined(ranges: &[Range]) -> Vec<Range> {
    let mut all: Vec<Range> = Vec::new();
    for &range in ranges {
        match all.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => all.push(range),
        }
    }
    all
}

pub(super) async fn page_ranges(store: Store) {
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

pub(super) async fn page_range_paging(store: Store) {
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

pub(super) async fn page_range_diff(store: Store) {
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

pub(super) async fn resizing(store: Store) {
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

/// More requests at once than connections, each with its own answer.
pub(super) async fn concurrency(store: Store) {
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
