//! Conditional headers, sequence numbers, and creation that does not overwrite.

use crate::client::memory;

#[test]
fn entity_tags_and_dates_guard_reads_and_writes() {
    let (_running, client) = memory();
    let created = client.create("a", 512);
    let (etag, date) = (created.header("etag"), created.header("last-modified"));
    let get = client.get("dysks/a").range(0, 512);
    let put = client.page("a", 0, &[1; 512]);
    let long_ago = "Mon, 01 Jan 2001 00:00:00 GMT";
    for (name, value, read, write) in [
        (
            "If-Match",
            "\"0x1\"",
            "412 ConditionNotMet",
            "412 ConditionNotMet",
        ),
        (
            "If-None-Match",
            etag,
            "304 ConditionNotMet",
            "412 ConditionNotMet",
        ),
        (
            "If-Modified-Since",
            date,
            "304 ConditionNotMet",
            "412 ConditionNotMet",
        ),
        (
            "If-Unmodified-Since",
            long_ago,
            "412 ConditionNotMet",
            "412 ConditionNotMet",
        ),
        (
            "If-Modified-Since",
            "tomorrow",
            "400 InvalidHeaderValue",
            "400 InvalidHeaderValue",
        ),
    ] {
        assert_eq!(get.clone().with(name, value).code(), read, "{name}");
        assert_eq!(put.clone().with(name, value).code(), write, "{name}");
    }
    assert_eq!(
        client.head("dysks/a").send().header("etag"),
        etag,
        "nothing was written"
    );
    for (name, value) in [
        ("If-Match", etag),
        ("If-Match", "*"),
        ("If-None-Match", "\"0x1\""),
        ("If-Modified-Since", long_ago),
        ("If-Unmodified-Since", date),
    ] {
        assert_eq!(get.clone().with(name, value).code(), "206", "{name}");
    }
    assert_eq!(put.clone().with("If-Match", etag).code(), "201");
    assert_eq!(put.with("If-Match", etag).code(), "412 ConditionNotMet");
}

#[test]
fn creation_can_refuse_to_overwrite() {
    let (_running, client) = memory();
    let create = |name: &str, value: &str| {
        client
            .put("dysks/a")
            .with("x-ms-blob-type", "PageBlob")
            .with("x-ms-blob-content-length", 512)
            .with(name, value)
            .code()
    };
    assert_eq!(create("If-Match", "*"), "412 ConditionNotMet");
    assert_eq!(create("If-None-Match", "*"), "201");
    assert_eq!(create("If-None-Match", "*"), "409 BlobAlreadyExists");
    assert_eq!(create("x-ms-meta-x", "1"), "201");
}

#[test]
fn the_sequence_number_fences_writes() {
    let (_running, client) = memory();
    client.create("a", 512);
    let put = |name: &str, bound: u64| client.page("a", 0, &[1; 512]).with(name, bound).code();
    let raise = |action: &str, number: Option<u64>| {
        let call = client
            .put("dysks/a?comp=properties")
            .with("x-ms-sequence-number-action", action);
        match number {
            Some(number) => call.with("x-ms-blob-sequence-number", number),
            None => call,
        }
    };
    let refused = "412 SequenceNumberConditionNotMet";
    assert_eq!(put("x-ms-if-sequence-number-lt", 1), "201");
    let raised = raise("max", Some(7)).send().expect_status(200);
    assert_eq!(raised.header("x-ms-blob-sequence-number"), "7");
    assert_eq!(put("x-ms-if-sequence-number-lt", 7), refused);
    assert_eq!(put("x-ms-if-sequence-number-lt", 8), "201");
    assert_eq!(put("x-ms-if-sequence-number-le", 6), refused);
    assert_eq!(put("x-ms-if-sequence-number-le", 7), "201");
    assert_eq!(put("x-ms-if-sequence-number-eq", 6), refused);
    assert_eq!(put("x-ms-if-sequence-number-eq", 7), "201");
    assert_eq!(put("x-ms-if-sequence-number-lt", 1), refused);
    raise("max", Some(3)).send().expect_status(200);
    let increment = raise("increment", None).send().expect_status(200);
    assert_eq!(increment.header("x-ms-blob-sequence-number"), "8");
    let big = i64::MAX.unsigned_abs();
    raise("update", Some(big)).send().expect_status(200);
    let head = client.head("dysks/a").send();
    assert_eq!(head.header("x-ms-blob-sequence-number"), big.to_string());
    assert_eq!(
        raise("increment", None).code(),
        "409 SequenceNumberIncrementTooLarge"
    );
    assert_eq!(
        raise("update", Some(big + 1)).code(),
        "400 InvalidHeaderValue"
    );
    assert_eq!(raise("max", None).code(), "400 MissingRequiredHeader");
    assert_eq!(raise("lower", Some(1)).code(), "400 InvalidHeaderValue");
    let clear = client
        .clear("a", 0, 512)
        .with("x-ms-if-sequence-number-lt", 5);
    assert_eq!(clear.code(), refused);
}
