//! Disks by the kernel's nbd driver: a volume's sockets, its sessions, and
//! the device they make.
//!
//! | file | what it holds |
//! |---|---|
//! | `mod.rs` | the transport: attach, find |
//! | [`device`] | one device: detach, and when it is gone |
//! | [`sessions`] | the connections that serve it, replaced when they break |
//! | [`openers`] | processes that have a device open |

mod device;
mod openers;
mod sessions;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::transport::{BoxFuture, Device, Export, Parked, Transport, TransportError};
use crate::device::BlockDevice;
use crate::nbd::kernel::{Connect, KernelError, KernelNbd, QueueLimits, SocketPair, Sysfs};
use crate::nbd::negotiation;
use device::NbdDevice;
use sessions::Sessions;

/// After this long the kernel shuts the connection of an unanswered request
/// and sends it again on another, or on the one that takes its place. No error
/// ever comes of it: the first of the two holds its range until its fate is
/// settled, the other waits for it.
///
/// It is also how long requests wait that a daemon took with it when it was
/// killed, so it should be short. But each replay of a request that is merely
/// slow costs a connection and moves its bytes twice, so it is longer than
/// what happens without a crash: one attempt at the store that runs into its
/// deadline (10 s), the fence and the repetition; and nearly a whole kernel
/// queue (128 requests, 4 MiB each) at a blob's 60 MiB/s.
const REPLAY: Duration = Duration::from_secs(15);
/// How long I/O waits for us when every connection is dead: in effect for
/// ever, for only this makes errors. A year, since the kernel counts it in
/// jiffies. Whoever wants errors instead detaches by force.
const WAIT_FOR_DAEMON: Duration = Duration::from_secs(365 * 24 * 3600);
/// How long a new device may take to appear.
const READY_PATIENCE: Duration = Duration::from_secs(10);
/// The size of a sector, the smallest that the disk takes.
const SECTOR: u32 = 512;

/// The nbd driver of this kernel.
#[derive(Default)]
pub struct NbdTransport {
    /// Opened at first use: the module may be loaded after us.
    kernel: Mutex<Option<KernelNbd>>,
    sysfs: Sysfs,
}

impl NbdTransport {
    /// The transport; asks the kernel nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    async fn kernel(&self) -> Result<KernelNbd, TransportError> {
        let known = |slot: &Mutex<Option<KernelNbd>>| {
            let slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            slot.clone()
        };
        if let Some(kernel) = known(&self.kernel) {
            return Ok(kernel);
        }
        let kernel = blocking(KernelNbd::open).await?;
        let mut slot = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
        // Of two that came at once the first stays.
        Ok(slot.get_or_insert(kernel).clone())
    }

    /// The device that the kernel has connected under this id.
    async fn index_of(&self, id: &str) -> Result<Option<u32>, TransportError> {
        let sysfs = self.sysfs.clone();
        let devices = blocking(move || sysfs.list()).await?;
        let found = devices
            .into_iter()
            .find(|device| device.pid.is_some() && device.backend.as_deref() == Some(id));
        Ok(found.map(|device| device.index))
    }

    async fn connect(&self, export: Export) -> Result<NbdDevice, TransportError> {
        let kernel = self.kernel().await?;
        let geometry = export.volume.geometry();
        let (theirs, ours) =
            SocketPair::many(export.connections.into()).map_err(TransportError::from)?;
        let sessions = Sessions::start(&export, kernel.clone(), self.sysfs.clone(), ours)?;
        let flags = negotiation::Export {
            name: export.name.clone(),
            geometry,
        }
        .flags(false);
        let connect = Connect {
            index: None,
            size_bytes: geometry.size,
            block_size: SECTOR,
            // Also of a lone connection, which is replaced: what a daemon that
            // was killed took with it is otherwise sent again after 30 s only.
            timeout: REPLAY,
            dead_connection_timeout: WAIT_FOR_DAEMON,
            server_flags: flags,
            client_flags: 0,
            backend: export.id.clone(),
        };
        let index = match kernel.connect(connect, theirs).await {
            Ok(device) => device.index,
            Err(error) => {
                sessions.end().await;
                return Err(error.into());
            }
        };
        tracing::debug!(name = export.name, index, "connected");
        sessions.connected(index);
        let sysfs = self.sysfs.clone();
        let path = sysfs.node(index);
        let device = NbdDevice::new(
            kernel,
            sysfs.clone(),
            index,
            export.id,
            path,
            Some(sessions),
        );
        let ready = blocking(move || {
            sysfs.set_queue(index, QueueLimits::default())?;
            tracing::debug!(index, "queue limits set");
            sysfs.wait_ready(index, geometry.size, READY_PATIENCE)?;
            // The kernel's own event came before the backend could be read.
            sysfs.announce(index);
            Ok(())
        })
        .await;
        if let Err(error) = ready {
            if let Err(left) = device.take(true).await {
                tracing::error!(name = export.name, %left, "a device that failed stays connected");
            }
            return Err(error);
        }
        Ok(device)
    }
}

