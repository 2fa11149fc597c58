//! Pages: writes, clears, reads, ranges, limits, checksums, resizing.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use md5::Digest as _;

use crate::client::memory;

const TIB: u64 = 1 << 40;

#[test]
fn a_page_blob_reads_what_was_written_and_zeroes_elsewhere() {
    let (_running, client) = memory();
    let created = client.create("a", 1 << 20);
    assert!(created.header("etag").starts_with("\"0x8D"));
    let written = client.page("a", 4096, &[7; 1024]).send().expect_status(201);
    assert_ne!(written.header("etag"), created.header("etag"));
    assert_eq!(written.header("x-ms-blob-sequence-number"), "0");
    assert_eq!(written.header("x-ms-version"), crate::client::VERSION);
    for name in ["date", "last-modified", "x-ms-request-id"] {
        assert!(!written.header(name).is_empty(), "{name}");
    }
    let bytes = client.read("a", 3584, 2048);
    assert_eq!(bytes, [vec![0; 512], vec![7; 1024], vec![0; 512]].concat());
    client.clear("a", 4096, 512).send().expect_status(201);
    assert_eq!(client.read("a", 4096, 1024), [[0; 512], [7; 512]].concat());
    assert_eq!(client.ranges("dysks/a?comp=pagelist"), "4608-5119");
}

#[test]
fn get_blob_knows_its_ranges() {
    let (_running, client) = memory();
    client.create("a", 2048);
    client.page("a", 0, &[1; 2048]).send().expect_status(201);
    let whole = client.get("dysks/a").send().expect_status(200);
    assert_eq!(whole.body.len(), 2048);
    let part = client
        .get("dysks/a")
        .range(1024, 512)
        .send()
        .expect_status(206);
    assert_eq!(part.header("content-range"), "bytes 1024-1535/2048");
    assert_eq!(part.header("x-ms-blob-type"), "PageBlob");
    let cut = client
        .get("dysks/a")
        .range(1536, 9999)
        .send()
        .expect_status(206);
    assert_eq!(cut.header("content-range"), "bytes 1536-2047/2048");
    let open = client.get("dysks/a").with("x-ms-range", "bytes=2047-");
    assert_eq!(open.send().expect_status(206).body, [1]);
    let both = client
        .get("dysks/a")
        .range(0, 512)
        .with("Range", "bytes=0-0");
    assert_eq!(both.send().expect_status(206).body.len(), 512);
    let past = client.get("dysks/a").range(2048, 1);
    assert_eq!(past.code(), "416 InvalidRange");
    assert_eq!(past.send().header("content-range"), "bytes */2048");
    let bad = client.get("dysks/a").with("x-ms-range", "bytes=9-1");
    assert_eq!(bad.code(), "400 InvalidHeaderValue");
}

#[test]
fn large_reads_are_streamed_whole() {
    let (_running, client) = memory();
    client.create("a", 32 << 20);
    client
        .page("a", 9 << 20, &[3; 4096])
        .send()
        .expect_status(201);
    let body = client.read("a", 1 << 20, 20 << 20);
    assert_eq!(body.len(), 20 << 20);
    assert_eq!(body.iter().filter(|byte| **byte == 3).count(), 4096);
    assert_eq!(body[8 << 20], 3);
}

#[test]
fn an_empty_blob_of_eight_tebibytes_costs_nothing() {
    let (running, client) = memory();
    client.create("big", 8 * TIB);
    let head = client.head("dysks/big").send().expect_status(200);
    assert_eq!(head.header("content-length"), (8 * TIB).to_string());
    assert_eq!(running.allocated("dysks", "big"), Some(0));
    client
        .page("big", 8 * TIB - 512, &[9; 512])
        .send()
        .expect_status(201);
    assert_eq!(client.read("big", 8 * TIB - 512, 512), [9; 512]);
    assert_eq!(client.read("big", 4 * TIB, 512), [0; 512]);
    let last = format!("{}-{}", 8 * TIB - 512, 8 * TIB - 1);
    assert_eq!(client.ranges("dysks/big?comp=pagelist"), last);
    assert!(running.allocated("dysks", "big") < Some(1 << 20));
    client.clear("big", 0, 8 * TIB).send().expect_status(201);
    assert_eq!(client.ranges("dysks/big?comp=pagelist"), "");
    assert_eq!(running.allocated("dysks", "big"), Some(0));
}

