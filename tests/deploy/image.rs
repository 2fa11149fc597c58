//! The image: the build finds all it needs in its context and nothing else, and
//! what the chart runs is in it. Building it takes ten minutes and root.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use crate::support::chart::{VALUE_SETS, objects, root, strings, text};
use serde_json::{Value, json};

/// Instructions of the Dockerfile, a line each.
fn instructions() -> Vec<String> {
    let file = std::fs::read_to_string(root().join("Dockerfile")).expect("readable");
    let lines = file
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'));
    let joined = lines.collect::<Vec<_>>().join("\n").replace("\\\n", " ");
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    joined
        .lines()
        .map(words)
        .filter(|line| !line.is_empty())
        .collect()
}

/// What `.dockerignore` lets through; it is written as a list of exceptions.
fn allowed() -> Vec<String> {
    let file = std::fs::read_to_string(root().join(".dockerignore")).expect("readable");
    let mut lines = file
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty());
    assert_eq!(lines.next(), Some("*"), "everything is kept out first");
    lines
        .map(|line| line.strip_prefix('!').expect("an exception").to_owned())
        .collect()
}

/// Packages that the last stage installs.
fn packages() -> BTreeSet<String> {
    let all = instructions();
    let last = all
        .iter()
        .rposition(|line| line.starts_with("FROM "))
        .expect("a stage");
    let install = all[last..]
        .iter()
        .find(|line| line.contains("apt-get install"));
    let install = install.expect("an installation");
    let list = install.split("apt-get install").nth(1).expect("a list");
    let list = list.split("&&").next().expect("a list");
    let words = list
        .split_whitespace()
        .filter(|word| !word.starts_with("--"));
    words.map(str::to_owned).collect()
}

#[test]
#[ignore = "builds the image: make soak"]
fn it_is_built_and_runs() {
    let built = Command::new(root().join("tests/deploy/build_image")).status();
    assert!(built.expect("bash runs").success());
}

#[test]
fn what_is_copied_is_in_the_context() {
    let allowed = allowed();
    let mut copied = 0;
    for line in instructions() {
        let Some(words) = line.strip_prefix("COPY ") else {
            continue;
        };
        if words.starts_with("--from=") || words.starts_with(". ") {
            continue;
        }
        let source = words.split(' ').next().expect("a source");
        assert!(root().join(source).exists(), "{source} is not there");
        let inside = |one: &String| Path::new(source).starts_with(one);
        assert!(
            allowed.iter().any(inside),
            ".dockerignore keeps {source} out"
        );
        copied += 1;
    }
    assert!(copied >= 2, "the Dockerfile copies {copied} files");
    for secret in [".git", "build", "target", "tests"] {
        assert!(
            !allowed.iter().any(|one| Path::new(one).starts_with(secret)),
            "{secret}"
        );
    }
}

#[test]
fn the_context_is_enough_for_cargo() {
    let context = tempfile::tempdir().expect("temp dir");
    for name in allowed()
        .into_iter()
        .filter(|name| root().join(name).exists())
    {
        let to = context.path().join(&name);
        std::fs::create_dir_all(to.parent().expect("a folder")).expect("made");
        let copied = Command::new("cp")
            .arg("-r")
            .arg(root().join(&name))
            .arg(&to)
            .status();
        assert!(copied.expect("cp runs").success());
    }
    assert_eq!(missing_targets(context.path()), [""; 0]);
    std::fs::remove_file(context.path().join("src/bin/csi-dysk.rs")).expect("it was there");
    let missing = missing_targets(context.path());
    assert!(
        missing.len() == 1 && missing[0].ends_with("csi-dysk.rs"),
        "{missing:?}"
    );
}

