//! Many requests on one connection: none waits for another, all are bounded,
//! and what was started is finished.

use std::sync::Arc;
use std::time::Duration;

use crate::support::memory_disk::{Kind, MemoryDisk};
use crate::support::nbd_peer::{Peer, Rig, request, soon, until};
use dysk::nbd::transmission::{ByteBudget, Ended, Limits, Session, SessionError, Stop, transmit};
use dysk::nbd::wire::reply::Errno;
use dysk::nbd::wire::request::Command;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::watch;

const MIB: u64 = 1 << 20;

fn limited(max_requests: usize, bytes: u32) -> Session {
    Session::kernel(Limits {
        max_requests,
        budget: ByteBudget::new(bytes),
        ..Limits::default()
    })
}

#[tokio::test]
async fn a_slow_request_does_not_hold_up_fast_ones() {
    let disk = MemoryDisk::new(MIB).hold(|asked| asked.offset == 0);
    let mut rig = Rig::new(disk, Session::default());
    rig.peer
        .send(request(Command::Write, 1, 0, 512), &[1; 512])
        .await;
    for cookie in 2..50 {
        rig.peer
            .send(request(Command::Read, cookie, 4096, 512), b"")
            .await;
        let reply = rig.peer.simple().await;
        assert_eq!((reply.cookie, reply.error), (cookie, 0));
        rig.peer.receive(512).await;
    }
    rig.disk.release(1);
    assert_eq!(rig.peer.simple().await.cookie, 1);
}

#[tokio::test]
async fn requests_enter_the_device_in_the_order_they_arrive() {
    let disk = MemoryDisk::new(MIB).recording().hold(|_| true);
    let mut rig = Rig::new(disk, Session::default());
    let mut bytes = Vec::new();
    for cookie in 0..100 {
        bytes.extend(request(Command::Write, cookie, cookie * 512, 512).encode());
        bytes.extend([1; 512]);
    }
    rig.peer.send_raw(&bytes).await;
    let disk = Arc::clone(&rig.disk);
    until("100 requests", || disk.running() == 100).await;
    let offsets: Vec<_> = disk
        .asked()
        .iter()
        .map(|asked| asked.offset / 512)
        .collect();
    assert_eq!(offsets, (0..100).collect::<Vec<_>>());
    disk.release(100);
    for _ in 0..100 {
        assert_eq!(rig.peer.simple().await.error, 0);
    }
}

#[tokio::test]
async fn no_more_requests_run_than_allowed() {
    let disk = MemoryDisk::new(MIB).hold(|_| true);
    let mut rig = Rig::new(disk, limited(8, 1 << 20));
    for cookie in 0..40 {
        rig.peer
            .send(request(Command::Read, cookie, 0, 512), b"")
            .await;
    }
    let disk = Arc::clone(&rig.disk);
    until("8 requests", || disk.running() == 8).await;
    disk.release(40);
    for _ in 0..40 {
        assert_eq!(rig.peer.simple().await.error, 0);
        rig.peer.receive(512).await;
    }
    assert_eq!(disk.peak(), 8);
}

#[tokio::test]
async fn no_more_bytes_are_in_flight_than_allowed() {
    for command in [Command::Read, Command::Write] {
        let disk = MemoryDisk::new(MIB).hold(|_| true);
        let mut rig = Rig::new(disk, limited(100, 10_000));
        for cookie in 0..12 {
            let header = request(command, cookie, 0, 4096);
            rig.peer.send(header, &vec![1; header.payload_len()]).await;
        }
        let disk = Arc::clone(&rig.disk);
        until("2 requests", || disk.running() == 2).await;
        disk.release(12);
        for _ in 0..12 {
            assert_eq!(rig.peer.simple().await.error, 0);
            if command == Command::Read {
                rig.peer.receive(4096).await;
            }
        }
        assert_eq!(disk.peak(), 2);
    }
}

#[tokio::test]
async fn a_request_above_the_whole_budget_has_it_alone() {
    let mut rig = Rig::new(MemoryDisk::new(MIB), limited(100, 1000));
    for cookie in 0..3 {
        rig.peer
            .send(request(Command::Write, cookie, 0, 65536), &[3; 65536])
            .await;
        assert_eq!(rig.peer.simple().await.error, 0);
    }
    assert_eq!(rig.disk.contents(65535, 2), [3, 0]);
}

