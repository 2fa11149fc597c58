//! Leases: the five actions, expiry, breaking, and what they guard.

use std::time::Duration;

use crate::client::{Client, eventually, memory};

const A: &str = "11111111-1111-4111-8111-111111111111";
const B: &str = "22222222-2222-4222-8222-222222222222";

fn acquire(client: &Client, id: &str, seconds: i64) -> String {
    client
        .lease("a", "acquire")
        .with("x-ms-lease-duration", seconds)
        .with("x-ms-proposed-lease-id", id)
        .code()
}

fn renew(client: &Client, id: &str) -> String {
    client.lease("a", "renew").with("x-ms-lease-id", id).code()
}

fn write(client: &Client, id: Option<&str>) -> String {
    let call = client.page("a", 0, &[1; 512]);
    match id {
        Some(id) => call.with("x-ms-lease-id", id).code(),
        None => call.code(),
    }
}

fn state(client: &Client) -> String {
    client
        .head("dysks/a")
        .send()
        .header("x-ms-lease-state")
        .to_owned()
}

#[test]
fn a_lease_keeps_others_from_writing() {
    let (_running, client) = memory();
    let created = client.create("a", 4096);
    let etag = created.header("etag");
    assert_eq!(acquire(&client, A, 15), "201");
    assert_eq!(acquire(&client, B, 15), "409 LeaseAlreadyPresent");
    assert_eq!(acquire(&client, A, -1), "201");
    let head = client.head("dysks/a").send();
    assert_eq!(
        head.header("etag"),
        etag,
        "lease operations leave the tag alone"
    );
    assert_eq!(head.header("x-ms-lease-duration"), "infinite");
    assert_eq!(write(&client, None), "412 LeaseIdMissing");
    assert_eq!(
        write(&client, Some(B)),
        "412 LeaseIdMismatchWithBlobOperation"
    );
    assert_eq!(write(&client, Some(A)), "201");
    let number = client
        .put("dysks/a?comp=properties")
        .with("x-ms-sequence-number-action", "increment");
    assert_eq!(number.code(), "412 LeaseIdMissing");
    assert_eq!(number.with("x-ms-lease-id", A).code(), "200");
    assert_eq!(client.delete("dysks/a").code(), "412 LeaseIdMissing");
    let read = client.get("dysks/a").range(0, 512);
    assert_eq!(read.code(), "206");
    assert_eq!(
        read.with("x-ms-lease-id", B).code(),
        "412 LeaseIdMismatchWithBlobOperation"
    );
    let release = client.lease("a", "release");
    assert_eq!(
        release.clone().with("x-ms-lease-id", B).code(),
        "409 LeaseIdMismatchWithLeaseOperation"
    );
    assert_eq!(release.with("x-ms-lease-id", A).code(), "200");
    assert_eq!(
        write(&client, Some(A)),
        "412 LeaseNotPresentWithBlobOperation"
    );
    assert_eq!(write(&client, None), "201");
}

#[test]
fn terms_outside_fifteen_to_sixty_seconds_are_refused() {
    let (_running, client) = memory();
    client.create("a", 512);
    for seconds in [14, 61, 0, -2] {
        assert_eq!(acquire(&client, A, seconds), "400 InvalidHeaderValue");
    }
    assert_eq!(acquire(&client, "no-guid", 15), "400 InvalidHeaderValue");
    let period = client
        .lease("a", "break")
        .with("x-ms-lease-break-period", 61);
    assert_eq!(period.code(), "400 InvalidHeaderValue");
}

#[test]
fn a_real_lease_runs_out_by_itself() {
    let (_running, client) = memory();
    client.create("a", 512);
    assert_eq!(acquire(&client, A, 15), "201");
    assert_eq!(state(&client), "leased");
    std::thread::sleep(Duration::from_secs(14));
    eventually("the lease expires", || state(&client) == "expired");
    assert_eq!(acquire(&client, B, 15), "201");
}

#[test]
fn an_expired_lease_is_renewed_while_nobody_has_touched_the_blob() {
    let (running, client) = memory();
    client.create("a", 512);
    acquire(&client, A, 60);
    assert!(running.expire_lease("dysks", "a"));
    assert_eq!(state(&client), "expired");
    assert_eq!(write(&client, Some(A)), "412 LeaseLost");
    assert_eq!(
        write(&client, Some(B)),
        "412 LeaseNotPresentWithBlobOperation"
    );
    assert_eq!(renew(&client, A), "200");
    assert_eq!(write(&client, Some(A)), "201");
    assert!(running.expire_lease("dysks", "a"));
    assert_eq!(write(&client, None), "201");
    assert_eq!(state(&client), "available");
    assert_eq!(renew(&client, A), "409 LeaseIdMismatchWithLeaseOperation");
    acquire(&client, A, 60);
    assert!(running.expire_lease("dysks", "a"));
    assert_eq!(acquire(&client, B, 60), "201");
    assert_eq!(renew(&client, A), "409 LeaseIdMismatchWithLeaseOperation");
    assert_eq!(
        write(&client, Some(A)),
        "412 LeaseIdMismatchWithBlobOperation"
    );
}

#[test]
fn breaking_takes_its_period() {
    let (_running, client) = memory();
    client.create("a", 512);
    let break_ = |period: Option<u32>| {
        let call = client.lease("a", "break");
        let answer = match period {
            Some(seconds) => call.with("x-ms-lease-break-period", seconds).send(),
            None => call.send(),
        };
        let left = answer.header("x-ms-lease-time");
        format!(
            "{} {left}{}",
            answer.status,
            answer.header("x-ms-error-code")
        )
    };
    assert_eq!(break_(None), "409 LeaseNotPresentWithLeaseOperation");
    acquire(&client, A, -1);
    assert_eq!(break_(Some(1)), "202 1");
    assert_eq!(state(&client), "breaking");
    assert_eq!(
        acquire(&client, A, 15),
        "409 LeaseIsBreakingAndCannotBeAcquired"
    );
    assert_eq!(acquire(&client, B, 15), "409 LeaseAlreadyPresent");
    assert_eq!(renew(&client, A), "409 LeaseIsBrokenAndCannotBeRenewed");
    assert_eq!(write(&client, Some(A)), "201");
    eventually("the break period ends", || state(&client) == "broken");
    assert_eq!(
        write(&client, Some(A)),
        "412 LeaseNotPresentWithBlobOperation"
    );
    assert_eq!(acquire(&client, B, -1), "201");
    assert_eq!(break_(None), "202 0");
    assert_eq!(state(&client), "broken");
    assert_eq!(write(&client, None), "201");
    assert_eq!(state(&client), "available");
}

#[test]
fn break_and_acquire_honour_conditional_headers() {
    let (_running, client) = memory();
    let etag = client.create("a", 512).header("etag").to_owned();
    let id = client
        .lease("a", "acquire")
        .with("x-ms-lease-duration", 15)
        .with("If-Match", &etag)
        .send()
        .expect_status(201)
        .header("x-ms-lease-id")
        .to_owned();
    assert_eq!(write(&client, Some(&id)), "201");
    let late = client.lease("a", "break").with("If-Match", &etag);
    assert_eq!(late.code(), "412 ConditionNotMet");
    assert_eq!(state(&client), "leased");
    let change = client
        .lease("a", "change")
        .with("x-ms-lease-id", &id)
        .with("x-ms-proposed-lease-id", B);
    assert_eq!(change.send().expect_status(200).header("x-ms-lease-id"), B);
    assert_eq!(
        write(&client, Some(&id)),
        "412 LeaseIdMismatchWithBlobOperation"
    );
    assert_eq!(write(&client, Some(B)), "201");
}
