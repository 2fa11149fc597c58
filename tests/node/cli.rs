//! `dyskctl` from end to end: what each command prints, whole, against the
//! embedded store and a daemon in this process.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::node::{ACCOUNT, Ctl, KEY, Node, Store, eventually, signal};
use bytes::Bytes;
use dysk::blob::{Checksum, Conditions, LeaseState};
use dysk::emulator::{Effect, Operation, Rule, Span};
use rustix::process::Signal;
use serde_json::{Value, json};

fn volume(blob: &str) -> String {
    format!("{ACCOUNT}/dysks/{blob}")
}

#[test]
fn a_volume_s_life() {
    let (store, node) = (Store::start(), Node::start());
    let (ctl, endpoint) = (node.ctl(), store.endpoint());
    let first = node.dir.path().join("disks/disk0");
    let first = first.to_str().expect("utf-8");

    // The container is made with the first volume in it.
    let create = [
        "create",
        &volume("vol1.vhd"),
        "--size",
        "1GiB",
        "--endpoint",
        &endpoint,
    ];
    ctl.run(&create).says("");
    let attach = ["attach", &volume("vol1.vhd"), "--endpoint", &endpoint];
    ctl.run(&attach).says(&format!("{first}\n"));
    assert_eq!(store.lease("vol1.vhd"), LeaseState::Leased);
    let link = std::fs::read_link(node.link("vol1")).expect("the link");
    assert_eq!(link.to_str(), Some(first));

    ctl.run(&["list"]).says(&format!(
        "Type  Name  VHD  SizeGB  AccountName       Path            Device\n\
         RW    vol1  Yes  1       devstoreaccount1  dysks/vol1.vhd  {first}\n"
    ));
    let status = ctl.run(&["status", "vol1"]);
    let status = status.ok();
    for line in [
        "name:                vol1",
        "state:               attached",
        "volume:              devstoreaccount1/dysks/vol1.vhd",
        "size:                1073741824 bytes (1GiB)",
        "format:              vhd",
        "access:              read-write",
        "fenced:              no",
        &format!("device:              {first}"),
        "connections:         1",
    ] {
        assert!(status.lines().any(|l| l == line), "{line}: {status}");
    }

    ctl.run(&["detach", "vol1"]).says("");
    assert_eq!(store.lease("vol1.vhd"), LeaseState::Available);
    node.assert_empty();
    ctl.run(&["list"])
        .says("Type  Name  VHD  SizeGB  AccountName  Path  Device\n");
    ctl.run(&["delete", &volume("vol1.vhd"), "--endpoint", &endpoint])
        .says("");
    assert!(!store.exists("vol1.vhd"));
}

#[test]
fn every_command_speaks_json() {
    let (store, node) = (Store::start(), Node::start());
    let (ctl, endpoint) = (node.ctl(), store.endpoint());
    let run = |arguments: &[&str]| -> Value {
        let mut all = arguments.to_vec();
        all.extend(["-o", "json"]);
        serde_json::from_str(ctl.run(&all).ok()).expect("json")
    };
    let blob = volume("j.vhd");
    let named = json!({ "account": ACCOUNT, "container": "dysks", "blob": "j.vhd" });
    let mut made = named.clone();
    made["size"] = json!(1 << 20);
    made["format"] = json!("raw");
    let create = [
        "create",
        &blob,
        "--size",
        "1MiB",
        "--format",
        "raw",
        "--endpoint",
        &endpoint,
    ];
    assert_eq!(run(&create), made);
    assert_eq!(run(&["list"]), json!([]));
    let attached = run(&[
        "attach",
        &blob,
        "--endpoint",
        &endpoint,
        "--connections",
        "3",
    ]);
    for (field, value) in [
        ("name", json!("j")),
        ("state", json!("attached")),
        ("account", json!(ACCOUNT)),
        ("container", json!("dysks")),
        ("blob", json!("j.vhd")),
        ("size", json!(1 << 20)),
        ("layout", json!("raw")),
        ("readOnly", json!(false)),
        ("caching", json!("none")),
        ("connections", json!(3)),
        ("device", json!(node.dir.path().join("disks/disk0"))),
        ("link", json!(node.link("j"))),
    ] {
        assert_eq!(attached[field], value, "{field}");
    }
    assert_eq!(run(&["list"])[0]["id"], attached["id"]);
    assert_eq!(run(&["status", "j"])["id"], attached["id"]);
    assert_eq!(
        run(&["detach", "j"]),
        json!({ "name": "j", "warnings": [] })
    );
    assert_eq!(run(&["delete", &blob, "--endpoint", &endpoint]), named);
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        run(&["version"]),
        json!({ "dyskctl": version, "dyskd": version })
    );
}

