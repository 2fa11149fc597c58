//! csi-dysk on a real kernel: the CSI project's own suite, a pod's life with
//! everything restarted under it, calls cut off at any point, and disks that
//! must not be formatted.

mod cut_off;

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::time::Instant;

use crate::support::csi_node;
use crate::support::csi_node::{
    MIB, World, Writer, mounted, mounts_of, raw, refused, sh, staging, target,
};
use crate::support::lane;
use tonic::Code;

/// Runs a test of this file that is made for the inside of a guest.
fn inside(kernel: &str, test: &str) {
    let own = std::env::current_exe().expect("this test's own path");
    let own = own.to_str().expect("a UTF-8 path");
    let test = format!("csi::{test}");
    lane::run(kernel, &["--timeout", "900"], "csi_inside", &[own, &test]);
}

#[test]
fn the_suite_passes_with_mounts_and_with_block_devices() {
    lane::run("6.12", &["--timeout", "1200"], "csi_sanity", &[]);
}

#[test]
fn a_pods_life() {
    inside("6.12", "guest_life");
}

#[test]
fn calls_cut_off_anywhere_are_repeated() {
    inside("6.12", "cut_off::guest_cut_off");
}

#[test]
fn only_what_is_empty_is_formatted() {
    inside("6.1", "guest_format");
}

const POD: &str = "pod-1";

/// Programs that a plugin finds before the system's.
const TOOLS: &str = "/tmp/dysk/tools";

/// Makes one of them.
fn tool(name: &str, text: &str) {
    fs::create_dir_all(TOOLS).expect("a folder");
    let path = format!("{TOOLS}/{name}");
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
}

fn path_of_tools() -> String {
    format!("{TOOLS}:{}", std::env::var("PATH").expect("a PATH"))
}

/// Whether it is done; a daemon that was just restarted says "later".
fn later(answer: Result<(), tonic::Status>) -> bool {
    match answer {
        Ok(()) => true,
        Err(status) => {
            assert_eq!(status.code(), Code::Unavailable, "{status}");
            false
        }
    }
}

