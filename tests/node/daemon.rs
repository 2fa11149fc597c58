//! The daemon: attachments beside each other, what is undone and what is
//! left, the control API as it is on the wire.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::node::{ACCOUNT, KEY, Node, Store, eventually, signal};
use dysk::blob::LeaseState;
use dysk::emulator::{Effect, Operation, Rule, Span};
use dysk::node::daemon::Daemon;
use rustix::process::Signal;
use serde_json::{Value, json};

/// One request as `curl --unix-socket` would send it: status and body.
fn ask(node: &Node, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(node.socket()).expect("the socket answers");
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("sends");
    read_answer(stream)
}

fn read_answer(mut stream: UnixStream) -> (u16, String) {
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).expect("a status");
    (status.parse().expect("a number"), body.to_owned())
}

/// The code of an error answer.
fn code(answer: &(u16, String)) -> (u16, String) {
    let body: Value = serde_json::from_str(&answer.1).expect("json");
    let code = body["error"]["code"].as_str().expect("a code");
    assert!(
        !body["error"]["message"]
            .as_str()
            .expect("a message")
            .is_empty()
    );
    (answer.0, code.to_owned())
}

fn request(store: &Store, name: &str) -> Value {
    json!({
        "name": name,
        "account": {
            "name": ACCOUNT,
            "endpoint": store.endpoint(),
            "credential": { "key": KEY },
        },
        "container": "dysks",
        "blob": format!("{name}.vhd"),
    })
}

fn attach(store: &Store, node: &Node, name: &str) -> (u16, String) {
    ask(
        node,
        "POST",
        "/v1/attachments",
        &request(store, name).to_string(),
    )
}

fn names(node: &Node) -> Vec<String> {
    let (status, body) = ask(node, "GET", "/v1/attachments", "");
    assert_eq!(status, 200);
    let body: Value = serde_json::from_str(&body).expect("json");
    let list = body["attachments"].as_array().expect("a list");
    list.iter()
        .map(|a| {
            format!(
                "{} {}",
                a["name"].as_str().expect("name"),
                a["state"].as_str().expect("state")
            )
        })
        .collect()
}

#[test]
fn the_api_as_curl_sees_it() {
    let (store, node) = (Store::start(), Node::start());
    store.create("a.vhd", 1 << 20);
    assert_eq!(
        ask(&node, "GET", "/v1/health", ""),
        (
            200,
            "{\"status\":\"ok\",\"attachments\":0,\"fenced\":0}\n".into()
        )
    );
    let version = json!({ "version": env!("CARGO_PKG_VERSION"), "api": 1 });
    assert_eq!(
        ask(&node, "GET", "/v1/version", ""),
        (200, format!("{}\n", version_text(&version)))
    );

    let (status, body) = attach(&store, &node, "a");
    assert_eq!(status, 201, "{body}");
    let made: Value = serde_json::from_str(&body).expect("json");
    assert_eq!(made["state"], "attached");
    let (status, body) = ask(&node, "GET", "/v1/attachments/a", "");
    let seen: Value = serde_json::from_str(&body).expect("json");
    assert_eq!((status, &seen["id"]), (200, &made["id"]));

    // The same once more is refused, unless the caller says it is the same one.
    assert_eq!(
        code(&attach(&store, &node, "a")),
        (409, "already-attached".into())
    );
    let mut again = request(&store, "a");
    again["reuse"] = json!(true);
    let (status, body) = ask(&node, "POST", "/v1/attachments", &again.to_string());
    let same: Value = serde_json::from_str(&body).expect("json");
    assert_eq!((status, &same["id"]), (200, &made["id"]));
    again["readOnly"] = json!(true);
    let other = ask(&node, "POST", "/v1/attachments", &again.to_string());
    assert_eq!(code(&other), (409, "already-attached".into()));

    let answer = ask(&node, "DELETE", "/v1/attachments/a", "");
    assert_eq!(answer, (200, "{\"name\":\"a\",\"warnings\":[]}\n".into()));
    let answer = ask(&node, "DELETE", "/v1/attachments/a", "");
    assert_eq!(code(&answer), (404, "not-attached".into()));
}

