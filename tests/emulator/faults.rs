//! Faults on demand, above all writes that execute late.

use std::time::{Duration, Instant};

use dysk::emulator::{Effect, Operation, Rule, SettingsChange, Span};

use crate::client::{Client, eventually, memory};

fn raise(client: &Client, number: u64) {
    client
        .put("dysks/a?comp=properties")
        .with("x-ms-sequence-number-action", "max")
        .with("x-ms-blob-sequence-number", number)
        .send()
        .expect_status(200);
}

fn late_write(client: &Client, millis: u64) {
    let rule = format!(
        r#"[{{"operation":"put-page","blob":"a","count":1,"effect":{{"kind":"late","delay":"{millis}ms"}}}}]"#
    );
    client.admin("PUT", "faults", &rule).expect_status(204);
    let write = client
        .page("a", 0, &[9; 512])
        .with("x-ms-if-sequence-number-lt", 1);
    let error = write.try_send().expect_err("no answer");
    assert!(
        matches!(
            error.kind(),
            std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::UnexpectedEof
        ),
        "{error}"
    );
}

#[test]
fn a_late_write_lands_after_newer_ones_when_nothing_fences_it() {
    let (running, client) = memory();
    client.create("a", 512);
    late_write(&client, 300);
    client.page("a", 0, &[1; 512]).send().expect_status(201);
    assert_eq!(client.read("a", 0, 1), [1]);
    eventually("the late write executes", || {
        running.stats().late.applied == 1
    });
    assert_eq!(client.read("a", 0, 512), [9; 512]);
}

#[test]
fn a_late_write_is_refused_once_the_sequence_number_was_raised() {
    let (running, client) = memory();
    client.create("a", 512);
    late_write(&client, 300);
    raise(&client, 1);
    client.page("a", 0, &[1; 512]).send().expect_status(201);
    eventually("the late write is refused", || {
        running.stats().late.refused == 1
    });
    assert_eq!(client.read("a", 0, 512), [1; 512]);
    assert_eq!(running.stats().late.applied, 0);
}

#[test]
fn resets_strike_before_or_after_the_effect() {
    let (running, client) = memory();
    client.create("a", 512);
    for (effect, expected) in [(Effect::ResetBefore, 0), (Effect::ResetAfter, 7)] {
        running
            .faults()
            .set(vec![Rule::on(Operation::PutPage, effect).times(1)]);
        client.page("a", 0, &[7; 512]).try_send().expect_err("cut");
        assert_eq!(client.read("a", 0, 1), [expected]);
    }
    let stats = running.stats();
    assert_eq!(
        (stats.faults["reset-before"], stats.faults["reset-after"]),
        (1, 1)
    );
}

#[test]
fn error_answers_follow_the_rule() {
    let (running, client) = memory();
    client.create("a", 8192);
    client
        .admin(
            "PUT",
            "faults",
            r#"[{"operation":"put-page","range":{"start":4096,"end":4608},
                 "effect":{"kind":"status","status":503,"code":"ServerBusy","retryAfter":2}},
                {"operation":"clear-pages",
                 "effect":{"kind":"status","status":500,"code":"OperationTimedOut","applied":true}}]"#,
        )
        .expect_status(204);
    assert_eq!(client.page("a", 0, &[1; 4096]).code(), "201");
    let busy = client.page("a", 512, &[2; 4096]).send().expect_status(503);
    assert_eq!(busy.header("retry-after"), "2");
    assert_eq!(busy.header("x-ms-error-code"), "ServerBusy");
    assert_eq!(client.read("a", 512, 1), [1]);
    assert_eq!(client.clear("a", 0, 512).code(), "500 OperationTimedOut");
    assert_eq!(client.read("a", 0, 1), [0]);
    let report = client.admin("GET", "faults", "").text();
    assert!(report.contains("\"struck\": 1"), "{report}");
    client.admin("DELETE", "faults", "").expect_status(204);
    assert_eq!(client.clear("a", 0, 512).code(), "201");
    client.admin("PUT", "faults", "[{}]").expect_status(400);
    let stats = running.stats();
    assert_eq!(stats.errors["503 ServerBusy"], 1);
    assert_eq!(stats.requests(Operation::PutPage), 2);
    running.reset_stats();
    assert_eq!(running.stats().requests(Operation::PutPage), 0);
}

