//! The processes of a bench: the store, what serves a disk from it, peers, and
//! fio; and the CPU time that each took.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dysk::emulator::{DEFAULT_KEY, StatsReport};
use serde_json::Value;

use crate::rows::{Load, Store, Who};
use crate::s3backer;

/// Bytes of each disk.
pub const SIZE: u64 = 256 << 20;
/// Of the one that a stream fills.
const STREAM: u64 = 1 << 30;
/// Seconds before it counts; where the store has caps, whoever serves learns
/// them meanwhile.
const RAMP: u64 = 1;
const RAMP_CAPPED: u64 = 5;

/// What one would script.
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/support/page_blob.py");

/// Where `tests/setup` has put Azure's SDK.
fn packages() -> PathBuf {
    let lib = Path::new(env!("CARGO_MANIFEST_DIR")).join("build/venv/lib");
    let python = std::fs::read_dir(&lib).expect("tests/setup made build/venv");
    let python = python.flatten().next().expect("a Python");
    python.path().join("site-packages")
}

/// A process that ends with the bench.
pub struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        if rustix::process::kill_process(pid, rustix::process::Signal::TERM).is_ok() {
            self.0.wait().expect("a child of ours can be waited for");
        }
    }
}

impl Running {
    /// User and system time so far.
    fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id()));
        let stat = stat.expect("it runs");
        let fields: Vec<&str> = stat
            .rsplit(") ")
            .next()
            .expect("a stat")
            .split_whitespace()
            .collect();
        let ticks = |at: usize| fields[at - 3].parse::<u64>().expect("ticks");
        let hertz = rustix::param::clock_ticks_per_second();
        Duration::from_millis((ticks(14) + ticks(15)) * 1000 / hertz)
    }
}

/// nbdkit in the foreground on `socket`; the plugin is to be added.
fn nbdkit(socket: &Path) -> Command {
    let mut command = Command::new("nbdkit");
    command.args(["-f", "-U"]).arg(socket);
    command
}

/// What fio says in the end.
fn report_of(fio: Child) -> Value {
    let output = fio.wait_with_output().expect("a child of ours ends");
    assert!(output.status.success(), "{output:?}");
    // The engine may say a word of its own before the report.
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.find('{').map_or("", |at| &text[at..]);
    serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// What one run found.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    pub iops: f64,
    pub mean_ms: f64,
    /// CPU time a request, in microseconds: of the server (or raw client),
    pub cpu_us: f64,
    /// of the store,
    pub store_us: f64,
    /// and of fio.
    pub fio_us: f64,
    /// Share of the store's requests that it refused.
    pub refused: f64,
    /// Put Pages for each GiB that fio wrote.
    pub puts: f64,
}

/// What the store has counted.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    all: u64,
    refused: u64,
    gets: u64,
    puts: u64,
}

/// A store, and everybody who serves from it or beside it.
pub struct Servers {
    // Ended before the store, whose lease they give back.
    served: Vec<(Who, Running)>,
    /// The store of s3backer.
    s3: Option<Running>,
    store: Running,
    address: SocketAddr,
    tls: bool,
    ramp: u64,
    folder: PathBuf,
}

impl Servers {
    /// The store, with `who` serving from it on sockets in `folder`, which is
    /// in memory: read-write caches stage there.
    pub fn start(folder: &Path, store: &Store, who: &[Who]) -> Self {
        std::fs::create_dir_all(folder).expect("a folder");
        let (running, address) = emulator(store, folder);
        let mut servers = Self {
            store: running,
            address,
            tls: store.tls,
            ramp: if store.caps == (0, 0) {
                RAMP
            } else {
                RAMP_CAPPED
            },
            folder: folder.to_owned(),
            served: Vec::new(),
            s3: None,
        };
        for who in who {
            servers.serve(*who, store);
        }
        for (who, _) in &servers.served {
            appears(&servers.socket(*who));
        }
        // What was never written is nobody's work: all others are filled.
        for who in who {
            match who {
                Who::Raw => servers.fill_raw(),
                // s3backer asks its store for what was never written, too.
                Who::Empty | Who::Null | Who::Stream | Who::S3backer => {}
                who => {
                    report_of(servers.start_fio(*who, &["--rw=write", "--bs=1M", "--iodepth=8"]));
                }
            }
        }
        servers
    }

