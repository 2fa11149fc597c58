//! The Helm chart, the manifests rendered from it and the examples: they lint,
//! they fit the schemas of the oldest and the newest Kubernetes, and the checks
//! themselves find what is wrong.

use std::process::Command;

use crate::support::chart::{VALUE_SETS, VERSIONS, conform, files, helm, render, root, text, tool};

#[test]
fn the_chart_lints() {
    for (name, values) in VALUE_SETS {
        for version in VERSIONS {
            let output = helm(&["lint", "--strict"], version, values);
            assert!(
                output.status.success(),
                "{name}, {version}: {}",
                text(&output)
            );
        }
    }
}

#[test]
fn what_the_chart_renders_fits_the_schemas() {
    for (name, values) in VALUE_SETS {
        for version in VERSIONS {
            let valid = conform(version, &render(version, values));
            let valid = valid.unwrap_or_else(|error| panic!("{name}, {version}: {error}"));
            assert!(valid >= 12, "{name}, {version}: only {valid} objects");
        }
    }
}

#[test]
fn manifests_and_examples_fit_the_schemas() {
    for folder in ["deploy/manifests", "deploy/examples"] {
        for (path, yaml) in files(folder) {
            for version in VERSIONS {
                let valid = conform(version, &yaml);
                let valid = valid.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                assert!(valid > 0, "{} has no object", path.display());
            }
        }
    }
}

#[test]
fn a_wrong_manifest_is_refused() {
    let good = render(VERSIONS[1], &["metrics.serviceMonitor.enabled=true"]);
    for (right, wrong, names) in [
        ("replicas: 2", "replicas: two", "/spec/replicas"),
        ("hostPID: true", "hostPids: true", "hostPids"),
        (
            "attachRequired: false",
            "attachRequired: maybe",
            "/spec/attachRequired",
        ),
        (
            "deletionPolicy: Delete",
            "deletionPolicy: Keep",
            "/deletionPolicy",
        ),
        ("driver: csi-dysk", "drivers: csi-dysk", "driver"),
        (
            "kind: PodDisruptionBudget",
            "kind: PodDisruptionBudgets",
            "could not find schema",
        ),
        (
            "    - port: provisioner",
            "    - ports: provisioner",
            "ports",
        ),
        (
            "provisioner: csi-dysk",
            "provisioners: csi-dysk",
            "provisioner",
        ),
    ] {
        let wrong = good.replacen(right, wrong, 1);
        assert_ne!(wrong, good, "{right} is not there");
        let said = conform(VERSIONS[1], &wrong).expect_err(names);
        assert!(said.contains(names), "{names}: {said}");
    }
    // Of a version that does not know it.
    let new = render("1.37", &[]);
    assert!(new.contains("nodeAllocatableUpdatePeriodSeconds"));
    let said = conform("1.29", &new).expect_err("not known yet");
    assert!(
        said.contains("nodeAllocatableUpdatePeriodSeconds"),
        "{said}"
    );
}

#[test]
fn wrong_values_are_refused_by_name() {
    for (value, names) in [
        ("dyskd.mode=sidecar", "dyskd"),
        ("dyskd.updateStrategy=Recreate", "updateStrategy"),
        ("dyskd.updatestrategy=OnDelete", "updatestrategy"),
        ("dyskd.maxSurge=0", "maxSurge"),
        ("kubeletDir=var/lib/kubelet", "kubeletDir"),
        ("runDir=/run/dysk/", "runDir"),
        ("csiDriver.attachRequired=1", "attachRequired"),
        (
            "csiDriver.nodeAllocatableUpdatePeriodSeconds=5",
            "nodeAllocatableUpdatePeriodSeconds",
        ),
        ("controller.replicas=1", "minAvailable"),
        ("controller.timeout=60", "timeout"),
        ("priorityClass.value=2000000000", "value"),
        ("priorityClass.name=system-own", "name"),
        ("storageClasses[0].reclaimPolicy=Recycle", "reclaimPolicy"),
        (
            "storageClasses[0].parameters.csi\\.storage\\.k8s\\.io/node-stage-secret-name=x",
            "invalid propertyName",
        ),
        ("secret.namespace=${pvc.namespace}", "rbac.clusterSecrets"),
        ("image.digest=sha256:beef", "digest"),
    ] {
        let output = helm(&["template", "csi-dysk"], VERSIONS[1], &[value]);
        let said = text(&output);
        assert!(!output.status.success(), "{value} was taken");
        assert!(said.contains(names), "{value}: {said}");
    }
    let output = helm(&["template", "csi-dysk"], "1.28.0", &[]);
    assert!(!output.status.success(), "an older Kubernetes was taken");
}

#[test]
fn the_plain_manifests_are_what_the_chart_renders() {
    let check = |folder: &std::path::Path| {
        Command::new(folder.join("render"))
            .arg("--check")
            .env("HELM", tool("helm"))
            .output()
            .expect("it runs")
    };
    let output = check(&root().join("deploy"));
    assert!(output.status.success(), "{}", text(&output));

    let copy = tempfile::tempdir().expect("temp dir");
    let copied = Command::new("cp")
        .arg("-r")
        .arg(root().join("deploy"))
        .arg(copy.path())
        .status();
    assert!(copied.expect("cp runs").success());
    let folder = copy.path().join("deploy");
    let values = folder.join("helm/csi-dysk/values.yaml");
    let text_of = std::fs::read_to_string(&values).expect("readable");
    std::fs::write(&values, text_of.replacen("replicas: 2", "replicas: 3", 1)).expect("written");
    let output = check(&folder);
    assert!(!output.status.success(), "old manifests were taken");
    assert!(
        text(&output).contains("+  replicas: 3"),
        "{}",
        text(&output)
    );
}