fn version_text(version: &Value) -> String {
    format!(
        "{{\"version\":{},\"api\":{}}}",
        version["version"], version["api"]
    )
}

#[test]
fn requests_that_make_no_sense() {
    let (store, node) = (Store::start(), Node::start());
    for (method, path, body, expected) in [
        ("GET", "/", "", (404, "no-such-path")),
        ("GET", "/v2/version", "", (404, "no-such-path")),
        ("GET", "/v1/nothing", "", (404, "no-such-path")),
        ("PUT", "/v1/attachments", "", (405, "wrong-method")),
        ("POST", "/v1/version", "", (405, "wrong-method")),
        ("GET", "/v1/attachments/a%2fb", "", (400, "invalid-request")),
        ("DELETE", "/v1/attachments/..", "", (400, "invalid-request")),
        (
            "DELETE",
            "/v1/attachments/a?forced=true",
            "",
            (400, "invalid-request"),
        ),
        ("POST", "/v1/attachments", "", (400, "invalid-request")),
        ("POST", "/v1/attachments", "[]", (400, "invalid-request")),
        (
            "POST",
            "/v1/attachments",
            "{\"name\":",
            (400, "invalid-request"),
        ),
    ] {
        let answer = code(&ask(&node, method, path, body));
        assert_eq!(
            answer,
            (expected.0, expected.1.to_owned()),
            "{method} {path} {body}"
        );
    }
    for (field, value, expected) in [
        ("readonly", json!(true), "invalid-request"),
        ("name", json!("a/b"), "invalid-request"),
        ("blob", json!(""), "invalid-request"),
        ("connections", json!(0), "invalid-request"),
        ("connections", json!(17), "invalid-request"),
        ("caching", json!("read-write"), "invalid-request"),
        (
            "policy",
            json!({ "caching": "write-back" }),
            "invalid-request",
        ),
        ("policy", json!({ "cacheSize": 1 << 20 }), "invalid-request"),
        ("policy", json!({ "ioDeadlineMs": 0 }), "invalid-request"),
        ("create", json!({ "size": 1000 }), "invalid-request"),
    ] {
        let mut request = request(&store, "a");
        request[field] = value;
        let answer = ask(&node, "POST", "/v1/attachments", &request.to_string());
        assert_eq!(code(&answer), (400, expected.to_owned()), "{request}");
    }
    // A body that is too long is refused, not read.
    let long = format!("{{\"name\":\"{}\"}}", "x".repeat(100 << 10));
    assert_eq!(
        code(&ask(&node, "POST", "/v1/attachments", &long)),
        (400, "invalid-request".into())
    );
    assert_eq!(names(&node), Vec::<String>::new());
    node.assert_empty();
}

#[test]
fn progress_comes_as_lines() {
    let (store, node) = (Store::start(), Node::start());
    let mut new = request(&store, "p");
    new["create"] = json!({ "size": 1 << 20 });
    let path = "/v1/attachments?progress=true";
    let (status, body) = ask(&node, "POST", path, &new.to_string());
    assert_eq!(status, 200);
    let lines: Vec<Value> = body
        .lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).expect("json"))
        .collect();
    let last = lines.last().expect("a line");
    assert_eq!(last["attached"]["name"], "p", "{body}");
    assert!(
        lines[..lines.len() - 1]
            .iter()
            .all(|l| l["stage"].is_string()),
        "{body}"
    );
    // A failure is the last line too.
    new["name"] = json!("q");
    new["blob"] = json!("none.vhd");
    new["create"] = Value::Null;
    let (status, body) = ask(&node, "POST", path, &new.to_string());
    assert_eq!(status, 200);
    assert!(
        body.contains("{\"failed\":{\"code\":\"no-such-blob\","),
        "{body}"
    );
}

