//! `dyskctl bench` with a real fio: what it prints, what it refuses to write
//! on, and that nothing of it is left.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::node;
use crate::support::node::{ACCOUNT, Ctl, Node, Said, Store, signal};
use bytes::Bytes;
use dysk::blob::{Checksum, Conditions, LeaseState};
use rustix::process::Signal;
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(10);

fn volume(blob: &str) -> String {
    format!("{ACCOUNT}/dysks/{blob}")
}

/// A store with the volume `b.vhd`, and a `dyskctl` whose temporary files go
/// to a folder of its own.
struct Place {
    store: Store,
    node: Node,
    temporary: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let store = Store::start();
        store.create("b.vhd", 8 << 20);
        Self {
            store,
            node: Node::prepare(),
            temporary: tempfile::tempdir().expect("a folder"),
        }
    }

    fn ctl(&self) -> Ctl {
        let folder = self.temporary.path().to_str().expect("utf-8");
        self.node
            .ctl()
            .with(&[("AZURE_STORAGE_KEY", node::KEY), ("TMPDIR", folder)])
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let endpoint = self.store.endpoint();
        let mut all = vec!["bench"];
        all.extend(arguments);
        all.extend(["--endpoint", &endpoint]);
        self.ctl().command(&all)
    }

    fn run(&self, arguments: &[&str]) -> Said {
        let mut command = self.command(arguments);
        Said::of(&command.output().expect("dyskctl runs"), arguments)
    }

    /// The bytes that the store has of the volume, footer aside; who holds it;
    /// and the temporary files.
    fn assert_nothing_left(&self) {
        let blob = self.store.blob("b.vhd");
        let none = Conditions::default();
        let ranges = blob.page_ranges(None, None, None, None, &none, DEADLINE);
        let filled = self
            .store
            .block_on(ranges)
            .expect("the store answers")
            .filled;
        let left: Vec<_> = filled
            .iter()
            .filter(|range| range.start < 8 << 20)
            .collect();
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(self.store.lease("b.vhd"), LeaseState::Available);
        let files = std::fs::read_dir(self.temporary.path()).expect("the folder");
        assert_eq!(files.count(), 0);
    }
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn measures_a_volume_and_leaves_it_empty() {
    let place = Place::new();
    let blob = volume("b.vhd");
    let said = place.run(&[&blob, "--runtime", "1s", "--size", "4MiB", "-o", "json"]);
    assert_eq!(said.code, Some(0), "{}", said.err);
    let steps: Vec<&str> = said.err.lines().collect();
    assert_eq!(
        steps,
        [
            "dyskctl: writing 4 MiB first",
            "dyskctl: read_iops (1 of 4): 1 s",
            "dyskctl: write_iops (2 of 4): 1 s",
            "dyskctl: read_bw (3 of 4): 1 s",
            "dyskctl: write_bw (4 of 4): 1 s",
        ]
    );
    let report: Value = serde_json::from_str(&said.out).expect("json");
    assert_eq!(report["target"], blob.as_str());
    assert_eq!(report["profile"], "kubestr");
    assert_eq!(report["engine"], "nbd");
    assert_eq!(report["size"], 4 << 20);
    let jobs = report["jobs"].as_array().expect("jobs");
    let shapes: Vec<_> = jobs
        .iter()
        .map(|job| {
            let text = |field: &str| job[field].as_str().expect("text").to_owned();
            (
                text("name"),
                text("direction"),
                job["block"].as_u64(),
                job["depth"].as_u64(),
            )
        })
        .collect();
    let expected = [
        ("read_iops", "read", 4096),
        ("write_iops", "write", 4096),
        ("read_bw", "read", 131_072),
        ("write_bw", "write", 131_072),
    ];
    let expected = expected
        .map(|(name, direction, block)| (name.into(), direction.into(), Some(block), Some(64)));
    assert_eq!(shapes, expected);
    for job in jobs {
        let field = |name: &str| number(&job[name]);
        assert!(field("iops") > 0.0 && field("p50") > 0.0, "{job}");
        assert!(field("p50") <= field("p99"), "{job}");
        assert!(field("iopsMin") <= field("iopsMax"), "{job}");
        let moved = field("bytesPerSecond") / (field("iops") * field("block"));
        assert!((0.99..1.01).contains(&moved), "{job}");
    }
    place.assert_nothing_left();
}

#[test]
fn the_database_profile_prints_a_table() {
    let place = Place::new();
    let arguments = [
        &volume("b.vhd"),
        "--profile",
        "database",
        "--runtime",
        "1s",
        "--size",
        "2MiB",
        "--caching",
        "read-write",
        "--staging-dir",
    ];
    let staging = tempfile::tempdir().expect("a folder");
    let mut all: Vec<&str> = arguments.to_vec();
    all.push(staging.path().to_str().expect("utf-8"));
    let said = place.run(&all);
    assert_eq!(said.code, Some(0), "{}", said.err);
    let firsts: Vec<_> = said
        .out
        .lines()
        .map(|line| line.split_whitespace().next().expect("a cell"))
        .collect();
    assert_eq!(
        firsts,
        [
            "Job",
            "commit",
            "page_read",
            "page_write",
            "mixed_read",
            "mixed_write"
        ]
    );
    place.assert_nothing_left();
}

