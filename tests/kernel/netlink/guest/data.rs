//! A device carries data and has the geometry asked for.

use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use dysk::nbd::kernel::{Connect, KernelError, KernelNbd, QueueLimits, Sysfs};
use rustix::fs::OFlags;

use crate::netlink::attached::{
    Attached, Block, FLAGS, MIB, PATIENCE, READ_ONLY, block_on, in_guest, read_text, request,
};

#[test]
#[ignore = "runs inside the kernel lane"]
fn attach_has_the_geometry_asked_for_and_carries_data() {
    in_guest();
    let device = Attached::new(&request("acct/dysks/a.vhd", 64 * MIB), 2);
    println!("attach of one device: {:?}", device.took);
    let sysfs = Sysfs::default();
    let state = sysfs.expect_ours(device.index, "acct/dysks/a.vhd").unwrap();
    assert_eq!((state.size_bytes, state.read_only), (64 << 20, false));
    sysfs
        .set_queue(device.index, QueueLimits::default())
        .unwrap();
    let queue = sysfs.block(device.index).join("queue");
    assert_eq!(read_text(queue.join("logical_block_size")), "4096");
    assert_eq!(read_text(queue.join("max_sectors_kb")), "4096");
    assert_eq!(read_text(queue.join("read_ahead_kb")), "4096");
    assert!(read_text(queue.join("scheduler")).contains("[none]"));

    let mut file = device.open();
    assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), 64 << 20);
    let block = Block([0xa5; 4096]);
    file.write_all_at(&block.0, 8192).unwrap();
    assert_eq!(device.disk.bytes(8192, 4096), block.0);
    assert_eq!(device.disk.bytes(4096, 4096), [0; 4096]);
    assert_eq!(device.disk.flushes.load(Ordering::SeqCst), 0);
    file.sync_all().unwrap();
    assert_eq!(device.disk.flushes.load(Ordering::SeqCst), 1);
    let mut back = Block([0; 4096]);
    file.read_exact_at(&mut back.0, 8192).unwrap();
    assert_eq!(back.0, block.0);
    drop(file);

    let began = Instant::now();
    device.detach().unwrap();
    println!("detach of one device: {:?}", began.elapsed());
    assert_eq!(sysfs.state(device.index).unwrap().backend, None);
    let error = device.detach().unwrap_err();
    assert!(
        matches!(error, KernelError::NotOurs { found: None, .. }),
        "{error}"
    );
    std::mem::forget(device);
}

#[test]
#[ignore = "runs inside the kernel lane"]
fn read_only_refuses_writes() {
    in_guest();
    let connect = Connect {
        server_flags: FLAGS | READ_ONLY,
        ..request("ro", MIB)
    };
    let device = Attached::new(&connect, 1);
    assert!(Sysfs::default().state(device.index).unwrap().read_only);
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(OFlags::DIRECT.bits() as i32);
    // Kernels differ in whether the open or the write is refused.
    let refused = options
        .open(&device.node)
        .and_then(|file| file.write_all_at(&Block([1; 4096]).0, 0));
    assert_eq!(
        refused.unwrap_err().kind(),
        std::io::ErrorKind::PermissionDenied
    );
    assert_eq!(device.disk.writes.load(Ordering::SeqCst), 0);
}

#[test]
#[ignore = "runs inside the kernel lane"]
fn resize_while_open() {
    in_guest();
    let device = Attached::new(&request("grow", MIB), 2);
    let mut file = device.open();
    assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), 1 << 20);
    let refused = file.write_all_at(&Block([1; 4096]).0, 2 << 20).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::StorageFull);
    device.disk.resize(4 * MIB);
    device.nbd.resize(device.index, "grow", 4 << 20).unwrap();
    Sysfs::default()
        .wait_ready(device.index, 4 << 20, PATIENCE)
        .unwrap();
    assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), 4 << 20);
    file.write_all_at(&Block([9; 4096]).0, 2 << 20).unwrap();
    assert_eq!(device.disk.bytes(2 << 20, 4096), [9; 4096]);
}

#[test]
#[ignore = "runs inside the kernel lane"]
fn fifty_devices_at_once() {
    in_guest();
    let began = Instant::now();
    let devices: Vec<_> = (0..50)
        .map(|n| Attached::new(&request(&format!("fifty/{n}"), MIB), 1))
        .collect();
    println!("attach of 50 devices: {:?}", began.elapsed());
    let calls: Duration = devices.iter().map(|device| device.took).sum();
    println!("of that, in the driver: {calls:?}");
    let listed = Sysfs::default().list().unwrap();
    for (n, device) in devices.iter().enumerate() {
        let backend = format!("fifty/{n}");
        let ours: Vec<_> = listed
            .iter()
            .filter(|found| found.backend.as_ref() == Some(&backend))
            .map(|found| found.index)
            .collect();
        assert_eq!(ours, [device.index]);
        device
            .open()
            .write_all_at(&Block([n as u8 + 1; 4096]).0, 0)
            .unwrap();
    }
    for (n, device) in devices.iter().enumerate() {
        assert_eq!(device.disk.bytes(0, 4096), [n as u8 + 1; 4096]);
    }
    let began = Instant::now();
    drop(devices);
    println!("detach of 50 devices: {:?}", began.elapsed());
}

#[test]
#[ignore = "runs inside the kernel lane"]
fn status_lists_devices() {
    in_guest();
    let devices: Vec<_> = (0..3)
        .map(|n| Attached::new(&request(&format!("s{n}"), MIB), 1))
        .collect();
    block_on(async {
        let nbd = KernelNbd::open().unwrap();
        let all = nbd.status(None).await.unwrap();
        for device in &devices {
            let one = nbd.status(Some(device.index)).await.unwrap();
            assert_eq!(one.len(), 1);
            assert!(one[0].connected && one[0].index == device.index);
            assert!(all.contains(&one[0]));
        }
    });
}
