//! The seam between an open volume and the kernel: how a disk becomes a
//! device. [`super::nbd`] is the one that ships; ublk can come beside it.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;

use super::api::ErrorCode;
use super::error::NodeError;
use crate::volume::Volume;

/// A future on the heap, so that transports can be chosen at run time.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What is to become a device.
#[derive(Clone)]
pub struct Export {
    /// The attachment's id; the kernel keeps it with the device, and
    /// [`Transport::find`] finds the device by it.
    pub id: String,
    /// For logs.
    pub name: String,
    /// Connections to the kernel, at least 1.
    pub connections: u16,
    /// The disk, open.
    pub volume: Arc<Volume>,
}

/// One connection of a device between two daemons: paused where a request
/// ends, everything that was read is answered.
#[derive(Debug)]
pub struct Parked {
    /// Our end.
    pub socket: OwnedFd,
    /// What was read from it and not taken.
    pub unread: Bytes,
}

/// Why a transport did not do it. The texts name the device and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// This node cannot attach: no driver, no privilege.
    #[error("{0}")]
    Unable(String),
    /// The device is in use.
    #[error("{device} is in use: {}; or use --force", places.join(", "))]
    InUse {
        /// The device.
        device: String,
        /// Where, and what to do: ``mounted at /srv: run `umount /srv` ``.
        places: Vec<String>,
    },
    /// The kernel refused or the device did not come or go.
    #[error("{0}")]
    Failed(String),
}

impl From<TransportError> for NodeError {
    fn from(error: TransportError) -> Self {
        let code = match error {
            TransportError::Unable(_) => ErrorCode::NodeUnable,
            TransportError::InUse { .. } => ErrorCode::InUse,
            TransportError::Failed(_) => ErrorCode::DeviceFailed,
        };
        Self::new(code, error.to_string())
    }
}

/// A way to turn volumes into devices.
///
/// No future of a transport is ever dropped before it ends: each either
/// finishes its work or takes back what it did.
pub trait Transport: Send + Sync + 'static {
    /// Can this node attach at all? Asked before anything else is done.
    fn check(&self) -> BoxFuture<'_, Result<(), TransportError>>;

    /// Makes the device and waits until it can be opened. On any error
    /// nothing of it is left.
    fn attach(&self, export: Export) -> BoxFuture<'_, Result<Arc<dyn Device>, TransportError>>;

    /// Serves the device that an earlier daemon made with the export's id, on
    /// the connections `parked` by it; new ones take the place of those that
    /// are dead, and what waits in the kernel goes on. None when there is no
    /// such device. On an error the device is as it was.
    fn resume(
        &self,
        export: Export,
        parked: Vec<Parked>,
    ) -> BoxFuture<'_, Result<Option<Arc<dyn Device>>, TransportError>>;

    /// The device that an earlier daemon made with this id, if it lives; not
    /// served, to be detached at most.
    fn find<'a>(
        &'a self,
        id: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<dyn Device>>, TransportError>>;
}

/// A disk in the kernel's hands.
pub trait Device: Send + Sync + 'static {
    /// The device node, such as `/dev/nbd3`.
    fn path(&self) -> &Path;

    /// Flushes, takes the device from the kernel and waits until it let go.
    /// Refused with [`TransportError::InUse`], checked in one step with the
    /// taking, unless `force`; then whoever still uses it gets errors. A
    /// device that is gone already is fine.
    fn detach(&self, force: bool) -> BoxFuture<'_, Result<(), TransportError>>;

    /// Tells the kernel that the disk has `size` bytes now, and waits until it
    /// says so too. Never shrinks; a device of that size is fine. Serve the
    /// size before: the kernel asks for the new end at once.
    fn resize(&self, size: u64) -> BoxFuture<'_, Result<(), TransportError>>;

    /// Takes no further request and waits until those taken are answered; then
    /// the connections, for another process to go on with. Until
    /// [`Device::go_on`] nothing here touches them.
    fn park(&self) -> BoxFuture<'_, Vec<Parked>>;

    /// Takes requests again after [`Device::park`], or while it is under way.
    fn go_on(&self);

    /// Ends when the kernel has let go of the device, whoever caused it.
    fn gone(&self) -> BoxFuture<'_, ()>;
}
