//! Who gets in: Shared Key, SAS, clock skew, and the account's own switches.

use dysk::emulator::Running;

use crate::client::{Call, Client, memory};

fn set(client: &Client, settings: &str) {
    client.admin("PUT", "settings", settings).expect_status(204);
}

#[test]
fn a_wrong_key_or_account_is_refused() {
    let (_running, client) = memory();
    client.create("a", 512);
    let mut stranger = client.clone();
    stranger.key = "AAAA".into();
    let answer = stranger.get("dysks/a").send().expect_status(403);
    assert_eq!(answer.header("x-ms-error-code"), "AuthenticationFailed");
    let text = answer.text();
    assert!(
        text.contains("<AuthenticationErrorDetail>The MAC signature found"),
        "{text}"
    );
    assert!(!text.contains(&client.key), "{text}");
    let anonymous = client.get("dysks/a").unsigned();
    assert_eq!(anonymous.code(), "401 NoAuthenticationInformation");
    let garbled = client
        .get("dysks/a")
        .unsigned()
        .with("Authorization", "Basic eDp5");
    assert_eq!(garbled.code(), "401 InvalidAuthenticationInfo");
    stranger.account = "other".into();
    assert_eq!(stranger.get("dysks/a").code(), "404 ResourceNotFound");
}

#[test]
fn signatures_cover_queries_and_odd_names() {
    let (_running, client) = memory();
    client.create("a%20b%2Bc%25/x", 512);
    assert_eq!(client.head("dysks/a%20b%2Bc%25/x").code(), "200");
    let list = "dysks?restype=container&comp=list&prefix=a%20b%2Bc%25&maxresults=5";
    assert!(
        client
            .get(list)
            .send()
            .text()
            .contains("<Name>a b+c%/x</Name>")
    );
}