#[test]
fn versions() {
    let mut node = Node::start();
    let version = env!("CARGO_PKG_VERSION");
    node.ctl()
        .run(&["version"])
        .says(&format!("dyskctl {version}\ndyskd {version}\n"));
    node.stop();
    let said = node.ctl().run(&["version"]);
    assert_eq!(
        (said.code, said.out),
        (Some(1), format!("dyskctl {version}\n"))
    );
    let csi = |argument: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_csi-dysk"))
            .arg(argument)
            .output();
        output.expect("csi-dysk runs")
    };
    assert_eq!(
        csi("--version").stdout,
        format!("csi-dysk {version}\n").as_bytes()
    );
    let refused = csi("node");
    assert_eq!(refused.status.code(), Some(2));
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains("unexpected argument 'node'"), "{text}");
}

/// Environment and arguments.
type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);

#[test]
fn a_volume_is_named_in_many_ways() {
    let store = Store::start();
    let node = Node::start();
    let endpoint = store.endpoint();
    let root = format!("http://{}", store.running.address());
    let dir = node.dir.path();
    for (file, text) in [("accountname", ACCOUNT), ("accountkey", KEY), ("key", KEY)] {
        std::fs::write(dir.join(file), format!("{text}\n")).expect("write");
    }
    let key_file = dir.join("key");
    let (dir, key_file) = (
        dir.to_str().expect("utf-8"),
        key_file.to_str().expect("utf-8"),
    );
    let connection = format!(
        "DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint};"
    );
    store.create("n.vhd", 1 << 20);
    let url = format!("{endpoint}/dysks/n.vhd");
    let short = format!("{ACCOUNT}/n.vhd");
    let whole = volume("n.vhd");
    let key = ("AZURE_STORAGE_KEY", KEY);
    let account = ("AZURE_STORAGE_ACCOUNT", ACCOUNT);
    let cases: &[Case<'_>] = &[
        (&[key], &[&url]),
        (&[key], &[&whole, "--endpoint", &root]),
        (&[key], &[&short, "--endpoint", &endpoint]),
        (&[key, account], &["n.vhd", "--endpoint", &endpoint]),
        (&[key], &[ACCOUNT, "--name", "n", "--endpoint", &endpoint]),
        (
            &[],
            &["n.vhd", "--secret-dir", dir, "--endpoint", &endpoint],
        ),
        (
            &[],
            &[
                &whole,
                "--account-key-file",
                key_file,
                "--endpoint",
                &endpoint,
            ],
        ),
        (
            &[("AZURE_STORAGE_CONNECTION_STRING", &connection)],
            &["n.vhd"],
        ),
        (
            &[("AZURE_STORAGE_CONNECTION_STRING", &connection)],
            &[&whole],
        ),
    ];
    for (environment, arguments) in cases {
        let ctl = node.ctl().with(environment);
        let mut attach = vec!["attach"];
        attach.extend(*arguments);
        ctl.run(&attach).ok();
        let said = ctl.run(&["status", "n", "-o", "json"]);
        let status: Value = serde_json::from_str(said.ok()).expect("json");
        assert_eq!(
            (&status["endpoint"], &status["blob"]),
            (&json!(endpoint), &json!("n.vhd")),
            "{attach:?}"
        );
        ctl.run(&["detach", "n"]).says("");
    }
}

#[test]
fn read_only_takes_no_lease_and_is_listed_as_such() {
    let (store, node) = (Store::start(), Node::start());
    let endpoint = store.endpoint();
    store.create("r.vhd", 64 << 20);
    store.hold_lease("r.vhd");
    let attach = [
        "attach",
        &volume("r.vhd"),
        "--read-only",
        "--endpoint",
        &endpoint,
    ];
    let device = node.ctl().run(&attach).ok().trim().to_owned();
    node.ctl().run(&["list"]).says(&format!(
        "Type  Name  VHD  SizeGB  AccountName       Path         Device\n\
         R     r     Yes  0.063   devstoreaccount1  dysks/r.vhd  {device}\n"
    ));
    node.ctl().run(&["detach", "r"]).says("");
    assert_eq!(
        store.lease("r.vhd"),
        LeaseState::Leased,
        "the other's lease is left alone"
    );
}

