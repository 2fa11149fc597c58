//! A volume whose store does not answer: nobody else waits for it, its I/O ends
//! at the operator's deadline if there is one, and it can be detached by force.

use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::node::{ACCOUNT, Node, Store, eventually};
use dysk::blob::LeaseState;
use dysk::emulator::{Effect, Rule, Span};
use serde_json::Value;

const LEN: u64 = 64 << 10;

fn set_up(blobs: &[&str]) -> (Store, Node) {
    let store = Store::start();
    for blob in blobs {
        store.create(&format!("{blob}.vhd"), 1 << 20);
    }
    (store, Node::start())
}

/// Attaches and returns the device.
fn attach(store: &Store, node: &Node, name: &str, options: &[&str]) -> String {
    let volume = format!("{ACCOUNT}/dysks/{name}.vhd");
    let endpoint = store.endpoint();
    let common = ["attach", &volume, "--endpoint", &endpoint];
    let said = node.ctl().run(&[&common, options].concat());
    said.ok().trim().to_owned()
}

/// Nothing of the blob is answered any more.
fn silence(store: &Store, name: &str) {
    let stall = Effect::Stall {
        delay: Span(Duration::from_secs(3600)),
        after: false,
    };
    let rule = Rule::any(stall).blob(format!("{name}.vhd"));
    store.running.faults().set(vec![rule]);
}

/// A client that writes to the device and flushes it.
fn client(device: &str) -> Command {
    let mut command = Command::new("qemu-io");
    command
        .args(["-f", "raw", "-t", "none", "-c"])
        .arg(format!("write -P 7 0 {LEN}"))
        .args(["-c", "flush"])
        .arg(format!("nbd+unix:///?socket={device}"))
        .stdin(Stdio::null());
    command
}

/// Whether the write and the flush succeeded, and what the client said. It
/// says nothing of a flush that failed but by its exit status.
fn told(device: &str) -> (bool, String) {
    let output = client(device).output().expect("qemu-io runs");
    let text = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&text).into_owned();
    (output.status.success(), said)
}

fn in_flight(node: &Node, name: &str) -> u64 {
    let said = node.ctl().run(&["status", name, "-o", "json"]);
    let status: Value = serde_json::from_str(said.ok()).expect("json");
    status["inFlight"].as_u64().expect("a number")
}

fn a_stuck_volume_is_detached_by_force(caching: &str) {
    let (store, node) = set_up(&["stuck", "other"]);
    let ctl = node.ctl();
    let stuck = attach(&store, &node, "stuck", &["--caching", caching]);
    let other = attach(&store, &node, "other", &["--caching", caching]);
    silence(&store, "stuck");
    let quiet = || (Stdio::null(), Stdio::null());
    let (out, err) = quiet();
    let mut waits = client(&stuck)
        .stdout(out)
        .stderr(err)
        .spawn()
        .expect("qemu-io runs");
    eventually("its i/o waits", || in_flight(&node, "stuck") > 0);

    // Everybody else goes on.
    let (succeeded, said) = told(&other);
    assert!(succeeded && said.contains("wrote 65536/65536"), "{said}");
    ctl.run(&["detach", "other"]).says("");
    assert!(in_flight(&node, "stuck") > 0);
    assert!(waits.try_wait().expect("its state").is_none());

    ctl.run(&["detach", "stuck", "--force", "-o", "json"]);
    ctl.run(&["list", "-o", "json"]).says("[]\n");
    waits.wait().expect("it ends");
    node.assert_empty();
    let staging = node.run_dir().join("staging");
    let folder = staging.to_str().expect("utf-8");
    let list = ["staging", "list", "-o", "json", "--staging-dir", folder];
    let left: Value = serde_json::from_str(ctl.run(&list).ok()).expect("json");
    if caching == "none" {
        assert_eq!(left, serde_json::json!([]));
    } else {
        assert_eq!(left[0]["state"], "aside", "{left}");
        assert_eq!(left[0]["dirtyBytes"], LEN, "{left}");
    }
}

#[test]
fn a_stuck_volume_holds_up_nobody_and_goes_when_forced() {
    a_stuck_volume_is_detached_by_force("none");
}

#[test]
fn one_that_caches_keeps_aside_what_it_could_not_flush() {
    a_stuck_volume_is_detached_by_force("read-write");
}

/// A clean stop beside `stuck`, whose I/O waits; it has to end while the store
/// still says nothing of it.
fn stop_beside_a_stuck_one(store: &Store, node: &mut Node) {
    const NOT_FOR_EVER: Duration = Duration::from_secs(30);
    let (stopped, wait) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let healed = scope.spawn(move || {
            let healed = wait.recv_timeout(NOT_FOR_EVER).is_err();
            store.running.faults().clear();
            store.running.cut_connections();
            healed
        });
        node.stop();
        stopped.send(()).ok();
        let healed = healed.join().expect("the store heals");
        assert!(!healed, "the stop waited for the stuck volume");
    });
}

