//! Dead servers, lost replies, callers that go away.

use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use dysk::nbd::kernel::{Connect, KernelNbd, SocketPair, Sysfs};

use crate::netlink::attached::{
    Attached, Block, MIB, PATIENCE, block_on, in_guest, request, until,
};
use crate::netlink::server::Disk;

/// Starts a write and returns once it sleeps in the kernel, and how it ends.
fn waiting_write(device: &Attached, fill: u8) -> mpsc::Receiver<std::io::Result<()>> {
    let file = device.open();
    let (number, told) = mpsc::channel();
    let (done, outcome) = mpsc::channel();
    thread::spawn(move || {
        number
            .send(rustix::thread::gettid().as_raw_nonzero())
            .unwrap();
        done.send(file.write_all_at(&Block([fill; 4096]).0, 0))
            .unwrap();
    });
    let stat = format!("/proc/self/task/{}/stat", told.recv().unwrap());
    until("the write waits", || {
        std::fs::read_to_string(&stat).is_ok_and(|text| text.contains(") D "))
    });
    outcome
}

#[test]
#[ignore = "runs inside the kernel lane"]
fn io_waits_out_a_dead_server_and_completes_after_reconfigure() {
    in_guest();
    let device = Attached::new(&request("dead", MIB), 2);
    device.disk.die();
    let outcome = waiting_write(&device, 0x77);
    assert_eq!(outcome.try_recv().err(), Some(mpsc::TryRecvError::Empty));
    assert_eq!(device.disk.bytes(0, 1), [0]);
    device.revive(2);
    outcome.recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(device.disk.bytes(0, 4096), [0x77; 4096]);

    // None is dead now: the kernel says yes, and drops what it got.
    let (kernel, server) = SocketPair::many(1).unwrap();
    device
        .nbd
        .reconfigure(device.index, "dead", &kernel)
        .unwrap();
    drop(kernel);
    device.disk.serve(server);
    assert_eq!(device.disk.live(), 2);
}

#[test]
#[ignore = "runs inside the kernel lane"]
fn io_fails_at_the_dead_connection_timeout_and_flows_after_reconfigure() {
    in_guest();
    let short = Connect {
        dead_connection_timeout: Duration::from_millis(900),
        ..request("d", MIB)
    };
    let device = Attached::new(&short, 1);
    device.disk.die();
    let error = device
        .open()
        .write_all_at(&Block([1; 4096]).0, 0)
        .unwrap_err();
    assert_eq!(
        error.raw_os_error(),
        Some(rustix::io::Errno::IO.raw_os_error())
    );
    device.revive(1);
    device.open().write_all_at(&Block([2; 4096]).0, 0).unwrap();
    assert_eq!(device.disk.bytes(0, 1), [2]);
}

#[test]
#[ignore = "runs inside the kernel lane"]
fn a_lost_reply_is_asked_for_again_on_another_connection() {
    in_guest();
    let quick = Connect {
        timeout: Duration::from_secs(1),
        ..request("t", MIB)
    };
    let device = Attached::new(&quick, 2);
    device.disk.swallow.store(1, Ordering::SeqCst);
    device.open().write_all_at(&Block([3; 4096]).0, 0).unwrap();
    assert_eq!(device.disk.writes.load(Ordering::SeqCst), 2);
    until("the silent connection is shut", || device.disk.live() == 1);
}

#[test]
#[ignore = "runs inside the kernel lane"]
fn abandoned_attach_leaves_no_device() {
    in_guest();
    block_on(async {
        let nbd = KernelNbd::open().unwrap();
        for n in 0..20 {
            let disk = Disk::new(MIB);
            let (kernel, server) = SocketPair::many(1).unwrap();
            disk.serve(server);
            let attach = nbd.connect(request(&format!("gone/{n}"), MIB), kernel);
            // Polled once, so that the call is on its way, then dropped:
            // at once, or while the kernel is at it.
            let patience = Duration::from_micros(n * 50);
            if let Ok(done) = tokio::time::timeout(patience, attach).await {
                let index = done.unwrap().index;
                nbd.disconnect(index, &format!("gone/{n}")).await.unwrap();
            }
        }
        // Calls are made in order: whatever was left of those is done.
        nbd.status(None).await.unwrap();
    });
    let left = Sysfs::default().list().unwrap();
    assert_eq!(left.iter().find(|device| device.backend.is_some()), None);
}