#[test]
fn a_lease_is_taken_over_only_when_told() {
    let (store, node) = (Store::start(), Node::start());
    let endpoint = store.endpoint();
    store.create("b.vhd", 1 << 20);
    store.hold_lease("b.vhd");
    let attach = ["attach", &volume("b.vhd"), "--endpoint", &endpoint];
    assert_eq!(node.ctl().run(&attach).code, Some(1));
    let mut breaking = attach.to_vec();
    breaking.push("--break-lease");
    node.ctl().run(&breaking).ok();
    node.ctl().run(&["detach", "b"]).says("");
    assert_eq!(store.lease("b.vhd"), LeaseState::Available);
}

#[test]
fn a_device_in_use_is_kept_unless_forced() {
    let (store, node) = (Store::start(), Node::start());
    let endpoint = store.endpoint();
    store.create("u.vhd", 1 << 20);
    let attach = ["attach", &volume("u.vhd"), "--endpoint", &endpoint];
    let device = node.ctl().run(&attach).ok().trim().to_owned();
    node.transport
        .set(|b| b.in_use = Some("mounted at /srv: run `umount /srv`".into()));
    let line = format!("{device} is in use: mounted at /srv: run `umount /srv`; or use --force");
    node.ctl().run(&["detach", "u"]).fails(&line);
    node.ctl().run(&["detach", &device]).fails(&line);
    let link = node.link("u");
    node.ctl()
        .run(&["detach", link.to_str().expect("utf-8")])
        .fails(&line);
    assert_eq!(store.lease("u.vhd"), LeaseState::Leased);
    let status = node.ctl().run(&["status", "u"]);
    assert!(
        status.ok().contains("state:               attached\n"),
        "{status:?}"
    );
    node.ctl().run(&["detach", &device, "--force"]).says("");
    assert_eq!(store.lease("u.vhd"), LeaseState::Available);
    node.assert_empty();
}

#[test]
fn serve_exports_until_it_is_told_to_stop() {
    let (store, node) = (Store::start(), Node::prepare());
    let endpoint = store.endpoint();
    store.create("s.vhd", 64 << 20);
    let socket = node.dir.path().join("s.sock");
    let path = socket.to_str().expect("utf-8");
    for stop in [Signal::INT, Signal::TERM] {
        let serve = [
            "serve",
            &volume("s.vhd"),
            "--unix",
            path,
            "--endpoint",
            &endpoint,
        ];
        let mut child = node.ctl().spawn(&serve);
        let mut out = BufReader::new(child.stdout.take().expect("piped"));
        let mut uri = String::new();
        out.read_line(&mut uri).expect("a line");
        assert_eq!(uri, format!("nbd+unix:///?socket={path}\n"));
        assert_eq!(store.lease("s.vhd"), LeaseState::Leased);
        let info = Command::new("nbdinfo")
            .args(["--size", uri.trim()])
            .output();
        assert_eq!(info.expect("nbdinfo runs").stdout, b"67108864\n");
        signal(&child, stop);
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(
            (output.status.code(), output.stderr.as_slice()),
            (Some(0), &b""[..])
        );
        let mut rest = String::new();
        out.read_to_string(&mut rest).expect("read");
        assert_eq!(rest, "");
        assert!(!socket.exists(), "the socket is removed");
        assert_eq!(store.lease("s.vhd"), LeaseState::Available);
    }
}

