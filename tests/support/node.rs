//! A store, a daemon and `dyskctl` for tests: the embedded store, the daemon
//! in this process with a transport that needs no kernel, and the real binary.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dysk::blob::source::CredentialSource;
use dysk::blob::{Conditions, DeleteSnapshots, LeaseId, LeaseState, PageBlob};
use dysk::emulator::{
    Config, DEFAULT_ACCOUNT, DEFAULT_KEY, Effect, Emulator, Operation, Rule, Running, Storage,
};
use dysk::nbd::server::Server;
use dysk::nbd::transmission::Stop;
use dysk::node::account::open_blob;
use dysk::node::api::{AccountSpec, Secret};
use dysk::node::daemon::{self, Daemon};
use dysk::node::transport::{BoxFuture, Device, Export, Parked, Transport, TransportError};
use dysk::volume;
use tempfile::TempDir;
use tokio::sync::{oneshot, watch};

pub const ACCOUNT: &str = DEFAULT_ACCOUNT;
pub const KEY: &str = DEFAULT_KEY;
const DEADLINE: Duration = Duration::from_secs(10);
/// Long enough for a machine that is busy with everything else.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long requests may take to end when a device is taken by force.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// An answer after which nothing is tried again: as if the caller had died
/// there, before or after the request took effect. The first `skip` are spared.
pub fn end_at(operation: Operation, skip: u64, applied: bool) -> Rule {
    let effect = Effect::Status {
        status: 400,
        code: "InjectedEnd".into(),
        retry_after: None,
        applied,
    };
    Rule {
        skip,
        ..Rule::on(operation, effect).times(1)
    }
}

/// Waits until `condition` holds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The embedded store, and a client to look into it.
pub struct Store {
    pub running: Running,
    runtime: tokio::runtime::Runtime,
}

impl Store {
    pub fn start() -> Self {
        let running = Emulator::start(Config {
            listen: "127.0.0.1:0".parse().expect("an address"),
            storage: Storage::Memory,
            ..Config::default()
        });
        Self {
            running: running.expect("the store starts"),
            runtime: tokio::runtime::Runtime::new().expect("a runtime"),
        }
    }

    pub fn endpoint(&self) -> String {
        self.running.url().to_owned()
    }

    pub fn spec(&self) -> AccountSpec {
        AccountSpec {
            name: ACCOUNT.into(),
            endpoint: self.endpoint(),
            credential: Secret(CredentialSource::Key(KEY.into())),
            ca_file: None,
        }
    }

    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    pub fn blob(&self, name: &str) -> PageBlob {
        let opened = self.block_on(open_blob(&self.spec(), "dysks", name));
        opened.expect("the account opens").1
    }

    /// Makes the volume `dysks/NAME`.
    pub fn create(&self, name: &str, size: u64) {
        let (account, blob) = self
            .block_on(open_blob(&self.spec(), "dysks", name))
            .expect("the account opens");
        let disk = dysk::node::api::NewDisk {
            size,
            format: dysk::node::api::Format::Vhd,
        };
        self.block_on(dysk::node::provision::create(&account, &blob, disk))
            .expect("the volume is made");
    }

    pub fn exists(&self, name: &str) -> bool {
        let blob = self.blob(name);
        match self.block_on(blob.properties(&Conditions::default(), DEADLINE)) {
            Ok(_) => true,
            Err(error) if error.is_not_found() => false,
            Err(error) => panic!("{error}"),
        }
    }

    pub fn lease(&self, name: &str) -> LeaseState {
        let blob = self.blob(name);
        let seen = self.block_on(blob.properties(&Conditions::default(), DEADLINE));
        seen.expect("the blob is there").lease_state
    }

    /// Takes the lease of `name` as another node would.
    pub fn hold_lease(&self, name: &str) -> LeaseId {
        let (blob, id) = (self.blob(name), LeaseId::random());
        self.block_on(blob.acquire_lease(&id, Some(60), &Conditions::default(), DEADLINE))
            .expect("the lease is free");
        id
    }

    /// Puts a block blob, which this product has no request for.
    pub fn put_block_blob(&self, name: &str) {
        use std::io::{Read, Write};
        let date = jiff::fmt::rfc2822::DateTimePrinter::new()
            .timestamp_to_rfc9110_string(&jiff::Timestamp::now())
            .expect("a date");
        let headers =
            format!("x-ms-blob-type:BlockBlob\nx-ms-date:{date}\nx-ms-version:2021-08-06\n");
        let resource = format!("/{ACCOUNT}/dysks/{name}");
        let text = format!("PUT\n\n\n5\n\n\n\n\n\n\n\n\n{headers}/{ACCOUNT}{resource}");
        let key = dysk::blob::SharedKey::from_base64(KEY).expect("a key");
        let signature = key.sign(&text);
        let address = self.running.address();
        let mut stream = std::net::TcpStream::connect(address).expect("connects");
        let headers = headers.replace('\n', "\r\n");
        write!(
            stream,
            "PUT {resource} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 5\r\n\
             Connection: close\r\n{headers}Authorization: SharedKey {ACCOUNT}:{signature}\r\n\r\nhello"
        )
        .expect("sends");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    }

