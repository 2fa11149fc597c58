//! Keys that change under a volume in use: I/O goes on, or waits loudly for
//! what a person has to mend; nothing fails, the lease stays, no key shows.

#[path = "support/node.rs"]
mod node;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use dysk::blob::source::CredentialSource;
use dysk::blob::{Credential, LeaseId, SharedKey};
use dysk::device::BlockDevice;
use dysk::emulator::{Operation, SettingsChange};
use dysk::node::account::open_blob;
use dysk::node::api::{AccountSpec, Secret};
use dysk::volume::{OpenOptions, Volume};
use node::{ACCOUNT, KEY, Node, Said, Store, eventually};
use tokio::task::JoinSet;
use tracing_subscriber::fmt::MakeWriter;

/// Keys in the order in which they come into use; `KEY` is the first.
const KEYS: [&str; 4] = [
    "c2Vjb25kIGtleSBvZiB0aGUgYWNjb3VudCwgc2VjcmV0MjI=",
    "dGhpcmQga2V5IG9mIHRoZSBhY2NvdW50LCBzZWNyZXQzMzM=",
    "Zm91cnRoIGtleSBvZiB0aGUgYWNjb3VudCwgc2VjcmV0NDQ=",
    "YSBrZXkgb2Ygc29tZSBvdGhlciBhY2NvdW50LCBzZWNyZXQ=",
];

/// Everything this process logs.
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

/// The log of all tests here.
fn log() -> Log {
    static LOG: OnceLock<Log> = OnceLock::new();
    let start = || {
        let log = Log::default();
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .with_writer(log.clone())
            .with_ansi(false)
            .init();
        log
    };
    LOG.get_or_init(start).clone()
}

impl Log {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("lock")).into_owned()
    }
}

#[track_caller]
fn assert_clean(text: &str) {
    for key in KEYS.iter().chain(&[KEY]) {
        assert!(!text.contains(&key[..20]), "a key shows: {text}");
    }
}

fn rotate(store: &Store, first: &str, second: &str) {
    let change = SettingsChange {
        key: Some(first.into()),
        second_key: Some(second.into()),
        ..SettingsChange::default()
    };
    store.running.change(&change).expect("keys");
}

fn refusals(store: &Store) -> u64 {
    let errors = store.running.stats().errors;
    let refused = errors.iter().filter(|(code, _)| code.starts_with("403"));
    refused.map(|(_, count)| count).sum()
}

/// A secret as Kubernetes mounts it: a change swaps one symbolic link.
struct MountedSecret(PathBuf);

impl MountedSecret {
    fn new(dir: &Path, files: &[(&str, &str)]) -> Self {
        fs::create_dir(dir).expect("made");
        let secret = Self(dir.to_owned());
        secret.set(files);
        for name in ["accountname", "accountkey", "accountkey2"] {
            symlink(Path::new("..data").join(name), dir.join(name)).expect("linked");
        }
        secret
    }

    fn set(&self, files: &[(&str, &str)]) {
        let count = fs::read_dir(&self.0).expect("listed").count();
        let version = self.0.join(format!("..version{count}"));
        fs::create_dir(&version).expect("made");
        for (name, text) in [("accountname", ACCOUNT)].iter().chain(files) {
            fs::write(version.join(name), text).expect("written");
        }
        let draft = self.0.join("..data_tmp");
        symlink(version.file_name().expect("a name"), &draft).expect("linked");
        fs::rename(&draft, self.0.join("..data")).expect("swapped");
    }
}

/// Writers that go on until told; an error ends the test.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    writers: JoinSet<()>,
}

