//! `deploy/image/dyskd-pod`, which runs dyskd in a pod, with stand-ins for dyskd
//! and dyskctl that do as a file says.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);

/// Notes its start, takes the lock, and waits to be told how to end.
const DYSKD: &str = r#"#!/bin/sh
echo "start $*" >>"$POD_TEST/log"
echo $$ >"$DYSK_RUN_DIR/lock"
trap 'echo term >>"$POD_TEST/log"; exit 0' TERM
while [ ! -e "$POD_TEST/end" ]; do sleep 0.05; done
status=$(cat "$POD_TEST/end")
rm "$POD_TEST/end"
echo "end $status" >>"$POD_TEST/log"
exit "$status"
"#;

/// Answers while there is a file `answers`.
const DYSKCTL: &str = "#!/bin/sh\necho ask >>\"$POD_TEST/asked\"\n[ -e \"$POD_TEST/answers\" ]\n";

struct Pod {
    dir: TempDir,
    /// The node's run directory, which its pods share.
    run_dir: PathBuf,
    script: Option<Child>,
}

impl Pod {
    fn prepare() -> Self {
        let dir = tempfile::tempdir().expect("temp dir");
        for folder in ["bin", "run", "state"] {
            fs::create_dir(dir.path().join(folder)).expect("made");
        }
        for (name, program) in [("dyskd", DYSKD), ("dyskctl", DYSKCTL)] {
            let path = dir.path().join("bin").join(name);
            fs::write(&path, program).expect("written");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("set");
        }
        Self {
            run_dir: dir.path().join("run"),
            dir,
            script: None,
        }
    }

    /// A pod of the node whose run directory is given, with the real programs.
    fn start_real(run_dir: &Path) -> Self {
        let mut pod = Self::prepare();
        pod.run_dir = run_dir.to_owned();
        for (name, program) in [
            ("dyskd", env!("CARGO_BIN_EXE_dyskd")),
            ("dyskctl", env!("CARGO_BIN_EXE_dyskctl")),
        ] {
            let path = pod.dir.path().join("bin").join(name);
            fs::remove_file(&path).expect("removed");
            symlink(program, path).expect("linked");
        }
        let mut run = pod.command(&["run", "--takeover", "--keep-attached", "--dysktab=/none"]);
        let run = run.arg("--run-dir").arg(run_dir).spawn();
        pod.script = Some(run.expect("it starts"));
        pod
    }

    fn start() -> Self {
        let mut pod = Self::prepare();
        let run = pod.command(&["run", "--takeover"]).spawn();
        pod.script = Some(run.expect("it starts"));
        pod.eventually("dyskd runs", |pod| pod.starts() == 1 && pod.is("ready"));
        pod
    }

    fn command(&self, words: &[&str]) -> Command {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/image/dyskd-pod");
        let path = std::env::var("PATH").expect("a path");
        let at = |name: &str| self.dir.path().join(name);
        let mut command = Command::new("sh");
        command
            .arg(script)
            .args(words)
            .env("PATH", format!("{}:{path}", at("bin").display()))
            .env("POD_TEST", self.dir.path())
            .env("DYSK_RUN_DIR", &self.run_dir)
            .env("DYSKD_POD_STATE", at("state"))
            .env("DYSKD_POD_LOOK", "1")
            .env("DYSKD_POD_GIVEN_UP", "1")
            .env("DYSKD_POD_PATIENCE", "3600")
            .stdin(Stdio::null())
            .stderr(self.said_file());
        self.set("answers", "");
        command
    }

    fn said_file(&self) -> fs::File {
        let options = fs::OpenOptions::new().create(true).append(true).to_owned();
        options.open(self.dir.path().join("said")).expect("opened")
    }

    fn said(&self) -> String {
        fs::read_to_string(self.dir.path().join("said")).expect("readable")
    }

    fn set(&self, file: &str, text: &str) {
        // In one step: the stand-ins look all the time.
        let draft = self.dir.path().join("draft");
        fs::write(&draft, text).expect("written");
        fs::rename(draft, self.dir.path().join(file)).expect("renamed");
    }

