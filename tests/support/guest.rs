//! Guests that a test leads from the host: they run its commands, and can be
//! frozen, thawed and cut off from power. Several may run at once.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

const REPO: &str = env!("CARGO_MANIFEST_DIR");
/// For a boot on a machine that is busy with everything else.
const BOOT: Duration = Duration::from_secs(120);
/// For a command that nobody gave another limit.
const COMMAND: Duration = Duration::from_secs(120);

/// What a command in a guest ended with.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: i64,
    pub out: String,
    pub err: String,
}

impl Answer {
    pub fn succeeded(&self) -> bool {
        self.status == 0
    }
}

/// A command that runs in a guest.
pub struct Pending {
    command: String,
    answer: Mutex<Receiver<Answer>>,
}

impl Pending {
    /// Its answer; `None` when the guest ended first.
    ///
    /// # Panics
    ///
    /// When there is none within `limit`.
    pub fn answer(&self, limit: Duration) -> Option<Answer> {
        match locked(&self.answer).recv_timeout(limit) {
            Ok(answer) => Some(answer),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("not within {limit:?}: {}", self.command),
        }
    }

    /// Whether it still runs.
    pub fn is_running(&self) -> bool {
        matches!(
            locked(&self.answer).try_recv(),
            Err(mpsc::TryRecvError::Empty)
        )
    }
}

type Waiting = Arc<Mutex<Option<BTreeMap<u64, Sender<Answer>>>>>;

/// The guest's end of the line: orders go out, answers come in, in any order.
struct Line {
    out: Mutex<TcpStream>,
    /// `None` once the guest is gone.
    waiting: Waiting,
}

