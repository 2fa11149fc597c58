//! One connection carries requests that the store has stuck and others that it
//! has not: nothing of the latter waits for the former, and nor do a hang-up,
//! a goodbye or a flush of a cache that has nothing to flush.

use std::sync::Arc;
use std::time::Duration;

use crate::support::emulated;
use crate::support::nbd_peer::{Peer, Transmission, request, soon, until};
use dysk::blob::LeaseId;
use dysk::emulator::{Effect, Operation, Rule, Running, Span};
use dysk::nbd::transmission::{Ended, Limits, Session, SessionError, Stop, transmit};
use dysk::nbd::wire::request::Command;
use dysk::volume::{Caching, OpenOptions, StagingOptions, Volume};
use tokio::net::UnixStream;
use tokio::sync::watch;

/// Longer than the test: what the store has stuck stays so.
const FOR_EVER: Duration = Duration::from_secs(3600);
/// What the rules strike; all else is left alone.
const STUCK: u64 = 64 << 10;
/// Small ones, which run in the connection's own task, and one that does not.
const SIZES: [u32; 4] = [4096, 4096, 512, 256 << 10];
const OTHERS: u64 = 40;

struct Rig {
    emulator: Running,
    volume: Arc<Volume>,
    peer: Peer,
    transmission: Transmission,
    stop: watch::Sender<Stop>,
    _folder: tempfile::TempDir,
}

async fn rig(caching: Caching) -> Rig {
    let (emulator, blob) = emulated::blob("disk.img", 4 << 20).await;
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
    let options = OpenOptions {
        attempt_deadline: FOR_EVER,
        caching,
        staging: StagingOptions {
            dir: folder.path().into(),
            ..StagingOptions::default()
        },
        ..OpenOptions::new(LeaseId::random())
    };
    let volume = Volume::open(blob, options).await.expect("opens");
    let (server, client) = UnixStream::pair().expect("a socket pair");
    let (stop, stopped) = watch::channel(Stop::Run);
    let session = Session::kernel(Limits::default());
    let transmission = tokio::spawn(transmit(server, Arc::clone(&volume), session, stopped));
    Rig {
        emulator,
        volume,
        peer: Peer { stream: client },
        transmission,
        stop,
        _folder: folder,
    }
}

/// What the store may do to a request for as long as it likes.
fn troubles() -> Vec<(&'static str, Effect)> {
    let stall = |after| Effect::Stall {
        delay: Span(FOR_EVER),
        after,
    };
    vec![
        ("no answer", stall(false)),
        ("no answer though it was done", stall(true)),
        ("throttled", Effect::status(503, "ServerBusy")),
        ("blocked", Effect::status(403, "AuthorizationFailure")),
    ]
}

fn strike(emulator: &Running, effect: &Effect) {
    let operations = [
        Operation::PutPage,
        Operation::ClearPages,
        Operation::GetBlob,
    ];
    let rules = operations.map(|operation| Rule {
        range: Some(STUCK..STUCK + 4096),
        ..Rule::on(operation, effect.clone())
    });
    emulator.faults().set(rules.to_vec());
}

/// Sends the ones that stick and waits until the store has turned on each.
async fn send_stuck(rig: &mut Rig, commands: &[Command]) {
    for (cookie, command) in (1..).zip(commands) {
        let header = match command {
            Command::Flush => request(*command, cookie, 0, 0),
            _ => request(*command, cookie, STUCK, 4096),
        };
        let payload = vec![1; header.payload_len()];
        rig.peer.send(header, &payload).await;
    }
    let expected = commands.len() as u64;
    let volume = Arc::clone(&rig.volume);
    until("they are under way", || {
        volume.status().in_flight >= expected
    })
    .await;
    let emulator = &rig.emulator;
    until("the store turned on one", || {
        emulator
            .faults()
            .report()
            .iter()
            .any(|rule| rule.struck > 0)
    })
    .await;
}

/// Writes and reads of every size, elsewhere; each has its answer before the
/// next is sent.
async fn others_are_served(rig: &mut Rig, what: &str) {
    for number in 0..OTHERS {
        let size = SIZES[usize::try_from(number % 4).expect("small")];
        let at = (1 << 20) + number * 4096;
        let (write, read) = (1000 + 2 * number, 1001 + 2 * number);
        let fill = u8::try_from(number).expect("small");
        let header = request(Command::Write, write, at, size);
        rig.peer.send(header, &vec![fill; size as usize]).await;
        let reply = soon(what, rig.peer.simple()).await;
        assert_eq!((reply.cookie, reply.error), (write, 0), "{what}");
        rig.peer
            .send(request(Command::Read, read, at, size), b"")
            .await;
        let reply = soon(what, rig.peer.simple()).await;
        assert_eq!((reply.cookie, reply.error), (read, 0), "{what}");
        let data = rig.peer.receive(size as usize).await;
        assert!(data.iter().all(|byte| *byte == fill), "{what}");
    }
}