/// Sends reads for ever; stops once nothing was taken for a while.
async fn flood(stream: &mut UnixStream) -> usize {
    let mut sent = 0;
    let header = request(Command::Read, 0, 0, 65536).encode();
    let patience = Duration::from_millis(200);
    while let Ok(Ok(())) = tokio::time::timeout(patience, stream.write_all(&header)).await {
        sent += 1;
    }
    sent
}

#[tokio::test]
async fn a_client_that_reads_no_replies_cannot_make_memory_grow() {
    let disk = MemoryDisk::new(MIB).recording();
    let session = limited(64, 1 << 20);
    let budget = session.limits.budget.clone();
    let mut rig = Rig::new(disk, session);
    let sent = flood(&mut rig.peer.stream).await;
    let taken = rig.disk.asked().len();
    assert!(taken < sent, "{taken} of {sent} requests were taken");
    // What the socket holds was sent and is no longer ours; beyond it there is
    // the budget.
    let socket = 1 << 20;
    let bound = ((1 << 20) + socket) / 65536;
    assert!(
        taken <= bound,
        "{taken} requests were taken, {bound} are allowed"
    );
    assert!(budget.available() < 65536, "the budget is not what bounds");
    // Everything goes on where it stopped.
    for _ in 0..taken {
        assert_eq!(rig.peer.simple().await.error, 0);
        rig.peer.receive(65536).await;
    }
    until("more requests", || rig.disk.asked().len() > taken).await;
}

#[tokio::test]
async fn what_a_vanished_client_left_running_is_finished() {
    let disk = MemoryDisk::new(MIB).hold(|_| true);
    let Rig {
        mut peer,
        disk,
        transmission,
        ..
    } = Rig::new(disk, Session::default());
    for cookie in 0..4 {
        peer.send(
            request(Command::Write, cookie, cookie * 512, 512),
            &[9; 512],
        )
        .await;
    }
    until("4 requests", || disk.running() == 4).await;
    drop(peer);
    // Nobody waits for the device to notice that the client is gone.
    let ended = soon("the end", transmission).await.expect("no panic");
    assert!(matches!(ended, Ok(Ended::Vanished)));
    assert_eq!((disk.running(), disk.contents(0, 1)), (4, vec![0]));
    disk.release(4);
    until("the writes", || disk.running() == 0).await;
    assert!(disk.contents(0, 2048).iter().all(|&byte| byte == 9));
}

#[tokio::test]
async fn writes_left_unread_by_a_vanished_client_are_not_applied() {
    // A client that had no answer for long gives up, sends its writes again on
    // another connection, and goes on to newer data: what it left in the first
    // socket must not come to life after that.
    let stale = [
        request(Command::Write, 1, 0, 512),
        request(Command::Trim, 2, 4096, 4096),
        request(Command::WriteZeroes, 3, 4096, 4096),
    ];
    for header in stale {
        let (server, client) = UnixStream::pair().expect("a socket pair");
        let mut peer = Peer { stream: client };
        peer.send(header, &vec![1; header.payload_len()]).await;
        drop(peer);
        let disk = Arc::new(MemoryDisk::new(MIB).recording());
        let (_stop, stopped) = watch::channel(Stop::Run);
        let ended = transmit(server, Arc::clone(&disk), Session::default(), stopped);
        let ended = soon("the end", ended).await;
        assert!(matches!(ended, Ok(Ended::Vanished)), "{ended:?}");
        assert_eq!(disk.asked(), [], "a stale request was applied");
    }
}

