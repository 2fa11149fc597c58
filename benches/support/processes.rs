//! The processes of a bench: the store, what serves a disk from it, peers, and
//! fio; and the CPU time that each took.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dysk::emulator::DEFAULT_KEY;
use serde_json::Value;

use crate::{Load, Who};

/// Bytes of each disk.
pub const SIZE: u64 = 256 << 20;
const RAMP: u64 = 1;

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
}

/// A store, and everybody who serves from it or beside it.
pub struct Servers {
    // Ended before the store, whose lease they give back.
    served: Vec<(Who, Running)>,
    store: Running,
    address: SocketAddr,
    folder: PathBuf,
}

impl Servers {
    /// A store of `latency` milliseconds, and servers with sockets in `folder`.
    pub fn start(folder: &Path, latency: f64) -> Self {
        std::fs::create_dir_all(folder).expect("a folder");
        let (store, address) = emulator(latency);
        let endpoint = format!("http://{address}/devstoreaccount1");
        let mut servers = Self {
            store,
            address,
            folder: folder.to_owned(),
            served: Vec::new(),
        };
        for name in ["raw", "dysk", "cached", "empty"] {
            run(dyskctl(&[
                "create",
                &volume(name),
                "--size",
                "256MiB",
                "--endpoint",
                &endpoint,
            ]));
        }
        for (who, name, more) in [
            (Who::Dysk, "dysk", &[][..]),
            (
                Who::Cached,
                "cached",
                &["--caching", "read-write", "--cache-size", "512MiB"][..],
            ),
            (Who::Empty, "empty", &[][..]),
        ] {
            let mut command = dyskctl(&["serve", &volume(name), "--endpoint", &endpoint, "--unix"]);
            command.arg(servers.socket(who)).args(more);
            if who == Who::Cached {
                command.arg("--staging-dir").arg(folder.join("staging"));
            }
            servers.spawn(who, command);
        }
        let mut nbdkit = |who, plugin: &[&str]| {
            let mut command = Command::new("nbdkit");
            command
                .args(["-f", "-U"])
                .arg(servers.socket(who))
                .args(plugin);
            servers.spawn(who, command);
        };
        nbdkit(Who::Memory, &["memory", "256M"]);
        nbdkit(Who::Null, &["null", "256M"]);
        let image = Path::new("/dev/shm").join(format!("dysk-bench-{}", std::process::id()));
        let file = std::fs::File::create(&image).expect("a file in memory");
        file.set_len(SIZE).expect("room");
        let mut command = Command::new("qemu-nbd");
        command
            .args(["-f", "raw", "-t", "-e", "8", "--cache=writeback", "-k"])
            .arg(servers.socket(Who::Qemu))
            .arg(&image);
        servers.spawn(Who::Qemu, command);
        for (who, _) in &servers.served {
            appears(&servers.socket(*who));
        }
        std::fs::remove_file(&image).expect("qemu-nbd has it open");
        // What was never written is nobody's work: all but one are filled.
        for who in [Who::Dysk, Who::Cached, Who::Memory, Who::Qemu] {
            servers.fio(who, &["--rw=write", "--bs=1M", "--iodepth=8"]);
        }
        servers.fill_raw();
        // It learns that it is empty.
        let learned = Instant::now() + Duration::from_secs(10);
        while servers.requests("get-page-ranges") == 0 && Instant::now() < learned {
            std::thread::sleep(Duration::from_millis(50));
        }
        servers
    }

    fn socket(&self, who: Who) -> PathBuf {
        self.folder.join(format!("{who:?}.sock"))
    }

    fn spawn(&mut self, who: Who, mut command: Command) {
        let child = command.stdout(Stdio::null()).spawn();
        let child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        self.served.push((who, Running(child)));
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
        let store = self.store.cpu();
        if who == Who::Raw {
            return self.measure_raw(load, seconds, store);
        }
        let server = self.served.iter().find(|(one, _)| *one == who);
        let server = &server.expect("it is served").1;
        let before = server.cpu();
        let report = self.fio(
            who,
            &[
                &format!("--rw={}", load.rw),
                &format!("--bs={}", load.block),
                &format!("--iodepth={}", load.depth),
                &format!("--runtime={seconds}"),
                &format!("--ramp_time={RAMP}"),
                "--time_based",
                "--norandommap",
            ],
        );
        let job = &report["jobs"][0];
        let side = &job[if load.rw.ends_with("read") {
            "read"
        } else {
            "write"
        }];
        let iops = side["iops"].as_f64().expect("IOPS");
        // The ramp counts as well.
        let requests = iops * (seconds + RAMP) as f64;
        let each = |time: Duration| time.as_secs_f64() * 1e6 / requests.max(1.0);
        let percent = |name: &str| job[name].as_f64().expect("a share");
        let fio = (percent("usr_cpu") + percent("sys_cpu")) / 100.0 * seconds as f64;
        Measured {
            iops,
            mean_ms: side["lat_ns"]["mean"].as_f64().expect("a latency") / 1e6,
            cpu_us: each(server.cpu() - before),
            store_us: each(self.store.cpu() - store),
            fio_us: fio * 1e6 / (iops * seconds as f64).max(1.0),
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
        }
    }

    fn fio(&self, who: Who, arguments: &[&str]) -> Value {
        let output = Command::new("fio")
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
            .output()
            .expect("fio runs (Debian package fio)");
        assert!(output.status.success(), "{output:?}");
        // The engine may say a word of its own before the report.
        let text = String::from_utf8_lossy(&output.stdout);
        let json = text.find('{').map_or("", |at| &text[at..]);
        serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Requests of one kind that the store has had.
    fn requests(&self, kind: &str) -> u64 {
        let mut stream = TcpStream::connect(self.address).expect("the store listens");
        write!(
            stream,
            "GET /-/stats HTTP/1.1\r\nHost: store\r\nConnection: close\r\n\r\n"
        )
        .expect("asked");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answered");
        let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
        let stats: Value = serde_json::from_str(body).expect("JSON");
        stats["operations"][kind]["requests"].as_u64().unwrap_or(0)
    }

    /// What reads of the volume that nobody wrote to cost: one run of its own.
    pub fn requests_of_never_written_reads(&self) -> u64 {
        let before = self.requests("get-blob");
        let arguments = [
            "--rw=randread",
            "--bs=4k",
            "--iodepth=32",
            "--number_ios=10000",
        ];
        self.fio(Who::Empty, &arguments);
        self.requests("get-blob") - before
    }
}

fn volume(name: &str) -> String {
    format!("devstoreaccount1/dysks/{name}.vhd")
}

fn emulator(latency: f64) -> (Running, SocketAddr) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_dysk-emulator"))
        .args(["--listen", "127.0.0.1:0", "--memory", "--latency"])
        .arg(format!("{latency}ms"))
        .stdout(Stdio::piped())
        .spawn()
        .expect("dysk-emulator starts");
    let mut line = String::new();
    let stdout = child.stdout.take().expect("stdout is piped");
    BufReader::new(stdout)
        .read_line(&mut line)
        .expect("the emulator says where it listens");
    let address = line
        .trim()
        .strip_prefix("listening on http://")
        .and_then(|rest| rest.split('/').next()?.parse().ok());
    let address = address.unwrap_or_else(|| panic!("no address: {line:?}"));
    (Running(child), address)
}

fn dyskctl(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dyskctl"));
    command
        .args(arguments)
        .env("AZURE_STORAGE_KEY", DEFAULT_KEY);
    command
}

fn run(mut command: Command) {
    let output = command.output().expect("dyskctl starts");
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