    /// The store's address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    fn serve(&mut self, who: Who, store: &Store) {
        let socket = self.socket(who);
        let command = match who {
            Who::Raw => return self.create("raw"),
            Who::Memory | Who::Null => {
                let plugin = if who == Who::Memory { "memory" } else { "null" };
                let mut command = nbdkit(&socket);
                command.args([plugin, &SIZE.to_string()]);
                command
            }
            Who::Delay => {
                let mut command = nbdkit(&socket);
                // A thread for each request that waits.
                command.args(["-t", "128", "--filter=delay", "memory"]);
                command.arg(SIZE.to_string());
                command.arg(format!("rdelay={}ms", store.latency));
                command.arg(format!("wdelay={}ms", store.latency));
                command
            }
            Who::Qemu => {
                let image = self.folder.join("image");
                let file = std::fs::File::create(&image).expect("a file in memory");
                file.set_len(SIZE).expect("room");
                let mut command = Command::new("qemu-nbd");
                command.args(["-f", "raw", "-t", "-e", "8", "--cache=writeback", "-k"]);
                command.arg(socket).arg(&image);
                command
            }
            Who::Script => {
                self.create("script");
                let mut command = nbdkit(&socket);
                command.args(["-t", "64", "python", SCRIPT]);
                let url = format!("http://{}/devstoreaccount1/dysks/script.vhd", self.address);
                command.env("BLOB_URL", url);
                command.env("BLOB_ACCOUNT", "devstoreaccount1");
                command.env("AZURE_STORAGE_KEY", DEFAULT_KEY);
                command.env("PYTHONPATH", packages());
                command
            }
            Who::S3backer => {
                let (s3, address) = listening(s3backer::store(store.latency));
                self.s3 = Some(s3);
                let (mount, disk) = s3backer::mount(&self.folder, address, SIZE);
                let mount = start(mount);
                appears(&disk);
                let mut command = nbdkit(&socket);
                command.args(["-t", "64", "file"]).arg(disk);
                self.served.push((who, start(command)));
                return self.served.push((who, mount));
            }
            Who::Dysk | Who::Cached | Who::Empty | Who::Stream => {
                let name = format!("{who:?}").to_lowercase();
                self.create(&name);
                let mut command = self.dyskctl(&["serve", &volume(&name)]);
                command.arg("--unix").arg(socket);
                if matches!(who, Who::Cached | Who::Stream) {
                    command.args(["--caching", "read-write", "--staging-dir"]);
                    command.arg(self.folder.join("staging"));
                }
                if who == Who::Cached {
                    command.args(["--cache-size", "512MiB"]);
                }
                command
            }
        };
        self.served.push((who, start(command)));
    }

    fn create(&self, name: &str) {
        let size = if name == "stream" { STREAM } else { SIZE };
        run(self.dyskctl(&["create", &volume(name), "--size", &size.to_string()]));
    }

    fn dyskctl(&self, arguments: &[&str]) -> Command {
        let scheme = if self.tls { "https" } else { "http" };
        let mut command = Command::new(env!("CARGO_BIN_EXE_dyskctl"));
        command
            .args(arguments)
            .arg("--endpoint")
            .arg(format!("{scheme}://{}/devstoreaccount1", self.address))
            .env("AZURE_STORAGE_KEY", DEFAULT_KEY);
        if self.tls {
            command.arg("--ca-file").arg(self.folder.join("ca.pem"));
        }
        command
    }

    fn socket(&self, who: Who) -> PathBuf {
        self.folder.join(format!("{who:?}.sock"))
    }

    fn fill_raw(&self) {
        let fills = Command::new(std::env::current_exe().expect("this bench"))
            .args([
                "raw",
                &self.address.to_string(),
                "write",
                "4194304",
                "1",
                "1",
            ])
            .output()
            .expect("the raw client runs");
        assert!(fills.status.success(), "{fills:?}");
    }

    /// One run of `load` by `who`.
    pub fn measure(&self, who: Who, load: Load, seconds: u64) -> Measured {
        let store = match &self.s3 {
            Some(s3) if who == Who::S3backer => s3,
            _ => &self.store,
        };
        let (store_before, counted) = (store.cpu(), self.counts());
        if who == Who::Raw {
            return self.measure_raw(load, seconds, store_before);
        }
        let server = || -> Duration {
            let processes = self.served.iter().filter(|(one, _)| *one == who);
            processes.map(|(_, running)| running.cpu()).sum()
        };
        let before = server();
        let until = if who == Who::Stream {
            vec![format!("--size={STREAM}"), "--end_fsync=1".into()]
        } else {
            let times = format!("--runtime={seconds} --ramp_time={} --time_based", self.ramp);
            times.split(' ').map(ToOwned::to_owned).collect()
        };
        let mut arguments = vec![
            format!("--rw={}", load.rw),
            format!("--bs={}", load.block),
            format!("--iodepth={}", load.depth),
            "--norandommap".into(),
        ];
        arguments.extend(until);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let fio = self.start_fio(who, &arguments);
        // What it takes to learn a cap is no part of what it takes to keep to it.
        std::thread::sleep(Duration::from_secs(self.ramp));
        let learned = self.counts();
        let report = report_of(fio);
        let job = &report["jobs"][0];
        let side = &job[if load.rw.ends_with("read") {
            "read"
        } else {
            "write"
        }];
        // fio's own rate leaves out the requests that it waited for at the end, but
        // not the time that they took.
        let bytes = side["io_bytes"].as_f64().expect("bytes");
        let time = side["runtime"].as_f64().expect("milliseconds") / 1e3;
        let iops = bytes / load.block as f64 / time;
        let requests = if who == Who::Stream {
            side["total_ios"].as_f64().expect("a count")
        } else {
            // The ramp counts as well.
            iops * (seconds + self.ramp) as f64
        };
        let each = |time: Duration| time.as_secs_f64() * 1e6 / requests.max(1.0);
        let percent = |name: &str| job[name].as_f64().expect("a share");
        let fio = (percent("usr_cpu") + percent("sys_cpu")) / 100.0 * seconds as f64;
        let (now, ratio) = (self.counts(), |part: u64, of: f64| {
            part as f64 / of.max(1e-9)
        });
        Measured {
            iops,
            mean_ms: side["lat_ns"]["mean"].as_f64().expect("a latency") / 1e6,
            cpu_us: each(server() - before),
            store_us: each(store.cpu() - store_before),
            fio_us: fio * 1e6 / (iops * seconds as f64).max(1.0),
            refused: ratio(
                now.refused - learned.refused,
                (now.all - learned.all) as f64,
            ),
            puts: ratio(now.puts - counted.puts, bytes / (1_u64 << 30) as f64),
        }
    }

    fn measure_raw(&self, load: Load, seconds: u64, store: Duration) -> Measured {
        let own = Command::new(std::env::current_exe().expect("this bench"))
            .args(["raw", &self.address.to_string(), load.rw])
            .args([load.block, load.depth.into(), seconds].map(|number| number.to_string()))
            .output()
            .expect("the raw client runs");
        assert!(own.status.success(), "{own:?}");
        let report: Value = serde_json::from_slice(&own.stdout).expect("JSON");
        let iops = report["iops"].as_f64().expect("IOPS");
        let requests = (iops * seconds as f64).max(1.0);
        Measured {
            iops,
            mean_ms: report["meanMs"].as_f64().expect("a latency"),
            cpu_us: 0.0,
            store_us: (self.store.cpu() - store).as_secs_f64() * 1e6 / requests,
            fio_us: 0.0,
            refused: 0.0,
            puts: 0.0,
        }
    }

    fn start_fio(&self, who: Who, arguments: &[&str]) -> Child {
        Command::new("fio")
            .args([
                "--name=bench",
                "--ioengine=nbd",
                "--thread",
                "--randrepeat=0",
            ])
            .args([format!("--size={SIZE}"), "--output-format=json".into()])
            .arg(format!(
                "--uri=nbd+unix:///?socket={}",
                self.socket(who).display()
            ))
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("fio runs (Debian package fio)")
    }

    /// What the store has counted so far; nothing, when only TLS gets there.
    fn counts(&self) -> Counts {
        if self.tls {
            return Counts::default();
        }
        let mut stream = TcpStream::connect(self.address).expect("the store listens");
        write!(
            stream,
            "GET /-/stats HTTP/1.1\r\nHost: store\r\nConnection: close\r\n\r\n"
        )
        .expect("asked");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answered");
        let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
        let stats: StatsReport = serde_json::from_str(body).expect("JSON");
        let of = |kind: &str| stats.operations.get(kind).map_or(0, |one| one.requests);
        Counts {
            all: stats.operations.values().map(|one| one.requests).sum(),
            refused: stats.throttled,
            gets: of("get-blob"),
            puts: of("put-page"),
        }
    }

    /// What reads of the volume that nobody wrote to cost: one run of its own.
    pub fn requests_of_never_written_reads(&self) -> u64 {
        let before = self.counts().gets;
        let arguments = [
            "--rw=randread",
            "--bs=4k",
            "--iodepth=32",
            "--number_ios=10000",
        ];
        report_of(self.start_fio(Who::Empty, &arguments));
        self.counts().gets - before
    }
}