    pub fn delete(&self, name: &str) {
        let blob = self.blob(name);
        self.block_on(volume::delete(&blob, DeleteSnapshots::Include, DEADLINE))
            .expect("the volume is deleted");
    }
}

/// What [`SocketTransport`] does when it is asked.
#[derive(Default)]
pub struct Behaviour {
    /// Refuses every check with this.
    pub unable: Option<String>,
    /// Fails every attach with this.
    pub broken: Option<String>,
    /// Refuses detaches that are not forced.
    pub in_use: Option<String>,
    /// The one device of which that is so, if not of all.
    pub in_use_alone: Option<String>,
    /// Devices of an earlier daemon: id and path.
    pub left: BTreeMap<String, PathBuf>,
}

/// A transport for tests alone: a "device" is a UNIX socket that speaks NBD.
pub struct SocketTransport {
    dir: PathBuf,
    pub behaviour: Arc<Mutex<Behaviour>>,
    /// While true, attaches wait.
    pub hold: watch::Sender<bool>,
    /// While true, detaches that are not forced wait.
    pub hold_detach: watch::Sender<bool>,
    count: Mutex<u32>,
    stops: Mutex<BTreeMap<String, watch::Sender<Stop>>>,
    /// What was asked of it, in order.
    pub log: Arc<Mutex<Vec<String>>>,
}

impl SocketTransport {
    fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            behaviour: Arc::default(),
            hold: watch::Sender::new(false),
            hold_detach: watch::Sender::new(false),
            count: Mutex::new(0),
            stops: Mutex::default(),
            log: Arc::default(),
        }
    }

    pub fn set(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.behaviour.lock().expect("lock"));
    }

    /// The device of `name` goes without the daemon's doing.
    pub fn take_away(&self, name: &str) {
        let stops = self.stops.lock().expect("lock");
        let stop = stops.get(name).expect("it is attached");
        stop.send_replace(Stop::Close);
    }

    /// Exports the disk on a socket at `path`.
    fn serve(&self, export: Export, path: PathBuf) -> Arc<dyn Device> {
        let server = Server::bind_unix(&path).expect("the socket binds");
        let (stop, stopped) = watch::channel(Stop::Run);
        let mut stops = self.stops.lock().expect("lock");
        stops.insert(export.name.clone(), stop.clone());
        drop(stops);
        let ended = watch::Sender::new(false);
        let tell = ended.clone();
        let given_up = watch::Sender::new(false);
        let mut giving_up = given_up.subscribe();
        tokio::spawn(async move {
            tokio::select! {
                () = server.run(export.volume, "", stopped) => {}
                Ok(_) = giving_up.wait_for(|given_up| *given_up) => {}
            }
            tell.send_replace(true);
        });
        Arc::new(SocketDevice {
            path,
            name: export.name,
            stop: Some(stop),
            ended,
            given_up,
            behaviour: self.behaviour.clone(),
            hold_detach: self.hold_detach.clone(),
            log: self.log.clone(),
        })
    }

    fn next_path(&self) -> PathBuf {
        let mut count = self.count.lock().expect("lock");
        let path = self.dir.join(format!("disk{count}"));
        *count += 1;
        path
    }
}

async fn released(gate: &watch::Sender<bool>) {
    let mut gate = gate.subscribe();
    gate.wait_for(|held| !held).await.expect("the gate stays");
}

