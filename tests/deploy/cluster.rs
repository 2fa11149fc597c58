//! The chart's objects and the controller's real sidecars in a real API server,
//! against csi-dysk and the embedded store: claims applied with kubectl become
//! volumes, grow, are modified, snapshotted, restored, cloned, attached and
//! deleted. There is no kubelet, so nothing is mounted.
//!
//! What runs is what the chart says: the sidecars are started as its Deployment
//! has them, each with the rights of its ServiceAccount and no others.
//! `tests/cluster/prepare` builds them all, which takes long: part of `make
//! soak`.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dysk::blob::source::CredentialSource;
use dysk::blob::{Conditions, Properties};
use dysk::emulator::{Config, DEFAULT_ACCOUNT, DEFAULT_KEY, Emulator, Running, Storage};
use dysk::node::account::open_blob;
use dysk::node::api::{AccountSpec, Secret};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::chart::{self, find, objects, parse, render, root, strings, text, with_input};

const PATIENCE: Duration = Duration::from_secs(120);
const DEADLINE: Duration = Duration::from_secs(10);
const NAMESPACE: &str = "dysk";
const NODE: &str = "node-1:0123456789ab";
/// Of the API server that is built.
const KUBERNETES: &str = "1.36";
const VALUES: [&str; 4] = [
    "namespace.create=true",
    "csiDriver.attachRequired=true",
    "controller.mountSecret=true",
    "sidecars.snapshotter.groupSnapshots=true",
];

/// A program with its output in a file; killed with its owner.
struct Process {
    name: String,
    log: PathBuf,
    child: Child,
}

impl Process {
    fn start(dir: &Path, name: &str, program: &Path, arguments: &[String]) -> Self {
        let log = dir.join(format!("{name}.log"));
        let out = File::create(&log).expect("a log");
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(out.try_clone().expect("a descriptor"))
            .stdout(out)
            .spawn();
        Self {
            child: child.unwrap_or_else(|error| panic!("{}: {error}", program.display())),
            name: name.to_owned(),
            log,
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let running = matches!(self.child.try_wait(), Ok(None));
        if running {
            self.child.kill().expect("it can be killed");
            self.child.wait().expect("a child of ours");
        }
        if std::thread::panicking() {
            let said = fs::read_to_string(&self.log).unwrap_or_default();
            let last: Vec<_> = said.lines().rev().take(15).collect();
            eprintln!("--- {} (running: {running})", self.name);
            for line in last.iter().rev() {
                eprintln!("{line}");
            }
        }
    }
}

fn built(name: &str) -> PathBuf {
    chart::built(&format!("cluster/{name}"), "tests/cluster/prepare")
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}

/// Waits until there is something.
#[track_caller]
fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let give_up = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < give_up, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

struct Cluster {
    processes: Vec<Process>,
    store: Running,
    runtime: tokio::runtime::Runtime,
    admin: PathBuf,
    server: String,
    dir: TempDir,
}

impl Cluster {
    /// etcd, the API server and the controllers that bind, attach and protect.
    fn start() -> Self {
        let store = Emulator::start(Config {
            listen: "127.0.0.1:0".parse().expect("an address"),
            storage: Storage::Memory,
            ..Config::default()
        });
        let dir = tempfile::tempdir().expect("a folder");
        let server = format!("https://127.0.0.1:{}", free_port());
        let mut cluster = Self {
            processes: Vec::new(),
            store: store.expect("the store starts"),
            runtime: tokio::runtime::Runtime::new().expect("a runtime"),
            admin: dir.path().join("admin"),
            server,
            dir,
        };
        cluster.start_api();
        let admin = cluster.admin.display();
        let controllers = format!(
            "--kubeconfig={admin} --leader-elect=false --use-service-account-credentials=true \
             --service-account-private-key-file={} \
             --controllers=persistentvolume-binder-controller,\
             persistentvolume-attach-detach-controller,persistentvolume-expander-controller,\
             persistentvolume-protection-controller,persistentvolumeclaim-protection-controller,\
             serviceaccount-controller,namespace-controller,garbage-collector-controller",
            cluster.path("sa.key")
        );
        cluster.run("kube-controller-manager", &controllers);
        cluster
    }

