//! The chart and what checks it: helm, kubeconform and the schemas that
//! `tests/deploy/prepare` puts into `build/deploy`.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// The oldest version of Kubernetes that the chart takes, and the newest that
/// there are schemas of.
pub const VERSIONS: [&str; 2] = ["1.29", "1.37"];

/// Sets of values, between them every branch of the templates.
pub const VALUE_SETS: [(&str, &[&str]); 6] = [
    ("defaults", &[]),
    (
        "surge",
        &[
            "dyskd.updateStrategy=RollingUpdate",
            "dyskd.maxSurge=10%",
            "dyskd.extraArgs={--verbose}",
            "dyskd.image=registry.example/csi-dysk:0.0.9",
        ],
    ),
    (
        "host dyskd, attach required",
        &["dyskd.mode=host", "csiDriver.attachRequired=true"],
    ),
    (
        "everything",
        &[
            "namespace.create=true",
            "csiDriver.attachRequired=true",
            "metrics.serviceMonitor.enabled=true",
            "metrics.serviceMonitor.labels.release=prometheus",
            "image.digest=sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
            "imagePullSecrets={registry}",
            "controller.podLabels.team=storage",
            "controller.mountSecret=true",
            "sidecars.snapshotter.groupSnapshots=true",
            "node.maxVolumes=64",
            "priorityClass.create=true",
            "controller.podAnnotations.note=x",
            "volumeSnapshotClass.default=true",
            "rbac.extraSecrets[0].name=other",
            "rbac.extraSecrets[0].namespace=team-a",
        ],
    ),
    (
        "least",
        &[
            "controller.replicas=1",
            "controller.podDisruptionBudget.enabled=false",
            "sidecars.snapshotter.enabled=false",
            "volumeSnapshotClass.enabled=false",
            "networkPolicy.enabled=false",
            "metrics.enabled=false",
            "dyskd.loadModule=false",
            "csiDriver.nodeAllocatableUpdatePeriodSeconds=0",
        ],
    ),
    (
        "a secret for each namespace",
        &[
            "secret.namespace=${pvc.namespace}",
            "rbac.clusterSecrets=true",
            "runDir=/var/run/dysk",
            "kubeletDir=/var/snap/kubelet",
        ],
    ),
];

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A tool of `tests/deploy/prepare`.
pub fn tool(name: &str) -> PathBuf {
    built(&format!("deploy/{name}"), "tests/setup test")
}

/// What `maker` has put into `build`.
pub fn built(name: &str, maker: &str) -> PathBuf {
    let path = root().join("build").join(name);
    assert!(
        path.exists(),
        "{} is not there: run {maker}",
        path.display()
    );
    path
}

pub fn text(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    String::from_utf8_lossy(out).into_owned() + &String::from_utf8_lossy(err)
}

/// `helm WORDS deploy/helm/csi-dysk` with values set.
pub fn helm(words: &[&str], version: &str, values: &[&str]) -> Output {
    let mut command = Command::new(tool("helm"));
    command.args(words).arg(root().join("deploy/helm/csi-dysk"));
    command.args(["--namespace", "dysk", "--kube-version", version]);
    for value in values {
        command.args(["--set", value]);
    }
    // Nothing of the machine's own.
    let home = tempfile::tempdir().expect("temp dir");
    let folders = ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"];
    command.envs(folders.map(|name| (name, home.path())));
    command.output().expect("helm runs")
}

/// What the chart renders to, as YAML.
pub fn render(version: &str, values: &[&str]) -> String {
    let output = helm(&["template", "csi-dysk"], version, values);
    assert!(output.status.success(), "{values:?}: {}", text(&output));
    String::from_utf8(output.stdout).expect("utf-8")
}

/// What the chart renders to, as objects.
pub fn objects(values: &[&str]) -> Vec<Value> {
    parse(&render(VERSIONS[1], values))
}

/// The documents of a YAML text.
pub fn parse(yaml: &str) -> Vec<Value> {
    let program = "import sys, json, yaml\n\
                   print(json.dumps([d for d in yaml.safe_load_all(sys.stdin) if d]))";
    let python = root().join("build/venv/bin/python");
    let output = with_input(Command::new(python).args(["-c", program]), yaml);
    assert!(output.status.success(), "{}", text(&output));
    serde_json::from_slice(&output.stdout).expect("json")
}

/// Runs `command` with `input`.
pub fn with_input(command: &mut Command, input: &str) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut stdin = child.stdin.take().expect("piped");
    let input = input.to_owned();
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().expect("it ends");
    // Who has failed reads no more.
    drop(writer.join().expect("no panic"));
    output
}

/// Checks manifests against the schemas of a version; how many objects were
/// valid, or what is wrong.
pub fn conform(version: &str, yaml: &str) -> Result<u64, String> {
    let schemas = root().join("build/deploy/schemas");
    let place = |folder: &str| {
        format!(
            "{}/{folder}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json",
            schemas.display()
        )
    };
    let mut command = Command::new(tool("kubeconform"));
    command.args(["-strict", "-output", "json", "-summary"]);
    for folder in [&format!("v{version}"), "custom"] {
        command.args(["-schema-location", &place(folder)]);
    }
    let output = with_input(command.arg("-"), yaml);
    if !output.status.success() {
        return Err(text(&output));
    }
    let said: Value = serde_json::from_slice(&output.stdout).expect("json");
    let summary = &said["summary"];
    // One that was passed over is not one that is right.
    if summary["skipped"] != 0 || summary["errors"] != 0 || summary["invalid"] != 0 {
        return Err(said.to_string());
    }
    Ok(summary["valid"].as_u64().expect("a number"))
}

/// The objects of a kind.
pub fn of_kind<'a>(objects: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    objects.iter().filter(move |object| object["kind"] == kind)
}

/// The object of this kind and name.
pub fn find<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    objects
        .iter()
        .find(|object| object["kind"] == kind && object["metadata"]["name"] == name)
        .unwrap_or_else(|| panic!("no {kind} {name}"))
}

/// Strings of a JSON array; none when it is not there.
pub fn strings(value: &Value) -> Vec<String> {
    let items = value.as_array().map(Vec::as_slice).unwrap_or_default();
    items
        .iter()
        .map(|item| item.as_str().expect("a string").to_owned())
        .collect()
}

/// The files of a folder of the repository, with their contents.
pub fn files(folder: &str) -> Vec<(PathBuf, String)> {
    let found = std::fs::read_dir(root().join(folder)).expect("the folder");
    let mut found: Vec<_> = found.map(|entry| entry.expect("an entry").path()).collect();
    found.sort();
    assert!(!found.is_empty(), "{folder} is empty");
    found
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).expect("readable");
            (path, text)
        })
        .collect()
}
