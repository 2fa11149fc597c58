//! The asynchronous side: one thread of its own makes every netlink call, one
//! after the other, because the kernel does so anyway and a call that gets
//! stuck must not take a data thread with it.

use std::os::fd::OwnedFd;
use std::thread;

use tokio::sync::{mpsc, oneshot};

use super::error::KernelError;
use super::family::{Connect, Device, DeviceStatus, NbdFamily};

/// Calls that may wait for the thread; more wait for a place in the queue.
const QUEUE: usize = 64;

type Answer<T> = oneshot::Sender<Result<T, KernelError>>;

enum Call {
    Connect(Connect, Vec<OwnedFd>, Answer<Device>),
    Reconfigure(u32, String, Vec<OwnedFd>, Answer<()>),
    Resize(u32, String, u64, Answer<()>),
    Disconnect(u32, String, Answer<()>),
    Status(Option<u32>, Answer<Vec<DeviceStatus>>),
}

/// A handle on the thread that talks to the kernel's nbd driver. Clones share
/// the thread; it ends with the last of them.
#[derive(Clone, Debug)]
pub struct KernelNbd {
    calls: mpsc::Sender<Call>,
}

impl KernelNbd {
    /// Finds the driver and starts the thread.
    ///
    /// # Errors
    /// As [`NbdFamily::open`], and [`KernelError::Netlink`] when no thread
    /// can be had.
    pub fn open() -> Result<Self, KernelError> {
        let family = NbdFamily::open()?;
        let (calls, queue) = mpsc::channel(QUEUE);
        thread::Builder::new()
            .name("nbd-netlink".to_owned())
            .spawn(move || serve(&family, queue))
            .map_err(KernelError::Netlink)?;
        Ok(Self { calls })
    }

    /// Connects a device; see [`NbdFamily::connect`]. The sockets' ends given
    /// here are closed. A caller that goes away before the answer leaves no
    /// device behind.
    ///
    /// # Errors
    /// As [`NbdFamily::connect`].
    pub async fn connect(
        &self,
        connect: Connect,
        sockets: Vec<OwnedFd>,
    ) -> Result<Device, KernelError> {
        self.call(|answer| Call::Connect(connect, sockets, answer))
            .await
    }

    /// Replaces dead connections; see [`NbdFamily::reconfigure`]. The ends
    /// given here are closed, so a socket that was not needed reads as ended
    /// at the server's side.
    ///
    /// # Errors
    /// As [`NbdFamily::reconfigure`].
    pub async fn reconfigure(
        &self,
        index: u32,
        backend: &str,
        sockets: Vec<OwnedFd>,
    ) -> Result<(), KernelError> {
        let backend = backend.to_owned();
        self.call(|answer| Call::Reconfigure(index, backend, sockets, answer))
            .await
    }

    /// Changes a device's size in bytes; see [`NbdFamily::resize`].
    ///
    /// # Errors
    /// As [`NbdFamily::resize`].
    pub async fn resize(
        &self,
        index: u32,
        backend: &str,
        size_bytes: u64,
    ) -> Result<(), KernelError> {
        let backend = backend.to_owned();
        self.call(|answer| Call::Resize(index, backend, size_bytes, answer))
            .await
    }

    /// Disconnects a device; see [`NbdFamily::disconnect`].
    ///
    /// # Errors
    /// As [`NbdFamily::disconnect`].
    pub async fn disconnect(&self, index: u32, backend: &str) -> Result<(), KernelError> {
        let backend = backend.to_owned();
        self.call(|answer| Call::Disconnect(index, backend, answer))
            .await
    }

    /// The driver's view of one device or all; see [`NbdFamily::status`].
    ///
    /// # Errors
    /// As [`NbdFamily::status`].
    pub async fn status(&self, index: Option<u32>) -> Result<Vec<DeviceStatus>, KernelError> {
        self.call(|answer| Call::Status(index, answer)).await
    }

    async fn call<T>(&self, call: impl FnOnce(Answer<T>) -> Call) -> Result<T, KernelError> {
        let (answer, reply) = oneshot::channel();
        self.calls
            .send(call(answer))
            .await
            .map_err(|_| KernelError::Stopped)?;
        reply.await.map_err(|_| KernelError::Stopped)?
    }
}

/// Makes the calls, in order, until the last handle is gone.
fn serve(family: &NbdFamily, mut queue: mpsc::Receiver<Call>) {
    while let Some(call) = queue.blocking_recv() {
        match call {
            Call::Connect(connect, sockets, answer) => {
                if answer.is_closed() {
                    continue;
                }
                let result = family.connect(&connect, &sockets);
                drop(sockets);
                if let Err(Ok(device)) = answer.send(result) {
                    undo(family, device, &connect.backend);
                }
            }
            Call::Reconfigure(index, backend, sockets, answer) => {
                let result = family.reconfigure(index, &backend, &sockets);
                drop(sockets);
                reply(answer, result);
            }
            Call::Resize(index, backend, size, answer) => {
                reply(answer, family.resize(index, &backend, size));
            }
            Call::Disconnect(index, backend, answer) => {
                reply(answer, family.disconnect(index, &backend));
            }
            Call::Status(index, answer) => reply(answer, family.status(index)),
        }
    }
}

/// A device nobody waits for any more must not stay.
fn undo(family: &NbdFamily, device: Device, backend: &str) {
    match family.disconnect(device.index, backend) {
        Ok(()) => tracing::info!(
            index = device.index,
            backend,
            "attach abandoned, disconnected"
        ),
        Err(error) => {
            tracing::error!(index = device.index, backend, %error, "attach abandoned, device left");
        }
    }
}

/// A caller that has gone away does not hear of the failure: the log does.
fn reply<T>(answer: Answer<T>, result: Result<T, KernelError>) {
    if let Err(Err(error)) = answer.send(result) {
        tracing::warn!(%error, "nbd call failed after its caller had gone");
    }
}