    fn start_api(&mut self) {
        let [etcd, peer] = [(); 2].map(|()| format!("http://127.0.0.1:{}", free_port()));
        let data = self.path("etcd");
        self.run(
            "etcd",
            &format!(
                "--name=one --data-dir={data} --unsafe-no-fsync --listen-client-urls={etcd} \
                 --advertise-client-urls={etcd} --listen-peer-urls={peer} \
                 --initial-advertise-peer-urls={peer} --initial-cluster=one={peer}"
            ),
        );
        let key = self.path("sa.key");
        let made = Command::new("openssl")
            .args(["genrsa", "-out", &key, "2048"])
            .output()
            .expect("openssl runs");
        assert!(made.status.success(), "{}", text(&made));
        let token = format!("{:032x}", rand::random::<u128>());
        let tokens = self.path("tokens");
        fs::write(&tokens, format!("{token},admin,admin,system:masters\n")).expect("written");
        let (port, certificates) = (
            self.server.rsplit(':').next().expect("a port").to_owned(),
            self.path("certificates"),
        );
        self.run(
            "kube-apiserver",
            &format!(
                "--etcd-servers={etcd} --bind-address=127.0.0.1 --secure-port={port} \
                 --advertise-address=127.0.0.1 --endpoint-reconciler-type=none \
                 --cert-dir={certificates} --token-auth-file={tokens} --authorization-mode=RBAC \
                 --service-cluster-ip-range=10.0.0.0/24 --service-account-key-file={key} \
                 --service-account-signing-key-file={key} --allow-privileged=true \
                 --service-account-issuer=https://kubernetes.default.svc"
            ),
        );
        self.write_config(&self.admin, &token);
        eventually("the API server is ready", || {
            self.kubectl(&["get", "--raw", "/readyz"], "").ok()
        });
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn run(&mut self, name: &str, arguments: &str) {
        let started = Process::start(self.dir.path(), name, &built(name), &words(arguments));
        self.processes.push(started);
    }

    /// How a client with `token` finds the API server.
    fn write_config(&self, path: &Path, token: &str) {
        let authority = self.path("certificates/apiserver.crt");
        let config = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {
                "server": self.server, "certificate-authority": authority,
            }}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        });
        fs::write(path, config.to_string()).expect("written");
    }

    fn kubectl(&self, words: &[&str], input: &str) -> Result<String, String> {
        let mut command = Command::new(built("kubectl"));
        command.arg("--kubeconfig").arg(&self.admin).args(words);
        command.env("HOME", self.dir.path());
        let output = with_input(&mut command, input);
        if output.status.success() {
            Ok(String::from_utf8(output.stdout).expect("utf-8"))
        } else {
            Err(text(&output))
        }
    }

    #[track_caller]
    fn apply(&self, yaml: &str) {
        let applied = self.kubectl(&["apply", "--server-side", "-f", "-"], yaml);
        applied.unwrap_or_else(|error| panic!("{error}"));
    }

    /// Applies an example of the repository.
    #[track_caller]
    fn example(&self, name: &str) {
        let path = root().join("deploy/examples").join(name);
        self.apply(&fs::read_to_string(path).expect("readable"));
    }

    /// An object as it is now.
    fn get(&self, kind: &str, name: &str) -> Option<Value> {
        let got = self.kubectl(&["get", kind, name, "-o", "json"], "");
        got.ok()
            .map(|json| serde_json::from_str(&json).expect("json"))
    }

    fn all(&self, kind: &str) -> Vec<Value> {
        let got = self.kubectl(&["get", kind, "-A", "-o", "json"], "");
        let list: Value = serde_json::from_str(&got.expect(kind)).expect("json");
        list["items"].as_array().expect("items").clone()
    }

    #[track_caller]
    fn patch(&self, kind: &str, name: &str, patch: &Value) {
        let patch = patch.to_string();
        let patched = self.kubectl(&["patch", kind, name, "--type=merge", "-p", &patch], "");
        patched.unwrap_or_else(|error| panic!("{error}"));
    }

    #[track_caller]
    fn delete(&self, kind: &str, name: &str) {
        // Nobody on a node ends a pod.
        let words = [
            "delete",
            kind,
            name,
            "--wait=false",
            "--grace-period=0",
            "--force",
        ];
        self.kubectl(&words, "")
            .unwrap_or_else(|error| panic!("{error}"));
    }

    /// The volume of a claim, once it is bound.
    #[track_caller]
    fn bound(&self, claim: &str) -> Value {
        let claim = eventually(&format!("claim {claim} is bound"), || {
            self.get("pvc", claim)
                .filter(|claim| claim["status"]["phase"] == "Bound")
        });
        let volume = claim["spec"]["volumeName"].as_str().expect("a name");
        self.get("pv", volume).expect("there")
    }

    /// The blob of a volume, if it is there.
    fn blob(&self, volume: &Value) -> Option<Properties> {
        let handle = volume["spec"]["csi"]["volumeHandle"].as_str();
        let handle = handle.expect("a handle");
        let mut parts = handle.splitn(3, '/').skip(1);
        let (container, blob) = (parts.next()?, parts.next()?);
        let spec = AccountSpec {
            name: DEFAULT_ACCOUNT.into(),
            endpoint: self.store.url().to_owned(),
            credential: Secret(CredentialSource::Key(DEFAULT_KEY.into())),
            ca_file: None,
        };
        self.runtime.block_on(async {
            let (_, blob) = open_blob(&spec, container, blob).await.expect("it opens");
            match blob.properties(&Conditions::default(), DEADLINE).await {
                Ok(seen) => Some(seen),
                Err(error) if error.is_not_found() => None,
                Err(error) => panic!("{error}"),
            }
        })
    }

    /// The driver's controller and its sidecars, as the chart has them.
    fn start_driver(&mut self) {
        for kind in ["snapshot.storage", "groupsnapshot.storage"] {
            for entry in fs::read_dir(built("crd")).expect("definitions") {
                let path = entry.expect("an entry").path();
                let name = path.file_name().and_then(|name| name.to_str());
                if name.is_some_and(|name| name.starts_with(kind)) {
                    self.apply(&fs::read_to_string(&path).expect("readable"));
                }
            }
        }
        eventually("the definitions are served", || {
            let classes = "volumegroupsnapshotclasses.groupsnapshot.storage.k8s.io";
            self.kubectl(&["get", classes], "").ok()
        });
        self.apply(&render(KUBERNETES, &VALUES));
        self.apply_secret();
        let token = ["create", "token", "csi-dysk-controller", "-n", NAMESPACE];
        let token = self.kubectl(&token, "").expect("a token");
        let config = self.dir.path().join("controller");
        self.write_config(&config, token.trim());

        let socket = self.path("csi.sock");
        let plugin = words(&format!(
            "--mode=controller --endpoint=unix://{socket} --secrets-dir={}",
            self.path("secret")
        ));
        let program = Path::new(env!("CARGO_BIN_EXE_csi-dysk"));
        let plugin = Process::start(self.dir.path(), "csi-dysk", program, &plugin);
        self.processes.push(plugin);
        eventually("csi-dysk listens", || fs::metadata(&socket).ok());

        let rendered = objects(&VALUES);
        let deployment = find(&rendered, "Deployment", "csi-dysk-controller");
        let containers = deployment["spec"]["template"]["spec"]["containers"].as_array();
        let mut started = Vec::new();
        for container in containers.expect("containers") {
            let name = container["name"].as_str().expect("a name");
            // The other one is the driver; the last cannot be had.
            if !name.starts_with("csi-") || name == "csi-dysk" {
                continue;
            }
            let mut arguments: Vec<String> = strings(&container["args"])
                .into_iter()
                .map(|argument| match argument.split_once('=') {
                    Some(("--csi-address", _)) => format!("--csi-address={socket}"),
                    Some(("--http-endpoint", _)) => {
                        format!("--http-endpoint=127.0.0.1:{}", free_port())
                    }
                    _ => argument.replace("$(NAMESPACE)", NAMESPACE),
                })
                .collect();
            arguments.push(format!("--kubeconfig={}", config.display()));
            let process = Process::start(self.dir.path(), name, &built(name), &arguments);
            self.processes.push(process);
            started.push(name.to_owned());
        }
        let all = [
            "csi-attacher",
            "csi-provisioner",
            "csi-resizer",
            "csi-snapshotter",
        ];
        started.sort();
        assert_eq!(started, all);
        // The cluster's own, with the cluster's rights.
        let admin = self.admin.display().to_string();
        let gates = "--feature-gates=CSIVolumeGroupSnapshot=true";
        self.run(
            "snapshot-controller",
            &format!("--kubeconfig={admin} {gates}"),
        );
    }

    /// The account's, in the cluster and as the controller has it mounted.
    fn apply_secret(&self) {
        let values = [
            ("accountname", DEFAULT_ACCOUNT.to_owned()),
            ("accountkey", DEFAULT_KEY.to_owned()),
            ("endpoint", self.store.url().to_owned()),
        ];
        let folder = self.dir.path().join("secret");
        fs::create_dir(&folder).expect("a folder");
        for (key, value) in &values {
            fs::write(folder.join(key), value).expect("written");
        }
        let data: serde_json::Map<_, _> = values
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value.into()))
            .collect();
        let secret = serde_json::json!({
            "apiVersion": "v1", "kind": "Secret", "type": "azure/dysk",
            "metadata": {"name": "dyskcreds", "namespace": NAMESPACE},
            "stringData": data,
        });
        self.apply(&secret.to_string());
    }

    /// No program has told the account's key.
    fn nothing_told(&self) {
        for process in &self.processes {
            let said = fs::read_to_string(&process.log).expect("a log");
            assert!(
                !said.contains(DEFAULT_KEY),
                "{} tells the key",
                process.name
            );
        }
    }
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