#[test]
fn only_the_owner_reaches_the_socket_and_the_records() {
    let (store, node) = (Store::start(), Node::start());
    store.create("a.vhd", 1 << 20);
    assert_eq!(attach(&store, &node, "a").0, 201);
    let mode = |path: &Path| std::fs::metadata(path).expect("stat").permissions().mode() & 0o777;
    assert_eq!(mode(&node.run_dir()), 0o700);
    assert_eq!(mode(&node.run_dir().join("attachments")), 0o700);
    assert_eq!(mode(&node.socket()), 0o600);
    assert_eq!(mode(&node.record("a")), 0o600);
    if !rustix::process::geteuid().is_root() {
        return; // Nobody else to ask as.
    }
    // Even with every door open, the peer's user id is looked at.
    for path in [node.dir.path(), &node.run_dir(), &node.socket()] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).expect("chmod");
    }
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--clear-groups"])
        .args(["curl", "-s", "--unix-socket"])
        .arg(node.socket())
        .arg("http://x/v1/attachments")
        .output()
        .expect("setpriv and curl run");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "{\"error\":{\"code\":\"forbidden\",\"message\":\"only root may control dyskd: run it with sudo\"}}\n"
    );
}

#[test]
fn many_attach_and_detach_beside_each_other() {
    const COUNT: usize = 40;
    let (store, node) = (Store::start(), Node::start());
    for i in 0..COUNT {
        store.create(&format!("m{i}.vhd"), 1 << 20);
    }
    let all = |work: &(dyn Fn(&str) -> u16 + Sync)| {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..COUNT)
                .map(|i| scope.spawn(move || work(&format!("m{i}"))))
                .collect();
            threads
                .into_iter()
                .map(|t| t.join().expect("joins"))
                .collect::<Vec<_>>()
        })
    };
    let (store_ref, node_ref) = (RequestOf(&store), &node);
    let attached = all(&|name| {
        ask(
            node_ref,
            "POST",
            "/v1/attachments",
            &store_ref.request(name),
        )
        .0
    });
    assert_eq!(attached, [201; COUNT]);
    assert_eq!(names(&node).len(), COUNT);
    let detached = all(&|name| ask(node_ref, "DELETE", &format!("/v1/attachments/{name}"), "").0);
    assert_eq!(detached, [200; COUNT]);
    node.assert_empty();
    for i in 0..COUNT {
        assert_eq!(store.lease(&format!("m{i}.vhd")), LeaseState::Available);
    }
}

/// The parts of a store that threads may share.
struct RequestOf<'a>(&'a Store);

impl RequestOf<'_> {
    fn request(&self, name: &str) -> String {
        request(self.0, name).to_string()
    }
}

#[test]
fn of_many_attaches_of_one_name_or_blob_one_wins() {
    let (store, node) = (Store::start(), Node::start());
    store.create("one.vhd", 1 << 20);
    let requests: Vec<String> = (0..16)
        .map(|i| {
            let mut request = request(&store, "one");
            if i % 2 == 0 {
                request["name"] = json!(format!("other{i}"));
            }
            request.to_string()
        })
        .collect();
    let node_ref = &node;
    let statuses = std::thread::scope(|scope| {
        let threads: Vec<_> = requests
            .iter()
            .map(|r| scope.spawn(move || ask(node_ref, "POST", "/v1/attachments", r).0))
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("joins"))
            .collect::<Vec<_>>()
    });
    assert_eq!(
        statuses.iter().filter(|s| **s == 201).count(),
        1,
        "{statuses:?}"
    );
    assert_eq!(
        statuses.iter().filter(|s| **s == 409).count(),
        15,
        "{statuses:?}"
    );
    assert_eq!(names(&node).len(), 1);
}