#[test]
fn a_clock_that_is_off_by_more_than_fifteen_minutes_is_refused() {
    let (_running, client) = memory();
    client.create("a", 512);
    let with_skew = |seconds: i64| Client {
        skew: seconds,
        ..client.clone()
    };
    for fine in [-14 * 60, 14 * 60] {
        assert_eq!(with_skew(fine).head("dysks/a").code(), "200");
    }
    for off in [-16 * 60, 16 * 60] {
        assert_eq!(
            with_skew(off).head("dysks/a").code(),
            "403 AuthenticationFailed"
        );
    }
    let old = with_skew(-16 * 60).get("dysks/a").send().text();
    assert!(
        old.contains("<AuthenticationErrorDetail>Request date header too old: &apos;")
            || old.contains("<AuthenticationErrorDetail>Request date header too old: '"),
        "{old}"
    );
    set(&client, r#"{"clockSkew":3600}"#);
    assert_eq!(client.head("dysks/a").code(), "403 AuthenticationFailed");
    let ahead = with_skew(3600).head("dysks/a").send().expect_status(200);
    let date = jiff::fmt::rfc2822::DateTimeParser::new()
        .parse_timestamp(ahead.header("date"))
        .expect("a date");
    let off = date.as_second() - jiff::Timestamp::now().as_second();
    assert!((3590..=3610).contains(&off), "{off}");
}

#[test]
fn the_accounts_switches_answer_as_azure_does() {
    let (_running, client) = memory();
    client.create("a", 512);
    for (settings, expected) in [
        (
            r#"{"sharedKeyDisabled":true}"#,
            "403 KeyBasedAuthenticationNotPermitted",
        ),
        (r#"{"httpsRequired":true}"#, "400 AccountRequiresHttps"),
        (r#"{"firewall":true}"#, "403 AuthorizationFailure"),
        (
            r#"{"sharedKeyDisabled":false,"httpsRequired":false,"firewall":false}"#,
            "200",
        ),
    ] {
        set(&client, settings);
        assert_eq!(client.head("dysks/a").code(), expected, "{settings}");
    }
    let shown = client.admin("GET", "settings", "").text();
    assert!(
        shown.contains("\"firewall\": false") && !shown.contains(&client.key),
        "{shown}"
    );
}

#[test]
fn keys_rotate() {
    let (_running, client) = memory();
    client.create("a", 512);
    let newer = Client {
        key: "bmV3ZXIga2V5".into(),
        ..client.clone()
    };
    let codes = || [&client, &newer].map(|client| client.head("dysks/a").send().status);
    assert_eq!(codes(), [200, 403]);
    set(&client, r#"{"secondKey":"bmV3ZXIga2V5"}"#);
    assert_eq!(codes(), [200, 200]);
    set(&client, r#"{"key":"bmV3ZXIga2V5","secondKey":""}"#);
    assert_eq!(codes(), [403, 200]);
}

#[test]
fn the_account_may_be_in_the_host_name() {
    let (_running, client) = memory();
    client.create("a", 512);
    let mut call = client.head("dysks/a");
    call.in_host();
    assert_eq!(call.code(), "200");
}

/// A service SAS of version 2020-12-06 and later.
struct Sas<'a> {
    resource: &'a str,
    path: &'a str,
    snapshot: &'a str,
    permissions: &'a str,
    start: &'a str,
    expiry: &'a str,
    ip: &'a str,
    protocol: &'a str,
}

const BLOB: Sas<'_> = Sas {
    resource: "b",
    path: "dysks/a",
    snapshot: "",
    permissions: "rw",
    start: "",
    expiry: "2999-01-01T00:00:00Z",
    ip: "",
    protocol: "",
};

impl Sas<'_> {
    fn query(&self, client: &Client) -> String {
        let version = "2022-11-02";
        let text = [
            self.permissions,
            self.start,
            self.expiry,
            &format!("/blob/{}/{}", client.account, self.path),
            "",
            self.ip,
            self.protocol,
            version,
            self.resource,
            self.snapshot,
            "",
            "",
            "",
            "",
            "",
            "",
        ]
        .join("\n");
        let mut query = format!(
            "sv={version}&sr={}&sp={}&se={}",
            self.resource, self.permissions, self.expiry
        );
        for (name, value) in [("st", self.start), ("sip", self.ip), ("spr", self.protocol)] {
            if !value.is_empty() {
                query.push_str(&format!("&{name}={value}"));
            }
        }
        query.push_str(&format!("&sig={}", escape(&client.hmac(&text))));
        query
    }

    fn get(&self, client: &Client) -> Call {
        let query = self.query(client);
        client.get(&format!("dysks/a?{query}")).unsigned()
    }
}

fn escape(text: &str) -> String {
    text.replace('+', "%2B")
        .replace('/', "%2F")
        .replace('=', "%3D")
}

fn blob() -> (Running, Client) {
    let (running, client) = memory();
    client.create("a", 512);
    (running, client)
}

#[test]
fn a_blob_sas_opens_its_blob_alone() {
    let (_running, client) = blob();
    client.create("b", 512);
    assert_eq!(BLOB.get(&client).code(), "200");
    let query = BLOB.query(&client);
    let put = client
        .put(&format!("dysks/a?comp=page&{query}"))
        .unsigned()
        .with("x-ms-page-write", "update")
        .range(0, 512)
        .body(&[1; 512]);
    assert_eq!(put.code(), "201");
    let other = client.get(&format!("dysks/b?{query}")).unsigned();
    assert_eq!(other.code(), "403 AuthenticationFailed");
    let delete = client.delete(&format!("dysks/a?{query}")).unsigned();
    assert_eq!(delete.code(), "403 AuthorizationPermissionMismatch");
    let tampered = query.replace("sp=rw", "sp=rwd");
    let delete = client.delete(&format!("dysks/a?{tampered}")).unsigned();
    assert_eq!(delete.code(), "403 AuthenticationFailed");
}

#[test]
fn a_sas_holds_for_its_time_address_and_protocol() {
    let (_running, client) = blob();
    let code = |sas: Sas<'_>| sas.get(&client).code();
    let late = Sas {
        expiry: "2020-01-01T00:00:00Z",
        ..BLOB
    };
    assert_eq!(code(late), "403 AuthenticationFailed");
    let early = Sas {
        start: "2998-01-01",
        ..BLOB
    };
    let text = early.get(&client).send().text();
    assert!(
        text.contains("Signature not valid in the specified time frame: Start ["),
        "{text}"
    );
    assert_eq!(
        code(Sas {
            start: "2020-01-01",
            ..BLOB
        }),
        "200"
    );
    assert_eq!(
        code(Sas {
            protocol: "https",
            ..BLOB
        }),
        "403 AuthorizationProtocolMismatch"
    );
    assert_eq!(
        code(Sas {
            protocol: "https,http",
            ..BLOB
        }),
        "200"
    );
    assert_eq!(
        code(Sas {
            ip: "127.0.0.1",
            ..BLOB
        }),
        "200"
    );
    assert_eq!(
        code(Sas {
            ip: "10.0.0.1-10.0.0.9",
            ..BLOB
        }),
        "403 AuthorizationSourceIPMismatch"
    );
}

#[test]
fn container_and_snapshot_sas() {
    let (_running, client) = blob();
    let container = Sas {
        resource: "c",
        path: "dysks",
        permissions: "rl",
        ..BLOB
    };
    assert_eq!(container.get(&client).code(), "200");
    let query = container.query(&client);
    let list = client
        .get(&format!("dysks?restype=container&comp=list&{query}"))
        .unsigned();
    assert_eq!(list.code(), "200");
    let taken = client
        .put("dysks/a?comp=snapshot")
        .send()
        .expect_status(201);
    let time = taken.header("x-ms-snapshot").to_owned();
    let at = |sas: &Sas<'_>| {
        let query = sas.query(&client);
        client
            .get(&format!("dysks/a?snapshot={time}&{query}"))
            .unsigned()
            .code()
    };
    let snapshot = Sas {
        resource: "bs",
        snapshot: &time,
        ..BLOB
    };
    assert_eq!(at(&snapshot), "200");
    assert_eq!(at(&container), "200");
    assert_eq!(snapshot.get(&client).code(), "403 AuthenticationFailed");
}

#[test]
fn an_account_sas_opens_what_its_types_name() {
    let (_running, client) = blob();
    let query = |types: &str, version: &str| {
        let mut text = format!(
            "{}\nrl\nb\n{types}\n\n2999-01-01\n\n\n{version}\n",
            client.account
        );
        if version >= "2020-12-06" {
            text.push('\n');
        }
        let signature = escape(&client.hmac(&text));
        format!("sv={version}&ss=b&srt={types}&sp=rl&se=2999-01-01&sig={signature}")
    };
    for version in ["2015-04-05", "2019-12-12", "2025-05-05"] {
        let code = |types: &str, target: &str| {
            client
                .get(&format!("{target}{}", query(types, version)))
                .unsigned()
                .code()
        };
        assert_eq!(code("o", "dysks/a?"), "200");
        assert_eq!(
            code("c", "dysks/a?"),
            "403 AuthorizationResourceTypeMismatch"
        );
        assert_eq!(code("sco", "dysks?restype=container&comp=list&"), "200");
        assert_eq!(
            code("o", "?comp=list&"),
            "403 AuthorizationResourceTypeMismatch"
        );
    }
}

#[test]
fn public_containers_are_read_by_anybody() {
    let (_running, client) = memory();
    let create = client
        .put("open?restype=container")
        .with("x-ms-blob-public-access", "blob");
    create.send().expect_status(201);
    let put = client
        .put("open/t")
        .with("x-ms-blob-type", "BlockBlob")
        .body(b"x");
    put.send().expect_status(201);
    assert_eq!(client.get("open/t").unsigned().send().body, b"x");
    assert_eq!(
        client.delete("open/t").unsigned().code(),
        "401 NoAuthenticationInformation"
    );
    let list = client.get("open?restype=container&comp=list").unsigned();
    assert_eq!(list.code(), "401 NoAuthenticationInformation");
}
