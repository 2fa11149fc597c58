//! What is refused, and how it is told.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;

use dysk::nbd::kernel::{Busy, Connect, KernelError, NbdFamily, SocketPair, Sysfs};
use rustix::fs::OFlags;

use crate::netlink::attached::{Attached, MIB, in_guest, request, sh, until};

#[test]
#[ignore = "runs inside the kernel lane"]
fn mounts_swap_loops_and_claims_make_it_busy() {
    in_guest();
    let device = Attached::new(&request("busy", 128 * MIB), 2);
    let (sysfs, node) = (Sysfs::default(), device.node.display());
    let busy = || sysfs.busy(device.index).unwrap();
    assert_eq!(busy(), None);

    sh(&format!(
        "mkfs.ext4 -q {node}; mkdir '/mnt/a b'; mount {node} '/mnt/a b'"
    ));
    assert_eq!(busy(), Some(Busy::Mounted("/mnt/a b".into())));
    let error = sysfs.expect_idle(device.index).unwrap_err().to_string();
    let name = format!("nbd{}", device.index);
    assert_eq!(
        error,
        format!("{name} is busy: mounted at /mnt/a b: run `umount /mnt/a b`")
    );
    sh("umount '/mnt/a b'");
    assert_eq!(busy(), None);

    sh("mkdir /mnt/private");
    let mut other = Command::new("unshare")
        .args(["-m", "sh", "-ec"])
        .arg(format!(
            "mount {node} /mnt/private; touch /run/mounted; exec sleep 1000"
        ))
        .spawn()
        .unwrap();
    until("the other namespace mounts", || {
        Path::new("/run/mounted").exists()
    });
    let elsewhere = Busy::MountedElsewhere {
        mount_point: "/mnt/private".into(),
        pid: other.id(),
    };
    assert_eq!(busy(), Some(elsewhere));
    other.kill().unwrap();
    other.wait().unwrap();
    until("the namespace is gone", || busy().is_none());

    sh(&format!(
        "mkfs.btrfs -qf {node}; mkdir /mnt/btrfs; mount {node} /mnt/btrfs"
    ));
    assert_eq!(busy(), Some(Busy::Mounted("/mnt/btrfs".into())));
    sh("umount /mnt/btrfs");

    sh(&format!("mkswap {node} >/dev/null; swapon {node}"));
    assert_eq!(busy(), Some(Busy::Swap));
    sh(&format!("swapoff {node}"));

    sh(&format!("losetup /dev/loop7 {node}"));
    assert_eq!(busy(), Some(Busy::Loop("loop7".to_owned())));
    sh("losetup -d /dev/loop7");
    until("the loop device lets go", || busy().is_none());

    let claim = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::EXCL.bits() as i32)
        .open(&device.node)
        .unwrap();
    assert_eq!(busy(), Some(Busy::Claimed));
    drop(claim);
    assert_eq!(busy(), None);
}

#[test]
#[ignore = "runs inside the kernel lane"]
fn bad_arguments_and_foreign_devices_are_refused() {
    in_guest();
    let nbd = NbdFamily::open().unwrap();
    let (kernel, _server) = SocketPair::many(1).unwrap();
    let missing = nbd.reconfigure(4000, "x", &kernel).unwrap_err();
    assert!(
        matches!(missing, KernelError::NoSuchDevice(4000)),
        "{missing}"
    );
    let missing = nbd.resize(4000, "x", 4096).unwrap_err();
    assert!(
        matches!(missing, KernelError::NoSuchDevice(4000)),
        "{missing}"
    );
    let missing = nbd.disconnect(4000, "x").unwrap_err();
    assert!(
        matches!(missing, KernelError::NoSuchDevice(4000)),
        "{missing}"
    );
    let missing = Sysfs::default().busy(4000).unwrap_err();
    assert!(
        matches!(missing, KernelError::NoSuchDevice(4000)),
        "{missing}"
    );

    let beyond = Connect {
        index: Some(1 << 22),
        ..request("x", MIB)
    };
    let refused = nbd.connect(&beyond, &kernel).unwrap_err();
    assert!(matches!(refused, KernelError::Refused { .. }), "{refused}");
    let null = File::open("/dev/null").unwrap();
    let refused = nbd.connect(&request("x", MIB), &[null]).unwrap_err();
    assert!(matches!(refused, KernelError::Refused { .. }), "{refused}");

    let device = Attached::new(&request("mine", MIB), 1);
    for error in [
        nbd.reconfigure(device.index, "yours", &kernel).unwrap_err(),
        nbd.resize(device.index, "yours", 4096).unwrap_err(),
        nbd.disconnect(device.index, "yours").unwrap_err(),
    ] {
        let KernelError::NotOurs { found, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(found.as_deref(), Some("mine"));
    }
    assert_eq!(
        Sysfs::default().state(device.index).unwrap().size_bytes,
        1 << 20
    );
}

#[test]
#[ignore = "runs inside the kernel lane"]
fn a_held_index_is_in_use_and_the_kernel_chooses_another() {
    in_guest();
    let device = Attached::new(&request("first", MIB), 1);
    let (index, node) = (device.index, device.node.clone());
    let (kernel, _server) = SocketPair::many(1).unwrap();
    let same = Connect {
        index: Some(index),
        ..request("second", MIB)
    };
    let nbd = NbdFamily::open().unwrap();
    let error = nbd.connect(&same, &kernel).unwrap_err();
    assert!(
        matches!(error, KernelError::InUse(found) if found == index),
        "{error}"
    );
    drop(device);

    // As a prober does: an open file on a device that is not connected.
    let prober = File::open(&node).unwrap();
    let error = nbd.connect(&same, &kernel).unwrap_err();
    assert!(
        matches!(error, KernelError::InUse(found) if found == index),
        "{error}"
    );
    let other = Attached::new(&request("second", MIB), 1);
    assert_ne!(other.index, index);
    drop(prober);
    let given = Connect {
        index: Some(index),
        ..request("third", MIB)
    };
    assert_eq!(Attached::new(&given, 1).index, index);
}

#[test]
#[ignore = "runs inside the kernel lane"]
fn sockets_do_not_leak_into_children() {
    in_guest();
    let device = Attached::new(&request("leak", MIB), 2);
    let output = Command::new("ls")
        .args(["-l", "/proc/self/fd"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.contains("socket:"), "{text}");
    drop(device);
}

/// Runs one scenario of [`super::wrapped`] by `wrapper`.
fn wrapped(wrapper: &[&str], scenario: &str) {
    let output = Command::new(wrapper[0])
        .args(&wrapper[1..])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            &format!("netlink::guest::wrapped::{scenario}"),
        ])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

#[test]
#[ignore = "runs inside the kernel lane"]
fn nobody_but_root_may_connect() {
    in_guest();
    // A copy: the path to the build may be closed to others than root.
    std::fs::copy(std::env::current_exe().unwrap(), "/run/as_nobody").unwrap();
    let output = Command::new("setpriv")
        .args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "/run/as_nobody",
        ])
        .args([
            "--ignored",
            "--exact",
            "netlink::guest::wrapped::connect_names_the_capability",
        ])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

#[test]
#[ignore = "runs inside the kernel lane"]
fn a_network_namespace_is_named_where_the_family_hides() {
    in_guest();
    let hides = std::env::var("DYSK_KERNEL").unwrap() == "6.1";
    let scenario = if hides {
        "open_names_the_namespace"
    } else {
        "open_succeeds"
    };
    wrapped(&["unshare", "-n"], scenario);
}