async fn stuck_reads(caching: Caching) {
    for (what, effect) in troubles() {
        let mut rig = rig(caching).await;
        strike(&rig.emulator, &effect);
        send_stuck(&mut rig, &[Command::Read, Command::Read]).await;
        others_are_served(&mut rig, what).await;
        assert_eq!(rig.volume.status().in_flight, 2, "{what}: still stuck");
    }
}

#[tokio::test]
async fn a_read_that_is_stuck_in_the_store_holds_up_nothing_else() {
    stuck_reads(Caching::None).await;
}

#[tokio::test]
async fn nor_does_one_behind_a_cache() {
    stuck_reads(Caching::ReadWrite).await;
}

#[tokio::test]
async fn a_write_that_is_stuck_in_the_store_holds_up_nothing_else() {
    for (what, effect) in troubles() {
        let mut rig = rig(Caching::None).await;
        strike(&rig.emulator, &effect);
        // The second waits for the first's range, the third for both.
        let commands = [Command::Write, Command::Write, Command::Trim];
        send_stuck(&mut rig, &commands).await;
        others_are_served(&mut rig, what).await;
        assert_eq!(rig.volume.status().in_flight, 3, "{what}: still stuck");
    }
}

/// Staged writes need no store; a flush that waits for it holds up no other.
#[tokio::test]
async fn a_flush_that_is_stuck_holds_up_nothing_else() {
    let mut rig = rig(Caching::ReadWrite).await;
    strike(&rig.emulator, &Effect::status(503, "ServerBusy"));
    rig.peer
        .send(request(Command::Write, 1, STUCK, 4096), &[1; 4096])
        .await;
    assert_eq!(rig.peer.simple().await.error, 0, "staged");
    send_stuck(&mut rig, &[Command::Flush]).await;
    others_are_served(&mut rig, "behind a flush").await;
    // It was there all along, and is answered once the store allows.
    rig.emulator.faults().clear();
    let reply = soon("the flush", rig.peer.simple()).await;
    assert_eq!((reply.cookie, reply.error), (1, 0));
}

#[tokio::test]
async fn a_hang_up_is_heard_though_requests_are_stuck() {
    for (what, effect) in troubles() {
        let mut rig = rig(Caching::None).await;
        strike(&rig.emulator, &effect);
        send_stuck(&mut rig, &[Command::Write, Command::Read]).await;
        drop(rig.peer);
        let ended = soon(what, rig.transmission).await.expect("no panic");
        let gone = matches!(ended, Ok(Ended::Vanished) | Err(SessionError::Read(_)));
        assert!(gone, "{what}: {ended:?}");
        drop(rig.stop);
    }
}

/// Handing over waits for what is taken and for nothing else: once the store
/// answers again the stream is given back, with the rest unread.
#[tokio::test]
async fn a_pause_waits_for_what_is_stuck_and_reads_no_more() {
    let mut rig = rig(Caching::None).await;
    strike(&rig.emulator, &Effect::status(503, "ServerBusy"));
    send_stuck(&mut rig, &[Command::Write, Command::Read]).await;
    rig.stop.send(Stop::Pause).expect("it listens");
    others_wait(&mut rig).await;
    rig.emulator.faults().clear();
    let mut answered: Vec<u64> = Vec::new();
    for _ in 0..2 {
        let reply = soon("an answer", rig.peer.simple()).await;
        assert_eq!(reply.error, 0);
        if reply.cookie == 2 {
            rig.peer.receive(4096).await;
        }
        answered.push(reply.cookie);
    }
    answered.sort_unstable();
    assert_eq!(answered, [1, 2]);
    let ended = soon("the pause", rig.transmission).await.expect("no panic");
    assert!(matches!(ended, Ok(Ended::Paused { .. })), "{ended:?}");
}

/// What comes after the pause is not taken.
async fn others_wait(rig: &mut Rig) {
    let taken = |rig: &Rig| rig.volume.status().completed + rig.volume.status().in_flight;
    let before = taken(rig);
    rig.peer
        .send(request(Command::Read, 9, 1 << 20, 4096), b"")
        .await;
    // Nothing tells that nothing happens; each yield lets the loop run.
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(taken(rig), before);
}
