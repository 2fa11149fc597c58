//! Unflushed writes of a volume that somebody else has taken: named, never
//! replayed by themselves, dropped or put back only when told. And an attach
//! that waits for somebody else's lease says so.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::node;
use crate::support::node::{ACCOUNT, Node, Store};
use bytes::Bytes;
use dysk::blob::{Checksum, Conditions, LeaseId, LeaseState, Range};
use dysk::device::BlockDevice;
use dysk::volume::{Caching, OpenOptions, StagingOptions, Volume};

const DEADLINE: Duration = Duration::from_secs(10);
const BYTES: usize = 8192;

fn volume() -> String {
    format!("{ACCOUNT}/dysks/vol1.vhd")
}

fn set_up() -> (Store, Node) {
    let store = Store::start();
    store.create("vol1.vhd", 64 << 20);
    (store, Node::start())
}

/// Writes that another holder's takeover left unflushed in `folder`, and that
/// holder's lease.
fn taken_over(store: &Store, folder: &Path) -> (PathBuf, LeaseId) {
    let blob = store.blob("vol1.vhd");
    let aside = store.block_on(async {
        let options = OpenOptions {
            caching: Caching::ReadWrite,
            staging: StagingOptions {
                dir: folder.into(),
                ..StagingOptions::default()
            },
            ..OpenOptions::new(LeaseId::random())
        };
        let volume = Volume::open(blob.clone(), options).await.expect("opens");
        let data = Bytes::from(vec![7; BYTES]);
        volume.write(0, data, false).await.expect("staged");
        let none = Conditions::default();
        let broken = blob.break_lease(Some(0), &none, DEADLINE).await;
        broken.expect("breaks");
        volume.flush().await.expect_err("fenced");
        volume.close().await.expect("closes");
        let status = volume.status();
        let text = status.fenced.expect("fenced");
        assert!(text.starts_with("since 20"), "{text}");
        assert!(text.contains("412") || text.contains("409"), "{text}");
        let cache = status.cache.expect("it caches");
        cache.set_aside.expect("kept aside").path
    });
    (aside, store.hold_lease("vol1.vhd"))
}

fn release(store: &Store, lease: &LeaseId) {
    let released = store.blob("vol1.vhd");
    let released = store.block_on(async { released.release_lease(lease, DEADLINE).await });
    released.expect("releases");
}

fn first_bytes(store: &Store) -> Vec<u8> {
    let blob = store.blob("vol1.vhd");
    let none = Conditions::default();
    let range = Range::at(0, BYTES as u64);
    let read = store.block_on(blob.get_range(range, Checksum::Off, &none, DEADLINE));
    read.expect("reads").pieces.concat()
}