    fn unset(&self, file: &str) {
        fs::remove_file(self.dir.path().join(file)).expect("removed");
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    fn starts(&self) -> usize {
        self.log().matches("start --takeover").count()
    }

    fn asked(&self) -> usize {
        let asked = fs::read_to_string(self.dir.path().join("asked"));
        asked.unwrap_or_default().lines().count()
    }

    /// Processes of this pod's that are still there.
    fn left_behind(&self) -> Vec<String> {
        let mark = format!("POD_TEST={}", self.dir.path().display());
        let processes = fs::read_dir("/proc").expect("/proc").flatten();
        processes
            .map(|entry| entry.path())
            .filter(|process| {
                let environment = fs::read(process.join("environ")).unwrap_or_default();
                environment
                    .split(|byte| *byte == 0)
                    .any(|one| one == mark.as_bytes())
            })
            .map(|process| fs::read_to_string(process.join("cmdline")).unwrap_or_default())
            .filter(|command| !command.is_empty())
            .collect()
    }

    fn stands_by(&self) -> bool {
        self.dir.path().join("state/handed-over").exists()
    }

    /// What a probe says; leaves `answers` as it is.
    fn is(&self, probe: &str) -> bool {
        let answers = self.dir.path().join("answers").exists();
        let mut command = self.command(&[probe]);
        if !answers {
            self.unset("answers");
        }
        command.status().expect("it runs").success()
    }

    fn eventually(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(
                Instant::now() < deadline,
                "not in time: {what}:\n{}",
                self.log() + &self.said()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn terminate(&mut self) -> ExitStatus {
        let mut script = self.script.take().expect("it runs");
        let pid = Pid::from_child(&script);
        kill_process(pid, Signal::TERM).expect("a signal");
        script.wait().expect("it ends")
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if self.script.is_some() {
            // Lets the stand-in end, too.
            self.terminate();
        }
    }
}

#[test]
fn a_daemon_that_dies_is_started_again_at_once() {
    let pod = Pod::start();
    pod.unset("answers");
    for deaths in 1..=2 {
        pod.set("end", "101");
        pod.eventually("started again", |pod| pod.starts() == deaths + 1);
    }
    assert!(!pod.stands_by());
}

#[test]
fn a_daemon_that_cannot_take_over_does_not_bother_the_other_again_and_again() {
    let mut pod = Pod::start();
    // It ends, and still somebody answers.
    pod.set("end", "1");
    pod.eventually("it waits", |pod| pod.said().contains("again in 3600 s"));
    assert_eq!(pod.starts(), 1);
    // Told to end, it leaves nothing behind that goes on sleeping.
    assert!(pod.terminate().success());
    assert_eq!(pod.left_behind(), [""; 0]);
}

#[test]
fn told_to_end_it_ends_the_daemon_and_waits_for_it() {
    let mut pod = Pod::start();
    assert!(pod.terminate().success());
    assert!(pod.log().ends_with("term\n"), "{}", pod.log());
    assert_eq!(pod.starts(), 1);
}

#[test]
fn after_a_handover_it_stands_by_and_does_not_take_the_disks_back() {
    let mut pod = Pod::start();
    // Another pod's daemon holds the run directory from here on.
    pod.set("run/lock", "1\n");
    pod.set("end", "0");
    pod.eventually("stands by", Pod::stands_by);
    assert!(pod.is("alive"), "or the kubelet would restart it");
    assert!(!pod.is("ready"), "it does not serve");
    // For longer than it waits for one that does not answer.
    pod.eventually("has looked", |pod| pod.asked() > 5);
    assert_eq!(pod.starts(), 1);
    assert!(pod.terminate().success());
}

#[test]
fn when_nobody_serves_any_more_it_goes_on_itself() {
    let pod = Pod::start();
    pod.set("end", "0");
    pod.eventually("stands by", Pod::stands_by);
    pod.unset("answers");
    pod.eventually("goes on", |pod| pod.starts() == 2 && !pod.stands_by());
}

#[test]
fn it_is_ready_when_its_own_daemon_serves() {
    let pod = Pod::start();
    assert!(pod.is("ready") && pod.is("alive"));
    // Before a take-over, the old pod's daemon answers.
    let own = fs::read_to_string(pod.dir.path().join("run/lock")).expect("a lock");
    pod.set("run/lock", "1\n");
    assert!(!pod.is("ready"));
    assert!(pod.is("alive"), "a take-over may take its time");
    pod.set("run/lock", &own);
    assert!(pod.is("ready"));
}

#[test]
fn a_daemon_that_hangs_is_not_alive() {
    let pod = Pod::start();
    pod.unset("answers");
    assert!(!pod.is("alive") && !pod.is("ready"));
}

/// As in an upgrade that surges, and in one that is rolled back.
#[test]
fn a_second_pod_s_daemon_takes_over_and_the_first_goes_on_after_it() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("dyskd takes root: not run");
        return;
    }
    let node = tempfile::tempdir().expect("temp dir");
    let run_dir = node.path().join("dysk");
    let mut first = Pod::start_real(&run_dir);
    first.eventually("serves", |pod| pod.is("ready"));
    let mut second = Pod::start_real(&run_dir);
    second.eventually("has taken over", |pod| pod.is("ready"));
    first.eventually("stands by", Pod::stands_by);
    assert!(first.is("alive") && !first.is("ready"));
    assert!(second.terminate().success());
    first.eventually("goes on", |pod| pod.is("ready"));
    assert!(first.terminate().success());
}

#[test]
fn other_words_are_refused() {
    let pod = Pod::prepare();
    let code = |words: &[&str]| pod.command(words).status().expect("it runs").code();
    assert_eq!(code(&[]), Some(2));
    assert_eq!(code(&["start"]), Some(2));
}