fn volume(name: &str) -> String {
    format!("devstoreaccount1/dysks/{name}.vhd")
}

fn emulator(store: &Store, folder: &Path) -> (Running, SocketAddr) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dysk-emulator"));
    command
        .args(["--listen", "127.0.0.1:0", "--memory", "--latency"])
        .arg(format!("{}ms", store.latency))
        .args(["--iops", &store.caps.0.to_string()])
        .args(["--bandwidth", &store.caps.1.to_string()]);
    if store.tls {
        certify(folder);
        command.arg("--tls-cert").arg(folder.join("server.pem"));
        command.arg("--tls-key").arg(folder.join("server.key"));
    }
    listening(command)
}

fn start(mut command: Command) -> Running {
    let child = command.stdout(Stdio::null()).spawn();
    Running(child.unwrap_or_else(|error| panic!("{command:?}: {error}")))
}

/// Starts a store, which says first where it listens.
fn listening(mut command: Command) -> (Running, SocketAddr) {
    let child = command.stdout(Stdio::piped()).spawn();
    let mut child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut line = String::new();
    let stdout = child.stdout.take().expect("stdout is piped");
    BufReader::new(stdout)
        .read_line(&mut line)
        .expect("the store says where it listens");
    let address = line
        .trim()
        .split_once("://")
        .and_then(|(_, rest)| rest.split('/').next()?.parse().ok());
    let address = address.unwrap_or_else(|| panic!("no address: {line:?}"));
    (Running(child), address)
}

/// An authority and a certificate for 127.0.0.1, made with openssl.
fn certify(folder: &Path) {
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
    let authority = "-keyout ca.key -out ca.pem -subj /CN=bench-authority";
    let server = "-keyout server.key -out server.pem -subj /CN=localhost -CA ca.pem \
         -CAkey ca.key -addext basicConstraints=critical,CA:FALSE \
         -addext subjectAltName=IP:127.0.0.1";
    for rest in [authority, server] {
        let mut command = Command::new("openssl");
        command.args(format!("req -x509 {key} {rest}").split_whitespace());
        run_in(folder, command);
    }
}

fn run_in(folder: &Path, mut command: Command) {
    command.current_dir(folder);
    run(command);
}

fn run(mut command: Command) {
    let output = command.output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{output:?}");
}

fn appears(path: &Path) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !path.exists() {
        assert!(
            Instant::now() < deadline,
            "{} did not appear",
            path.display()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}
