//! Calls of the node that end in the middle, because the plugin dies or its
//! caller goes, and are repeated.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::time::Duration;

use dysk::csi::v1::Volume;
use tokio::time::error::Elapsed;
use tonic::{Code, Status};

use super::{POD, TOOLS, path_of_tools, tool};
use crate::support::csi_node::{self, MIB, World, mounted, mounts_of, raw, sh, staging, target};

/// Stages, and leaves when it takes longer than `patience`.
fn stage_within(
    world: &World,
    volume: &Volume,
    patience: Duration,
) -> Result<Result<(), Status>, Elapsed> {
    let request = world.stage_request(volume, mounted("ext4"));
    world.block_on(async {
        let mut node = World::node().await;
        let staged = tokio::time::timeout(patience, node.node_stage_volume(request)).await?;
        Ok(staged.map(drop))
    })
}

#[test]
#[ignore = "runs in a guest of the kernel lane"]
fn guest_cut_off() {
    let mut world = World::start("2ms");
    // The plugin dies at another point each time, on a volume that it formats.
    for (round, millis) in [80, 350].into_iter().enumerate() {
        let volume = world.create(&format!("dies-{round}"), 32 * MIB, mounted("ext4"));
        let cut = stage_within(&world, &volume, Duration::from_millis(millis));
        world.restart_plugin();
        println!(
            "figure: killed after {millis} ms, {}",
            if cut.is_ok() { "done" } else { "under way" }
        );
        finish(&world, &volume);
    }
    // Before and after each of the tools that a stage runs.
    for name in ["blkid", "mkfs.ext4", "mount"] {
        for (when, text) in [
            ("before", "kill -KILL $PPID; exit 1".to_owned()),
            (
                "after",
                format!("PATH=${{PATH#*:}}; {name} \"$@\"; kill -KILL $PPID; exit 1"),
            ),
        ] {
            tool(name, &text);
            world.plugin_with_tools(Some(&path_of_tools()));
            let volume = world.create(&format!("{when}-{name}"), 32 * MIB, mounted("ext4"));
            world.stage(&volume, mounted("ext4")).expect_err("it died");
            world.plugin_died();
            fs::remove_file(format!("{TOOLS}/{name}")).expect("removed");
            finish(&world, &volume);
            println!("ok killed {when} {name}");
        }
    }
    cut_between_steps(&mut world);
    println!("ok the plugin dies");
    // The caller leaves at another point each time; the call goes on.
    let volume = world.create("leaves", 32 * MIB, mounted("ext4"));
    let mut left = 0;
    for millis in [1, 10, 50, 100, 200, 400] {
        let cut = stage_within(&world, &volume, Duration::from_millis(millis));
        left += usize::from(cut.is_err());
        if let Ok(Err(status)) = cut {
            assert_eq!(status.code(), Code::Aborted, "{status}");
        }
    }
    assert!(left > 0, "no call was cut off");
    finish(&world, &volume);
    callers_leave(&world, &volume);
    world.nothing_told();
    println!("ok the caller leaves");
}

/// Callers leave the calls that are sooner done than a stage.
fn callers_leave(world: &World, volume: &dysk::csi::v1::Volume) {
    let done = |what: &str, call: &dyn Fn() -> Result<(), tonic::Status>| {
        csi_node::eventually(what, || match call() {
            Ok(()) => true,
            Err(status) => {
                assert_eq!(status.code(), Code::Aborted, "{what}: {status}");
                false
            }
        });
    };
    world.stage(volume, mounted("ext4")).expect("staged");
    let device = sh(&format!("findmnt -no SOURCE {}", staging(volume).display()));
    let mut left = 0;
    for millis in [2, 5, 10, 20] {
        let patience = Duration::from_millis(millis);
        let publish = world.publish_request(volume, mounted("ext4"), POD, true);
        let unpublish = World::unpublish_request(volume, POD);
        let cut = world.block_on(async {
            let mut node = World::node().await;
            tokio::time::timeout(patience, node.node_publish_volume(publish)).await
        });
        left += usize::from(cut.is_err());
        let publish = || world.publish(volume, mounted("ext4"), POD, true);
        done("published", &publish);
        assert_eq!(mounts_of(&device), 2);
        let cut = world.block_on(async {
            let mut node = World::node().await;
            tokio::time::timeout(patience, node.node_unpublish_volume(unpublish)).await
        });
        left += usize::from(cut.is_err());
        done("unpublished", &|| world.try_unpublish(volume, POD));
        assert!(!target(POD).exists(), "the target is left");
        assert_eq!(mounts_of(&device), 1);
        let unstage = World::unstage_request(volume);
        let cut = world.block_on(async {
            let mut node = World::node().await;
            tokio::time::timeout(patience, node.node_unstage_volume(unstage)).await
        });
        left += usize::from(cut.is_err());
        done("unstaged", &|| world.unstage(volume));
        world.nothing_left();
        done("staged", &|| world.stage(volume, mounted("ext4")));
    }
    assert!(left > 0, "no call was cut off");
    world.unstage(volume).expect("unstaged");
    world.nothing_left();
}