impl Transport for SocketTransport {
    fn check(&self) -> BoxFuture<'_, Result<(), TransportError>> {
        let unable = self.behaviour.lock().expect("lock").unable.clone();
        Box::pin(async { unable.map_or(Ok(()), |text| Err(TransportError::Unable(text))) })
    }

    fn attach(&self, export: Export) -> BoxFuture<'_, Result<Arc<dyn Device>, TransportError>> {
        Box::pin(async move {
            self.log
                .lock()
                .expect("lock")
                .push(format!("attach {}", export.name));
            released(&self.hold).await;
            if let Some(text) = self.behaviour.lock().expect("lock").broken.clone() {
                return Err(TransportError::Failed(text));
            }
            let path = self.next_path();
            Ok(self.serve(export, path))
        })
    }

    fn resume(
        &self,
        export: Export,
        parked: Vec<Parked>,
    ) -> BoxFuture<'_, Result<Option<Arc<dyn Device>>, TransportError>> {
        assert!(parked.is_empty(), "nothing is handed over here");
        Box::pin(async move {
            let entry = format!("resume {}", export.name);
            self.log.lock().expect("lock").push(entry);
            let left = self.behaviour.lock().expect("lock").left.remove(&export.id);
            Ok(left.map(|path| self.serve(export, path)))
        })
    }

    fn find<'a>(
        &'a self,
        id: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<dyn Device>>, TransportError>> {
        Box::pin(async move {
            let left = self.behaviour.lock().expect("lock").left.get(id).cloned();
            Ok(left.map(|path| {
                Arc::new(SocketDevice {
                    path,
                    name: id.to_owned(),
                    stop: None,
                    ended: watch::Sender::new(false),
                    given_up: watch::Sender::new(false),
                    behaviour: self.behaviour.clone(),
                    hold_detach: self.hold_detach.clone(),
                    log: self.log.clone(),
                }) as Arc<dyn Device>
            }))
        })
    }
}

struct SocketDevice {
    path: PathBuf,
    name: String,
    stop: Option<watch::Sender<Stop>>,
    ended: watch::Sender<bool>,
    /// Raised to leave requests behind that do not end.
    given_up: watch::Sender<bool>,
    behaviour: Arc<Mutex<Behaviour>>,
    hold_detach: watch::Sender<bool>,
    log: Arc<Mutex<Vec<String>>>,
}

impl SocketDevice {
    /// Where it is in use.
    fn place_in_use(&self) -> Option<String> {
        let behaviour = self.behaviour.lock().expect("lock");
        let another = |alone: &String| *alone != self.name;
        if behaviour.in_use_alone.as_ref().is_some_and(another) {
            return None;
        }
        behaviour.in_use.clone()
    }
}

impl Device for SocketDevice {
    fn path(&self) -> &Path {
        &self.path
    }

    fn detach(&self, force: bool) -> BoxFuture<'_, Result<(), TransportError>> {
        Box::pin(async move {
            let entry = format!("detach {} force={force}", self.name);
            self.log.lock().expect("lock").push(entry);
            if !force {
                released(&self.hold_detach).await;
                if let Some(place) = self.place_in_use() {
                    return Err(TransportError::InUse {
                        device: self.path.display().to_string(),
                        places: vec![place],
                    });
                }
            }
            match &self.stop {
                Some(stop) => {
                    stop.send_replace(Stop::Close);
                    let ends = tokio::time::timeout(END_PATIENCE, self.gone());
                    if force && ends.await.is_err() {
                        self.given_up.send_replace(true);
                    }
                    self.gone().await;
                }
                None => {
                    self.behaviour.lock().expect("lock").left.remove(&self.name);
                }
            }
            Ok(())
        })
    }

    fn resize(&self, size: u64) -> BoxFuture<'_, Result<(), TransportError>> {
        let entry = format!("resize {} to {size}", self.name);
        self.log.lock().expect("lock").push(entry);
        Box::pin(std::future::ready(Ok(())))
    }

    fn park(&self) -> BoxFuture<'_, Vec<Parked>> {
        unreachable!("sockets of clients are not handed over here")
    }

    fn go_on(&self) {
        unreachable!("nothing is parked here")
    }

    fn gone(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            let mut ended = self.ended.subscribe();
            ended.wait_for(|ended| *ended).await.expect("we hold it");
        })
    }
}

/// A daemon in this process, with folders of its own.
pub struct Node {
    pub dir: TempDir,
    pub transport: Arc<SocketTransport>,
    pub keep_attached: bool,
    /// Where it is to answer Prometheus, and where it does.
    pub metrics: Option<SocketAddr>,
    pub scraped: Option<SocketAddr>,
    running: Option<(oneshot::Sender<()>, std::thread::JoinHandle<()>)>,
}

impl Node {
    /// Folders and transport; the daemon is started by [`Node::run`].
    pub fn prepare() -> Self {
        let dir = tempfile::tempdir().expect("temp dir");
        let disks = dir.path().join("disks");
        std::fs::create_dir(&disks).expect("disks");
        Self {
            transport: Arc::new(SocketTransport::new(disks)),
            keep_attached: false,
            dir,
            metrics: None,
            scraped: None,
            running: None,
        }
    }

    pub fn start() -> Self {
        let mut node = Self::prepare();
        node.run();
        node
    }

    pub fn config(&self) -> daemon::Config {
        daemon::Config {
            run_dir: self.run_dir(),
            link_dir: self.link("").to_owned(),
            keep_attached: self.keep_attached,
            metrics: self.metrics,
            ..daemon::Config::default()
        }
    }