#[test]
#[ignore = "takes what tests/cluster/prepare builds: part of make soak"]
fn claims_become_volumes_in_a_real_api_server() {
    let mut cluster = Cluster::start();
    cluster.start_driver();

    // A claim becomes a bound volume.
    cluster.example("mssql.yaml");
    let volume = cluster.bound("mssql-data");
    assert_eq!(volume["spec"]["csi"]["driver"], "csi-dysk");
    assert!(!volume.to_string().contains(DEFAULT_KEY));
    let made = cluster.blob(&volume).expect("there");
    assert!(
        (32 * GIB..32 * GIB + MIB).contains(&made.size),
        "{}",
        made.size
    );
    println!("ok bound");

    grows(&cluster, &volume);
    is_modified(&cluster);
    let copies = is_snapshotted(&cluster);
    groups(&cluster);
    is_attached(&cluster);
    is_deleted(&cluster, &volume, &copies);
    cluster.nothing_told();
}

/// The claim asks for more: the blob has it, and the filesystem waits for a node.
fn grows(cluster: &Cluster, volume: &Value) {
    let size = serde_json::json!({"spec": {"resources": {"requests": {"storage": "40Gi"}}}});
    cluster.patch("pvc", "mssql-data", &size);
    let name = volume["metadata"]["name"].as_str().expect("a name");
    eventually("the volume has grown", || {
        let volume = cluster.get("pv", name).expect("there");
        (volume["spec"]["capacity"]["storage"] == "40Gi").then_some(())
    });
    let grown = cluster.blob(volume).expect("there").size;
    assert!((40 * GIB..40 * GIB + MIB).contains(&grown), "{grown}");
    eventually("the claim waits for a node", || {
        let claim = cluster.get("pvc", "mssql-data").expect("there");
        let status = claim["status"].to_string();
        (status.contains("FileSystemResizePending") || status.contains("NodeResizePending"))
            .then_some(())
    });
    println!("ok grown");
}

