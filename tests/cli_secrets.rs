//! No key and no signature shows in any output, log or error; the only file
//! that holds one is the record, for its owner alone.

#[path = "support/node.rs"]
mod node;

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use node::{ACCOUNT, KEY, Node, Store, eventually};
use tracing_subscriber::fmt::MakeWriter;

/// Everything this process (store and daemon) logs, down to trace.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("lock").write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// Parts of what must not show: whole, and without its ends.
fn secrets() -> Vec<String> {
    let signature = "c2lnbmF0dXJlIG9mIGEgc2hhcmVkIGFjY2VzcyBzaWduYXR1cmU";
    vec![KEY.to_owned(), KEY[8..40].to_owned(), signature.to_owned()]
}

#[track_caller]
fn assert_clean(what: &str, text: &str) {
    for secret in secrets() {
        assert!(!text.contains(&secret), "{what} shows a secret: {text}");
    }
}

/// Environment and arguments.
type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);

#[test]
fn no_secret_shows() {
    let log = Log::default();
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(log.clone())
        .init();
    let (store, mut node) = (Store::start(), Node::start());
    let endpoint = store.endpoint();
    store.create("a.vhd", 1 << 20);
    let volume = format!("{ACCOUNT}/dysks/a.vhd");
    let sas = format!("sv=2021-08-06&sp=rw&sig={}", secrets()[2]);
    let connection = format!("AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint}");
    let url = format!("{endpoint}/dysks/a.vhd?{sas}");
    let key = ("AZURE_STORAGE_KEY", KEY);
    let trace = ("RUST_LOG", "trace");
    let socket = node.dir.path().join("serve.sock");
    let socket = socket.to_str().expect("utf-8");
    let broken = format!("AccountKey={KEY};nonsense");
    let half_key = &KEY[..41];
    let cases: &[Case<'_>] = &[
        (
            &[key, trace],
            &["attach", &volume, "--endpoint", &endpoint, "-vv"],
        ),
        (&[key, trace], &["list", "-o", "json"]),
        (&[key, trace], &["status", "a", "-o", "json"]),
        (
            &[key, trace],
            &["attach", &volume, "--endpoint", &endpoint, "--name", "b"],
        ),
        (&[key, trace], &["detach", "a"]),
        (
            &[("AZURE_STORAGE_SAS_TOKEN", &sas), trace],
            &["attach", &volume, "--endpoint", &endpoint],
        ),
        (
            &[("AZURE_STORAGE_SAS_TOKEN", &sas), trace],
            &["delete", &volume, "--endpoint", &endpoint],
        ),
        (&[key, trace], &["attach", &url]),
        (&[key, trace], &["serve", &url, "--unix", socket]),
        (
            &[("AZURE_STORAGE_CONNECTION_STRING", &broken), trace],
            &["delete", &volume],
        ),
        (
            &[("AZURE_STORAGE_KEY", half_key), trace],
            &["attach", &volume, "--endpoint", &endpoint],
        ),
        (
            &[("AZURE_STORAGE_CONNECTION_STRING", &connection), trace],
            &["attach", "a.vhd", "-vv"],
        ),
    ];
    for (environment, arguments) in cases {
        let said = node.ctl().with(environment).run(arguments);
        assert_clean("standard output", &said.out);
        // What the caller typed comes back at most without its query.
        assert_clean("standard error", &said.err);
    }
    // Of the attachments that came and went one is left: its record is the
    // only file with the key, and its owner's alone.
    let record = node.record("a");
    let text = std::fs::read_to_string(&record).expect("the record");
    assert!(text.contains(KEY), "the next daemon needs it");
    let mode = std::fs::metadata(&record)
        .expect("stat")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    for file in files(node.dir.path()) {
        if file != record {
            assert_clean(
                "a file",
                &std::fs::read_to_string(&file).unwrap_or_default(),
            );
        }
    }
    node.stop();
    let log = String::from_utf8_lossy(&log.0.lock().expect("lock")).into_owned();
    assert!(log.contains("attach begins"), "the log is there");
    assert_clean("the log", &log);
}

fn files(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).expect("a folder") {
        let entry = entry.expect("an entry");
        let kind = entry.file_type().expect("a type");
        if kind.is_dir() {
            found.extend(files(&entry.path()));
        } else if kind.is_file() {
            found.push(entry.path());
        }
    }
    found
}

/// The daemon's memory holds keys: when it crashes it leaves no core dump,
/// where any other process would.
#[test]
fn a_crashed_daemon_leaves_no_core_dump() {
    if !rustix::process::geteuid().is_root() {
        return; // It does not run as anybody else.
    }
    let node = Node::prepare();
    let crash = |command: &str, ready: &dyn Fn() -> bool| {
        let mut child = Command::new("sh")
            .args(["-c", &format!("ulimit -c unlimited && exec {command}")])
            .current_dir(node.dir.path())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("sh runs");
        eventually("it is up", ready);
        // Unlike SIGQUIT, nobody's background job is started with it ignored.
        node::signal(&child, rustix::process::Signal::ABORT);
        child.wait().expect("wait").core_dumped()
    };
    let up = node.dir.path().join("up");
    let other = format!("sh -c 'touch {} && exec sleep 1000'", up.display());
    if !crash(&other, &|| up.exists()) {
        return; // Nothing dumps core on this machine.
    }
    let daemon = format!(
        "{} --run-dir {}",
        env!("CARGO_BIN_EXE_dyskd"),
        node.run_dir().display()
    );
    assert!(!crash(&daemon, &|| node.ctl().run(&["list"]).code == Some(0)));
}
