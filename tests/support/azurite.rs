//! Starts and stops real Azurite (npm), and makes certificates for it.
//!
//! Azurite is installed once into `build/azurite`, as `tests/azurite` pins it.

#![allow(dead_code, reason = "every test file uses another part of it")]

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// The emulators' account.
pub const ACCOUNT: &str = "devstoreaccount1";
/// Its published key.
pub const KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// How long installing or starting may take before a test fails; not a
/// measurement, only an end to waiting.
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs until it is dropped, also when the test panics or is killed.
pub struct Azurite {
    child: Child,
    _dir: tempfile::TempDir,
    /// `http(s)://127.0.0.1:PORT/devstoreaccount1`.
    pub endpoint: String,
}

/// A certificate authority and a certificate for 127.0.0.1 signed by it.
pub struct Certificates {
    dir: tempfile::TempDir,
}

impl Certificates {
    /// Makes them with the openssl command.
    pub fn make() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let openssl = |arguments: &str| {
            let output = Command::new("openssl")
                .args(arguments.split(' '))
                .current_dir(dir.path())
                .output()
                .expect("openssl runs (Debian package openssl)");
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "openssl {arguments}: {text}");
        };
        let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
        openssl(&format!(
            "req -x509 {key} -keyout ca.key -out ca.pem -subj /CN=dysk-test-authority"
        ));
        openssl(&format!(
            "req -x509 {key} -keyout server.key -out server.pem -subj /CN=localhost \
             -CA ca.pem -CAkey ca.key -addext basicConstraints=critical,CA:FALSE \
             -addext subjectAltName=IP:127.0.0.1,DNS:localhost"
        ));
        Self { dir }
    }

    /// What a client has to trust.
    pub fn authority(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// The server's certificate.
    pub fn certificate(&self) -> PathBuf {
        self.dir.path().join("server.pem")
    }

    /// The server's key.
    pub fn key(&self) -> PathBuf {
        self.dir.path().join("server.key")
    }
}

impl Azurite {
    /// Starts it on a free port of 127.0.0.1, everything in memory.
    pub fn start(certificates: Option<&Certificates>) -> Self {
        let program = ensure();
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut arguments = vec![
            "--blobHost=127.0.0.1".into(),
            "--blobPort=0".into(),
            "--inMemoryPersistence".into(),
            "--disableTelemetry".into(),
            "--silent".into(),
        ];
        if let Some(certificates) = certificates {
            arguments.push(format!("--cert={}", certificates.certificate().display()));
            arguments.push(format!("--key={}", certificates.key().display()));
        }
        // The shell outlives neither its stdin, which is our end of a pipe,
        // nor lets Azurite do so.
        let mut child = Command::new("sh")
            .arg("-c")
            .arg("node \"$@\" </dev/null & pid=$!; read -r _; kill \"$pid\"; wait \"$pid\"")
            .arg("azurite")
            .arg(program)
            .args(arguments)
            .current_dir(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("sh runs");
        let stdout = child.stdout.take().expect("a piped stdout");
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some(address) = line.split("successfully listens on ").nth(1) {
                    // Nobody listens any more once the first address is known.
                    let _later_ones = sender.send(address.trim().to_owned());
                }
            }
        });
        let address = receiver.recv_timeout(PATIENCE);
        let mut azurite = Self {
            child,
            _dir: dir,
            endpoint: String::new(),
        };
        let address = address.expect("azurite says where it listens");
        azurite.endpoint = format!("{address}/{ACCOUNT}");
        azurite
    }
}

impl Drop for Azurite {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        if let Err(error) = self.child.wait() {
            eprintln!("azurite: {error}");
        }
    }
}

/// The script to run with node; installs it first where that is still to do.
fn ensure() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let pinned = root.join("tests/azurite");
    let place = root.join("build/azurite");
    let program = place.join("node_modules/azurite/dist/src/blob/main.js");
    let stamp = place.join("installed");

    std::fs::create_dir_all(&place).expect("build/azurite");
    let lock = File::create(place.join("lock")).expect("build/azurite/lock");
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).expect("the file lock");
    let wanted = std::fs::read_to_string(pinned.join("package-lock.json")).expect("the lock file");
    if std::fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        return program;
    }
    for file in ["package.json", "package-lock.json"] {
        std::fs::copy(pinned.join(file), place.join(file)).expect(file);
    }
    let output = Command::new("npm")
        .args(["ci", "--no-audit", "--no-fund", "--prefix"])
        .arg(&place)
        .output()
        .expect("npm runs (Debian packages nodejs and npm)");
    assert!(
        output.status.success(),
        "npm ci of azurite failed:\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(program.is_file(), "{} is missing", program.display());
    std::fs::write(&stamp, wanted).expect("build/azurite/installed");
    program
}
