//! Inside a guest: a store, dyskd and both halves of csi-dysk as processes,
//! and clients of theirs.
#![allow(dead_code, reason = "each test uses its part")]

mod writer;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dysk::csi::v1::controller_client::ControllerClient;
use dysk::csi::v1::node_client::NodeClient;
use dysk::csi::v1::volume_capability::{
    AccessMode, AccessType, BlockVolume, MountVolume, access_mode::Mode,
};
use dysk::csi::v1::*;
use dysk::emulator::{DEFAULT_ACCOUNT, DEFAULT_KEY};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

pub use writer::{Writer, check_records};

pub const MIB: i64 = 1 << 20;
const WORK: &str = "/tmp/dysk";
const PATIENCE: Duration = Duration::from_secs(60);

/// A process that is killed with its owner.
pub struct Process(Child);

impl Process {
    fn start(name: &str, arguments: &[&str], path: Option<&str>) -> Self {
        Self::start_under(&[], name, arguments, path)
    }

    /// Starts it by a command in front of it, which has to leave it this
    /// process's own child.
    fn start_under(front: &[&str], name: &str, arguments: &[&str], path: Option<&str>) -> Self {
        // The mode, where there is one.
        let role = arguments.get(1).filter(|_| name == "csi-dysk");
        let bin = std::env::var("DYSK_BIN").expect("the lane sets DYSK_BIN");
        let log = File::options()
            .create(true)
            .append(true)
            .open(format!("{WORK}/{name}{}.log", role.unwrap_or(&"")))
            .expect("a log");
        let own = format!("{bin}/{name}");
        let mut words = front.iter().copied().chain([own.as_str()]);
        let mut command = Command::new(words.next().expect("its own name"));
        command.args(words).args(arguments);
        command.stderr(log).stdout(Stdio::piped());
        if let Some(path) = path {
            command.env("PATH", path);
        }
        Self(command.spawn().expect(name))
    }

    /// Kills it without warning.
    pub fn kill(&mut self) {
        self.0.kill().expect("it can be killed");
        self.0.wait().expect("a child of ours");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            self.kill();
        }
    }
}