impl Load {
    fn start(store: &Store, volume: &Arc<Volume>) -> Self {
        let (stop, done) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let mut writers = JoinSet::new();
        store.block_on(async {
            for writer in 0..16_u64 {
                let (volume, stop, done) = (volume.clone(), stop.clone(), done.clone());
                writers.spawn(async move {
                    while !stop.load(Ordering::Relaxed) {
                        let data = Bytes::from_static(&[5; 4096]);
                        let wrote = volume.write(writer * 4096, data, false).await;
                        wrote.expect("no error while keys change");
                        done.fetch_add(1, Ordering::Relaxed);
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                });
            }
        });
        Self {
            stop,
            done,
            writers,
        }
    }

    fn goes_on(&self) {
        let then = self.done.load(Ordering::Relaxed);
        eventually("i/o goes on", || {
            self.done.load(Ordering::Relaxed) > then + 64
        });
    }

    fn stop(mut self, store: &Store) {
        self.stop.store(true, Ordering::Relaxed);
        store.block_on(async {
            while let Some(ended) = self.writers.join_next().await {
                ended.expect("a writer failed");
            }
        });
    }
}

fn open(store: &Store, source: CredentialSource, name: &str) -> Arc<Volume> {
    let spec = AccountSpec {
        credential: Secret(source),
        ..store.spec()
    };
    store.block_on(async {
        let (_, blob) = open_blob(&spec, "dysks", name).await.expect("opens");
        let opened = Volume::open(blob, OpenOptions::new(LeaseId::random())).await;
        opened.expect("the volume opens")
    })
}

#[test]
fn keys_rotate_under_load_and_a_wrong_secret_blocks_until_it_is_replaced() {
    let log = log();
    let store = Store::start();
    store.create("a.vhd", 1 << 20);
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("secret");
    let secret = MountedSecret::new(&path, &[("accountkey", KEY), ("accountkey2", KEYS[0])]);
    rotate(&store, KEY, KEYS[0]);
    let volume = open(&store, CredentialSource::SecretDir(path), "a.vhd");
    let load = Load::start(&store, &volume);
    load.goes_on();
    assert_eq!(refusals(&store), 0);

    // The first key goes, the second one is good: nobody waits.
    rotate(&store, KEYS[1], KEYS[0]);
    load.goes_on();
    assert_eq!(volume.status().blocked, None);
    // The keeper signs with it too: a lease that ran out is renewed.
    assert!(store.running.expire_lease("dysks", "a.vhd"));
    load.goes_on();
    assert_eq!(volume.status().fenced, None);

    // The new secret is there before both old keys are gone: nobody waits.
    secret.set(&[("accountkey", KEYS[1])]);
    rotate(&store, KEYS[1], "");
    load.goes_on();
    assert_eq!(volume.status().blocked, None);

    // No key is good any more: i/o waits, and says so.
    rotate(&store, KEYS[2], "");
    eventually("it is blocked", || volume.status().blocked.is_some());
    let told = volume.status().blocked.expect("blocked");
    for words in ["AuthenticationFailed", "rotated", "(since "] {
        assert!(told.contains(words), "{told}");
    }
    assert_clean(&told);
    assert!(log.text().contains("i/o is blocked: "), "not in the log");

    // A wrong one does not help, and is tried seldom, by 16 callers and the keeper together.
    secret.set(&[("accountkey", KEYS[3])]);
    let then = (refusals(&store), std::time::Instant::now());
    eventually("the wrong one is tried", || refusals(&store) >= then.0 + 3);
    let seconds = then.1.elapsed().as_secs_f64() + 1.0;
    let asked = (refusals(&store) - then.0) as f64;
    assert!(asked <= 6.0 * seconds, "{asked} refusals in {seconds} s");
    assert!(volume.status().blocked.is_some());
    let done = load.done.load(Ordering::Relaxed);

    // A secret of another account is not even tried.
    secret.set(&[("accountkey", KEYS[2]), ("accountname", "other")]);
    eventually("it is named", || {
        volume
            .status()
            .blocked
            .is_some_and(|told| told.contains("those of account other"))
    });
    assert_eq!(load.done.load(Ordering::Relaxed), done, "i/o went on");

    // The lease ran out meanwhile; nobody took it, so it is renewed.
    store.running.expire_lease("dysks", "a.vhd");
    secret.set(&[("accountkey", KEYS[2])]);
    load.goes_on();
    let status = volume.status();
    assert_eq!((status.blocked, status.fenced), (None, None));
    load.stop(&store);
    store
        .block_on(volume.close())
        .expect("the lease is released");
    assert_clean(&log.text());
}

/// The same rotation without a second key and without a source to ask.
#[test]
fn without_another_key_or_a_source_the_same_rotation_blocks() {
    log();
    let store = Store::start();
    store.create("a.vhd", 1 << 20);
    rotate(&store, KEY, KEYS[0]);
    let volume = open(&store, CredentialSource::Key(KEY.into()), "a.vhd");
    let load = Load::start(&store, &volume);
    load.goes_on();
    rotate(&store, KEYS[1], KEYS[0]);
    eventually("it is blocked", || volume.status().blocked.is_some());
    let key = SharedKey::from_base64(KEYS[0]).expect("a key");
    volume.account().set_credential(Credential::SharedKey(key));
    load.goes_on();
    load.stop(&store);
    store
        .block_on(volume.close())
        .expect("the lease is released");
}

/// fio on an NBD socket.
fn fio(socket: &Path, seconds: u32) -> Child {
    Command::new("fio")
        .args([
            "--name=keys",
            "--ioengine=nbd",
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=8",
            "--size=1M",
            "--time_based",
        ])
        .arg(format!("--runtime={seconds}"))
        .arg(format!("--uri=nbd+unix:///?socket={}", socket.display()))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("fio runs")
}

#[track_caller]
fn ends_well(child: Child) {
    let output = child.wait_with_output().expect("it ends");
    let said = Said::of(&output, &["fio"]);
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
}

#[test]
fn a_running_attachment_is_given_another_credential() {
    let log = log();
    let (store, node) = (Store::start(), Node::start());
    store.create("a.vhd", 1 << 20);
    let (volume, endpoint) = (format!("{ACCOUNT}/dysks/a.vhd"), store.endpoint());
    let ctl = node.ctl();
    let device = ctl.run(&["attach", &volume, "--endpoint", &endpoint]);
    let device = PathBuf::from(device.ok().trim());
    let load = fio(&device, 4);
    eventually("i/o goes", || {
        store.running.stats().requests(Operation::PutPage) > 50
    });

    rotate(&store, KEYS[0], "");
    eventually("status says so", || {
        let said = ctl.run(&["status", "a"]).ok().to_owned();
        assert_clean(&said);
        said.contains("it may have been rotated") && said.contains("(since ")
    });

    let with = |key| ctl.with(&[("AZURE_STORAGE_KEY", key)]);
    let refused = with(KEYS[3]).run(&["credential", "a"]);
    assert_eq!(refused.code, Some(1));
    assert!(
        refused.err.contains("the credential of a stays as it was")
            && refused.err.contains("not one of account"),
        "{}",
        refused.err
    );
    assert_clean(&refused.err);
    let record = || fs::read_to_string(node.record("a")).expect("the record");
    assert!(record().contains(KEY));
    ctl.run(&["credential", "nobody"])
        .fails("nothing is attached as nobody: see `dyskctl list`");

    with(KEYS[0]).run(&["credential", "a"]).says("");
    ends_well(load);
    assert!(record().contains(KEYS[0]) && !record().contains(KEY));
    let mode = fs::metadata(node.record("a")).expect("the record");
    assert_eq!(mode.permissions().mode() & 0o777, 0o600);
    let said = ctl.run(&["status", "a"]).ok().to_owned();
    assert!(said.contains("blocked"), "{said}");
    assert!(!said.contains("(since "), "{said}");

    // A file, too: from then on it is read again by itself.
    let file = node.dir.path().join("key");
    fs::write(&file, KEYS[0]).expect("written");
    let path = file.to_str().expect("utf-8");
    ctl.run(&["credential", "a", "--account-key-file", path])
        .says("");
    assert!(!record().contains(KEYS[0]), "a path, no key");
    let load = fio(&device, 3);
    fs::write(&file, KEYS[1]).expect("written");
    rotate(&store, KEYS[1], "");
    ends_well(load);
    ctl.run(&["detach", "a"]).ok();
    assert_clean(&log.text());
}

#[test]
fn an_export_reads_its_key_file_again() {
    let (store, node) = (Store::start(), Node::prepare());
    store.create("a.vhd", 1 << 20);
    let file = node.dir.path().join("key");
    fs::write(&file, KEY).expect("written");
    let (volume, endpoint) = (format!("{ACCOUNT}/dysks/a.vhd"), store.endpoint());
    let socket = node.dir.path().join("a.sock");
    let (key, unix) = (
        file.to_str().expect("utf-8"),
        socket.to_str().expect("utf-8"),
    );
    let mut serve = node.ctl().spawn(&[
        "serve",
        &volume,
        "--endpoint",
        &endpoint,
        "--account-key-file",
        key,
        "--unix",
        unix,
    ]);
    eventually("it serves", || socket.exists());
    let load = fio(&socket, 5);
    eventually("i/o goes", || {
        store.running.stats().requests(Operation::PutPage) > 50
    });
    // First the store: i/o waits until the file follows.
    rotate(&store, KEYS[0], "");
    eventually("it was refused", || refusals(&store) > 0);
    fs::write(&file, KEYS[0]).expect("written");
    ends_well(load);
    node::signal(&serve, rustix::process::Signal::TERM);
    assert!(serve.wait().expect("it ends").success());
    let mut said = String::new();
    std::io::Read::read_to_string(&mut serve.stderr.take().expect("piped"), &mut said)
        .expect("utf-8");
    assert!(
        said.contains("i/o is blocked") || refusals(&store) < 3,
        "{said}"
    );
    assert_clean(&said);
}
