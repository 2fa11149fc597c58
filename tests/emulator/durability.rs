//! The real binary: what it says, how it stops, and what survives its death.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::client::{Client, eventually};

const LEASE: &str = "11111111-1111-4111-8111-111111111111";

struct Process {
    child: Child,
    client: Client,
    url: String,
}

impl Process {
    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_dysk-emulator"))
            .args(["--listen", "127.0.0.1:0"])
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped"))
            .read_line(&mut line)
            .expect("a line");
        let url = line
            .trim_end()
            .strip_prefix("listening on ")
            .expect(&line)
            .to_owned();
        let address = url["http://".len()..]
            .split('/')
            .next()
            .expect("an address");
        let client = Client::new(address.parse().expect("an address"));
        Self { child, client, url }
    }

    fn in_dir(dir: &Path) -> Self {
        Self::start(&["--dir", dir.to_str().expect("utf-8")])
    }

    fn kill(mut self) {
        self.child.kill().expect("SIGKILL");
        self.child.wait().expect("dead");
    }

    fn signal(mut self, signal: rustix::process::Signal) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("signal");
        self.child.wait().expect("ended").code()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Already dead unless the test failed.
        self.child.kill().unwrap_or_default();
        self.child.wait().map(drop).unwrap_or_default();
    }
}

#[test]
fn it_tells_its_url_and_stops_cleanly() {
    for signal in [rustix::process::Signal::INT, rustix::process::Signal::TERM] {
        let process = Process::start(&["--memory", "--account", "acct", "--key", "AAAA"]);
        assert!(process.url.ends_with("/acct"), "{}", process.url);
        let mut client = process.client.clone();
        (client.account, client.key) = ("acct".into(), "AAAA".into());
        client
            .put("dysks?restype=container")
            .send()
            .expect_status(201);
        assert_eq!(process.signal(signal), Some(0));
    }
}

#[test]
fn bad_arguments_are_refused_in_one_line() {
    let output = Command::new(env!("CARGO_BIN_EXE_dysk-emulator"))
        .args(["--memory", "--key", "no base64", "--listen", "127.0.0.1:0"])
        .output()
        .expect("runs");
    let error = String::from_utf8(output.stderr).expect("utf-8");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(error, "dysk-emulator: the account key is not base64\n");
}

#[test]
fn a_directory_belongs_to_one_emulator() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let _first = Process::in_dir(dir.path());
    let output = Command::new(env!("CARGO_BIN_EXE_dysk-emulator"))
        .args(["--listen", "127.0.0.1:0", "--dir"])
        .arg(dir.path())
        .output()
        .expect("runs");
    let error = String::from_utf8(output.stderr).expect("utf-8");
    assert!(error.contains("another emulator uses"), "{error}");
}

#[test]
fn what_was_acknowledged_survives_kill_9() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let process = Process::in_dir(dir.path());
    let client = process.client.clone();
    client
        .put("dysks?restype=container")
        .send()
        .expect_status(201);
    client.create("a", 8 << 40);
    client.page("a", 0, &[1; 4096]).send().expect_status(201);
    client
        .page("a", 5 << 40, &[2; 512])
        .send()
        .expect_status(201);
    let taken = client
        .put("dysks/a?comp=snapshot")
        .send()
        .expect_status(201);
    let time = taken.header("x-ms-snapshot").to_owned();
    client.clear("a", 0, 1024).send().expect_status(201);
    client
        .put("dysks/a?comp=properties")
        .with("x-ms-sequence-number-action", "max")
        .with("x-ms-blob-sequence-number", 42)
        .send()
        .expect_status(200);
    client
        .lease("a", "acquire")
        .with("x-ms-lease-duration", 60)
        .with("x-ms-proposed-lease-id", LEASE)
        .send()
        .expect_status(201);
    client
        .put("dysks/a?comp=metadata")
        .with("x-ms-lease-id", LEASE)
        .with("x-ms-meta-k", "v")
        .send()
        .expect_status(200);
    client.create("gone", 512);
    client.delete("dysks/gone").send().expect_status(202);
    let last = client
        .page("a", 8192, &[3; 512])
        .with("x-ms-lease-id", LEASE)
        .send()
        .expect_status(201);
    process.kill();

    let process = Process::in_dir(dir.path());
    let client = process.client.clone();
    let head = client.head("dysks/a").send().expect_status(200);
    assert_eq!(head.header("etag"), last.header("etag"));
    assert_eq!(head.header("x-ms-blob-sequence-number"), "42");
    assert_eq!(head.header("x-ms-lease-state"), "leased");
    assert_eq!(head.header("x-ms-meta-k"), "v");
    assert_eq!(client.read("a", 0, 2048), [[0; 1024], [1; 1024]].concat());
    let far = 5u64 << 40;
    let ranges = format!("1024-4095 8192-8703 {far}-{}", far + 511);
    assert_eq!(client.ranges("dysks/a?comp=pagelist"), ranges);
    assert_eq!(
        client.ranges(&format!("dysks/a?comp=pagelist&prevsnapshot={time}")),
        "c0-1023 8192-8703"
    );
    assert_eq!(
        client.read(&format!("a?snapshot={time}"), 0, 4096),
        [1; 4096]
    );
    assert_eq!(client.page("a", 0, &[1; 512]).code(), "412 LeaseIdMissing");
    assert_eq!(
        client
            .lease("a", "renew")
            .with("x-ms-lease-id", LEASE)
            .code(),
        "200"
    );
    assert_eq!(client.head("dysks/gone").code(), "404 BlobNotFound");
    process.kill();
}

