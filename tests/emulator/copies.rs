//! Copy Blob and Put Page From URL.

use dysk::emulator::SettingsChange;

use crate::client::{Answer, Client, eventually, memory};

fn copy(client: &Client, from: &str, to: &str) -> Answer {
    client
        .put(&format!("dysks/{to}"))
        .with("x-ms-copy-source", client.url(&format!("dysks/{from}")))
        .send()
}

fn status(client: &Client, blob: &str) -> String {
    let head = client.head(&format!("dysks/{blob}")).send();
    head.header("x-ms-copy-status").to_owned()
}

fn slow_copies(running: &dysk::emulator::Running, bytes_a_second: u64) {
    let change = SettingsChange {
        copy_bandwidth: Some(bytes_a_second),
        ..SettingsChange::default()
    };
    running.change(&change).expect("no key in it");
}

#[test]
fn a_copy_is_whole_and_independent() {
    let (_running, client) = memory();
    client.create("a", 1 << 30);
    client.page("a", 0, &[1; 4096]).send().expect_status(201);
    client
        .page("a", 1 << 29, &[2; 4096])
        .send()
        .expect_status(201);
    let started = copy(&client, "a", "b").expect_status(202);
    assert_eq!(started.header("x-ms-copy-status"), "pending");
    eventually("the copy ends", || status(&client, "b") == "success");
    let head = client.head("dysks/b").send();
    assert_eq!(head.header("x-ms-copy-id"), started.header("x-ms-copy-id"));
    assert_eq!(head.header("x-ms-copy-progress"), "1073741824/1073741824");
    assert_eq!(
        client.ranges("dysks/b?comp=pagelist"),
        "0-4095 536870912-536875007"
    );
    client.page("b", 0, &[3; 512]).send().expect_status(201);
    client
        .page("a", 1 << 29, &[4; 512])
        .send()
        .expect_status(201);
    assert_eq!(client.read("a", 0, 512), [1; 512]);
    assert_eq!(client.read("b", 1 << 29, 512), [2; 512]);
    assert_eq!(copy(&client, "none", "x").status, 404);
}

#[test]
fn a_copy_fails_when_its_source_changes_but_not_from_a_snapshot() {
    let (running, client) = memory();
    slow_copies(&running, 1 << 20);
    client.create("a", 1 << 20);
    client.page("a", 0, &[1; 1 << 20]).send().expect_status(201);
    let taken = client
        .put("dysks/a?comp=snapshot")
        .send()
        .expect_status(201);
    let time = taken.header("x-ms-snapshot").to_owned();
    copy(&client, "a", "b").expect_status(202);
    copy(&client, &format!("a?snapshot={time}"), "s").expect_status(202);
    client.page("a", 0, &[9; 512]).send().expect_status(201);
    eventually("the copy fails", || status(&client, "b") == "failed");
    let head = client.head("dysks/b").send();
    assert!(
        head.header("x-ms-copy-status-description")
            .starts_with("412 ")
    );
    slow_copies(&running, 0);
    eventually("the copy ends", || status(&client, "s") == "success");
    assert_eq!(client.read("s", 0, 1 << 20), vec![1; 1 << 20]);
}

#[test]
fn a_pending_copy_blocks_writes_and_can_be_aborted() {
    let (running, client) = memory();
    slow_copies(&running, 64 << 10);
    client.create("a", 1 << 20);
    client.page("a", 0, &[1; 1 << 20]).send().expect_status(201);
    let started = copy(&client, "a", "b").expect_status(202);
    assert_eq!(
        client.page("b", 0, &[2; 512]).code(),
        "409 PendingCopyOperation"
    );
    assert_eq!(client.delete("dysks/b").code(), "409 PendingCopyOperation");
    let abort = |id: &str| {
        client
            .put(&format!("dysks/b?comp=copy&copyid={id}"))
            .with("x-ms-copy-action", "abort")
            .code()
    };
    assert_eq!(abort("other"), "409 CopyIdMismatch");
    assert_eq!(abort(started.header("x-ms-copy-id")), "204");
    assert_eq!(
        abort(started.header("x-ms-copy-id")),
        "409 NoPendingCopyOperation"
    );
    assert_eq!(status(&client, "b"), "aborted");
    assert_eq!(client.head("dysks/b").send().header("content-length"), "0");
    assert_eq!(client.delete("dysks/b").code(), "202");
}

#[test]
fn pages_come_from_a_url_with_a_sas() {
    let (_running, client) = memory();
    client.create("a", 8192);
    client.page("a", 4096, &[5; 4096]).send().expect_status(201);
    client.create("b", 8192);
    let put = |source: &str| {
        client
            .put("dysks/b?comp=page")
            .with("x-ms-page-write", "update")
            .with("x-ms-copy-source", client.url(source))
            .with("x-ms-source-range", "bytes=4096-5119")
            .range(0, 1024)
    };
    assert_eq!(put("dysks/a").code(), "403 CannotVerifyCopySource");
    let text = format!(
        "{}\nr\nb\no\n\n2999-01-01\n\n\n2020-08-04\n",
        client.account
    );
    let signature = client
        .hmac(&text)
        .replace('+', "%2B")
        .replace('/', "%2F")
        .replace('=', "%3D");
    let sas = format!("sv=2020-08-04&ss=b&srt=o&sp=r&se=2999-01-01&sig={signature}");
    put(&format!("dysks/a?{sas}")).send().expect_status(201);
    assert_eq!(client.read("b", 0, 1024), [5; 1024]);
    assert_eq!(client.ranges("dysks/b?comp=pagelist"), "0-1023");
    let fenced = put(&format!("dysks/a?{sas}")).with("x-ms-if-sequence-number-lt", 0);
    assert_eq!(fenced.code(), "412 SequenceNumberConditionNotMet");
    assert_eq!(
        put(&format!("dysks/none?{sas}")).code(),
        "404 CannotVerifyCopySource"
    );
}