#[test]
fn a_slow_volume_holds_up_nobody_else() {
    let (store, node) = (Store::start(), Node::start());
    for name in ["slow.vhd", "quick.vhd"] {
        store.create(name, 1 << 20);
    }
    let stall = Effect::Stall {
        delay: Span(Duration::from_secs(3600)),
        after: false,
    };
    let rule = Rule::any(stall).blob("slow.vhd");
    store.running.faults().set(vec![rule]);
    let slow = request(&store, "slow").to_string();
    let mut waiting = UnixStream::connect(node.socket()).expect("connects");
    write!(
        waiting,
        "POST /v1/attachments HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{slow}",
        slow.len()
    )
    .expect("sends");
    eventually("the slow one is under way", || {
        names(&node) == ["slow attaching"]
    });
    assert_eq!(attach(&store, &node, "quick").0, 201);
    assert_eq!(names(&node), ["quick attached", "slow attaching"]);
    assert_eq!(
        code(&ask(&node, "DELETE", "/v1/attachments/slow", "")),
        (409, "busy".into())
    );
    assert_eq!(ask(&node, "DELETE", "/v1/attachments/quick", "").0, 200);
    // Told to give up, it is undone once its request to the store has ended.
    store.running.faults().clear();
    store.running.cut_connections();
    let forced = ask(&node, "DELETE", "/v1/attachments/slow?force=true", "");
    assert_eq!(forced.0, 200, "{forced:?}");
    assert_eq!(code(&read_answer(waiting)), (409, "cancelled".into()));
    assert_eq!(store.lease("slow.vhd"), LeaseState::Available);
    node.assert_empty();
}