#[test]
fn limits_are_azures() {
    let (_running, client) = memory();
    let create = |size: u64| {
        client
            .put("dysks/new")
            .with("x-ms-blob-type", "PageBlob")
            .with("x-ms-blob-content-length", size)
            .code()
    };
    assert_eq!(create(8 * TIB + 512), "400 InvalidHeaderValue");
    assert_eq!(create(1000), "400 InvalidHeaderValue");
    assert_eq!(client.head("dysks/new").code(), "404 BlobNotFound");
    client.create("a", 16 << 20);
    client
        .page("a", 0, &vec![1; 4 << 20])
        .send()
        .expect_status(201);
    assert_eq!(
        client.page("a", 0, &vec![1; (4 << 20) + 512]).code(),
        "413 RequestBodyTooLarge"
    );
    assert_eq!(
        client.page("a", 0, &vec![1; 8 << 20]).code(),
        "413 RequestBodyTooLarge"
    );
    for (offset, len) in [(0, 100), (100, 512), (0, 513)] {
        assert_eq!(
            client.page("a", offset, &vec![1; len]).code(),
            "416 InvalidPageRange"
        );
        assert_eq!(
            client.clear("a", offset, len as u64).code(),
            "416 InvalidPageRange"
        );
    }
    assert_eq!(
        client.page("a", 16 << 20, &[1; 512]).code(),
        "416 InvalidPageRange"
    );
    assert_eq!(
        client.clear("a", 0, (16 << 20) + 512).code(),
        "416 InvalidPageRange"
    );
    let short = client
        .put("dysks/a?comp=page")
        .with("x-ms-page-write", "update")
        .range(0, 1024)
        .body(&[1; 512]);
    assert_eq!(short.code(), "400 InvalidHeaderValue");
    let rangeless = client
        .put("dysks/a?comp=page")
        .with("x-ms-page-write", "clear");
    assert_eq!(rangeless.code(), "400 MissingRequiredHeader");
    assert_eq!(
        client.put("dysks/a?comp=page").code(),
        "400 MissingRequiredHeader"
    );
    assert_eq!(client.page("none", 0, &[1; 512]).code(), "404 BlobNotFound");
    let elsewhere = client
        .put("nowhere/a?comp=page")
        .with("x-ms-page-write", "clear")
        .range(0, 512);
    assert_eq!(elsewhere.code(), "404 ContainerNotFound");
}

#[test]
fn other_kinds_of_blobs_are_no_disks() {
    let (_running, client) = memory();
    let put = client.put("dysks/text").with("x-ms-blob-type", "BlockBlob");
    put.body(b"hello").send().expect_status(201);
    assert_eq!(client.get("dysks/text").send().body, b"hello");
    assert_eq!(
        client.head("dysks/text").send().header("x-ms-blob-type"),
        "BlockBlob"
    );
    assert_eq!(
        client.page("text", 0, &[1; 512]).code(),
        "409 InvalidBlobType"
    );
    assert_eq!(
        client.get("dysks/text?comp=pagelist").code(),
        "409 InvalidBlobType"
    );
    let resize = client
        .put("dysks/text?comp=properties")
        .with("x-ms-blob-content-length", 512);
    assert_eq!(resize.code(), "409 InvalidBlobType");
}

#[test]
fn checksums_are_checked_and_echoed() {
    let (_running, client) = memory();
    client.create("a", 4096);
    let data: Vec<u8> = (0..=255).cycle().take(1024).collect();
    let md5 = STANDARD.encode(md5::Md5::digest(&data));
    let mut digest = crc64fast_nvme::Digest::new();
    digest.write(&data);
    let crc = STANDARD.encode(digest.sum64().to_le_bytes());
    let put = client.page("a", 0, &data);
    assert_eq!(put.send().header("x-ms-content-crc64"), crc);
    let summed = put
        .clone()
        .with("Content-MD5", &md5)
        .send()
        .expect_status(201);
    assert_eq!(summed.header("content-md5"), md5);
    put.clone()
        .with("x-ms-content-crc64", &crc)
        .send()
        .expect_status(201);
    let wrong = client.page("a", 0, &[0; 1024]);
    assert_eq!(
        wrong.clone().with("Content-MD5", &md5).code(),
        "400 Md5Mismatch"
    );
    assert_eq!(
        wrong.clone().with("x-ms-content-crc64", &crc).code(),
        "400 Crc64Mismatch"
    );
    assert_eq!(wrong.with("Content-MD5", "abc").code(), "400 InvalidMd5");
    let get = client.get("dysks/a").range(0, 1024);
    let answer = get
        .clone()
        .with("x-ms-range-get-content-md5", "true")
        .send();
    assert_eq!(
        (answer.header("content-md5"), &answer.body),
        (md5.as_str(), &data)
    );
    let answer = get.with("x-ms-range-get-content-crc64", "true").send();
    assert_eq!(answer.header("x-ms-content-crc64"), crc);
    let rangeless = client
        .get("dysks/a")
        .with("x-ms-range-get-content-md5", "true");
    assert_eq!(rangeless.code(), "400 InvalidHeaderValue");
}