#[test]
fn kill_9_amid_writes_loses_nothing_that_was_acknowledged() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut expected: Vec<u8> = vec![0; 64];
    for round in 1..=3u8 {
        let process = Process::in_dir(dir.path());
        let client = process.client.clone();
        if round == 1 {
            client
                .put("dysks?restype=container")
                .send()
                .expect_status(201);
            client.create("a", 64 * 4096);
        }
        let writers: Vec<_> = (0..4u64)
            .map(|writer| {
                let client = client.clone();
                std::thread::spawn(move || {
                    let mut acknowledged = Vec::new();
                    for number in 0.. {
                        let block = (number * 4 + writer) % 64;
                        let byte = round * 64 + u8::try_from(number / 16 % 64).expect("small");
                        let put = client.page("a", block * 4096, &[byte; 4096]);
                        match put.try_send() {
                            Ok(answer) if answer.status == 201 => acknowledged.push((block, byte)),
                            _ => return (acknowledged, Some((block, byte))),
                        }
                    }
                    (acknowledged, None)
                })
            })
            .collect();
        eventually("some writes are in", || {
            client.admin("GET", "stats", "").text().contains("put-page")
        });
        std::thread::sleep(std::time::Duration::from_millis(150));
        process.kill();
        let mut unknown = Vec::new();
        for writer in writers {
            let (acknowledged, last) = writer.join().expect("no panic");
            for (block, byte) in acknowledged {
                expected[usize::try_from(block).expect("small")] = byte;
            }
            unknown.extend(last);
        }
        let process = Process::in_dir(dir.path());
        for (block, byte) in expected.iter_mut().enumerate() {
            let read = process.client.read("a", block as u64 * 4096, 4096);
            for page in read.chunks(512) {
                let late = unknown.contains(&(block as u64, page[0]));
                assert!(
                    page.iter().all(|b| *b == page[0]),
                    "a torn page in block {block}"
                );
                assert!(
                    page[0] == *byte || late,
                    "block {block}: {} for {byte}",
                    page[0]
                );
            }
            // The next round only knows blocks that are whole.
            process
                .client
                .page("a", block as u64 * 4096, &[*byte; 4096])
                .send()
                .expect_status(201);
        }
        process.kill();
    }
}

#[test]
fn a_copy_goes_on_after_kill_9() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let process = Process::in_dir(dir.path());
    let client = process.client.clone();
    client
        .put("dysks?restype=container")
        .send()
        .expect_status(201);
    client.create("a", 1 << 20);
    client.page("a", 0, &[8; 1 << 20]).send().expect_status(201);
    client
        .admin("PUT", "settings", r#"{"copyBandwidth":65536}"#)
        .expect_status(204);
    client
        .put("dysks/b")
        .with("x-ms-copy-source", client.url("dysks/a"))
        .send()
        .expect_status(202);
    process.kill();
    let process = Process::in_dir(dir.path());
    let client = process.client.clone();
    eventually("the copy ends", || {
        client.head("dysks/b").send().header("x-ms-copy-status") == "success"
    });
    assert_eq!(client.read("b", 0, 1 << 20), vec![8; 1 << 20]);
    process.kill();
}

#[test]
fn what_is_not_its_own_is_left_alone() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let foreign = ["lost+found/a", "containers/other/b", "notes.json"];
    for name in foreign {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().expect("below dir")).expect("directory");
        std::fs::write(path, "mine").expect("file");
    }
    let process = Process::in_dir(dir.path());
    let client = process.client.clone();
    for container in ["dysks", "again"] {
        client
            .put(&format!("{container}?restype=container"))
            .send()
            .expect_status(201);
    }
    client.create("a", 512);
    // What a deletion that was cut short leaves behind.
    std::fs::remove_file(dir.path().join("containers/dysks/container.json")).expect("removed");
    process.kill();
    let process = Process::in_dir(dir.path());
    let client = process.client.clone();
    assert_eq!(client.head("dysks/a").code(), "404 ContainerNotFound");
    let create = client.put("dysks?restype=container");
    create.send().expect_status(201);
    assert_eq!(client.head("dysks/a").code(), "404 BlobNotFound");
    assert_eq!(client.get("again?restype=container").code(), "200");
    process.kill();
    for name in foreign {
        assert!(dir.path().join(name).exists(), "{name}");
    }
}