/// A VolumeAttributesClass limits it.
fn is_modified(cluster: &Cluster) {
    cluster.apply(
        r#"{"apiVersion": "storage.k8s.io/v1", "kind": "VolumeAttributesClass",
            "metadata": {"name": "slow"}, "driverName": "csi-dysk",
            "parameters": {"iops": "500", "bandwidth": "60MiB"}}"#,
    );
    let class = serde_json::json!({"spec": {"volumeAttributesClassName": "slow"}});
    cluster.patch("pvc", "mssql-data", &class);
    eventually("the claim has its class", || {
        let claim = cluster.get("pvc", "mssql-data").expect("there");
        (claim["status"]["currentVolumeAttributesClassName"] == "slow").then_some(())
    });
    println!("ok modified");
}

/// A snapshot, a volume restored from it and a clone: the examples.
fn is_snapshotted(cluster: &Cluster) -> Vec<Value> {
    let sized = |example: &str| {
        let path = root().join("deploy/examples").join(example);
        let yaml = fs::read_to_string(path).expect("readable");
        // Its source has grown above.
        cluster.apply(&yaml.replace("storage: 32Gi", "storage: 40Gi"));
    };
    sized("snapshot.yaml");
    sized("clone.yaml");
    eventually("the snapshot is ready", || {
        let snapshot = cluster.get("volumesnapshot", "mssql-before-upgrade");
        (snapshot?["status"]["readyToUse"] == true).then_some(())
    });
    let copies = ["mssql-restored", "mssql-clone"].map(|claim| {
        let copy = cluster.bound(claim);
        let size = cluster.blob(&copy).expect("there").size;
        assert!(
            (40 * GIB..40 * GIB + MIB).contains(&size),
            "{claim}: {size}"
        );
        copy
    });
    println!("ok snapshotted, restored and cloned");
    copies.into()
}