#[test]
fn serve_gives_up_on_a_dead_store_when_told_twice() {
    let (store, node) = (Store::start(), Node::prepare());
    let endpoint = store.endpoint();
    store.create("d.vhd", 1 << 20);
    // What was never written would be answered without the store.
    let (none, page) = (Conditions::default(), Bytes::from_static(&[7; 512]));
    let blob = store.blob("d.vhd");
    let deadline = Duration::from_secs(10);
    store
        .block_on(blob.put_page(0, page, Checksum::Off, &none, deadline))
        .expect("written");
    let serve = [
        "serve",
        &volume("d.vhd"),
        "--listen",
        "127.0.0.1:0",
        "--endpoint",
        &endpoint,
    ];
    let mut child = node.ctl().spawn(&serve);
    let mut uri = String::new();
    let mut out = BufReader::new(child.stdout.take().expect("piped"));
    out.read_line(&mut uri).expect("a line");
    assert!(uri.starts_with("nbd://127.0.0.1:"), "{uri}");
    // Every request for data hangs; the lease is still served.
    let stall = Effect::Stall {
        delay: Span(Duration::from_secs(3600)),
        after: false,
    };
    let rules = vec![Rule::on(Operation::GetBlob, stall)];
    store.running.faults().set(rules);
    let mut copy = Command::new("nbdcopy")
        .args([uri.trim(), "null:"])
        .stderr(Stdio::null())
        .spawn()
        .expect("nbdcopy runs");
    eventually("a read hangs", || {
        store
            .running
            .faults()
            .report()
            .iter()
            .any(|rule| rule.struck > 0)
    });
    signal(&child, Signal::INT);
    let address = uri
        .trim()
        .trim_start_matches("nbd://")
        .trim_end_matches('/');
    eventually("it takes no more clients", || {
        std::net::TcpStream::connect(address).is_err()
    });
    assert!(
        child.try_wait().expect("wait").is_none(),
        "it waits for the store"
    );
    signal(&child, Signal::INT);
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(!copy.wait().expect("wait").success());
    assert_eq!(store.lease("d.vhd"), LeaseState::Available);
}

#[test]
fn an_interrupted_attach_is_undone() {
    let (store, node) = (Store::start(), Node::start());
    let endpoint = store.endpoint();
    node.transport.hold.send_replace(true);
    let new = volume("i.vhd");
    let attach = [
        "attach",
        &new,
        "--create",
        "--size",
        "1MiB",
        "--endpoint",
        &endpoint,
    ];
    let child = node.ctl().spawn(&attach);
    eventually("the device is being made", || {
        node.transport
            .log
            .lock()
            .expect("lock")
            .iter()
            .any(|l| l == "attach i")
    });
    signal(&child, Signal::INT);
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "dyskctl: interrupted: the attach of i is being undone\n"
    );
    node.transport.hold.send_replace(false);
    eventually("the name is free", || {
        node.ctl().run(&["list", "-o", "json"]).out == "[]\n"
    });
    assert!(!store.exists("i.vhd"), "the blob it made is gone");
    node.assert_empty();
}

#[test]
fn a_reader_that_stops_reading_is_no_error() {
    let node = Node::start();
    for arguments in [&["list"][..], &["--help"], &["version"]] {
        let mut child = node.ctl().spawn(arguments);
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(
            (output.status.code(), output.stderr.as_slice()),
            (Some(0), &b""[..]),
            "{arguments:?}"
        );
    }
}

#[test]
fn verbose_tells_the_steps_on_standard_error() {
    let (store, node) = (Store::start(), Node::start());
    let endpoint = store.endpoint();
    store.create("v.vhd", 1 << 20);
    let said = node
        .ctl()
        .run(&["-v", "attach", &volume("v.vhd"), "--endpoint", &endpoint]);
    assert_eq!(said.code, Some(0));
    assert_eq!(said.out.lines().count(), 1, "{said:?}");
    assert!(said.err.contains("opening the volume name=v"), "{said:?}");
}

#[test]
fn help_of_every_command_reads_well() {
    let ctl = Ctl::new(std::path::Path::new("/nonexistent"));
    let words = [
        "attach",
        "credential",
        "detach",
        "list",
        "status",
        "create",
        "delete",
        "staging",
        "serve",
        "version",
    ];
    let whole = ctl.run(&["--help"]);
    for word in words {
        assert!(
            whole.ok().contains(&format!("\n  {word} ")),
            "{word}: {whole:?}"
        );
        let help = ctl.run(&[word, "--help"]);
        let text = help.ok();
        assert!(text.contains(&format!("Usage: dyskctl {word}")), "{text}");
        for line in text.lines() {
            assert!(line.chars().count() <= 110, "too wide: {line}");
        }
    }
}
