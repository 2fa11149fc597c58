//! What the manifests mean: options, parameters and keys that the programs
//! really know, the rights that the sidecars need and no others, and a data path
//! that the plugin's life does not touch.

use std::collections::BTreeSet;
use std::process::Command;

use crate::support::chart;
use crate::support::chart::{VALUE_SETS, files, find, objects, of_kind, parse, root, strings};
use dysk::node::secret::KEYS;
use serde_json::Value;

/// The sidecars whose sources Go's module proxy does not have, and the options
/// of theirs that their documentation names.
const DOCUMENTED: [(&str, &[&str]); 2] = [
    ("livenessprobe", &["csi-address", "http-endpoint", "v"]),
    (
        "csi-node-driver-registrar",
        &[
            "csi-address",
            "kubelet-registration-path",
            "http-endpoint",
            "v",
        ],
    ),
];

/// `--help` of one of our programs.
fn help(program: &str) -> String {
    let path = match program {
        "csi-dysk" => env!("CARGO_BIN_EXE_csi-dysk"),
        "dyskd" => env!("CARGO_BIN_EXE_dyskd"),
        other => panic!("{other} is none of ours"),
    };
    let output = Command::new(path).arg("--help").output().expect("it runs");
    chart::text(&output)
}

/// Whether `--help` names the option.
fn names(help: &str, option: &str) -> bool {
    let words = help.split(|c: char| c.is_whitespace() || ",[]=".contains(c));
    words
        .into_iter()
        .any(|word| word.trim_end_matches("...") == option)
}

fn containers(object: &Value) -> impl Iterator<Item = &Value> {
    let pod = &object["spec"]["template"]["spec"];
    ["initContainers", "containers"]
        .into_iter()
        .filter_map(|list| pod[list].as_array())
        .flatten()
}

/// `csi-provisioner` of `registry.k8s.io/sig-storage/csi-provisioner:v6.4.0`.
fn image_name(container: &Value) -> &str {
    let image = container["image"].as_str().expect("an image");
    let name = image.rsplit('/').next().expect("a part");
    name.split([':', '@']).next().expect("a part")
}

fn prepared(sidecar: &str, file: &str) -> Option<BTreeSet<String>> {
    let path = root()
        .join("build/deploy/sidecars")
        .join(sidecar)
        .join(file);
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.lines().map(str::to_owned).collect())
}

#[test]
fn every_option_is_one_that_the_program_knows() {
    let mut checked = BTreeSet::new();
    for (_, values) in VALUE_SETS {
        for object in objects(values) {
            for container in containers(&object) {
                let args = strings(&container["args"]);
                let command = strings(&container["command"]);
                let options = args.iter().filter_map(|arg| arg.strip_prefix("--"));
                let program = match command.first().map(String::as_str) {
                    Some("dyskd-pod") => "dyskd",
                    Some(own) => own,
                    None => image_name(container),
                };
                if ["modprobe", "install"].contains(&program) {
                    assert!(args.is_empty());
                    continue;
                }
                for option in options {
                    let name = option.split('=').next().expect("a part");
                    let known = match (program, prepared(program, "options")) {
                        ("csi-dysk" | "dyskd", _) => names(&help(program), &format!("--{name}")),
                        // klog's.
                        (_, Some(options)) => options.contains(name) || name == "v",
                        (_, None) => DOCUMENTED
                            .iter()
                            .any(|(sidecar, known)| *sidecar == program && known.contains(&name)),
                    };
                    assert!(known, "{program} has no option --{name}");
                    checked.insert(program.to_owned());
                }
            }
        }
    }
    for program in [
        "csi-dysk",
        "dyskd",
        "csi-provisioner",
        "csi-attacher",
        "csi-resizer",
        "csi-snapshotter",
    ] {
        assert!(checked.contains(program), "{program} was not checked");
    }
    assert!(
        !names(&help("dyskd"), "--keep"),
        "a part of an option's name is none"
    );
}

/// The part of the driver that says what it takes.
fn source(file: &str) -> String {
    let path = root().join("src/csi").join(file);
    let text = std::fs::read_to_string(&path).expect("the driver's source");
    // What its tests say is not what it takes.
    text.split("#[cfg(test)]")
        .next()
        .expect("a part")
        .to_owned()
}