fn a_clean_stop_waits_for_no_stuck_volume(caching: &str) {
    let (store, mut node) = set_up(&["stuck", "other"]);
    let stuck = attach(&store, &node, "stuck", &["--caching", caching]);
    attach(&store, &node, "other", &["--caching", caching]);
    let said = node.ctl().run(&["status", "stuck", "-o", "json"]);
    let status: Value = serde_json::from_str(said.ok()).expect("json");
    let id = status["id"].as_str().expect("an id").to_owned();
    node.transport.set(|b| {
        b.in_use = Some("mounted at /srv".into());
        b.in_use_alone = Some("stuck".into());
    });
    silence(&store, "stuck");
    let waits = client(&stuck).stdout(Stdio::null()).spawn();
    let mut waits = waits.expect("qemu-io runs");
    eventually("its i/o waits", || in_flight(&node, "stuck") > 0);

    stop_beside_a_stuck_one(&store, &mut node);
    waits.wait().expect("it ends");
    assert_eq!(store.lease("other.vhd"), LeaseState::Available);
    assert!(!node.record("other").exists());
    assert_eq!(store.lease("stuck.vhd"), LeaseState::Leased);
    assert!(node.record("stuck").exists(), "left to the next daemon");
    if caching == "none" {
        let left = stuck.clone().into();
        node.transport.set(|b| drop(b.left.insert(id, left)));
        node.run();
        eventually("i/o goes on", || told(&stuck).0);
        node.transport.set(|b| b.in_use = None);
        node.ctl().run(&["detach", "stuck"]).says("");
        return;
    }
    // What was acknowledged is where the next one looks for it. (That it does
    // is seen in guests; here this process still has the file.)
    let folder = node.run_dir().join("staging");
    let files = std::fs::read_dir(&folder).expect("a folder");
    let sizes: Vec<u64> = files
        .map(|file| file.and_then(|file| file.metadata()).expect("a file").len())
        .collect();
    assert!(sizes.iter().any(|&size| size >= LEN), "{sizes:?}");
}

#[test]
fn a_clean_stop_leaves_a_stuck_volume_and_detaches_the_others() {
    a_clean_stop_waits_for_no_stuck_volume("none");
}

#[test]
fn a_clean_stop_leaves_what_a_stuck_volume_has_staged() {
    a_clean_stop_waits_for_no_stuck_volume("read-write");
}

#[test]
fn a_clean_stop_leaves_a_detach_that_does_not_end() {
    let (store, mut node) = set_up(&["stuck"]);
    let stuck = attach(&store, &node, "stuck", &[]);
    silence(&store, "stuck");
    let waits = client(&stuck).stdout(Stdio::null()).spawn();
    let mut waits = waits.expect("qemu-io runs");
    eventually("its i/o waits", || in_flight(&node, "stuck") > 0);
    let mut detach = node.ctl().spawn(&["detach", "stuck"]);
    eventually("the detach is under way", || {
        let said = node.ctl().run(&["list", "-o", "json"]);
        let list: Value = serde_json::from_str(said.ok()).expect("json");
        list[0]["state"] == "detaching"
    });
    stop_beside_a_stuck_one(&store, &mut node);
    for child in [&mut waits, &mut detach] {
        child.wait().expect("it ends");
    }
    assert!(node.record("stuck").exists(), "left to the next daemon");
    // It finds no device, and tidies up.
    node.run();
    eventually("nothing is left", || !node.record("stuck").exists());
    assert_eq!(store.lease("stuck.vhd"), LeaseState::Available);
}

#[test]
fn waiting_ends_at_the_deadline_if_there_is_one() {
    for caching in ["none", "read-write"] {
        let (store, node) = set_up(&["late"]);
        let options = ["--caching", caching, "--io-deadline", "300ms"];
        let device = attach(&store, &node, "late", &options);
        silence(&store, "late");
        let (succeeded, said) = told(&device);
        assert!(!succeeded, "{caching}: {said}");
        // What is staged is acknowledged; what is to be in the store is not.
        let written = said.contains("wrote 65536/65536");
        assert_eq!(written, caching == "read-write", "{caching}: {said}");
        // It is no fence: a store that is back is used.
        store.running.faults().clear();
        store.running.cut_connections();
        eventually("i/o goes on", || told(&device).0);
        node.ctl().run(&["detach", "late"]).says("");
    }
}