/// Two claims' volumes at one moment.
fn groups(cluster: &Cluster) {
    for claim in ["mssql-data", "mssql-clone"] {
        let label = serde_json::json!({"metadata": {"labels": {"together": "yes"}}});
        cluster.patch("pvc", claim, &label);
    }
    cluster.apply(
        r#"{"apiVersion": "groupsnapshot.storage.k8s.io/v1", "kind": "VolumeGroupSnapshot",
            "metadata": {"name": "both", "namespace": "default"},
            "spec": {"volumeGroupSnapshotClassName": "csi-dysk",
                     "source": {"selector": {"matchLabels": {"together": "yes"}}}}}"#,
    );
    eventually("the group is ready", || {
        let group = cluster.get("volumegroupsnapshot", "both")?;
        (group["status"]["readyToUse"] == true).then_some(())
    });
    let contents = cluster.all("volumegroupsnapshotcontents");
    let handles = &contents[0]["status"]["volumeSnapshotInfoList"];
    assert_eq!(handles.as_array().map(Vec::len), Some(2), "{contents:?}");
    cluster.delete("volumegroupsnapshot", "both");
    eventually("the group is gone", || {
        cluster
            .all("volumegroupsnapshotcontents")
            .is_empty()
            .then_some(())
    });
    println!("ok grouped");
}

/// A pod on a node: the volume is published to it, and taken back.
fn is_attached(cluster: &Cluster) {
    let managed = "volumes.kubernetes.io/controller-managed-attach-detach";
    cluster.apply(
        &serde_json::json!({"apiVersion": "v1", "kind": "Node",
            "metadata": {"name": "node-1", "annotations": {managed: "true"}}})
        .to_string(),
    );
    let node = cluster.get("node", "node-1").expect("there");
    cluster.apply(
        &serde_json::json!({"apiVersion": "storage.k8s.io/v1", "kind": "CSINode",
            "metadata": {"name": "node-1", "ownerReferences": [{
                "apiVersion": "v1", "kind": "Node", "name": "node-1",
                "uid": node["metadata"]["uid"]}]},
            "spec": {"drivers": [{"name": "csi-dysk", "nodeID": NODE, "topologyKeys": null}]}})
        .to_string(),
    );
    let yaml = fs::read_to_string(root().join("deploy/examples/raw-block.yaml"));
    let mut example = parse(&yaml.expect("readable"));
    example[1]["spec"]["nodeName"] = "node-1".into();
    eventually("the namespace has its account", || {
        cluster.get("serviceaccount", "default")
    });
    for object in &example {
        cluster.apply(&object.to_string());
    }
    let volume = cluster.bound("raw-data");
    let published = || {
        let seen = cluster.blob(&volume).expect("there").metadata;
        seen.into_iter().find(|(key, _)| key == "dyskpublished")
    };
    let attachment = eventually("the volume is attached", || {
        let all = cluster.all("volumeattachment");
        all.into_iter()
            .find(|one| one["status"]["attached"] == true)
    });
    assert_eq!(attachment["spec"]["attacher"], "csi-dysk");
    assert_eq!(attachment["status"]["attachmentMetadata"]["node"], NODE);
    let (_, to) = published().expect("it is said");
    assert!(to.contains("node-1"), "{to}");
    cluster.delete("pod", "raw-block");
    eventually("the volume is detached", || {
        cluster.all("volumeattachment").is_empty().then_some(())
    });
    let left = published().map(|(_, to)| to).unwrap_or_default();
    assert!(!left.contains("node-1"), "{left}");
    println!("ok attached and detached");
}

/// A volume waits for its snapshot to be deleted; then all are gone.
fn is_deleted(cluster: &Cluster, volume: &Value, copies: &[Value]) {
    let name = volume["metadata"]["name"].as_str().expect("a name");
    cluster.delete("pvc", "mssql-data");
    eventually("its deletion is refused", || {
        let events = cluster.all("events");
        let of = |event: &&Value| {
            event["involvedObject"]["name"] == name && event["reason"] == "VolumeFailedDelete"
        };
        let event = events.iter().find(of)?;
        let message = event["message"].as_str()?;
        assert!(message.contains("it has snapshots"), "{message}");
        Some(())
    });
    assert!(cluster.blob(volume).is_some());
    cluster.delete("volumesnapshot", "mssql-before-upgrade");
    for claim in ["mssql-restored", "mssql-clone", "raw-data"] {
        cluster.delete("pvc", claim);
    }
    eventually("all volumes are gone", || {
        cluster.all("pv").is_empty().then_some(())
    });
    for volume in copies.iter().chain([volume]) {
        assert!(cluster.blob(volume).is_none(), "{volume}");
    }
    println!("ok deleted");
}