/// Waits until `done`.
#[track_caller]
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let give_up = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < give_up, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs a command that must succeed; answers with what it printed.
#[track_caller]
pub fn sh(command: &str) -> String {
    let output = Command::new("bash")
        .args(["-euo", "pipefail", "-c", command])
        .env("AZURE_STORAGE_KEY", DEFAULT_KEY)
        .output()
        .expect("bash");
    assert!(
        output.status.success(),
        "{command}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

pub struct World {
    store: Process,
    pub endpoint: String,
    /// The account's, as the Secret has it.
    key: String,
    pub daemon: Process,
    controller_process: Process,
    pub plugin: Process,
    runtime: tokio::runtime::Runtime,
}

fn socket(mode: &str) -> String {
    format!("{WORK}/{mode}.sock")
}

fn start_plugin(mode: &str, path: Option<&str>) -> Process {
    start_plugin_under(&[], mode, path)
}

fn start_plugin_under(front: &[&str], mode: &str, path: Option<&str>) -> Process {
    let endpoint = format!("unix://{}", socket(mode));
    let arguments = [
        "--mode",
        mode,
        "--endpoint",
        &endpoint,
        "--node-id",
        "node-1",
    ];
    let process = Process::start_under(front, "csi-dysk", &arguments, path);
    // This one and no other: a child of a killed plugin, between its fork and its
    // exec, holds the old listener for a moment.
    eventually("the plugin listens", || {
        let Ok(stream) = std::os::unix::net::UnixStream::connect(socket(mode)) else {
            return false;
        };
        let peer = rustix::net::sockopt::socket_peercred(&stream).expect("a unix socket");
        peer.pid.as_raw_nonzero().get().cast_unsigned() == process.0.id()
    });
    process
}

impl World {
    pub fn start(latency: &str) -> Self {
        fs::create_dir_all(WORK).expect("a folder");
        let mut store = Process::start(
            "dysk-emulator",
            &["--listen", "127.0.0.1:0", "--memory", "--latency", latency],
            None,
        );
        let mut line = String::new();
        let out = store.0.stdout.take().expect("piped");
        BufReader::new(out).read_line(&mut line).expect("a line");
        let endpoint = line
            .trim()
            .strip_prefix("listening on ")
            .expect("an address");
        let endpoint = endpoint.to_owned();
        let daemon = Process::start("dyskd", &[], None);
        let world = Self {
            store,
            endpoint,
            key: DEFAULT_KEY.to_owned(),
            daemon,
            controller_process: start_plugin("controller", None),
            plugin: start_plugin("node", None),
            runtime: tokio::runtime::Runtime::new().expect("a runtime"),
        };
        world.daemon_answers();
        world
    }

    fn daemon_answers(&self) {
        eventually("dyskd answers", || {
            std::os::unix::net::UnixStream::connect("/run/dysk/dyskd.sock").is_ok()
        });
    }

    pub fn restart_plugin(&mut self) {
        self.plugin.kill();
        self.plugin = start_plugin("node", None);
    }

    /// Restarts it with another PATH for its tools.
    pub fn plugin_with_tools(&mut self, path: Option<&str>) {
        self.plugin.kill();
        self.plugin = start_plugin("node", path);
    }

    /// Restarts it so that it is killed when it is about to make this call of the
    /// system for the `nth` time.
    pub fn plugin_dying_before(&mut self, call: &str, nth: u32) {
        self.plugin.kill();
        // A socket that is left is tried first, by a call that is not meant.
        fs::remove_file(socket("node")).expect("left behind");
        let trace = format!("trace={call}");
        let kill = format!("inject={call}:signal=SIGKILL:when={nth}");
        // With -D the tracer is no parent of the plugin's.
        let front = [
            "strace",
            "-D",
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            &trace,
            "-e",
            &kill,
        ];
        self.plugin = start_plugin_under(&front, "node", None);
    }

    /// The plugin has been killed by what it was started with; a good one follows.
    #[track_caller]
    pub fn plugin_died(&mut self) {
        eventually("the plugin dies", || {
            let ended = self.plugin.0.try_wait().expect("a child of ours");
            ended.is_some()
        });
        self.plugin = start_plugin("node", None);
    }

    pub fn restart_daemon(&mut self) {
        self.daemon.kill();
        self.daemon = Process::start("dyskd", &[], None);
        self.daemon_answers();
    }

    /// A new dyskd takes over from the running one, which ends by itself.
    pub fn upgrade_daemon(&mut self) {
        let heir = Process::start("dyskd", &["--takeover"], None);
        let mut old = std::mem::replace(&mut self.daemon, heir);
        let mut ended = None;
        eventually("the old dyskd ends", || {
            ended = old.0.try_wait().expect("a child of ours");
            ended.is_some()
        });
        assert!(ended.is_some_and(|status| status.success()), "{ended:?}");
        self.daemon_answers();
    }

    pub fn secrets(&self) -> HashMap<String, String> {
        [
            ("accountname", DEFAULT_ACCOUNT),
            ("accountkey", &self.key),
            ("endpoint", &self.endpoint),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
    }

    /// Where the store is steered from.
    fn steering(&self) -> &str {
        self.endpoint.trim_end_matches(DEFAULT_ACCOUNT)
    }

    /// Which requests to the store meet which trouble from now on.
    pub fn faults(&self, rules: &str) {
        let root = self.steering();
        sh(&format!(
            "curl -sf -X PUT {root}-/faults -d '{rules}' >/dev/null"
        ));
    }

    /// Whether one of the rules has struck.
    pub fn has_struck(&self) -> bool {
        let report = sh(&format!("curl -sf {}-/faults", self.steering()));
        report.split("\"struck\":").skip(1).any(|count| {
            let count = count.trim_start();
            !count.starts_with('0')
        })
    }

    /// The account has another key from now on, and the cluster's Secret too.
    pub fn rotate(&mut self, key: &str) {
        let root = self.steering();
        sh(&format!(
            "curl -sf -X PUT {root}-/settings -d '{{\"key\": \"{key}\"}}' >/dev/null"
        ));
        key.clone_into(&mut self.key);
    }

    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    async fn channel(mode: &str) -> Channel {
        Endpoint::try_from(format!("unix://{}", socket(mode)))
            .expect("an endpoint")
            .connect()
            .await
            .expect("it connects")
    }

    pub async fn node() -> NodeClient<Channel> {
        NodeClient::new(Self::channel("node").await)
    }

    pub fn create(&self, name: &str, size: i64, capability: VolumeCapability) -> Volume {
        let request = CreateVolumeRequest {
            name: name.into(),
            capacity_range: Some(CapacityRange {
                required_bytes: size,
                limit_bytes: 0,
            }),
            volume_capabilities: vec![capability],
            secrets: self.secrets(),
            ..CreateVolumeRequest::default()
        };
        let answer = self.block_on(async {
            let mut client = ControllerClient::new(Self::channel("controller").await);
            client.create_volume(request).await
        });
        answer.expect(name).into_inner().volume.expect("a volume")
    }

    pub fn grow(&self, volume: &Volume, size: i64) {
        let request = ControllerExpandVolumeRequest {
            volume_id: volume.volume_id.clone(),
            capacity_range: Some(CapacityRange {
                required_bytes: size,
                limit_bytes: 0,
            }),
            secrets: self.secrets(),
            volume_capability: None,
        };
        self.block_on(async {
            let mut client = ControllerClient::new(Self::channel("controller").await);
            client.controller_expand_volume(request).await
        })
        .expect("grown");
    }

    pub fn delete(&self, volume: &Volume) {
        let request = DeleteVolumeRequest {
            volume_id: volume.volume_id.clone(),
            secrets: self.secrets(),
        };
        self.block_on(async {
            let mut client = ControllerClient::new(Self::channel("controller").await);
            client.delete_volume(request).await
        })
        .expect("deleted");
    }

    pub fn stage_request(
        &self,
        volume: &Volume,
        capability: VolumeCapability,
    ) -> NodeStageVolumeRequest {
        NodeStageVolumeRequest {
            volume_id: volume.volume_id.clone(),
            staging_target_path: staging(volume).display().to_string(),
            volume_capability: Some(capability),
            secrets: self.secrets(),
            volume_context: volume.volume_context.clone(),
            ..NodeStageVolumeRequest::default()
        }
    }

    pub fn stage(&self, volume: &Volume, capability: VolumeCapability) -> Result<(), Status> {
        let request = self.stage_request(volume, capability);
        self.block_on(async { Self::node().await.node_stage_volume(request).await })
            .map(drop)
    }

    pub fn publish_request(
        &self,
        volume: &Volume,
        capability: VolumeCapability,
        pod: &str,
        readonly: bool,
    ) -> NodePublishVolumeRequest {
        NodePublishVolumeRequest {
            volume_id: volume.volume_id.clone(),
            staging_target_path: staging(volume).display().to_string(),
            target_path: target(pod).display().to_string(),
            volume_capability: Some(capability),
            readonly,
            volume_context: volume.volume_context.clone(),
            secrets: self.secrets(),
            ..NodePublishVolumeRequest::default()
        }
    }

    pub fn publish(
        &self,
        volume: &Volume,
        capability: VolumeCapability,
        pod: &str,
        readonly: bool,
    ) -> Result<(), Status> {
        let request = self.publish_request(volume, capability, pod, readonly);
        self.block_on(async { Self::node().await.node_publish_volume(request).await })
            .map(drop)
    }

    pub fn unpublish_request(volume: &Volume, pod: &str) -> NodeUnpublishVolumeRequest {
        NodeUnpublishVolumeRequest {
            volume_id: volume.volume_id.clone(),
            target_path: target(pod).display().to_string(),
        }
    }

    pub fn unstage_request(volume: &Volume) -> NodeUnstageVolumeRequest {
        NodeUnstageVolumeRequest {
            volume_id: volume.volume_id.clone(),
            staging_target_path: staging(volume).display().to_string(),
        }
    }

    pub fn try_unpublish(&self, volume: &Volume, pod: &str) -> Result<(), Status> {
        let request = Self::unpublish_request(volume, pod);
        self.block_on(async { Self::node().await.node_unpublish_volume(request).await })
            .map(drop)
    }

    pub fn unpublish(&self, volume: &Volume, pod: &str) {
        self.try_unpublish(volume, pod).expect("unpublished");
        assert!(!target(pod).exists(), "the target is left");
    }

    pub fn unstage(&self, volume: &Volume) -> Result<(), Status> {
        let request = Self::unstage_request(volume);
        self.block_on(async { Self::node().await.node_unstage_volume(request).await })
            .map(drop)
    }

    pub fn stats(&self, volume: &Volume, pod: &str) -> NodeGetVolumeStatsResponse {
        let request = NodeGetVolumeStatsRequest {
            volume_id: volume.volume_id.clone(),
            volume_path: target(pod).display().to_string(),
            ..NodeGetVolumeStatsRequest::default()
        };
        self.block_on(async { Self::node().await.node_get_volume_stats(request).await })
            .expect("stats")
            .into_inner()
    }

    pub fn expand(&self, volume: &Volume, pod: &str, size: i64) -> Result<i64, Status> {
        let request = NodeExpandVolumeRequest {
            volume_id: volume.volume_id.clone(),
            volume_path: target(pod).display().to_string(),
            capacity_range: Some(CapacityRange {
                required_bytes: size,
                limit_bytes: 0,
            }),
            ..NodeExpandVolumeRequest::default()
        };
        self.block_on(async { Self::node().await.node_expand_volume(request).await })
            .map(|answer| answer.into_inner().capacity_bytes)
    }

    /// Runs dyskctl against the store.
    pub fn dyskctl(&self, command: &str) -> String {
        let endpoint = &self.endpoint;
        sh(&format!(
            "dyskctl() {{ \"$DYSK_BIN/dyskctl\" \"$@\"; }}; endpoint={endpoint}; {command}"
        ))
    }

    /// Nothing is attached or mounted.
    pub fn nothing_left(&self) {
        assert_eq!(self.dyskctl("dyskctl list -o json | tr -d ' \\n'"), "[]");
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("a table");
        let left: Vec<_> = mounts.lines().filter(|line| line.contains("nbd")).collect();
        assert!(left.is_empty(), "{left:?}");
    }

    /// No log holds the account's key.
    pub fn nothing_told(&self) {
        for entry in fs::read_dir(WORK).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.extension().is_some_and(|end| end == "log") {
                let text = fs::read(&path).expect("a log");
                for key in [DEFAULT_KEY, &self.key] {
                    let key = key.as_bytes();
                    let found = text.windows(key.len()).any(|window| window == key);
                    assert!(!found, "{} holds the key", path.display());
                }
            }
        }
    }

    /// How often a daemon has handed its disks over to the next.
    pub fn handed_over(&self) -> usize {
        let log = fs::read_to_string(format!("{WORK}/dyskd.log")).expect("a log");
        log.lines()
            .filter(|line| line.ends_with(" handed over"))
            .count()
    }

    /// The last line of the plugin's log that says `text`.
    pub fn logged(&self, text: &str) -> String {
        sh(&format!(
            "cat {WORK}/csi-dysk*.log | grep -a '{text}' | tail -n 1"
        ))
    }
}

/// How many mounts there are of `device`.
pub fn mounts_of(device: &str) -> usize {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("a table");
    let of = |line: &&str| line.contains(&format!(" {device} "));
    mounts.lines().filter(of).count()
}

pub fn staging(volume: &Volume) -> PathBuf {
    let name = volume.volume_id.rsplit('/').next().expect("a name");
    Path::new("/mnt/a/staging").join(name)
}

pub fn target(pod: &str) -> PathBuf {
    Path::new("/mnt/b/pods").join(pod).join("mount")
}

pub fn mounted(kind: &str) -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode {
            mode: Mode::SingleNodeWriter.into(),
        }),
        access_type: Some(AccessType::Mount(MountVolume {
            fs_type: kind.into(),
            ..MountVolume::default()
        })),
    }
}

pub fn raw() -> VolumeCapability {
    VolumeCapability {
        access_type: Some(AccessType::Block(BlockVolume {})),
        ..mounted("")
    }
}

#[track_caller]
pub fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, text: &str) {
    let status = answer.expect_err("refused");
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().contains(text), "{status}");
}