#[test]
#[ignore = "runs in a guest of the kernel lane"]
fn guest_life() {
    let mut world = World::start("5ms");
    let mut handed_over = 0;
    for (kind, size) in [("ext4", 64 * MIB), ("xfs", 320 * MIB), ("btrfs", 160 * MIB)] {
        let volume = world.create(kind, size, mounted(kind));
        let stage = |world: &World| {
            csi_node::eventually("staged", || later(world.stage(&volume, mounted(kind))));
            world
                .publish(&volume, mounted(kind), POD, false)
                .expect("published");
        };
        stage(&world);
        println!("figure: {kind}, first: {}", world.logged("staged"));
        let file = target(POD).join("file");
        fs::write(&file, "kept").expect("written");
        sh(&format!("sync -f {}", file.display()));
        let device = sh(&format!(
            "findmnt -no SOURCE {}",
            staging(&volume).display()
        ));

        world.restart_plugin();
        stage(&world);
        assert_eq!(
            mounts_of(&device),
            2,
            "one mount for the node, one for the pod"
        );
        world.restart_daemon();
        fs::write(target(POD).join("more"), vec![7; 3 << 20]).expect("written");
        sh(&format!("sync -f {}", file.display()));
        stage(&world);
        assert_eq!(mounts_of(&device), 2);

        // The daemon is upgraded while the pod writes.
        let writer = Writer::start(target(POD).join("records"));
        writer.goes_on();
        world.upgrade_daemon();
        writer.goes_on();
        let (records, written) = writer.end();
        handed_over += 1;
        assert_eq!(world.handed_over(), handed_over);
        stage(&world);
        assert_eq!(mounts_of(&device), 2);

        let stats = world.stats(&volume, POD);
        let condition = stats.volume_condition.expect("a condition");
        assert!(!condition.abnormal, "{condition:?}");
        assert!(stats.usage[0].used > 3 * MIB && stats.usage[0].total <= size);
        refused(world.unstage(&volume), Code::FailedPrecondition, "");
        stage(&world);
        world.unpublish(&volume, POD);
        world.unpublish(&volume, POD);
        world.unstage(&volume).expect("unstaged");
        world.unstage(&volume).expect("nothing to do");
        world.nothing_left();

        world.grow(&volume, 2 * size);
        stage(&world);
        println!(
            "figure: {kind}, grown meanwhile: {}",
            world.logged("staged")
        );
        assert_eq!(fs::read_to_string(&file).expect("there"), "kept");
        csi_node::check_records(&records, written);
        let grown = world.expand(&volume, POD, 2 * size).expect("expanded");
        assert_eq!(grown, 2 * size);
        let total = world.stats(&volume, POD).usage[0].total;
        assert!(total > size + size / 2, "{kind}: {total} of {}", 2 * size);
        // In use.
        world.grow(&volume, 3 * size);
        let grown = world.expand(&volume, POD, 3 * size).expect("expanded");
        assert_eq!(grown, 3 * size);
        let total = world.stats(&volume, POD).usage[0].total;
        assert!(
            total > 2 * size + size / 2,
            "{kind}: {total} of {}",
            3 * size
        );
        world.unpublish(&volume, POD);
        world.unstage(&volume).expect("unstaged");

        // A copy, read-only, beside its original.
        let begun = Instant::now();
        world.stage(&volume, mounted(kind)).expect("staged");
        let staged = begun.elapsed();
        world
            .publish(&volume, mounted(kind), "reader", true)
            .expect("published");
        let both = begun.elapsed();
        println!(
            "figure: {kind}, a formatted volume: staged in {staged:.2?}, and published in {both:.2?}"
        );
        println!("figure: {kind}, of that: {}", world.logged("staged"));
        let refusal = fs::write(target("reader").join("x"), "x").expect_err("read-only");
        assert_eq!(refusal.raw_os_error(), Some(30), "EROFS");
        world.unpublish(&volume, "reader");
        world.unstage(&volume).expect("unstaged");
        world.delete(&volume);
        world.nothing_left();
        println!("ok {kind}");
    }
    let volume = world.create("raw", 8 * MIB, raw());
    world.stage(&volume, raw()).expect("staged");
    world
        .publish(&volume, raw(), POD, false)
        .expect("published");
    world
        .publish(&volume, raw(), POD, false)
        .expect("published before");
    let node = target(POD);
    assert!(
        fs::metadata(&node)
            .expect("there")
            .file_type()
            .is_block_device()
    );
    let fill = format!(
        "dd if=/dev/urandom of={} bs=1M count=8 oflag=direct",
        node.display()
    );
    sh(&fill);
    // The Secret is rotated under it, and comes with the publish that kubelet
    // repeats.
    world.rotate("cm90YXRlZCBrZXkgb2YgdGhlIGFjY291bnQsIHNlY3JldA==");
    let writing = std::thread::spawn(move || sh(&fill));
    csi_node::eventually("the volume waits for a key", || {
        let condition = world.stats(&volume, POD).volume_condition;
        condition.expect("a condition").abnormal
    });
    assert!(!writing.is_finished(), "it was told an error");
    world
        .publish(&volume, raw(), POD, false)
        .expect("published before, with a new Secret");
    writing.join().expect("written");
    assert_eq!(world.stats(&volume, POD).usage[0].total, 8 * MIB);
    world.unpublish(&volume, POD);
    world.unstage(&volume).expect("unstaged");
    // What was written raw is nobody's to format.
    refused(
        world.stage(&volume, mounted("ext4")),
        Code::FailedPrecondition,
        "raw block",
    );
    world.unstage(&volume).expect("unstaged");
    world.delete(&volume);
    world.nothing_left();
    world.nothing_told();
    println!("ok raw");
}

/// A blob's content as the kernel reads it.
fn content(world: &World, blob: &str) -> String {
    world.dyskctl(&format!(
        "d=$(dyskctl attach devstoreaccount1/dysks/{blob} --endpoint $endpoint --name look); \
         sha256sum <$d; dyskctl detach look"
    ))
}