#[test]
fn every_parameter_is_one_that_the_driver_knows() {
    let sidecar = prepared("csi-provisioner", "parameters").expect("tests/setup test");
    let snapshotter = prepared("csi-snapshotter", "parameters").expect("tests/setup test");
    let known = source("parameters.rs");
    for (_, values) in VALUE_SETS {
        let objects = objects(values);
        let classes = of_kind(&objects, "StorageClass").map(|class| (class, &sidecar));
        let snapshots = of_kind(&objects, "VolumeSnapshotClass").map(|class| (class, &snapshotter));
        let groups = of_kind(&objects, "VolumeGroupSnapshotClass");
        let snapshots = snapshots.chain(groups.map(|class| (class, &snapshotter)));
        for (class, sidecar) in classes.chain(snapshots) {
            for (name, value) in class["parameters"].as_object().expect("parameters") {
                assert!(value.is_string(), "{name}: {value}");
                match name.strip_prefix("csi.storage.k8s.io/") {
                    Some(own) => assert!(sidecar.contains(own), "no sidecar knows {name}"),
                    None => {
                        let quoted = format!("\"{name}\"");
                        let there = known.contains(&quoted);
                        assert!(there, "the driver has no parameter {name}");
                    }
                }
            }
        }
    }
    assert!(
        !sidecar.contains("node-stage-secret"),
        "a part of a name is none"
    );
}

#[test]
fn every_key_of_a_secret_is_one_that_the_driver_reads() {
    let mut keys = BTreeSet::new();
    for (path, yaml) in files("deploy/examples") {
        let secrets = parse(&yaml);
        for secret in of_kind(&secrets, "Secret").filter(|secret| secret["type"] == "azure/dysk") {
            for (key, value) in secret["stringData"].as_object().expect("stringData") {
                let value = value.as_str().expect("a string");
                assert!(
                    value.starts_with("REPLACE"),
                    "{}: {key} is real",
                    path.display()
                );
                assert!(KEYS.contains(&key.as_str()), "the driver reads no {key}");
                keys.insert(key.clone());
            }
        }
    }
    assert!(
        keys.contains("accountname") && keys.contains("accountkey"),
        "{keys:?}"
    );
}

/// Rights as (group, resource, verb).
type Rights = BTreeSet<(String, String, String)>;

fn rights(objects: &[Value], skip: &[&str]) -> Rights {
    let roles = of_kind(objects, "ClusterRole").chain(of_kind(objects, "Role"));
    let mut rights = Rights::new();
    for rule in roles.flat_map(|role| role["rules"].as_array().expect("rules")) {
        for group in strings(&rule["apiGroups"]) {
            for resource in strings(&rule["resources"]) {
                if skip.contains(&resource.as_str()) {
                    continue;
                }
                for verb in strings(&rule["verbs"]) {
                    rights.insert((group.clone(), resource.clone(), verb));
                }
            }
        }
    }
    rights
}

/// What a sidecar's own documentation says it needs, but for what serves features
/// that are not used here.
fn needed(container: &Value) -> Rights {
    let sidecar = image_name(container);
    let groups = strings(&container["args"])
        .iter()
        .any(|argument| argument.contains("CSIVolumeGroupSnapshot=true"));
    let unused: &[&str] = match sidecar {
        // Capacity is not published: any account takes any volume.
        "csi-provisioner" => &["csistoragecapacities", "pods", "replicasets"],
        // --handle-volume-inuse-error=false looks for no pods.
        "csi-resizer" => &["pods"],
        // Groups of volumes are a feature of their own.
        "csi-snapshotter" if !groups => &[
            "volumegroupsnapshotclasses",
            "volumegroupsnapshotcontents",
            "volumegroupsnapshotcontents/status",
        ],
        _ => &[],
    };
    let folder = format!("build/deploy/sidecars/{sidecar}");
    let published = files(&folder)
        .into_iter()
        .filter(|(path, _)| path.extension().is_some_and(|end| end == "yaml"))
        .flat_map(|(_, yaml)| parse(&yaml));
    rights(&published.collect::<Vec<_>>(), unused)
}