    pub fn run(&mut self) {
        let (config, transport) = (self.config(), self.transport.clone());
        let (stop, stopped) = oneshot::channel();
        let (ready, started) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async {
                let daemon = Daemon::start(config, transport)
                    .await
                    .expect("the daemon starts");
                ready.send(daemon.metrics()).expect("the test waits");
                // A dropped sender means a test that failed: stop too.
                daemon.run(async { drop(stopped.await) }).await;
            });
            runtime.shutdown_background();
        });
        self.scraped = started.recv().expect("the daemon starts");
        self.running = Some((stop, thread));
    }

    /// Stops the daemon cleanly and waits for it.
    pub fn stop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            drop(stop);
            thread.join().expect("the daemon ends well");
        }
    }

    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    pub fn socket(&self) -> PathBuf {
        self.run_dir().join("dyskd.sock")
    }

    pub fn link(&self, name: &str) -> PathBuf {
        self.dir.path().join("links").join(name)
    }

    pub fn record(&self, name: &str) -> PathBuf {
        self.run_dir().join(format!("attachments/{name}.json"))
    }

    /// Nothing of any attachment is left.
    pub fn assert_empty(&self) {
        let entries = |dir: PathBuf| match std::fs::read_dir(&dir) {
            Ok(entries) => entries.map(|e| e.expect("entry").path()).collect(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => panic!("{}: {error}", dir.display()),
        };
        for dir in [
            self.run_dir().join("attachments"),
            self.dir.path().join("links"),
            self.dir.path().join("disks"),
        ] {
            assert_eq!(entries(dir), Vec::<PathBuf>::new());
        }
    }

    pub fn ctl(&self) -> Ctl {
        Ctl::new(&self.socket())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Gates that a failing test left shut must not hold the daemon.
        self.transport.hold.send_replace(false);
        self.transport.hold_detach.send_replace(false);
        if let Some((stop, thread)) = self.running.take() {
            drop(stop);
            drop(thread.join());
        }
    }
}

/// `dyskctl` with an environment of its own.
#[derive(Clone)]
pub struct Ctl {
    socket: PathBuf,
    environment: Vec<(String, String)>,
}

impl Ctl {
    /// With the store's key in the environment.
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            environment: vec![("AZURE_STORAGE_KEY".into(), KEY.into())],
        }
    }

    /// With these variables and no others of ours.
    pub fn with(&self, environment: &[(&str, &str)]) -> Self {
        Self {
            socket: self.socket.clone(),
            environment: environment
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
        }
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dyskctl"));
        for name in [
            "AZURE_STORAGE_ACCOUNT",
            "AZURE_STORAGE_KEY",
            "AZURE_STORAGE_SAS_TOKEN",
            "AZURE_STORAGE_CONNECTION_STRING",
            "RUST_LOG",
        ] {
            command.env_remove(name);
        }
        command
            .args(arguments)
            .arg("--socket")
            .arg(&self.socket)
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Said {
        let output = self.command(arguments).output().expect("dyskctl runs");
        Said::of(&output, arguments)
    }

    pub fn spawn(&self, arguments: &[&str]) -> Child {
        self.command(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("dyskctl runs")
    }
}

/// What a command said.
#[derive(Debug, PartialEq, Eq)]
pub struct Said {
    pub command: String,
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Said {
    pub fn of(output: &Output, arguments: &[&str]) -> Self {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("utf-8");
        Self {
            command: arguments.join(" "),
            code: output.status.code(),
            out: text(&output.stdout),
            err: text(&output.stderr),
        }
    }

    /// It worked and said exactly this.
    #[track_caller]
    pub fn says(&self, out: &str) {
        assert_eq!(
            (self.code, self.out.as_str(), self.err.as_str()),
            (Some(0), out, ""),
            "{}",
            self.command
        );
    }

    /// It worked; what it said.
    #[track_caller]
    pub fn ok(&self) -> &str {
        assert_eq!(
            (self.code, self.err.as_str()),
            (Some(0), ""),
            "{}",
            self.command
        );
        &self.out
    }

    /// It failed with exit code 1 and exactly this line.
    #[track_caller]
    pub fn fails(&self, line: &str) {
        self.fails_with(1, line);
    }

    /// It failed with this exit code and exactly this line.
    #[track_caller]
    pub fn fails_with(&self, code: i32, line: &str) {
        assert_eq!(
            (self.code, self.out.as_str(), self.err.as_str()),
            (Some(code), "", format!("dyskctl: {line}\n").as_str()),
            "{}",
            self.command
        );
    }
}

/// Sends `signal` to a child.
pub fn signal(child: &Child, signal: rustix::process::Signal) {
    let pid = i32::try_from(child.id()).expect("a pid");
    let pid = rustix::process::Pid::from_raw(pid).expect("not 0");
    rustix::process::kill_process(pid, signal).expect("the child lives");
}
