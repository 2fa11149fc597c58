//! Foreign NBD clients against `dyskctl serve` with a page blob behind it, in
//! every caching mode; what they wrote is then looked for in the blob.

#![allow(
    clippy::cast_possible_truncation,
    reason = "sizes here are small, and bytes are meant to wrap"
)]

use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command};

use crate::support::node::{ACCOUNT, Node, Store, signal};
use dysk::blob::{Checksum, Conditions, Range};
use rustix::process::Signal;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const DEADLINE: std::time::Duration = std::time::Duration::from_secs(30);

/// `dyskctl serve` on a UNIX socket.
struct Serving {
    store: Store,
    node: Node,
    child: Option<Child>,
    uri: String,
}

impl Serving {
    fn start(caching: &str) -> Self {
        let (store, node) = (Store::start(), Node::prepare());
        store.create("c.vhd", SIZE);
        let mut serving = Self {
            store,
            node,
            child: None,
            uri: String::new(),
        };
        let (socket, staging) = (serving.file("c.sock"), serving.file("staging"));
        let (volume, endpoint) = (format!("{ACCOUNT}/dysks/c.vhd"), serving.store.endpoint());
        let mut arguments = vec!["serve", &volume, "--endpoint", &endpoint];
        arguments.extend(["--unix", &socket, "--caching", caching]);
        if caching != "none" {
            arguments.extend(["--staging-dir", &staging, "--cache-size", "8MiB"]);
        }
        let mut child = serving.node.ctl().spawn(&arguments);
        let stdout = child.stdout.take().expect("piped");
        serving.child = Some(child);
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        serving.uri = line.trim().to_owned();
        assert!(serving.uri.starts_with("nbd+unix://"), "{line:?}");
        serving
    }

    fn file(&self, name: &str) -> String {
        let path: PathBuf = self.node.dir.path().join(name);
        path.to_str().expect("a plain path").to_owned()
    }

    /// Ends it as a user does, and reads what the store holds then.
    fn stop(&mut self) -> Vec<u8> {
        let child = self.child.take().expect("it is stopped once");
        signal(&child, Signal::TERM);
        let output = child.wait_with_output().expect("it ends");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), &*said), (Some(0), ""));
        let blob = self.store.blob("c.vhd");
        let none = Conditions::default();
        let read = blob.get_range(Range::at(0, SIZE), Checksum::Off, &none, DEADLINE);
        self.store
            .block_on(read)
            .expect("the blob is read")
            .pieces
            .concat()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            child.kill().expect("a child of ours");
            child.wait().expect("a child of ours");
        }
    }
}

/// Runs a tool that `package` brings; it has to succeed.
fn run(package: &str, tool: &str, arguments: &[&str]) -> String {
    let output = Command::new(tool)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {tool} (apt-get install {package}): {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let wrong = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{tool} {arguments:?}: {}\n{text}{wrong}",
        output.status
    );
    text
}

/// Bytes that differ from place to place.
fn pattern(len: u64, salt: u64) -> Vec<u8> {
    (0..len)
        .map(|at| (((at / 512 + salt) * 31 + at % 251) % 256) as u8)
        .collect()
}

fn everybody(caching: &str) {
    let mut serving = Serving::start(caching);
    let uri = serving.uri.clone();

    // nbdinfo and nbdcopy.
    assert_eq!(
        run("libnbd-bin", "nbdinfo", &["--size", &uri]).trim(),
        SIZE.to_string()
    );
    let source = serving.file("source");
    let mut expected = pattern(16 * MIB, 1);
    std::fs::write(&source, &expected).expect("written");
    run("libnbd-bin", "nbdcopy", &["--flush", &source, &uri]);
    let back = serving.file("back");
    run("libnbd-bin", "nbdcopy", &[&uri, &back]);
    expected.resize(SIZE as usize, 0);
    assert!(
        std::fs::read(&back).expect("read") == expected,
        "nbdcopy brought back other bytes"
    );
    let map = run("libnbd-bin", "nbdinfo", &["--map", &uri]);
    assert!(map.contains("hole"), "{map}");

    // qemu-img and qemu-io.
    let image = serving.file("image");
    run(
        "qemu-utils",
        "qemu-img",
        &["convert", "-f", "raw", "-O", "raw", &uri, &image],
    );
    run(
        "qemu-utils",
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &image, &uri],
    );
    let commands = [
        "write -f -P 0xab 20M 64k",
        "write -z 21M 64k",
        "discard 1M 1M",
        "write -P 0xcd 20481k 512",
        "flush",
    ];
    let mut arguments = vec!["-f", "raw", "-t", "none"];
    arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
    arguments.push(&uri);
    let text = run("qemu-utils", "qemu-io", &arguments);
    assert!(!text.contains("rror") && !text.contains("failed"), "{text}");
    expected[20 << 20..(20 << 20) + (64 << 10)].fill(0xab);
    expected[1 << 20..2 << 20].fill(0);
    expected[20481 << 10..(20481 << 10) + 512].fill(0xcd);

    // fio, verifying behind itself, on a part of its own.
    let fio_uri = format!("--uri={uri}");
    run(
        "fio",
        "fio",
        &[
            "--name=verify",
            "--ioengine=nbd",
            &fio_uri,
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=32",
            "--offset=32M",
            "--size=16M",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_state_save=0",
            "--verify_fatal=1",
            "--end_fsync=1",
        ],
    );

    // The nbd crate's client.
    let mut stream = UnixStream::connect(serving.file("c.sock")).expect("it listens");
    let export = nbd::client::handshake(&mut stream, b"").expect("a handshake");
    assert_eq!(export.size, SIZE);
    let mut client = nbd::client::NbdClient::new(&mut stream, &export);
    let data = pattern(8192, 7);
    client.seek(SeekFrom::Start(56 << 20)).expect("sought");
    client.write_all(&data).expect("written");
    client.seek(SeekFrom::Start(56 << 20)).expect("sought");
    let mut read = vec![0; data.len()];
    client.read_exact(&mut read).expect("read");
    assert!(read == data, "the nbd crate read other bytes");
    expected[56 << 20..(56 << 20) + data.len()].copy_from_slice(&data);

    let stored = serving.stop();
    let fios = 32 << 20..48 << 20;
    for part in [0..fios.start, fios.end..SIZE as usize] {
        assert!(
            stored[part.clone()] == expected[part],
            "the blob holds other bytes"
        );
    }
    assert!(
        stored[fios].iter().any(|byte| *byte != 0),
        "fio's bytes are not in the blob"
    );
}

#[test]
fn uncached() {
    everybody("none");
}

#[test]
fn read_only_cached() {
    everybody("read-only");
}

#[test]
fn read_write_cached() {
    everybody("read-write");
}
