//! A store outside the guests: `dysk-emulator` as a process of its own, which
//! can be stopped, killed and started again with its data.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dysk::blob::source::CredentialSource;
use dysk::blob::{Account, Checksum, Conditions, PageBlob, Range};
use dysk::emulator::{DEFAULT_ACCOUNT, DEFAULT_KEY};
use dysk::node::account::open_blob;
use dysk::node::api::{AccountSpec, Format, NewDisk, Secret};
use dysk::node::provision;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// The host as a guest sees it.
pub const HOST: &str = "10.0.2.2";
const DEADLINE: Duration = Duration::from_secs(30);
const PIECE: u64 = 4 << 20;

/// The store. Its data is in files, which outlive the process.
pub struct OutsideStore {
    process: Child,
    port: u16,
    options: Vec<String>,
    folder: TempDir,
    runtime: tokio::runtime::Runtime,
}

impl OutsideStore {
    /// Starts it on a free port.
    pub fn start(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder for the store");
        let options: Vec<String> = options.iter().map(|&text| text.to_owned()).collect();
        let (process, port) = launch(&folder, &options, 0);
        Self {
            process,
            port,
            options,
            folder,
            runtime: tokio::runtime::Runtime::new().expect("a runtime"),
        }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its URL for a guest.
    pub fn endpoint(&self) -> String {
        endpoint(self.port)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).expect("the store runs");
    }

    /// Stops it where it is: connections stay, nothing answers.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// Kills it without warning.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.process.wait().expect("a child of ours");
    }

    /// Starts it again after [`Self::kill`], on its port, with its data.
    pub fn restart(&mut self) {
        (self.process, self.port) = launch(&self.folder, &self.options, self.port);
    }

    /// A request to the emulator's own interface; answers with the body.
    pub fn admin(&self, method: &str, path: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).expect("the store listens");
        write!(
            stream,
            "{method} /-/{path} HTTP/1.1\r\nHost: store\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n{body}",
            body.len()
        )
        .expect("sends");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        assert!(head.starts_with("HTTP/1.1 20"), "{path}: {answer}");
        body.to_owned()
    }

    /// Faults from now on; see docs/emulator.md.
    pub fn faults(&self, rules: &Value) {
        self.admin("PUT", "faults", &rules.to_string());
    }

    pub fn no_faults(&self) {
        self.admin("DELETE", "faults", "");
    }

    pub fn stats(&self) -> Value {
        serde_json::from_str(&self.admin("GET", "stats", "")).expect("JSON")
    }

    /// A blob of the container `dysks`.
    pub fn blob(&self, name: &str) -> PageBlob {
        self.open(name).1
    }

    fn open(&self, name: &str) -> (Account, PageBlob) {
        let spec = AccountSpec {
            name: DEFAULT_ACCOUNT.into(),
            endpoint: format!("http://127.0.0.1:{}/{DEFAULT_ACCOUNT}", self.port),
            credential: Secret(CredentialSource::Key(DEFAULT_KEY.into())),
            ca_file: None,
        };
        let opened = self.runtime.block_on(open_blob(&spec, "dysks", name));
        opened.expect("the account opens")
    }

    /// Makes an empty disk in the container `dysks`.
    pub fn create(&self, name: &str, size: u64) {
        let disk = NewDisk {
            size,
            format: Format::Vhd,
        };
        let (account, blob) = self.open(name);
        let made = self
            .runtime
            .block_on(provision::create(&account, &blob, disk));
        made.expect("a disk is made");
    }

    /// The bytes of a blob from 0 to `end`, as the store has them.
    pub fn bytes(&self, name: &str, end: u64) -> Vec<u8> {
        let blob = self.blob(name);
        let mut bytes = Vec::new();
        for start in (0..end).step_by(usize::try_from(PIECE).expect("small")) {
            let range = Range {
                start,
                end: (start + PIECE).min(end),
            };
            let none = Conditions::default();
            let read = blob.get_range(range, Checksum::Off, &none, DEADLINE);
            for piece in self
                .runtime
                .block_on(read)
                .expect("the store answers")
                .pieces
            {
                bytes.extend_from_slice(&piece);
            }
        }
        bytes
    }
}

impl Drop for OutsideStore {
    fn drop(&mut self) {
        if kill_process(Pid::from_child(&self.process), Signal::KILL).is_ok() {
            self.process.wait().expect("a child of ours");
        }
    }
}

/// The URL of the host's `port` for a guest.
pub fn endpoint(port: u16) -> String {
    format!("http://{HOST}:{port}/{DEFAULT_ACCOUNT}")
}

fn launch(folder: &TempDir, options: &[String], port: u16) -> (Child, u16) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_dysk-emulator"))
        .args(["--listen", &format!("127.0.0.1:{port}"), "--dir"])
        .arg(folder.path())
        .args(options)
        .stdout(Stdio::piped())
        .spawn()
        .expect("dysk-emulator starts");
    let mut line = String::new();
    let stdout = child.stdout.take().expect("stdout is piped");
    BufReader::new(stdout)
        .read_line(&mut line)
        .expect("the emulator says where it listens");
    let port = line
        .trim()
        .strip_prefix("listening on http://127.0.0.1:")
        .and_then(|rest| rest.split('/').next())
        .and_then(|port| port.parse().ok());
    (
        child,
        port.unwrap_or_else(|| panic!("no address: {line:?}")),
    )
}
