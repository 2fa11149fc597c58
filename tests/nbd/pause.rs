//! Pausing a connection at a request boundary and going on elsewhere: nothing
//! is lost and nothing happens twice, wherever in the byte stream the pause
//! falls.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use crate::support::memory_disk::{Kind, MemoryDisk};
use crate::support::nbd_peer::{Peer, Rig, Transmission, request, soon, until};
use bytes::Bytes;
use dysk::nbd::transmission::{ByteBudget, Ended, Limits, Session, Stop, transmit};
use dysk::nbd::wire::reply::{Errno, SimpleReply};
use dysk::nbd::wire::request::{Command, RequestHeader};
use proptest::prelude::*;
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;

const MIB: u64 = 1 << 20;

fn start(
    stream: UnixStream,
    disk: &Arc<MemoryDisk>,
    unread: Bytes,
) -> (Transmission, watch::Sender<Stop>) {
    let (stop, stopped) = watch::channel(Stop::Run);
    let session = Session {
        unread,
        ..Session::default()
    };
    let disk = Arc::clone(disk);
    (tokio::spawn(transmit(stream, disk, session, stopped)), stop)
}

async fn pause(transmission: Transmission, stop: &watch::Sender<Stop>) -> (UnixStream, Bytes) {
    stop.send_replace(Stop::Pause);
    let ended = soon("the pause", transmission).await.expect("no panic");
    match ended {
        Ok(Ended::Paused { stream, unread }) => (stream, unread),
        other => panic!("{other:?} instead of a pause"),
    }
}

/// Sends `bytes` up to `cut`, pauses, goes on, sends the rest, and returns the
/// errors of `replies` simple replies by cookie.
async fn cut_at(
    disk: &Arc<MemoryDisk>,
    bytes: &[u8],
    cut: usize,
    replies: usize,
) -> Vec<(u64, u32)> {
    let (server, client) = UnixStream::pair().expect("a socket pair");
    let server_too = server.as_fd().try_clone_to_owned().expect("a descriptor");
    let mut peer = Peer { stream: client };
    let (transmission, stop) = start(server, disk, Bytes::new());
    peer.send_raw(&bytes[..cut]).await;
    until("the bytes to be read", || {
        rustix::io::ioctl_fionread(&server_too).expect("a socket") == 0
    })
    .await;
    drop(server_too);
    let (server, unread) = pause(transmission, &stop).await;
    let (transmission, stop) = start(server, disk, unread);
    peer.send_raw(&bytes[cut..]).await;
    let mut errors = Vec::new();
    for _ in 0..replies {
        let reply = peer.simple().await;
        errors.push((reply.cookie, reply.error));
    }
    errors.sort_unstable();
    drop(peer);
    soon("the end", transmission).await.expect("no panic").ok();
    drop(stop);
    errors
}

fn message(header: RequestHeader, fill: u8) -> Vec<u8> {
    let mut bytes = header.encode().to_vec();
    bytes.resize(bytes.len() + header.payload_len(), fill);
    bytes
}

#[tokio::test]
async fn a_pause_may_fall_anywhere_in_the_stream() {
    let bytes = [
        message(request(Command::Write, 1, 0, 600), 1),
        message(request(Command::Flush, 2, 0, 0), 0),
        message(request(Command::Write, 3, 8192, 100), 3),
    ]
    .concat();
    for cut in 0..=bytes.len() {
        let disk = Arc::new(MemoryDisk::new(MIB).recording());
        let errors = cut_at(&disk, &bytes, cut, 3).await;
        assert_eq!(errors, [(1, 0), (2, 0), (3, 0)], "cut at {cut}");
        let kinds: Vec<_> = disk.asked().iter().map(|asked| asked.kind).collect();
        assert_eq!(
            kinds,
            [Kind::Write, Kind::Flush, Kind::Write],
            "cut at {cut}"
        );
        assert_eq!(disk.contents(599, 2), [1, 0]);
        assert_eq!(disk.contents(8291, 2), [3, 0]);
    }
}

#[tokio::test]
async fn a_pause_within_a_large_payload_keeps_every_byte() {
    let mut bytes = message(request(Command::Write, 1, 0, 300_000), 0);
    for (at, byte) in bytes[28..].iter_mut().enumerate() {
        *byte = u8::try_from(at % 251).expect("below 251");
    }
    for cut in [28, 29, 5_000, 65_536, 65_564, 200_000, 300_027] {
        let disk = Arc::new(MemoryDisk::new(MIB));
        assert_eq!(cut_at(&disk, &bytes, cut, 1).await, [(1, 0)]);
        assert_eq!(disk.contents(0, 300_000), bytes[28..], "cut at {cut}");
    }
}

#[tokio::test]
async fn a_pause_within_a_payload_that_is_refused_keeps_the_refusal() {
    let bytes = [
        message(request(Command::Write, 1, 0, 50_000), 1),
        message(request(Command::Write, 2, 0, 512), 2),
    ]
    .concat();
    for cut in [10, 28, 100, 49_000, 50_027, 50_028, 50_100] {
        let disk = Arc::new(MemoryDisk::new(MIB).max_payload(4096));
        let errors = cut_at(&disk, &bytes, cut, 2).await;
        assert_eq!(errors, [(1, Errno::Inval.code()), (2, 0)], "cut at {cut}");
        assert_eq!(disk.contents(511, 2), [2, 0], "cut at {cut}");
    }
}