/// The plugin dies before each change that publishing, unpublishing and
/// unstaging make.
fn cut_between_steps(world: &mut World) {
    let volume = world.create("steps", 32 * MIB, mounted("ext4"));
    world.stage(&volume, mounted("ext4")).expect("staged");
    let device = sh(&format!(
        "findmnt -no SOURCE {}",
        staging(&volume).display()
    ));
    let publish = |world: &World| world.publish(&volume, mounted("ext4"), POD, true);
    for (call, nth) in [("mkdir", 1), ("mount", 1), ("mount", 2)] {
        world.plugin_dying_before(call, nth);
        publish(world).expect_err("it died");
        world.plugin_died();
        publish(world).expect("published");
        assert_eq!(mounts_of(&device), 2, "before {call} {nth}");
        let refusal = fs::write(target(POD).join("x"), "x").expect_err("read-only");
        assert_eq!(refusal.raw_os_error(), Some(30), "EROFS");
        world.unpublish(&volume, POD);
        assert_eq!(mounts_of(&device), 1, "before {call} {nth}");
        println!("ok published, killed before {call} {nth}");
    }
    for call in ["umount2", "rmdir"] {
        publish(world).expect("published");
        world.plugin_dying_before(call, 1);
        world.try_unpublish(&volume, POD).expect_err("it died");
        world.plugin_died();
        world.unpublish(&volume, POD);
        assert_eq!(mounts_of(&device), 1, "before {call}");
        println!("ok unpublished, killed before {call}");
    }
    for call in ["umount2", "connect"] {
        world.stage(&volume, mounted("ext4")).expect("staged");
        world.plugin_dying_before(call, 1);
        world.unstage(&volume).expect_err("it died");
        world.plugin_died();
        world.unstage(&volume).expect("unstaged");
        world.nothing_left();
        println!("ok unstaged, killed before {call}");
    }
    let block = world.create("steps-raw", 8 * MIB, raw());
    world.stage(&block, raw()).expect("staged");
    world.plugin_dying_before("mount", 1);
    world
        .publish(&block, raw(), POD, false)
        .expect_err("it died");
    world.plugin_died();
    for call in ["umount2", "unlink"] {
        world.publish(&block, raw(), POD, false).expect("published");
        let kind = fs::metadata(target(POD)).expect("there").file_type();
        assert!(kind.is_block_device());
        world.plugin_dying_before(call, 1);
        world.try_unpublish(&block, POD).expect_err("it died");
        world.plugin_died();
        world.unpublish(&block, POD);
        println!("ok block unpublished, killed before {call}");
    }
    world.unstage(&block).expect("unstaged");
    world.nothing_left();
}

/// Repeats a stage until it succeeds; once mounted, it is a good filesystem.
fn finish(world: &World, volume: &dysk::csi::v1::Volume) {
    csi_node::eventually("the repetition succeeds", || {
        match world.stage(volume, mounted("ext4")) {
            Ok(()) => true,
            Err(status) => {
                // Another call is at it, the daemon undoes an attach, or a
                // killed mkfs has not let go of the disk.
                let later = matches!(
                    status.code(),
                    Code::Aborted | Code::Unavailable | Code::Internal
                );
                assert!(later, "{status}");
                false
            }
        }
    });
    world
        .publish(volume, mounted("ext4"), POD, false)
        .expect("published");
    let device = sh(&format!("findmnt -no SOURCE {}", staging(volume).display()));
    assert_eq!(mounts_of(&device), 2);
    fs::write(target(POD).join("file"), "x").expect("writable");
    world.unpublish(volume, POD);
    let name = staging(volume);
    sh(&format!("umount {} && e2fsck -fn {device}", name.display()));
    world.unstage(volume).expect("unstaged");
    world.nothing_left();
}