#[test]
#[ignore = "runs in a guest of the kernel lane"]
fn guest_format() {
    let mut world = World::start("1ms");
    // What is on it, and what the refusal says.
    let cases = [
        ("xfs", "mkfs.xfs -q $d", "xfs is on it"),
        (
            "table",
            "echo ,,L | sfdisk -q --no-reread --no-tell-kernel $d",
            "partition table",
        ),
        (
            "luks",
            "printf 'LUKS\\272\\276\\0\\1' | dd of=$d conv=notrunc,fsync",
            "is on it",
        ),
        (
            "start",
            "dd if=/dev/urandom of=$d bs=4k count=1 seek=9 oflag=direct",
            "written to",
        ),
        (
            "middle",
            "dd if=/dev/urandom of=$d bs=4k count=1 seek=8000 oflag=direct",
            "written to",
        ),
        (
            "errors",
            "mkfs.ext4 -q $d; debugfs -w -R 'ssv state 2' $d",
            "recorded errors",
        ),
        (
            "torn",
            "mkfs.ext4 -q $d; dd if=/dev/zero of=$d bs=4k count=1 conv=fsync",
            "written to",
        ),
    ];
    for (name, make, says) in cases {
        let size = if name == "xfs" { 320 } else { 64 };
        let volume = world.create(name, size * MIB, mounted("ext4"));
        let blob = format!("{name}.vhd");
        world.dyskctl(&format!(
            "d=$(dyskctl attach devstoreaccount1/dysks/{blob} --endpoint $endpoint --name make); \
             {{ {make}; }} >&2; sync; dyskctl detach make"
        ));
        let before = content(&world, &blob);
        for _ in 0..2 {
            refused(
                world.stage(&volume, mounted("ext4")),
                Code::FailedPrecondition,
                says,
            );
        }
        world.unstage(&volume).expect("unstaged");
        assert_eq!(content(&world, &blob), before, "{name}: bytes have changed");
        world.nothing_left();
        println!("ok {name}");
    }
    // One that was ours, mounted and then wiped by somebody.
    let volume = world.create("wiped", 32 * MIB, mounted("ext4"));
    world.stage(&volume, mounted("ext4")).expect("staged");
    world.unstage(&volume).expect("unstaged");
    world.dyskctl(
        "d=$(dyskctl attach devstoreaccount1/dysks/wiped.vhd --endpoint $endpoint --name make); \
         blkdiscard $d; dyskctl detach make",
    );
    refused(
        world.stage(&volume, mounted("ext4")),
        Code::FailedPrecondition,
        "wiped",
    );
    world.unstage(&volume).expect("unstaged");
    println!("ok wiped");

    // Probes that fail, in every way: nothing is formatted on their word.
    tool("mkfs.ext4", "touch /tmp/dysk/formatted; exit 1");
    world.plugin_with_tools(Some(&path_of_tools()));
    let volume = world.create("unknown", 32 * MIB, mounted("ext4"));
    for (how, text) in [
        ("fails", "exit 4"),
        ("is killed", "kill -KILL $$"),
        ("complains", "echo cannot read >&2; exit 2"),
        ("finds nothing to name", "echo DEVNAME=x; exit 0"),
        ("is ambivalent", "exit 8"),
    ] {
        tool("blkid", text);
        let status = world.stage(&volume, mounted("ext4")).expect_err(how);
        assert!(
            matches!(status.code(), Code::Internal | Code::FailedPrecondition),
            "{how}: {status}"
        );
        println!("ok blkid {how}: {}", status.message());
    }
    fs::remove_file(format!("{TOOLS}/blkid")).expect("removed");
    // And the store's part of it: what is there cannot be read (blkid itself says
    // then that there is nothing), nor what was ever written, nor the mark; or the
    // mark cannot be set.
    let foreign = world.create("foreign", 32 * MIB, mounted("ext4"));
    world.dyskctl(
        "d=$(dyskctl attach devstoreaccount1/dysks/foreign.vhd --endpoint $endpoint --name make); \
         dd if=/dev/urandom of=$d bs=4k count=1 seek=9 oflag=direct; dyskctl detach make",
    );
    let before = content(&world, "foreign.vhd");
    refused(
        world.stage(&foreign, mounted("ext4")),
        Code::FailedPrecondition,
        "written to",
    );
    sh("! dmesg | grep -E 'I/O error|EXT4-fs error'");
    for (operation, name, volume) in [
        ("get-blob", "foreign", &foreign),
        ("get-page-ranges", "unknown", &volume),
        ("get-blob-properties", "unknown", &volume),
        ("set-blob-metadata", "unknown", &volume),
    ] {
        world.faults(&format!(
            r#"[{{"operation": "{operation}", "blob": "{name}.vhd",
                 "effect": {{"kind": "status", "status": 400, "code": "InjectedEnd"}}}}]"#
        ));
        let status = world.stage(volume, mounted("ext4"));
        let status = status.expect_err(operation);
        assert!(
            matches!(status.code(), Code::Internal | Code::PermissionDenied),
            "{operation}: {status}"
        );
        assert!(world.has_struck(), "{operation} was not asked for");
        println!("ok {operation} fails: {}", status.message());
    }
    world.faults("[]");
    world.unstage(&foreign).expect("unstaged");
    let after = content(&world, "foreign.vhd");
    assert_eq!(after, before, "bytes of a disk that could not be read");
    // The reads above, which the kernel was right to complain of.
    sh("dmesg --clear");
    let formatted = fs::exists("/tmp/dysk/formatted").expect("known");
    assert!(!formatted, "formatted on the word of a failed probe");
    // With a probe that works, the mkfs of the same PATH is run: the test can fail.
    refused(
        world.stage(&volume, mounted("ext4")),
        Code::Internal,
        "mkfs.ext4",
    );
    assert!(fs::exists("/tmp/dysk/formatted").expect("known"));
    // And what it left half done is finished by the next.
    world.plugin_with_tools(None);
    world.stage(&volume, mounted("ext4")).expect("staged");
    world.unstage(&volume).expect("unstaged");
    world.nothing_left();
    world.nothing_told();
    println!("ok unknown");
}