impl Transport for NbdTransport {
    fn check(&self) -> BoxFuture<'_, Result<(), TransportError>> {
        Box::pin(async { self.kernel().await.map(drop) })
    }

    fn attach(&self, export: Export) -> BoxFuture<'_, Result<Arc<dyn Device>, TransportError>> {
        Box::pin(async { Ok(Arc::new(self.connect(export).await?) as Arc<dyn Device>) })
    }

    fn resume(
        &self,
        export: Export,
        parked: Vec<Parked>,
    ) -> BoxFuture<'_, Result<Option<Arc<dyn Device>>, TransportError>> {
        Box::pin(async move {
            let Some(index) = self.index_of(&export.id).await? else {
                return Ok(None);
            };
            let kernel = self.kernel().await?;
            let sysfs = self.sysfs.clone();
            let handed_over = parked.len() == usize::from(export.connections);
            let sessions = Sessions::resume(&export, kernel.clone(), sysfs.clone(), index, parked)?;
            set_queue_later(sysfs.clone(), index);
            let path = sysfs.node(index);
            let mut device = NbdDevice::new(kernel, sysfs, index, export.id, path, Some(sessions));
            if !handed_over {
                device = device.after_a_crash();
            }
            Ok(Some(Arc::new(device) as Arc<dyn Device>))
        })
    }

    fn find<'a>(
        &'a self,
        id: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<dyn Device>>, TransportError>> {
        Box::pin(async move {
            let Some(index) = self.index_of(id).await? else {
                return Ok(None);
            };
            let (kernel, sysfs) = (self.kernel().await?, self.sysfs.clone());
            let path = sysfs.node(index);
            let device = NbdDevice::new(kernel, sysfs, index, id.to_owned(), path, None);
            Ok(Some(Arc::new(device) as Arc<dyn Device>))
        })
    }
}

impl From<KernelError> for TransportError {
    fn from(error: KernelError) -> Self {
        match error {
            KernelError::NoModule
            | KernelError::NetworkNamespace
            | KernelError::TooOld(_)
            | KernelError::NotPermitted(_) => Self::Unable(error.to_string()),
            KernelError::Busy { index, busy } => Self::InUse {
                device: format!("/dev/nbd{index}"),
                places: vec![busy.to_string()],
            },
            _ => Self::Failed(error.to_string()),
        }
    }
}

/// Sets the queue's limits in case that an earlier daemon died before it came
/// to this. Nobody waits for it: it takes until what is under way is served.
fn set_queue_later(sysfs: Sysfs, index: u32) {
    tokio::task::spawn_blocking(move || {
        if let Err(error) = sysfs.set_queue(index, QueueLimits::default()) {
            tracing::warn!(index, %error, "cannot set the queue's limits");
        }
    });
}

/// Runs what waits for the kernel away from the threads that serve disks.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, KernelError> + Send + 'static,
) -> Result<T, TransportError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(TransportError::Failed(format!(
            "work on the kernel's side died: {error}"
        ))),
    }
}