#[tokio::test]
async fn a_pause_answers_what_runs_and_leaves_what_waits() {
    let session = Session::kernel(Limits {
        max_requests: 2,
        budget: ByteBudget::new(2 * 4096),
        ..Limits::default()
    });
    let disk = MemoryDisk::new(MIB).recording().hold(|_| true);
    let Rig {
        mut peer,
        disk,
        stop,
        transmission,
    } = Rig::new(disk, session);
    for cookie in 1..=5 {
        peer.send(
            request(Command::Write, cookie, cookie * 512, 512),
            &[1; 512],
        )
        .await;
    }
    until("2 requests", || disk.running() == 2).await;
    stop.send_replace(Stop::Pause);
    tokio::task::yield_now().await;
    assert!(!transmission.is_finished(), "paused with requests running");
    disk.release(2);
    let (server, unread) = pause(transmission, &stop).await;
    assert_eq!(peer.simple().await.error, 0);
    assert_eq!(peer.simple().await.error, 0);
    assert_eq!(disk.asked().len(), 2);

    let (transmission, stop) = start(server, &disk, unread);
    disk.release(3);
    let mut cookies = BTreeSet::new();
    for _ in 0..3 {
        cookies.insert(peer.simple().await.cookie);
    }
    assert_eq!(cookies, BTreeSet::from([3, 4, 5]));
    let (_, unread) = pause(transmission, &stop).await;
    assert_eq!(unread, Bytes::new());
}

#[tokio::test]
async fn a_pause_can_become_a_close() {
    let disk = MemoryDisk::new(MIB).hold(|_| true);
    let Rig {
        mut peer,
        disk,
        stop,
        transmission,
    } = Rig::new(disk, Session::default());
    peer.send(request(Command::Write, 1, 0, 512), &[1; 512])
        .await;
    until("the write", || disk.running() == 1).await;
    stop.send_replace(Stop::Pause);
    tokio::task::yield_now().await;
    stop.send_replace(Stop::Close);
    tokio::task::yield_now().await;
    disk.release(1);
    assert_eq!(peer.simple().await.error, 0);
    peer.ended().await;
    let ended = soon("the end", transmission).await.expect("no panic");
    assert!(matches!(ended, Ok(Ended::Closed)), "{ended:?}");
}

/// Sends writes of all sizes in pieces of all sizes, each request with a
/// cookie of its own.
async fn send_load(mut sending: tokio::net::unix::OwnedWriteHalf, requests: u64, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut bytes = Vec::new();
    for cookie in 0..requests {
        let length = match rng.random_range(0..4) {
            0 => 512,
            1 => rng.random_range(1..4096),
            2 => 4096,
            _ => rng.random_range(4096..65536),
        };
        let header = request(Command::Write, cookie, cookie << 16, length);
        bytes.extend(message(header, fill(cookie)));
    }
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let (now, later) = rest.split_at(rng.random_range(1..100_000).min(rest.len()));
        soon("sending", sending.write_all(now)).await.expect("sent");
        rest = later;
        if rng.random_bool(0.3) {
            tokio::time::sleep(Duration::from_micros(rng.random_range(1..300))).await;
        }
    }
    sending.forget();
}

fn fill(cookie: u64) -> u8 {
    u8::try_from(cookie % 250).expect("below 250") + 1
}

async fn pause_under_load(requests: u64, seed: u64) -> usize {
    let delays = std::sync::Mutex::new(StdRng::seed_from_u64(seed));
    let disk = MemoryDisk::new(requests << 16).recording().delay(move |_| {
        let mut rng = delays.lock().expect("no panic in here");
        Duration::from_micros([0, 0, rng.next_u64() % 400][rng.random_range(0..3)])
    });
    let disk = Arc::new(disk);
    let (mut server, client) = UnixStream::pair().expect("a socket pair");
    let (mut replies, sending) = client.into_split();
    let sender = tokio::spawn(send_load(sending, requests, seed));
    let receiver = tokio::spawn(async move {
        let mut cookies = Vec::new();
        let mut bytes = [0; 16];
        for _ in 0..requests {
            soon("a reply", replies.read_exact(&mut bytes))
                .await
                .expect("a reply");
            let reply = SimpleReply::parse(&bytes).expect("a reply");
            assert_eq!(reply.error, 0);
            cookies.push(reply.cookie);
        }
        // The socket stays open until the last pause.
        (cookies, replies)
    });

    let mut rng = StdRng::seed_from_u64(!seed);
    let mut unread = Bytes::new();
    let mut pauses = 0;
    while !receiver.is_finished() {
        let (transmission, stop) = start(server, &disk, unread);
        tokio::time::sleep(Duration::from_micros(rng.random_range(0..2000))).await;
        (server, unread) = pause(transmission, &stop).await;
        pauses += 1;
    }
    soon("the sender", sender).await.expect("all was sent");
    let (mut cookies, _replies) = receiver.await.expect("all was answered");
    cookies.sort_unstable();
    assert_eq!(
        cookies,
        (0..requests).collect::<Vec<_>>(),
        "lost or doubled replies"
    );
    let asked = disk.asked();
    let offsets: BTreeSet<_> = asked.iter().map(|asked| asked.offset >> 16).collect();
    assert_eq!(asked.len() as u64, requests, "a request ran twice");
    assert_eq!(offsets, (0..requests).collect());
    for asked in asked {
        let len = usize::try_from(asked.len).expect("small");
        let written = disk.contents(asked.offset, len);
        let expected = fill(asked.offset >> 16);
        assert!(
            written.iter().all(|&byte| byte == expected),
            "torn write {asked:?}"
        );
    }
    pauses
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn under_load_no_request_is_lost_or_doubled(seed: u64) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let pauses = runtime.block_on(pause_under_load(600, seed));
        prop_assert!(pauses > 1, "the load was over before a pause");
    }
}