/// Sources of the manifest's targets that are not there.
fn missing_targets(at: &Path) -> Vec<String> {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--format-version",
            "1",
            "--offline",
        ])
        .arg("--manifest-path")
        .arg(at.join("Cargo.toml"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", text(&output));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("json");
    let targets = metadata["packages"][0]["targets"]
        .as_array()
        .expect("targets");
    let sources = targets
        .iter()
        .filter(|target| target["kind"] != json!(["test"]))
        .map(|target| target["src_path"].as_str().expect("a path"));
    sources
        .filter(|source| !Path::new(source).exists())
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_compiler_is_new_enough_and_the_image_is_not_root_s() {
    let all = instructions();
    let version = |text: &str| -> Vec<u32> {
        text.split('.')
            .map(|part| part.parse().expect("a number"))
            .collect()
    };
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).expect("readable");
    let least = manifest
        .lines()
        .find_map(|line| line.strip_prefix("rust-version = \""));
    let least = version(least.expect("a version").trim_end_matches('"'));
    let compiler = all.iter().find_map(|line| line.strip_prefix("FROM rust:"));
    let compiler = version(
        compiler
            .expect("a compiler")
            .split('-')
            .next()
            .expect("a part"),
    );
    assert!(compiler >= least, "{compiler:?} is older than {least:?}");
    for line in all.iter().filter(|line| line.starts_with("FROM ")) {
        assert!(
            line.contains("bookworm"),
            "one Debian for both, since libc is: {line}"
        );
    }
    assert!(all.contains(&"USER 65532:65532".to_owned()));
}

#[test]
fn what_the_chart_runs_is_in_the_image() {
    let all = instructions();
    let packages = packages();
    let build = all
        .iter()
        .find(|line| line.contains("cargo build"))
        .expect("a build");
    for (_, values) in VALUE_SETS {
        for object in objects(values) {
            let pod = &object["spec"]["template"]["spec"];
            for list in ["initContainers", "containers"] {
                for container in pod[list].as_array().into_iter().flatten() {
                    let probes = ["readinessProbe", "livenessProbe"].map(|p| &container[p]["exec"]);
                    let commands = probes.map(|exec| strings(&exec["command"]));
                    let own = strings(&container["command"]);
                    for program in commands
                        .iter()
                        .chain([&own])
                        .filter_map(|words| words.first())
                    {
                        let there = match program.as_str() {
                            "csi-dysk" | "dyskd" | "dyskctl" => {
                                build.contains(&format!("--bin {program}"))
                                    && build.contains(&format!("target/release/{program}"))
                            }
                            "dyskd-pod" => all
                                .iter()
                                .any(|line| line.contains("deploy/image/dyskd-pod")),
                            "modprobe" => packages.contains("kmod"),
                            // coreutils, which every Debian has.
                            "install" => true,
                            _ => false,
                        };
                        assert!(there, "{program} is not in the image");
                    }
                }
            }
        }
    }
    // What dyskd-pod runs, and the node plugin for each filesystem.
    assert!(build.contains("--bin dyskd ") && build.contains("--bin dyskctl"));
    for program in programs_of(&root().join("src")) {
        let package = match program.as_str() {
            "mount" | "umount" => "mount",
            "blkid" | "wipefs" | "blockdev" | "findmnt" | "losetup" => "util-linux",
            "mkfs.ext4" | "resize2fs" | "e2fsck" | "tune2fs" | "dumpe2fs" => "e2fsprogs",
            "mkfs.xfs" | "xfs_growfs" | "xfs_repair" => "xfsprogs",
            "mkfs.btrfs" | "btrfs" => "btrfs-progs",
            _ => panic!("which package has {program}?"),
        };
        assert!(
            packages.contains(package),
            "{program}: {package} is missing"
        );
    }
    for package in [
        "ca-certificates",
        "mount",
        "util-linux",
        "e2fsprogs",
        "xfsprogs",
        "btrfs-progs",
    ] {
        assert!(packages.contains(package), "{package} is missing");
    }
}

/// The programs that the sources run by name, but for their tests.
fn programs_of(folder: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(programs_of(&path));
            continue;
        }
        let source = std::fs::read_to_string(&path).unwrap_or_default();
        let source = source.split("#[cfg(test)]").next().expect("a part");
        for call in ["tool::run(", "tool::ended("] {
            for after in source.split(call).skip(1) {
                // A name that is computed is one of a list of names.
                if let Some(name) = after.trim_start().strip_prefix('"') {
                    found.insert(name.split('"').next().expect("a part").to_owned());
                }
            }
        }
        let words = source.split('"').filter(|word| word.starts_with("mkfs."));
        found.extend(words.map(str::to_owned));
    }
    found
}