#[tokio::test]
async fn a_write_that_waits_for_the_budget_dies_with_its_client() {
    let session = limited(100, 512);
    let disk = MemoryDisk::new(MIB).recording().hold(|_| true);
    let mut first = Rig::new(disk, session.clone());
    first
        .peer
        .send(request(Command::Write, 1, 0, 512), &[1; 512])
        .await;
    until("the first write", || first.disk.running() == 1).await;

    let Rig {
        mut peer,
        disk,
        transmission,
        ..
    } = Rig::new(MemoryDisk::new(MIB).recording(), session);
    peer.send(request(Command::Write, 1, 0, 512), &[1; 512])
        .await;
    drop(peer);
    let ended = soon("the end", transmission).await.expect("no panic");
    assert!(matches!(ended, Err(SessionError::Truncated)), "{ended:?}");
    first.disk.release(1);
    assert_eq!(first.peer.simple().await.error, 0);
    assert_eq!(disk.asked(), []);
}

#[tokio::test]
async fn a_dropped_transmission_leaves_no_request_half_way() {
    let (server, client) = UnixStream::pair().expect("a socket pair");
    let disk = Arc::new(MemoryDisk::new(MIB).hold(|_| true));
    let (_stop, stopped) = watch::channel(Stop::Run);
    let serving = tokio::spawn(transmit(
        server,
        Arc::clone(&disk),
        Session::default(),
        stopped,
    ));
    let mut peer = Peer { stream: client };
    peer.send(request(Command::Write, 1, 0, 512), &[9; 512])
        .await;
    until("the write", || disk.running() == 1).await;
    serving.abort();
    assert!(
        soon("the abort", serving)
            .await
            .expect_err("aborted")
            .is_cancelled()
    );
    disk.release(1);
    until("the write", || disk.running() == 0).await;
    assert_eq!(disk.contents(0, 1), [9]);
}

#[tokio::test]
async fn close_waits_for_a_running_request_and_answers_it() {
    let disk = MemoryDisk::new(MIB).hold(|asked| asked.kind == Kind::Write);
    let mut rig = Rig::new(disk, Session::default());
    rig.peer
        .send(request(Command::Write, 1, 0, 512), &[9; 512])
        .await;
    until("the write", || rig.disk.running() == 1).await;
    rig.stop.send_replace(Stop::Close);
    let reply = loop {
        rig.peer.send(request(Command::Flush, 2, 0, 0), b"").await;
        let reply = rig.peer.simple().await;
        if reply.error != 0 {
            break reply;
        }
    };
    assert_eq!((reply.cookie, reply.error), (2, Errno::Shutdown.code()));
    assert!(!rig.transmission.is_finished());
    rig.disk.release(1);
    let reply = rig.peer.simple().await;
    assert_eq!((reply.cookie, reply.error), (1, 0));
    rig.peer.ended().await;
    assert!(matches!(rig.ended().await, Ok(Ended::Closed)));
}

#[tokio::test]
async fn a_client_that_reads_nothing_cannot_delay_the_end_for_ever() {
    let session = Session::kernel(Limits {
        linger: Duration::from_millis(50),
        ..Limits::default()
    });
    let mut rig = Rig::new(MemoryDisk::new(MIB), session);
    flood(&mut rig.peer.stream).await;
    rig.stop.send_replace(Stop::Close);
    let Rig {
        peer, transmission, ..
    } = rig;
    let ended = soon("the end", transmission).await.expect("no panic");
    assert!(matches!(ended, Err(SessionError::Stalled)), "{ended:?}");
    drop(peer);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_share_a_budget_without_starving() {
    let budget = ByteBudget::new(64 << 10);
    let mut clients = Vec::new();
    for _ in 0..4 {
        let session = Session::kernel(Limits {
            budget: budget.clone(),
            ..Limits::default()
        });
        let disk = MemoryDisk::new(MIB).delay(|_| Duration::from_micros(100));
        let mut rig = Rig::new(disk, session);
        clients.push(tokio::spawn(async move {
            for round in 0..50 {
                for cookie in 0..4 {
                    let header = request(Command::Write, cookie, cookie << 15, 32768);
                    rig.peer.send(header, &[round; 32768]).await;
                }
                for _ in 0..4 {
                    assert_eq!(rig.peer.simple().await.error, 0);
                }
            }
        }));
    }
    for client in clients {
        soon("a client", client).await.expect("served");
    }
    until("the budget to be whole", || budget.available() == 64 << 10).await;
}
