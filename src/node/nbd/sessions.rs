//! The connections of one device. One that the kernel gave up (a request
//! was not answered for the replay threshold) is replaced, so that a store
//! that was away for long finds every connection there when it comes back.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::device::{BlockDevice, DeviceError};
use crate::nbd::kernel::{KernelError, KernelNbd, SocketPair, Sysfs, sockets};
use crate::nbd::transmission::{ByteBudget, Ended, Limits, Session, Stop, transmit};
use crate::node::transport::{Export, Parked, TransportError};
use crate::volume::Volume;

/// Payload bytes of one volume's requests under way.
const BUDGET: u32 = 64 << 20;
/// How long sessions may take to end once the device is disconnected.
const END_PATIENCE: Duration = Duration::from_secs(2);
/// Pauses between attempts to replace a connection.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

pub(super) struct Sessions {
    shared: Arc<Shared>,
    tasks: Vec<AbortHandle>,
}

struct Shared {
    kernel: KernelNbd,
    sysfs: Sysfs,
    volume: Arc<Volume>,
    backend: String,
    name: String,
    limits: Limits,
    /// Known once the kernel has picked it.
    index: OnceLock<u32>,
    /// Raised when the device is taken apart: nothing is replaced any more.
    leaving: watch::Sender<bool>,
    stop: watch::Sender<Stop>,
    /// Connections that are being served now.
    serving: watch::Sender<usize>,
    /// Sessions that run.
    running: watch::Sender<usize>,
    /// Those of them that are parked.
    parked: watch::Sender<usize>,
    /// What they left for another process; dead connections leave nothing.
    lot: Mutex<Vec<Parked>>,
}

/// A connection and what was read from it and not taken.
struct Alive {
    stream: UnixStream,
    unread: Bytes,
}

fn alive(stream: StdStream, unread: Bytes) -> Result<Alive, TransportError> {
    match UnixStream::from_std(stream) {
        Ok(stream) => Ok(Alive { stream, unread }),
        Err(error) => Err(TransportError::Failed(format!(
            "cannot use a socket: {error}"
        ))),
    }
}

/// Counts a session for as long as it lives, aborted or not.
struct Running(Arc<Shared>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.send_modify(|count| *count -= 1);
    }
}

/// Counts a connection for as long as it is served.
struct Serving<'a>(&'a watch::Sender<usize>);

impl<'a> Serving<'a> {
    fn begin(count: &'a watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count)
    }
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

impl Sessions {
    /// Serves the export's volume on `streams`.
    pub fn start(
        export: &Export,
        kernel: KernelNbd,
        sysfs: Sysfs,
        streams: Vec<StdStream>,
    ) -> Result<Self, TransportError> {
        let streams = streams
            .into_iter()
            .map(|stream| alive(stream, Bytes::new()).map(Some))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self::run(export, kernel, sysfs, streams, OnceLock::new()))
    }

    /// Serves it on a device of an earlier daemon: on the connections that
    /// one parked; the others are dead, and each is replaced as soon as the
    /// kernel has noticed.
    pub fn resume(
        export: &Export,
        kernel: KernelNbd,
        sysfs: Sysfs,
        index: u32,
        parked: Vec<Parked>,
    ) -> Result<Self, TransportError> {
        let mut streams = parked
            .into_iter()
            .map(|parked| alive(parked.socket.into(), parked.unread).map(Some))
            .collect::<Result<Vec<_>, _>>()?;
        streams.resize_with(export.connections.into(), || None);
        Ok(Self::run(export, kernel, sysfs, streams, index.into()))
    }

    fn run(
        export: &Export,
        kernel: KernelNbd,
        sysfs: Sysfs,
        streams: Vec<Option<Alive>>,
        index: OnceLock<u32>,
    ) -> Self {
        let limits = Limits {
            budget: ByteBudget::new(BUDGET),
            ..Limits::default()
        };
        let shared = Arc::new(Shared {
            kernel,
            sysfs,
            volume: export.volume.clone(),
            backend: export.id.clone(),
            name: export.name.clone(),
            limits,
            index,
            leaving: watch::Sender::new(false),
            stop: watch::Sender::new(Stop::Run),
            serving: watch::Sender::new(0),
            running: watch::Sender::new(streams.len()),
            parked: watch::Sender::new(0),
            lot: Mutex::default(),
        });
        let tasks = streams
            .into_iter()
            .map(|stream| {
                let running = Running(shared.clone());
                tokio::spawn(serve(running, stream)).abort_handle()
            })
            .collect();
        Self { shared, tasks }
    }

    /// The kernel picked this index: from now on connections are replaced.
    pub fn connected(&self, index: u32) {
        self.shared.index.get_or_init(|| index);
    }

    /// The device is about to be disconnected.
    pub fn leaving(&self) {
        self.shared.leaving.send_replace(true);
    }

    /// Has the volume flush what it has acknowledged; ends early, as if that
    /// were done, when the device is taken apart meanwhile.
    ///
    /// # Errors
    /// The volume cannot.
    pub async fn flush(&self) -> Result<(), DeviceError> {
        let mut leaving = self.shared.leaving.subscribe();
        tokio::select! {
            flushed = self.shared.volume.flush() => flushed,
            // The sender lives in what we hold.
            _ = leaving.wait_for(|leaving| *leaving) => Ok(()),
        }
    }

    /// Ends what still runs after the device was disconnected. Requests that
    /// wait for a store that is away are left behind; nobody waits for their
    /// answers.
    pub async fn end(&self) {
        self.leaving();
        self.shared.stop.send_replace(Stop::Close);
        if tokio::time::timeout(END_PATIENCE, self.ended())
            .await
            .is_err()
        {
            for task in &self.tasks {
                task.abort();
            }
            self.ended().await;
        }
    }