#[test]
fn the_same_seed_strikes_the_same_requests() {
    let strikes = |seed: u64| {
        let (running, client) = memory();
        client.create("a", 512);
        let effect = Effect::status(503, "ServerBusy");
        running
            .faults()
            .set(vec![Rule::on(Operation::PutPage, effect).chance(0.5, seed)]);
        let put = client.page("a", 0, &[1; 512]);
        (0..40).map(|_| put.send().status).collect::<Vec<_>>()
    };
    let first = strikes(1);
    assert!(first.contains(&503) && first.contains(&201));
    assert_eq!(first, strikes(1));
    assert_ne!(first, strikes(2));
}

#[test]
fn reads_can_be_wrong_or_short() {
    let (running, client) = memory();
    client.create("a", 4096);
    client.page("a", 0, &[6; 4096]).send().expect_status(201);
    let get = client
        .get("dysks/a")
        .range(0, 4096)
        .with("x-ms-range-get-content-crc64", "true");
    let good = get.send();
    running.faults().set(vec![
        Rule::on(Operation::GetBlob, Effect::Corrupt { bytes: 1 }).times(1),
    ]);
    let bad = get.send().expect_status(206);
    let wrong = bad.body.iter().filter(|byte| **byte != 6).count();
    assert_eq!(wrong, 1);
    assert_eq!(
        bad.header("x-ms-content-crc64"),
        good.header("x-ms-content-crc64")
    );
    let truncate = Effect::Truncate { keep: Some(100) };
    running
        .faults()
        .set(vec![Rule::on(Operation::GetBlob, truncate).times(1)]);
    get.try_send().expect_err("the body breaks off");
    assert_eq!(get.send().body, good.body);
}

#[test]
fn a_stalled_write_executes_even_when_its_client_has_gone() {
    let (running, client) = memory();
    client.create("a", 512);
    let delay = Span(Duration::from_millis(200));
    let stall = |after| Effect::Stall { delay, after };
    running
        .faults()
        .set(vec![Rule::on(Operation::PutPage, stall(false)).times(1)]);
    client.page("a", 0, &[4; 512]).send_and_leave();
    assert_eq!(client.read("a", 0, 1), [0]);
    eventually("the stalled write executes", || {
        client.read("a", 0, 1) == [4]
    });
    running
        .faults()
        .set(vec![Rule::on(Operation::PutPage, stall(true)).times(1)]);
    let start = Instant::now();
    client.page("a", 0, &[5; 512]).send().expect_status(201);
    assert!(start.elapsed() >= delay.0);
}

#[test]
fn caps_delay_and_then_refuse() {
    let (running, client) = memory();
    client.create("a", 512);
    let change = SettingsChange {
        iops: Some(5),
        ..SettingsChange::default()
    };
    running.change(&change).expect("no key in it");
    // One request every 200 ms, and a queue of 100 ms.
    let codes: Vec<String> = (0..3)
        .map(|_| client.page("a", 0, &[1; 512]).code())
        .collect();
    assert!(codes.contains(&"503 ServerBusy".to_owned()), "{codes:?}");
    assert!(running.stats().throttled >= 1);
    client
        .admin("PUT", "settings", r#"{"iops":0,"queue":"1s"}"#)
        .expect_status(204);
    assert_eq!(client.page("a", 0, &[1; 512]).code(), "201");
    client
        .admin("PUT", "settings", r#"{"iopses":0}"#)
        .expect_status(400);
}

#[test]
fn latency_is_never_less_than_asked_for() {
    let (running, client) = memory();
    client.create("a", 512);
    let change = SettingsChange {
        latency: Some(Span(Duration::from_millis(20))),
        ..SettingsChange::default()
    };
    running.change(&change).expect("no key in it");
    let start = Instant::now();
    client.page("a", 0, &[1; 512]).send().expect_status(201);
    assert!(start.elapsed() >= Duration::from_millis(20));
}

/// Nothing of what is listed is moved, however long it is.
#[test]
fn a_list_of_ranges_takes_nothing_of_a_cap_on_bytes() {
    let (running, client) = memory();
    client.create("a", 1 << 30);
    let change = SettingsChange {
        bandwidth: Some(1 << 20),
        ..SettingsChange::default()
    };
    running.change(&change).expect("no key in it");
    let listed = || {
        let whole = format!("bytes=0-{}", (1u64 << 30) - 1);
        let list = client.get("dysks/a?comp=pagelist");
        list.with("x-ms-range", whole).code()
    };
    assert_eq!([listed(), listed()], ["200", "200"]);
    // What a read moves counts.
    let read = || {
        let get = client.get("dysks/a");
        get.with("x-ms-range", "bytes=0-4194303").code()
    };
    assert_eq!([read(), read()], ["206", "503 ServerBusy"]);
}