#[test]
fn what_was_kept_aside_is_named_and_waits_for_a_decision() {
    let (store, node) = set_up();
    let (endpoint, ctl) = (store.endpoint(), node.ctl());
    let staging = node.run_dir().join("staging");
    let folder = staging.to_str().expect("utf-8");
    let (aside, other) = taken_over(&store, &staging);
    let path = aside.to_str().expect("utf-8");
    let list = ["staging", "list", "--staging-dir", folder];
    ctl.run(&list).says(&format!(
        "{:31}  State  Unflushed  Path\n{}  aside  8192       {path}\n",
        "Volume",
        volume()
    ));
    release(&store, &other);

    // The next attach goes without them, and tells.
    let volume = volume();
    let attach = [
        "attach",
        &volume,
        "--endpoint",
        &endpoint,
        "--caching",
        "read-write",
    ];
    ctl.run(&attach).ok();
    let status = ctl.run(&["status", "vol1"]);
    let line = format!("8192 bytes in {path} (see `dyskctl staging`)");
    assert!(status.ok().contains(&line), "{status:?}");
    let listed = ctl.run(&["list"]);
    assert!(
        listed.ok().contains("8192 unflushed bytes kept aside"),
        "{listed:?}"
    );
    ctl.run(&["staging", "restore", path]).fails(&format!(
        "{path}: the volume is attached, or other unflushed writes wait for it: \
         detach it, or set those aside first"
    ));
    ctl.run(&["detach", "vol1"]).ok();
    assert_eq!(first_bytes(&store), [0; BYTES], "replayed by itself");

    // Told to decide, one is asked once more.
    ctl.run(&["staging", "discard", path]).fails(&format!(
        "{path} holds 8192 bytes of {volume} that were never written to the store: \
         say --yes to drop them for good"
    ));
    let place = ctl
        .run(&["staging", "restore", path])
        .ok()
        .trim()
        .to_owned();
    let said = ctl.run(&attach);
    let number = |text: &str| -> u64 {
        let digits = text.split(|c: char| !c.is_ascii_digit()).next();
        digits.and_then(|d| d.parse().ok()).expect("a number")
    };
    let now = number(said.err.split("sequence number ").nth(1).expect("a number"));
    let then = number(said.err.split(", not ").nth(1).expect("a number"));
    assert!(then < now, "{said:?}");
    said.fails(&format!(
        "{volume}: 8192 bytes of unflushed writes in {place}, but the volume may have been \
         written elsewhere since (sequence number {now}, not {then}): attach with --recover \
         set-aside to keep them out of the way, --recover discard to drop them, or --recover \
         force to write them over what is there"
    ));
    assert_eq!(store.lease("vol1.vhd"), LeaseState::Available);
    ctl.run(&[&attach[..], &["--recover", "force"]].concat())
        .ok();
    ctl.run(&["detach", "vol1"]).ok();
    assert_eq!(first_bytes(&store), [7; BYTES]);
    ctl.run(&list).says("Volume  State  Unflushed  Path\n");
    node.assert_empty();
}

#[test]
fn dropping_them_takes_a_yes() {
    let (store, node) = set_up();
    let ctl = node.ctl();
    let staging = node.run_dir().join("staging");
    let (aside, _other) = taken_over(&store, &staging);
    let path = aside.to_str().expect("utf-8");
    ctl.run(&["staging", "discard", path, "--yes"]).says("");
    assert!(!aside.exists());
    ctl.run(&["staging", "discard", path, "--yes"])
        .fails(&format!("{path} is not there: see `dyskctl staging list`"));
    let own = node.socket();
    let own = own.to_str().expect("utf-8");
    ctl.run(&["staging", "restore", own]).fails(&format!(
        "{own} was not set aside: name a file that `dyskctl staging list` shows as aside"
    ));
}

#[test]
fn an_attach_that_waits_for_a_lease_says_so_once() {
    let (store, node) = set_up();
    let (endpoint, volume) = (store.endpoint(), volume());
    let socket = node.dir.path().join("serve.sock");
    let socket = socket.to_str().expect("utf-8");
    for command in [
        &["attach"] as &[&str],
        &["serve", "--unix", socket] as &[&str],
    ] {
        let lease = store.hold_lease("vol1.vhd");
        let options = [&volume, "--endpoint", &endpoint, "--wait", "45s"];
        let mut child = node.ctl().spawn(&[command, &options].concat());
        let mut err = BufReader::new(child.stderr.take().expect("piped"));
        let mut line = String::new();
        err.read_line(&mut line).expect("reads");
        let expected = format!(
            "dyskctl: {volume}: leased elsewhere: waiting up to 45s for the lease to end\n"
        );
        assert_eq!(line, expected);
        // Long enough to look again and find it still leased.
        std::thread::sleep(Duration::from_millis(2500));
        release(&store, &lease);
        let mut out = BufReader::new(child.stdout.take().expect("piped"));
        let mut device = String::new();
        out.read_line(&mut device).expect("reads");
        assert!(!device.is_empty(), "{command:?} did not begin");
        if command[0] == "serve" {
            node::signal(&child, rustix::process::Signal::TERM);
        }
        assert!(child.wait().expect("it ends").success(), "{command:?}");
        let mut rest = String::new();
        std::io::Read::read_to_string(&mut err, &mut rest).expect("reads");
        assert_eq!(rest, "", "said once");
        if command[0] == "attach" {
            node.ctl().run(&["detach", "vol1"]).ok();
        }
    }
}