    /// Takes no further request, waits until those taken are answered, and
    /// hands out copies of the connections.
    pub async fn park(&self) -> Vec<Parked> {
        self.shared.lot().clear();
        self.shared.stop.send_replace(Stop::Pause);
        let (mut running, mut parked) = (
            self.shared.running.subscribe(),
            self.shared.parked.subscribe(),
        );
        // The senders live in what we hold.
        while *parked.borrow_and_update() < *running.borrow_and_update() {
            tokio::select! {
                _ = running.changed() => {}
                _ = parked.changed() => {}
            }
        }
        std::mem::take(&mut *self.shared.lot())
    }

    /// Waits until every connection is there and served.
    pub async fn whole(&self) {
        let mut serving = self.shared.serving.subscribe();
        // Cannot fail: we hold the sender.
        drop(serving.wait_for(|count| *count == self.tasks.len()).await);
    }

    /// Takes requests again.
    pub fn go_on(&self) {
        self.shared.stop.send_replace(Stop::Run);
    }

    /// Waits until no session runs.
    pub async fn ended(&self) {
        let mut running = self.shared.running.subscribe();
        // Cannot fail: we hold the sender.
        drop(running.wait_for(|count| *count == 0).await);
    }
}

async fn serve(running: Running, mut connection: Option<Alive>) {
    let shared = &running.0;
    loop {
        let Some(Alive { stream, unread }) = connection.take() else {
            let mut stop = shared.stop.subscribe();
            let paused = tokio::select! {
                replaced = shared.replace_or_leave() => {
                    connection = replaced.map(|stream| Alive { stream, unread: Bytes::new() });
                    if connection.is_none() {
                        return;
                    }
                    false
                }
                // The sender lives in what we hold.
                _ = stop.wait_for(|stop| *stop == Stop::Pause) => true,
            };
            if paused {
                shared.stay_parked(None).await;
            }
            continue;
        };
        let session = Session {
            unread,
            ..Session::kernel(shared.limits.clone())
        };
        let stop = shared.stop.subscribe();
        let serving = Serving::begin(&shared.serving);
        let ended = transmit(stream, shared.volume.clone(), session, stop).await;
        drop(serving);
        match ended {
            Ok(Ended::Disconnected | Ended::Closed) => return,
            Ok(Ended::Paused { stream, unread }) => {
                let alive = Alive { stream, unread };
                shared.stay_parked(Some(&alive)).await;
                connection = Some(alive);
            }
            Ok(Ended::Vanished) => {
                tracing::warn!(name = shared.name, "the kernel gave up a connection");
            }
            Err(error) => tracing::warn!(name = shared.name, %error, "a connection broke"),
        }
    }
}

impl Shared {
    fn lot(&self) -> MutexGuard<'_, Vec<Parked>> {
        // Nothing that holds it can leave it half changed.
        self.lot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves a copy of the connection in the lot and waits to go on.
    async fn stay_parked(&self, connection: Option<&Alive>) {
        let mut stop = self.stop.subscribe();
        if *stop.borrow_and_update() != Stop::Pause {
            return;
        }
        if let Some(Alive { stream, unread }) = connection {
            match stream.as_fd().try_clone_to_owned() {
                Ok(socket) => self.lot().push(Parked {
                    socket,
                    unread: unread.clone(),
                }),
                Err(error) => {
                    tracing::error!(name = self.name, %error, "cannot hand a connection over");
                }
            }
        }
        self.parked.send_modify(|count| *count += 1);
        // The sender is ours.
        drop(stop.wait_for(|stop| *stop != Stop::Pause).await);
        self.parked.send_modify(|count| *count -= 1);
    }

    /// As [`Shared::replace`], until the device is taken apart.
    async fn replace_or_leave(&self) -> Option<UnixStream> {
        let mut leaving = self.leaving.subscribe();
        tokio::select! {
            replaced = self.replace() => replaced,
            // The sender lives in what we hold.
            _ = leaving.wait_for(|leaving| *leaving) => None,
        }
    }

    /// A new connection to our device in place of a dead one; none when the
    /// device is ours no more.
    async fn replace(&self) -> Option<UnixStream> {
        let index = *self.index.get()?;
        let mut pause = Duration::ZERO;
        loop {
            // It takes the kernel a moment to mark a connection dead, and as
            // long as none is, it drops a new one without a word.
            tokio::time::sleep(pause).await;
            pause = (pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
            match self.reconfigure(index).await {
                Ok(Some(stream)) => {
                    tracing::info!(name = self.name, index, "connection replaced");
                    return Some(stream);
                }
                Ok(None) => {}
                Err(KernelError::NotOurs { .. } | KernelError::NoSuchDevice(_)) => return None,
                Err(error) => {
                    tracing::warn!(name = self.name, %error, "cannot replace a connection yet");
                }
            }
        }
    }

    /// One attempt; none when the kernel had no use for it.
    async fn reconfigure(&self, index: u32) -> Result<Option<UnixStream>, KernelError> {
        let sysfs = self.sysfs.clone();
        let backend = self.backend.clone();
        tokio::task::spawn_blocking(move || sysfs.expect_ours(index, &backend))
            .await
            .map_err(|_| KernelError::Stopped)??;
        let pair = SocketPair::new()?;
        let theirs = vec![pair.kernel];
        self.kernel
            .reconfigure(index, &self.backend, theirs)
            .await?;
        if sockets::is_abandoned(pair.server.as_fd()).map_err(KernelError::Sockets)? {
            return Ok(None);
        }
        UnixStream::from_std(pair.server)
            .map(Some)
            .map_err(KernelError::Sockets)
    }
}