impl Line {
    fn over(stream: TcpStream) -> Self {
        stream.set_nodelay(true).expect("TCP");
        let incoming = stream.try_clone().expect("a second handle");
        let waiting: Waiting = Arc::new(Mutex::new(Some(BTreeMap::new())));
        let answers = Arc::clone(&waiting);
        std::thread::spawn(move || {
            for line in BufReader::new(incoming).lines() {
                let Ok(line) = line else { break };
                let value: Value = serde_json::from_str(&line).expect("the agent speaks JSON");
                let text = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
                let answer = Answer {
                    status: value["status"].as_i64().expect("a status"),
                    out: text("out"),
                    err: text("err"),
                };
                let id = value["id"].as_u64().expect("an id");
                let sender = locked(&answers).as_mut().and_then(|map| map.remove(&id));
                if let Some(sender) = sender {
                    // Nobody may be waiting any more.
                    drop(sender.send(answer));
                }
            }
            locked(&answers).take();
        });
        Self {
            out: Mutex::new(stream),
            waiting,
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A virtual machine of the lane. Ends with its owner.
pub struct Guest {
    name: String,
    runner: Child,
    results: TempDir,
    listener: TcpListener,
    line: OnceLock<Line>,
    next: AtomicU64,
    cut: bool,
}

impl Guest {
    /// Starts a guest and returns at once: the first command waits for it.
    /// `environment` is that of its commands.
    pub fn boot(name: &str, kernel: &str, environment: &[(&str, &str)]) -> Self {
        let results = tempfile::tempdir().expect("a folder for the guest");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let bin = Path::new(env!("CARGO_BIN_EXE_dyskd"))
            .parent()
            .expect("binaries lie in a folder");
        let log = File::create(results.path().join("guest.log")).expect("a log");
        let mut command = Command::new(format!("{REPO}/tests/kernel/run"));
        command
            .args(["--kernel", kernel, "--timeout", "7200", "--memory", "1024"])
            .arg("--results")
            .arg(results.path())
            .arg("--env")
            .arg(format!("DYSK_BIN={}", bin.display()));
        for (name, value) in environment {
            command.arg("--env").arg(format!("{name}={value}"));
        }
        let runner = command
            .arg("--")
            .arg(format!("{REPO}/tests/kernel/guest/agent"))
            .arg(port.to_string())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("tests/kernel/run starts");
        Self {
            name: format!("{name} ({kernel})"),
            runner,
            results,
            listener,
            line: OnceLock::new(),
            next: AtomicU64::new(0),
            cut: false,
        }
    }

    fn line(&self) -> &Line {
        self.line.get_or_init(|| {
            self.listener.set_nonblocking(true).expect("a socket");
            let deadline = Instant::now() + BOOT;
            loop {
                match self.listener.accept() {
                    Ok((stream, _)) => {
                        stream.set_nonblocking(false).expect("a socket");
                        break Line::over(stream);
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(error) => panic!("{}: {error}", self.name),
                }
                assert!(Instant::now() < deadline, "{} does not boot", self.name);
                std::thread::sleep(Duration::from_millis(20));
            }
        })
    }

    /// Waits until it has booted.
    pub fn up(&self) {
        self.line();
    }

    /// Starts a command in a bash that has read `lib.sh`.
    pub fn start(&self, command: &str) -> Pending {
        let line = self.line();
        let (sender, answer) = mpsc::channel();
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        if let Some(waiting) = locked(&line.waiting).as_mut() {
            waiting.insert(id, sender);
        }
        let order = format!("{}\n", json!({"id": id, "command": command}));
        let sent = locked(&line.out).write_all(order.as_bytes());
        sent.unwrap_or_else(|error| panic!("{}: {error}", self.name));
        Pending {
            command: format!("{}: {command}", self.name),
            answer: Mutex::new(answer),
        }
    }

    /// Runs a command to its end, whatever that is.
    pub fn attempt(&self, command: &str) -> Answer {
        let pending = self.start(command);
        pending
            .answer(COMMAND)
            .unwrap_or_else(|| panic!("{} is gone", self.name))
    }

    /// Runs a command that has to succeed; answers with its output, trimmed.
    pub fn run(&self, command: &str) -> String {
        let answer = self.attempt(command);
        assert!(
            answer.succeeded(),
            "{}: status {} of: {command}\n{}{}",
            self.name,
            answer.status,
            answer.out,
            answer.err
        );
        answer.out.trim().to_owned()
    }

    /// Starts `dyskd`, whose log outlives the guest.
    pub fn start_daemon(&self) {
        self.run(
            "\"$DYSK_BIN/dyskd\" </dev/null >>$DYSK_RESULTS/dyskd.log 2>&1 & \
             echo $! >$work/daemon; eventually 20 dyskctl version",
        );
    }

    fn signal(&self, signal: Signal) {
        let pid = std::fs::read_to_string(self.results.path().join("qemu.pid"))
            .unwrap_or_else(|error| panic!("{} is not there: {error}", self.name));
        let pid = pid.trim().parse().ok().and_then(Pid::from_raw);
        kill_process(pid.expect("a process id"), signal).expect("it runs");
    }

    /// Stops the whole machine where it is.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets a frozen machine go on.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// The power goes; returns when the machine is gone.
    pub fn cut(mut self) {
        self.cut = true;
        self.signal(Signal::KILL);
        self.runner.wait().expect("a child of ours");
    }

    /// What `dyskd` has said so far.
    pub fn daemon_log(&self) -> String {
        std::fs::read_to_string(self.results.path().join("dyskd.log")).unwrap_or_default()
    }

    /// What the guest is busy with, if it still answers.
    fn tell_what_runs(&self) {
        let Some(line) = self.line.get() else { return };
        let (sender, answer) = mpsc::channel();
        if let Some(waiting) = locked(&line.waiting).as_mut() {
            waiting.insert(u64::MAX, sender);
        }
        let command = "ps -eo pid,stat,wchan:20,args | grep -v '\\]$'; dyskctl status -o json";
        let order = format!("{}\n", json!({"id": u64::MAX, "command": command}));
        if locked(&line.out).write_all(order.as_bytes()).is_ok() {
            match answer.recv_timeout(Duration::from_secs(20)) {
                Ok(answer) => eprintln!("--- {}:\n{}", self.name, answer.out),
                Err(_) => eprintln!("--- {}: does not answer", self.name),
            }
        }
    }

    /// The kernel must not have seen an I/O error or worse.
    pub fn no_kernel_errors(&self) {
        let seen =
            self.run("dmesg | grep -E 'I/O error|EXT4-fs error|XFS.*(error|orrupt)' || true");
        assert!(seen.is_empty(), "{}: the kernel says: {seen}", self.name);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.cut {
            return;
        }
        if std::thread::panicking() {
            self.tell_what_runs();
            for file in ["guest.log", "dyskd.log", "console.log"] {
                let text = std::fs::read_to_string(self.results.path().join(file));
                let text = text.unwrap_or_default();
                let lines: Vec<&str> = text.lines().collect();
                eprintln!("--- {}: the end of {file}", self.name);
                for line in &lines[lines.len().saturating_sub(25)..] {
                    eprintln!("    {line}");
                }
            }
        }
        // Takes its QEMU along, a frozen one too.
        if kill_process(Pid::from_child(&self.runner), Signal::TERM).is_ok() {
            self.runner.wait().expect("a child of ours");
        }
    }
}

/// What each writer was promised: numbers of records, and when.
type Seen = Mutex<BTreeMap<String, Vec<(u64, Instant)>>>;

/// Sees acknowledgements from outside the guests: a writer names itself, then
/// tells the number of each record that it was promised.
pub struct Witness {
    port: u16,
    seen: Arc<Seen>,
}

impl Witness {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let seen = Arc::new(Mutex::new(BTreeMap::new()));
        let all = Arc::clone(&seen);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let seen = Arc::clone(&all);
                std::thread::spawn(move || listen(stream, &seen));
            }
        });
        Self { port, seen }
    }

