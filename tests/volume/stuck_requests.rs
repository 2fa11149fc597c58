//! A client that has no answer for long hangs up and sends everything again on
//! another connection, as the kernel does at the replay threshold. However
//! long the store is away, what it left behind does not pile up.

use std::sync::Arc;
use std::time::Duration;

use crate::support::emulated;
use crate::support::nbd_peer;
use crate::support::nbd_peer::{Peer, request, soon, until};
use bytes::Bytes;
use dysk::blob::{LeaseId, PageBlob};
use dysk::device::{BlockDevice, DeviceError, Extent, Geometry, ReadData};
use dysk::emulator::{Effect, Operation, Rule, Running};
use dysk::nbd::transmission::{ByteBudget, Ended, Limits, Session, SessionError, Stop, transmit};
use dysk::nbd::wire::request::Command;
use dysk::volume::{Caching, OpenOptions, StagingOptions, Volume};
use tokio::net::UnixStream;
use tokio::sync::watch;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 32;
/// Behind the blocks that are written: what is trimmed again and again.
const TRIMMED: u64 = BLOCKS * BLOCK;
/// Requests of one generation: writes, a read, a trim and a flush.
const REQUESTS: u64 = BLOCKS + 3;
const GENERATIONS: u8 = 20;
/// One attempt at the store; several fit into the outage.
const ATTEMPT: Duration = Duration::from_millis(200);

async fn store() -> (Running, PageBlob) {
    emulated::blob("stuck.img", 1 << 20).await
}

async fn open(blob: &PageBlob, caching: Caching, folder: &tempfile::TempDir) -> Arc<Volume> {
    let options = OpenOptions {
        attempt_deadline: ATTEMPT,
        caching,
        staging: StagingOptions {
            dir: folder.path().into(),
            // So small that the outage fills it.
            size: 1,
            ..StagingOptions::default()
        },
        ..OpenOptions::new(LeaseId::random())
    };
    Volume::open(blob.clone(), options).await.expect("opens")
}

/// Nobody answers.
fn break_store(emulator: &Running) {
    let stall = Effect::Stall {
        delay: dysk::emulator::Span(Duration::from_secs(3600)),
        after: false,
    };
    let stalled = [
        Operation::PutPage,
        Operation::ClearPages,
        Operation::GetBlob,
    ];
    let mut rules: Vec<_> = stalled
        .into_iter()
        .map(|operation| Rule::on(operation, stall.clone()))
        .collect();
    let busy = Effect::status(503, "ServerBusy");
    rules.push(Rule::on(Operation::SetBlobProperties, busy));
    emulator.faults().set(rules);
}

/// One generation of the client's requests on a connection of its own.
async fn ask<D: BlockDevice>(
    device: &Arc<D>,
    limits: &Limits,
    generation: u8,
) -> (Peer, nbd_peer::Transmission, watch::Sender<Stop>) {
    let (server, client) = UnixStream::pair().expect("a socket pair");
    let (stop, stopped) = watch::channel(Stop::Run);
    let (device, session) = (Arc::clone(device), Session::kernel(limits.clone()));
    let transmission = tokio::spawn(transmit(server, device, session, stopped));
    let mut peer = Peer { stream: client };
    for block in 0..BLOCKS {
        let write = request(Command::Write, block, block * BLOCK, 4096);
        peer.send(write, &[generation; 4096]).await;
    }
    peer.send(request(Command::Trim, 100, TRIMMED, 65536), b"")
        .await;
    peer.send(request(Command::Read, 101, TRIMMED, 512), b"")
        .await;
    peer.send(request(Command::Flush, 102, 0, 0), b"").await;
    (peer, transmission, stop)
}