#[test]
fn the_controller_may_do_what_its_sidecars_need_and_nothing_else() {
    for (name, values) in VALUE_SETS {
        let objects = objects(values);
        let controller = find(&objects, "Deployment", "csi-dysk-controller");
        let mut need = Rights::new();
        for container in containers(controller) {
            let sidecar = image_name(container);
            if prepared(sidecar, "options").is_some() {
                need.extend(needed(container));
            }
        }
        if !containers(controller).any(|container| image_name(container) == "csi-snapshotter") {
            need.retain(|(group, ..)| group != "snapshot.storage.k8s.io");
        }
        // The Secrets, one by one.
        need.insert((String::new(), "secrets".into(), "get".into()));
        let have = rights(&objects, &[]);
        let missing: Vec<_> = need.difference(&have).collect();
        assert!(missing.is_empty(), "{name}: missing {missing:?}");
        let more: Vec<_> = have.difference(&need).collect();
        assert!(more.is_empty(), "{name}: not needed {more:?}");
    }
}

#[test]
fn secrets_are_read_by_name_unless_asked_otherwise() {
    let reads = |objects: &[Value]| -> Vec<(String, Vec<String>)> {
        let roles = of_kind(objects, "ClusterRole").chain(of_kind(objects, "Role"));
        roles
            .flat_map(|role| {
                let rules = role["rules"].as_array().expect("rules").iter();
                rules.map(move |rule| (role, rule))
            })
            .filter(|(_, rule)| strings(&rule["resources"]).contains(&"secrets".into()))
            .map(|(role, rule)| {
                assert_eq!(strings(&rule["verbs"]), ["get"]);
                let at = role["metadata"]["namespace"]
                    .as_str()
                    .unwrap_or("everywhere");
                (at.to_owned(), strings(&rule["resourceNames"]))
            })
            .collect()
    };
    let named = |at: &str, name: &str| (at.to_owned(), vec![name.to_owned()]);
    assert_eq!(reads(&objects(&[])), [named("dysk", "dyskcreds")]);
    let two = [
        "storageClasses[0].name=csi-dysk",
        "storageClasses[0].secret.name=team",
        "storageClasses[0].secret.namespace=team-a",
    ];
    let mut found = reads(&objects(&two));
    found.sort();
    assert_eq!(found, [named("dysk", "dyskcreds"), named("team-a", "team")]);
    let all = objects(&["rbac.clusterSecrets=true"]);
    assert_eq!(reads(&all), [("everywhere".to_owned(), Vec::new())]);
    // Nodes get theirs from the kubelet.
    let objects = objects(&[]);
    for binding in of_kind(&objects, "ClusterRoleBinding").chain(of_kind(&objects, "RoleBinding")) {
        for subject in binding["subjects"].as_array().expect("subjects") {
            assert_eq!(subject["name"], "csi-dysk-controller");
        }
    }
}

#[test]
fn the_plugin_s_life_does_not_touch_the_data_path() {
    let dyskd = |values: &[&str]| find(&objects(values), "DaemonSet", "csi-dysk-dyskd").clone();
    let usual = dyskd(&[]);
    let spec = &usual["spec"]["template"]["spec"];
    assert_eq!(usual["spec"]["updateStrategy"]["type"], "OnDelete");
    assert_eq!(
        (&spec["hostPID"], &spec["hostNetwork"]),
        (&true.into(), &true.into())
    );
    let (args, daemon) = {
        let mut own = containers(&usual).filter(|c| c["name"] == "dyskd");
        let daemon = own.next().expect("dyskd");
        (strings(&daemon["args"]), daemon)
    };
    for option in ["--takeover", "--keep-attached"] {
        assert!(args.contains(&option.to_owned()), "{args:?}");
    }
    // Two pods on a node when one takes over from the other: no port is taken.
    assert_eq!(daemon["ports"], Value::Null);
    assert_eq!(
        daemon["resources"]["limits"],
        Value::Null,
        "staged data would be killed for"
    );
    assert!(spec["terminationGracePeriodSeconds"].as_u64() >= Some(180));

    let moved = dyskd(&[
        "node.log=debug",
        "controller.replicas=3",
        "sidecars.livenessProbe.image=registry.example/livenessprobe:v9",
        "csiDriver.attachRequired=true",
    ]);
    assert_eq!(usual["spec"], moved["spec"]);
    let apart = |tag: &str| {
        let tag = format!("image.tag={tag}");
        dyskd(&[&tag, "dyskd.image=registry.example/csi-dysk:1"])
    };
    assert_eq!(apart("v8")["spec"], apart("v9")["spec"]);

    let surge = dyskd(&["dyskd.updateStrategy=RollingUpdate"]);
    let rolling = &surge["spec"]["updateStrategy"]["rollingUpdate"];
    assert_eq!(
        (&rolling["maxSurge"], &rolling["maxUnavailable"]),
        (&1.into(), &0.into())
    );
    let host = objects(&["dyskd.mode=host"]);
    assert!(of_kind(&host, "DaemonSet").all(|set| set["metadata"]["name"] == "csi-dysk-node"));
}