    /// Where writers tell.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Numbers of the records that `writer` was promised, and when.
    pub fn acknowledged(&self, writer: &str) -> Vec<(u64, Instant)> {
        locked(&self.seen).get(writer).cloned().unwrap_or_default()
    }

    /// How many records `writer` was promised: they are numbered from 0.
    pub fn count(&self, writer: &str) -> u64 {
        let last = locked(&self.seen)
            .get(writer)
            .and_then(|all| all.last().copied());
        last.map_or(0, |(number, _)| number + 1)
    }

    /// Waits until `writer` has been promised `more` records more.
    pub fn goes_on(&self, writer: &str, more: u64, limit: Duration) {
        let (from, deadline) = (self.count(writer), Instant::now() + limit);
        while self.count(writer) < from + more {
            assert!(
                Instant::now() < deadline,
                "{writer} does not go on from {from}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Records a second between two moments.
    pub fn rate(&self, writer: &str, from: Instant, to: Instant) -> f64 {
        let all = self.acknowledged(writer);
        let count = all.iter().filter(|(_, at)| (from..to).contains(at)).count();
        f64::from(u32::try_from(count).expect("few")) / (to - from).as_secs_f64()
    }
}

fn listen(mut stream: TcpStream, seen: &Seen) {
    let Ok(incoming) = stream.set_nodelay(true).and_then(|()| stream.try_clone()) else {
        // The guest is gone already.
        return;
    };
    let mut incoming = BufReader::new(incoming);
    let mut next = || {
        let mut line = String::new();
        match incoming.read_line(&mut line) {
            // A line that a power cut broke off acknowledges nothing.
            Ok(_) => line.strip_suffix('\n').map(str::to_owned),
            Err(_) => None,
        }
    };
    let Some(writer) = next() else { return };
    while let Some(line) = next() {
        let number = line.parse().expect("a record's number");
        let moment = Instant::now();
        locked(seen)
            .entry(writer.clone())
            .or_default()
            .push((number, moment));
        if stream.write_all(b"\n").is_err() {
            return;
        }
    }
}