/// The most requests that were in the volume at once, sampled when a
/// generation's have all arrived.
async fn outage<D: BlockDevice>(volume: &Arc<Volume>, device: &Arc<D>, limits: &Limits) -> u64 {
    let mut most = 0;
    for generation in 1..=GENERATIONS {
        let before = volume.status();
        let (peer, transmission, _stop) = ask(device, limits, generation).await;
        let arrived = || {
            let now = volume.status();
            let gone = now.completed - before.completed;
            now.in_flight + gone >= before.in_flight + REQUESTS
        };
        until("a generation has arrived", arrived).await;
        most = most.max(volume.status().in_flight);
        // For longer than an attempt: this generation's outcomes are unknown.
        tokio::time::sleep(2 * ATTEMPT).await;
        drop(peer);
        let ended = soon("the hang-up", transmission).await.expect("no panic");
        // A client that left replies unread resets the connection.
        let gone = matches!(ended, Ok(Ended::Vanished) | Err(SessionError::Read(_)));
        assert!(gone, "{ended:?}");
    }
    most
}

fn limits(bytes: u32) -> Limits {
    Limits {
        budget: ByteBudget::new(bytes),
        ..Limits::default()
    }
}

async fn nothing_piles_up(caching: Caching) {
    let (emulator, blob) = store().await;
    let folder = tempfile::tempdir().expect("a folder");
    let volume = open(&blob, caching, &folder).await;
    break_store(&emulator);
    // Less than three generations: were anything left of them, the fourth
    // would never arrive.
    let limits = limits(3 * 4096 * u32::try_from(REQUESTS).expect("few"));
    let most = outage(&volume, &volume, &limits).await;
    assert!(
        most <= 3 * REQUESTS,
        "{most} requests at once of {REQUESTS}"
    );
    // All that is left ends although the store is still away.
    until("nothing is left", || volume.status().in_flight == 0).await;

    let (mut peer, _transmission, _stop) = ask(&volume, &limits, GENERATIONS + 1).await;
    emulator.faults().clear();
    for _ in 0..REQUESTS {
        let reply = peer.simple().await;
        assert_eq!(reply.error, 0, "{reply:?}");
        if reply.cookie == 101 {
            peer.receive(512).await;
        }
    }
    volume.close().await.expect("closes");
    let volume = open(&blob, Caching::None, &folder).await;
    let data = volume.read(0, u32::try_from(TRIMMED).expect("small")).await;
    let data = data.expect("reads").to_bytes();
    assert!(
        data.iter().all(|byte| *byte == GENERATIONS + 1),
        "an old copy won"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_dead_connections_do_not_pile_up() {
    nothing_piles_up(Caching::None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_do_they_behind_a_full_cache() {
    nothing_piles_up(Caching::ReadWrite).await;
}

/// Hides the caller from the volume: every request runs in a task of its own.
struct Deaf(Arc<Volume>);

async fn apart<T: Send + 'static>(
    request: impl Future<Output = Result<T, DeviceError>> + Send + 'static,
) -> Result<T, DeviceError> {
    tokio::spawn(request).await.expect("no panic")
}

impl BlockDevice for Deaf {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    async fn read(&self, offset: u64, len: u32) -> Result<ReadData, DeviceError> {
        let volume = Arc::clone(&self.0);
        apart(async move { volume.read(offset, len).await }).await
    }

    async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), DeviceError> {
        let volume = Arc::clone(&self.0);
        apart(async move { volume.write(offset, data, fua).await }).await
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        let volume = Arc::clone(&self.0);
        apart(async move { volume.flush().await }).await
    }

    async fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), DeviceError> {
        let volume = Arc::clone(&self.0);
        apart(async move { volume.trim(offset, len, fua).await }).await
    }

    async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        fua: bool,
        no_hole: bool,
    ) -> Result<(), DeviceError> {
        let volume = Arc::clone(&self.0);
        apart(async move { volume.write_zeroes(offset, len, fua, no_hole).await }).await
    }

    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, DeviceError> {
        let volume = Arc::clone(&self.0);
        apart(async move { volume.extents(offset, len).await }).await
    }
}

/// The contrast: the same, when the volume does not hear that the client left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_hearing_of_the_hang_up_they_would() {
    let (emulator, blob) = store().await;
    let folder = tempfile::tempdir().expect("a folder");
    let volume = open(&blob, Caching::None, &folder).await;
    break_store(&emulator);
    let device = Arc::new(Deaf(Arc::clone(&volume)));
    let most = outage(&volume, &device, &limits(64 << 20)).await;
    assert!(
        most > u64::from(GENERATIONS / 2) * REQUESTS,
        "{most} requests at once of {REQUESTS}"
    );
}