#[test]
fn page_ranges_coalesce_and_come_in_pages() {
    let (_running, client) = memory();
    client.create("a", 1 << 20);
    for offset in [0, 512, 1024, 4096, 8192, 8704, 65536] {
        client
            .page("a", offset, &[1; 512])
            .send()
            .expect_status(201);
    }
    assert_eq!(
        client.ranges("dysks/a?comp=pagelist"),
        "0-1535 4096-4607 8192-9215 65536-66047"
    );
    let mut marker = String::new();
    let mut seen = Vec::new();
    loop {
        let page = client.ranges(&format!(
            "dysks/a?comp=pagelist&maxresults=2&marker={marker}"
        ));
        let (ranges, next) = page.split_once(" next=").unwrap_or((&page, ""));
        seen.push(ranges.to_owned());
        if next.is_empty() {
            break;
        }
        marker = next.to_owned();
    }
    assert_eq!(seen, ["0-1535 4096-4607", "8192-9215 65536-66047"]);
    let within = client.get("dysks/a?comp=pagelist").range(1024, 4096).send();
    assert_eq!(within.header("x-ms-blob-content-length"), "1048576");
    assert_eq!(
        crate::client::compact_ranges(&within.text()),
        "1024-1535 4096-4607"
    );
    assert_eq!(
        client.get("dysks/a?comp=pagelist&maxresults=0").code(),
        "400 OutOfRangeQueryParameterValue"
    );
}

#[test]
fn more_than_ten_thousand_ranges_need_a_second_page() {
    let (_running, client) = memory();
    client.create("a", 32 << 20);
    // One page in two: written whole, then every other page cleared, in blocks.
    client
        .page("a", 0, &vec![1; 4 << 20])
        .send()
        .expect_status(201);
    client
        .page("a", 4 << 20, &vec![1; 4 << 20])
        .send()
        .expect_status(201);
    client
        .page("a", 8 << 20, &vec![1; 4 << 20])
        .send()
        .expect_status(201);
    for page in 0..10_100 {
        client
            .clear("a", page * 1024, 512)
            .send()
            .expect_status(201);
    }
    let first = client.ranges("dysks/a?comp=pagelist");
    assert_eq!(
        first.split(' ').filter(|range| range.contains('-')).count(),
        10_000
    );
    let marker = first.rsplit_once("next=").expect("a marker").1;
    let second = client.ranges(&format!("dysks/a?comp=pagelist&marker={marker}"));
    assert_eq!(second.split(' ').count(), 100);
    assert!(!second.contains("next"));
}

#[test]
fn resizing_drops_what_is_cut_off() {
    let (_running, client) = memory();
    client.create("a", 8192);
    client.page("a", 0, &[5; 8192]).send().expect_status(201);
    let resize = |size: u64| {
        client
            .put("dysks/a?comp=properties")
            .with("x-ms-blob-content-length", size)
            .send()
            .expect_status(200)
    };
    let before = client.head("dysks/a").send().header("etag").to_owned();
    assert_ne!(resize(4096).header("etag"), before);
    assert_eq!(
        client.page("a", 4096, &[1; 512]).code(),
        "416 InvalidPageRange"
    );
    resize(16384);
    assert_eq!(client.read("a", 3584, 1024), [[5; 512], [0; 512]].concat());
    assert_eq!(client.ranges("dysks/a?comp=pagelist"), "0-4095");
}

#[test]
fn properties_and_metadata_are_kept() {
    let (_running, client) = memory();
    client.create("dir/a%20b", 512);
    let target = "dysks/dir/a%20b";
    client
        .put(&format!("{target}?comp=metadata"))
        .with("x-ms-meta-owner", "me")
        .send()
        .expect_status(200);
    client
        .put(&format!("{target}?comp=properties"))
        .with("x-ms-blob-content-type", "application/vhd")
        .send()
        .expect_status(200);
    let head = client.head(target).send().expect_status(200);
    assert_eq!(head.header("x-ms-meta-owner"), "me");
    assert_eq!(head.header("content-type"), "application/vhd");
    let metadata = client.head(&format!("{target}?comp=metadata")).send();
    assert_eq!(metadata.header("x-ms-meta-owner"), "me");
    let list = client
        .get("dysks?restype=container&comp=list&include=metadata")
        .send()
        .text();
    assert!(
        list.contains("<Name>dir/a b</Name>") && list.contains("<owner>me</owner>"),
        "{list}"
    );
}
