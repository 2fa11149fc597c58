//! How a connection ends: by a word, by hanging up, by nonsense.

use crate::support::memory_disk::MemoryDisk;
use crate::support::nbd_peer::{Rig, request, soon, structured};
use dysk::nbd::transmission::{Ended, Session, SessionError, Stop};
use dysk::nbd::wire::request::{Command, RequestHeader};
use proptest::prelude::*;
use tokio::io::AsyncWriteExt;

const MIB: u64 = 1 << 20;

fn disk() -> MemoryDisk {
    MemoryDisk::new(MIB)
}

#[tokio::test]
async fn goodbye_and_hang_ups_are_told_apart() {
    let mut rig = Rig::new(disk(), Session::default());
    rig.peer
        .send(request(Command::Write, 1, 0, 512), &[1; 512])
        .await;
    rig.peer
        .send(request(Command::Disconnect, 0, 0, 0), b"")
        .await;
    assert_eq!(rig.peer.simple().await.error, 0);
    rig.peer.ended().await;
    assert!(matches!(rig.ended().await, Ok(Ended::Disconnected)));

    // A client that closes its sending side still gets its answer.
    let mut rig = Rig::new(disk().hold(|_| true), Session::default());
    rig.peer.send(request(Command::Read, 1, 0, 512), b"").await;
    rig.peer.stream.shutdown().await.expect("shut down");
    rig.disk.release(1);
    assert_eq!(rig.peer.simple().await.error, 0);
    rig.peer.receive(512).await;
    rig.peer.ended().await;
    assert!(matches!(rig.ended().await, Ok(Ended::Disconnected)));

    let rig = Rig::new(disk(), Session::default());
    let Rig {
        peer, transmission, ..
    } = rig;
    drop(peer);
    let ended = soon("the end", transmission).await.expect("no panic");
    assert!(matches!(ended, Ok(Ended::Vanished)));

    for part in [
        &request(Command::Write, 1, 0, 512).encode()[..],
        b"\x25\x60",
    ] {
        let Rig {
            mut peer,
            transmission,
            ..
        } = Rig::new(disk(), Session::default());
        peer.send_raw(part).await;
        drop(peer);
        let ended = soon("the end", transmission).await.expect("no panic");
        assert!(matches!(ended, Err(SessionError::Truncated)));
    }
}

#[tokio::test]
async fn the_last_word_of_a_dropped_stop_stands() {
    let Rig {
        mut peer,
        transmission,
        stop,
        ..
    } = Rig::new(disk(), Session::default());
    drop(stop);
    peer.send(request(Command::Flush, 1, 0, 0), b"").await;
    assert_eq!(peer.simple().await.error, 0);
    drop(peer);
    let ended = soon("the end", transmission).await.expect("no panic");
    assert!(matches!(ended, Ok(Ended::Vanished)));

    let Rig {
        mut peer,
        transmission,
        stop,
        ..
    } = Rig::new(disk(), Session::default());
    stop.send_replace(Stop::Close);
    drop(stop);
    peer.ended().await;
    let ended = soon("the end", transmission).await.expect("no panic");
    assert!(matches!(ended, Ok(Ended::Closed)));
}

#[tokio::test]
async fn a_wrong_magic_ends_the_session() {
    let mut rig = Rig::new(disk(), Session::default());
    rig.peer.send_raw(&[0x11; 28]).await;
    rig.peer.ended().await;
    let error = rig.ended().await.expect_err("out of step");
    assert_eq!(
        error.to_string(),
        "nbd protocol violation: request opens with magic 0x11111111"
    );
}

/// A request that may be wrong in any field.
fn any_request() -> impl Strategy<Value = RequestHeader> {
    let flags = prop_oneof![4 => Just(0), 1 => 0u16..32, 1 => any::<u16>()];
    let command = prop_oneof![8 => 0u16..9, 1 => any::<u16>()];
    let offset = prop_oneof![4 => 0..MIB, 1 => any::<u64>()];
    let length = prop_oneof![4 => 0u32..9000, 1 => any::<u32>()];
    (flags, command, any::<u64>(), offset, length).prop_map(
        |(flags, command, cookie, offset, length)| {
            // A payload is really sent, so keep it small.
            let length = if command == 1 {
                length % 40_000
            } else {
                length
            };
            RequestHeader {
                flags,
                command,
                cookie,
                offset,
                length,
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Valid and invalid requests in any mix, then garbage, then a hang-up:
    /// the transmission ends, and without a panic.
    #[test]
    fn survives_anything(
        requests in prop::collection::vec(any_request(), 0..24),
        garbage in prop::collection::vec(any::<u8>(), 0..128),
        chunks in prop::collection::vec(1usize..5000, 1..8),
        with_structure: bool,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let session = if with_structure { structured() } else { Session::default() };
            let disk = MemoryDisk::new(MIB).max_payload(32 << 10);
            let Rig { peer, transmission, stop, .. } = Rig::new(disk, session);
            let mut bytes = Vec::new();
            for header in &requests {
                bytes.extend(header.encode());
                bytes.resize(bytes.len() + header.payload_len(), 0x5a);
            }
            bytes.extend(garbage);
            let (mut replies, mut sending) = peer.stream.into_split();
            let drain = tokio::spawn(async move {
                tokio::io::copy(&mut replies, &mut tokio::io::sink()).await
            });
            let mut rest = &bytes[..];
            for len in chunks.iter().cycle() {
                let (now, later) = rest.split_at((*len).min(rest.len()));
                if now.is_empty() || sending.write_all(now).await.is_err() {
                    break;
                }
                rest = later;
            }
            drop(sending);
            let ended = soon("the transmission", transmission).await;
            assert!(ended.is_ok(), "the transmission panicked");
            drop(stop);
            soon("the replies", drain).await.expect("no panic").ok();
        });
    }
}