#[test]
fn a_caller_that_hangs_up_cancels_its_attach() {
    let (store, node) = (Store::start(), Node::start());
    store.create("h.vhd", 1 << 20);
    for path in ["/v1/attachments", "/v1/attachments?progress=true"] {
        node.transport.hold.send_replace(true);
        let body = request(&store, "h").to_string();
        let mut caller = UnixStream::connect(node.socket()).expect("connects");
        write!(
            caller,
            "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .expect("sends");
        eventually("the device is being made", || {
            let log = node.transport.log.lock().expect("lock");
            log.last().is_some_and(|l| l == "attach h")
        });
        assert_eq!(store.lease("h.vhd"), LeaseState::Leased);
        drop(caller);
        eventually("the daemon hears of it", || {
            let (_, body) = ask(&node, "GET", "/v1/attachments/h", "");
            let seen: Value = serde_json::from_str(&body).expect("json");
            seen["reason"] == "connecting the device; cancelled"
        });
        node.transport.hold.send_replace(false);
        eventually("it is undone", || names(&node).is_empty());
        assert_eq!(store.lease("h.vhd"), LeaseState::Available, "{path}");
        node.assert_empty();
        let mut log = node.transport.log.lock().expect("lock");
        assert_eq!(*log, ["attach h", "detach h force=true"], "{path}");
        log.clear();
    }
}

#[test]
fn a_detach_goes_on_when_its_caller_leaves_and_can_turn_forced() {
    let (store, node) = (Store::start(), Node::start());
    store.create("d.vhd", 1 << 20);
    assert_eq!(attach(&store, &node, "d").0, 201);
    // A flush that waits for the store.
    node.transport.hold_detach.send_replace(true);
    let mut caller = UnixStream::connect(node.socket()).expect("connects");
    write!(
        caller,
        "DELETE /v1/attachments/d HTTP/1.1\r\nHost: x\r\n\r\n"
    )
    .expect("sends");
    eventually("it is detaching", || names(&node) == ["d detaching"]);
    drop(caller);
    assert_eq!(names(&node), ["d detaching"]);
    assert_eq!(
        ask(&node, "DELETE", "/v1/attachments/d?force=true", "").0,
        200
    );
    node.assert_empty();
    assert_eq!(store.lease("d.vhd"), LeaseState::Available);
}

#[test]
fn a_forced_detach_does_not_need_the_store() {
    let (store, node) = (Store::start(), Node::start());
    store.create("gone.vhd", 1 << 20);
    assert_eq!(attach(&store, &node, "gone").0, 201);
    let stall = Effect::Stall {
        delay: Span(Duration::from_secs(3600)),
        after: false,
    };
    store
        .running
        .faults()
        .set(vec![Rule::on(Operation::ReleaseLease, stall)]);
    let (status, body) = ask(&node, "DELETE", "/v1/attachments/gone?force=true", "");
    assert_eq!(status, 200, "{body}");
    let body: Value = serde_json::from_str(&body).expect("json");
    let warning = body["warnings"][0].as_str().expect("a warning");
    assert!(
        warning.starts_with("devstoreaccount1/dysks/gone.vhd: lease not released"),
        "{warning}"
    );
    node.assert_empty();
}

#[test]
fn a_device_that_goes_by_other_hands_is_told() {
    let (store, node) = (Store::start(), Node::start());
    store.create("x.vhd", 1 << 20);
    assert_eq!(attach(&store, &node, "x").0, 201);
    node.transport.take_away("x");
    eventually("it is noticed", || names(&node) == ["x failed"]);
    let said = node.ctl().run(&["status", "x"]);
    assert!(
        said.ok()
            .contains("was disconnected by other hands: detach x to release the volume"),
        "{said:?}"
    );
    assert_eq!(
        store.lease("x.vhd"),
        LeaseState::Leased,
        "nobody else gets it unasked"
    );
    node.ctl().run(&["detach", "x"]).says("");
    assert_eq!(store.lease("x.vhd"), LeaseState::Available);
    node.assert_empty();
}

#[test]
fn a_clean_stop_detaches_what_is_not_in_use() {
    let (store, mut node) = (Store::start(), Node::start());
    for name in ["s1", "s2"] {
        store.create(&format!("{name}.vhd"), 1 << 20);
        assert_eq!(attach(&store, &node, name).0, 201);
    }
    node.stop();
    for name in ["s1.vhd", "s2.vhd"] {
        assert_eq!(store.lease(name), LeaseState::Available);
    }
    assert!(!node.socket().exists());
    node.assert_empty();
}

#[test]
fn a_clean_stop_leaves_what_is_in_use_to_the_next_daemon() {
    let (store, mut node) = (Store::start(), Node::start());
    store.create("busy.vhd", 1 << 20);
    let (_, made) = attach(&store, &node, "busy");
    let made: Value = serde_json::from_str(&made).expect("json");
    let id = made["id"].as_str().expect("an id").to_owned();
    let device = made["device"].as_str().expect("a device").to_owned();
    node.transport
        .set(|b| b.in_use = Some("mounted at /srv".into()));
    node.stop();
    assert_eq!(store.lease("busy.vhd"), LeaseState::Leased);
    assert!(node.record("busy").exists());
    assert!(std::fs::symlink_metadata(node.link("busy")).is_ok());

    // The next one finds the device alive, and serves it on under the lease.
    node.transport.set(|b| {
        b.left.insert(id.clone(), device.clone().into());
    });
    node.run();
    eventually("taken up", || names(&node) == ["busy attached"]);
    assert!(
        node.transport
            .log
            .lock()
            .expect("lock")
            .contains(&"resume busy".to_owned())
    );
    let said = node.ctl().run(&["status", "busy"]);
    assert!(said.ok().contains(&device), "{said:?}");
    assert_eq!(store.lease("busy.vhd"), LeaseState::Leased);
    assert_eq!(code(&attach(&store, &node, "busy")).0, 409);
    assert_eq!(
        node.ctl().run(&["detach", "busy"]).code,
        Some(1),
        "it is still in use"
    );
    node.transport.set(|b| b.in_use = None);
    node.ctl().run(&["detach", "busy"]).says("");
    assert_eq!(store.lease("busy.vhd"), LeaseState::Available);
    assert!(!node.record("busy").exists());
}

#[test]
fn a_daemon_told_to_keep_them_leaves_idle_disks_to_the_next_one() {
    let (store, mut node) = (Store::start(), Node::prepare());
    node.keep_attached = true;
    node.run();
    store.create("idle.vhd", 1 << 20);
    let (_, made) = attach(&store, &node, "idle");
    let made: Value = serde_json::from_str(&made).expect("json");
    let id = made["id"].as_str().expect("an id").to_owned();
    let device = made["device"].as_str().expect("a device").to_owned();
    node.stop();
    assert_eq!(store.lease("idle.vhd"), LeaseState::Leased);
    assert!(node.record("idle").exists());
    assert!(std::fs::symlink_metadata(node.link("idle")).is_ok());

    node.transport.set(|b| {
        b.left.insert(id, device.clone().into());
    });
    node.run();
    eventually("taken up", || names(&node) == ["idle attached"]);
    let said = node.ctl().run(&["status", "idle"]);
    assert!(said.ok().contains(&device), "{said:?}");
    node.ctl().run(&["detach", "idle"]).says("");
    assert_eq!(store.lease("idle.vhd"), LeaseState::Available);
    node.assert_empty();
}

#[test]
fn records_of_devices_that_are_gone_are_tidied_up() {
    let store = Store::start();
    let mut node = Node::prepare();
    for name in ["mine", "taken", "deleted"] {
        store.create(&format!("{name}.vhd"), 1 << 20);
    }
    let records = node.run_dir().join("attachments");
    std::fs::create_dir_all(&records).expect("records");
    std::fs::create_dir_all(node.link("")).expect("links");
    for name in ["mine", "taken", "deleted"] {
        let held = store.hold_lease(&format!("{name}.vhd"));
        // `taken` is somebody else's by now.
        let lease = match name {
            "taken" => "00000000-0000-4000-8000-000000000000",
            _ => held.as_str(),
        };
        let record = json!({
            "format": 1,
            "id": format!("id-of-{name}"),
            "request": request(&store, name),
            "lease": lease,
            "device": "/dev/nbd17",
            "since": "2026-01-02T03:04:05Z",
        });
        std::fs::write(node.record(name), record.to_string()).expect("write");
        std::os::unix::fs::symlink("/dev/nbd17", node.link(name)).expect("link");
    }
    store.running.expire_lease("dysks", "deleted.vhd");
    store.delete("deleted.vhd");
    std::fs::write(records.join("torn.json"), "{\"format\": 1, \"id\"").expect("write");
    node.run();
    eventually("all are tidied up", || names(&node).is_empty());
    assert_eq!(store.lease("mine.vhd"), LeaseState::Available);
    assert_eq!(
        store.lease("taken.vhd"),
        LeaseState::Leased,
        "another's lease is left alone"
    );
    assert!(
        records.join("torn.unreadable").exists(),
        "put aside, not guessed at"
    );
    std::fs::remove_file(records.join("torn.unreadable")).expect("remove");
    node.assert_empty();
}

#[test]
fn a_run_directory_is_one_daemon_s() {
    let node = Node::start();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let second = runtime.block_on(Daemon::start(node.config(), node.transport.clone()));
    let error = second.err().expect("the second is refused").to_string();
    assert_eq!(
        error,
        format!(
            "run directory {}: another dyskd (pid {}) uses it: stop that one, or choose another with --run-dir",
            node.run_dir().display(),
            std::process::id()
        )
    );
    node.ctl().run(&["list", "-o", "json"]).says("[]\n");
}

#[test]
fn the_binary_starts_stops_and_says_who_it_needs_to_be() {
    let node = Node::prepare();
    let mut command = Command::new(env!("CARGO_BIN_EXE_dyskd"));
    command
        .arg("--run-dir")
        .arg(node.run_dir())
        .env_remove("RUST_LOG");
    if !rustix::process::geteuid().is_root() {
        let output = command.output().expect("dyskd runs");
        assert_eq!(output.status.code(), Some(1));
        assert!(
            String::from_utf8_lossy(&output.stderr)
                .starts_with("dyskd: attaching disks takes root")
        );
        return;
    }
    let mut child = command.stderr(Stdio::piped()).spawn().expect("dyskd runs");
    eventually("it answers", || node.ctl().run(&["list"]).code == Some(0));
    let second = Command::new(env!("CARGO_BIN_EXE_dyskd"))
        .arg("--run-dir")
        .arg(node.run_dir())
        .output()
        .expect("dyskd runs");
    assert_eq!(second.status.code(), Some(1));
    let line = format!("another dyskd (pid {}) uses it", child.id());
    assert!(
        String::from_utf8_lossy(&second.stderr).contains(&line),
        "{second:?}"
    );
    signal(&child, Signal::TERM);
    assert_eq!(child.wait().expect("wait").code(), Some(0));
    assert!(!node.socket().exists());
    let mut log = String::new();
    child
        .stderr
        .take()
        .expect("piped")
        .read_to_string(&mut log)
        .expect("read");
    assert!(
        log.contains("dyskd is ready") && log.trim_end().ends_with("stopped"),
        "{log}"
    );
}