#[test]
fn data_is_never_written_over() {
    let place = Place::new();
    let blob = place.store.blob("b.vhd");
    let page = Bytes::from(vec![7; 512]);
    for at in [1024_u64, (8 << 20) - 512] {
        let none = Conditions::default();
        let put = blob.put_page(at, page.clone(), Checksum::Off, &none, DEADLINE);
        place.store.block_on(put).expect("written");
        place.run(&[&volume("b.vhd")]).fails(&format!(
            "{} holds data at byte {at}, which a bench would overwrite: bench a file on its \
             filesystem with --scratch-file DIR, or empty it first (blkdiscard)",
            volume("b.vhd")
        ));
        let read = blob.get_range(
            dysk::blob::Range::at(at, 512),
            Checksum::Off,
            &none,
            DEADLINE,
        );
        let read = place.store.block_on(read).expect("read");
        assert_eq!(read.pieces.concat(), page);
        assert_eq!(place.store.lease("b.vhd"), LeaseState::Available);
        let clear = blob.clear_pages(dysk::blob::Range::at(at, 512), &none, DEADLINE);
        place.store.block_on(clear).expect("cleared");
    }
    place.assert_nothing_left();
}

#[test]
fn an_interrupt_leaves_nothing_behind() {
    for (signalled, job) in [(Signal::INT, "writing"), (Signal::TERM, "read_iops")] {
        let place = Place::new();
        let mut child = place
            .command(&[&volume("b.vhd"), "--runtime", "60s", "--size", "8MiB"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("dyskctl runs");
        let mut said = BufReader::new(child.stderr.take().expect("piped"));
        let mut line = String::new();
        while !line.contains(job) {
            line.clear();
            assert!(said.read_line(&mut line).expect("a line") > 0, "it ended");
        }
        signal(&child, signalled);
        let mut rest = String::new();
        said.read_to_string(&mut rest).expect("the rest");
        assert_eq!(
            child.wait().expect("a child of ours").code(),
            Some(130),
            "{rest}"
        );
        let last = rest.lines().last().unwrap_or_default();
        assert_eq!(last, "dyskctl: interrupted; nothing of the bench is left");
        place.assert_nothing_left();
    }
}

#[test]
fn a_scratch_file_is_gone_afterwards() {
    let place = Place::new();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_str().expect("utf-8");
    let arguments = [
        "--scratch-file",
        path,
        "--profile",
        "stream",
        "--runtime",
        "1s",
        "--size",
        "4MiB",
        "-o",
        "json",
    ];
    let said = place.run(&arguments);
    assert_eq!(said.code, Some(0), "{}", said.err);
    let report: Value = serde_json::from_str(&said.out).expect("json");
    assert_eq!(report["target"], path);
    let jobs = report["jobs"].as_array().expect("jobs");
    assert_eq!(jobs.len(), 2);
    assert!(
        jobs.iter().all(|job| number(&job["iops"]) > 0.0),
        "{report}"
    );
    let left = std::fs::read_dir(folder.path())
        .expect("the folder")
        .count();
    assert_eq!(left, 0);
}

#[test]
fn what_cannot_be_benched_is_told_in_a_line() {
    let place = Place::new();
    let file = place.temporary.path().join("file");
    std::fs::write(&file, [0; 4096]).expect("a file");
    let path = file.to_str().expect("utf-8");
    place.run(&[path]).fails(&format!(
        "{path} is no block device: name one, an attachment, or a volume"
    ));
    place
        .run(&["/nowhere"])
        .fails("/nowhere: No such file or directory (os error 2)");
    place
        .run(&[path, "--size", "4k"])
        .fails("--size: less than 1MiB tells nothing");
    place.run(&[path, "--runtime", "100ms"]).fails_with(
        2,
        "invalid value '100ms' for '--runtime <DURATION>': a job runs for 1s to 1h; see --help",
    );
    let folder = place.temporary.path().to_str().expect("utf-8");
    place.run(&[path, "--scratch-file", folder]).fails(&format!(
        "{folder} is not on {path}: name a folder of its filesystem, or leave the device out"
    ));
    std::fs::remove_file(&file).expect("removed");
    place.assert_nothing_left();
}

#[test]
fn without_fio_it_says_how_to_get_it() {
    let place = Place::new();
    let nothing: &Path = place.temporary.path();
    let mut command = place.command(&[&volume("b.vhd")]);
    let output = command.env("PATH", nothing).output().expect("dyskctl runs");
    Said::of(&output, &["bench"]).fails("fio is not installed: apt install fio");
    place.assert_nothing_left();
}