#[test]
fn every_container_is_bounded_and_no_more_privileged_than_it_has_to_be() {
    for (name, values) in VALUE_SETS {
        for object in objects(values) {
            for container in containers(&object) {
                let who = format!(
                    "{name}: {} of {}",
                    container["name"], object["metadata"]["name"]
                );
                assert!(
                    container["resources"]["requests"]["memory"].is_string(),
                    "{who}"
                );
                let security = &container["securityContext"];
                assert_eq!(security["readOnlyRootFilesystem"], true, "{who}");
                let node = object["kind"] == "DaemonSet";
                let own = ["dyskd", "csi-dysk"]
                    .map(Value::from)
                    .contains(&container["name"]);
                if node && own {
                    assert_eq!(security["privileged"], true, "{who}");
                    continue;
                }
                assert_ne!(security["privileged"], true, "{who}");
                assert_eq!(security["allowPrivilegeEscalation"], false, "{who}");
                assert_eq!(strings(&security["capabilities"]["drop"]), ["ALL"], "{who}");
                assert_eq!(security["runAsNonRoot"] == true, !node, "{who}");
            }
        }
    }
}

#[test]
fn every_pod_has_a_priority_above_those_with_disks() {
    let used = |values: &[&str]| {
        let all = objects(values);
        let pods = all.iter().filter(|object| containers(object).count() > 0);
        let class = |pod: &Value| pod["spec"]["template"]["spec"]["priorityClassName"].clone();
        let classes: Vec<_> = pods.map(class).collect();
        assert_eq!(classes.len(), 3);
        (classes, of_kind(&all, "PriorityClass").count())
    };
    let (classes, made) = used(&[]);
    assert_eq!(made, 0);
    for class in classes {
        let class = class.as_str().expect("a class");
        assert!(class.starts_with("system-"), "{class}");
    }
    let (classes, made) = used(&["priorityClass.create=true", "priorityClass.name=disks"]);
    assert_eq!(made, 1);
    assert!(classes.iter().all(|class| class == "disks"), "{classes:?}");
}

#[test]
fn examples_refer_to_what_the_chart_makes() {
    let made = objects(&[]);
    let exists = |kind: &str, name: &Value| {
        of_kind(&made, kind).any(|object| &object["metadata"]["name"] == name)
    };
    for (path, yaml) in files("deploy/examples") {
        let path = path.display();
        let objects = parse(&yaml);
        for claim in of_kind(&objects, "PersistentVolumeClaim") {
            let class = &claim["spec"]["storageClassName"];
            assert!(
                class == "" || exists("StorageClass", class),
                "{path}: {class}"
            );
        }
        for volume in of_kind(&objects, "PersistentVolume") {
            let csi = &volume["spec"]["csi"];
            assert!(exists("CSIDriver", &csi["driver"]), "{path}");
            let handle = csi["volumeHandle"].as_str().expect("a handle");
            let of = ["container", "blob"]
                .map(|part| csi["volumeAttributes"][part].as_str().expect("a part"));
            assert!(
                handle.ends_with(&format!("/{}/{}", of[0], of[1])),
                "{path}: {handle}"
            );
            dysk::blob::reference::VolumeRef::parse(handle).expect("a volume");
        }
        for snapshot in of_kind(&objects, "VolumeSnapshot") {
            let class = &snapshot["spec"]["volumeSnapshotClassName"];
            assert!(exists("VolumeSnapshotClass", class), "{path}: {class}");
        }
    }
}
