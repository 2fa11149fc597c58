//! A page blob as a block device: open, lease, fence, ordering of overlapping
//! writes, caching. Neither NBD nor the kernel is known here.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::blob::vhd::Layout;
use crate::blob::{LeaseId, PageBlob, StorageError};
use crate::device::{BlockDevice, DeviceError, Extent, Geometry, ReadData};

/// Azure's names for what a disk may cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Caching {
    /// Write-through; nothing is cached.
    #[default]
    None,
    /// Reads are cached; writes go through.
    ReadOnly,
    /// A volatile write cache: writes may wait for flush or FUA.
    ReadWrite,
}

/// How to open a volume.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Take no lease, refuse writes.
    pub read_only: bool,
    /// Caching mode.
    pub caching: Caching,
    /// Break somebody else's lease first.
    pub break_lease: bool,
    /// The lease id to take, fresh at each attach.
    pub lease: LeaseId,
    /// Bound on each attempt at a request of control size.
    pub attempt_deadline: Duration,
}

/// Why a volume did not open. Nothing stays leased.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OpenError {
    /// The store refused or could not be reached.
    #[error("{0}")]
    Storage(#[from] StorageError),
    /// Another holder has the lease.
    #[error("{object}: leased elsewhere: {remedy}")]
    Leased {
        /// `account/container/blob`.
        object: String,
        /// What to do.
        remedy: String,
    },
    /// The blob cannot be a disk.
    #[error("{object}: {reason}")]
    Unusable {
        /// `account/container/blob`.
        object: String,
        /// Why, and what to do.
        reason: String,
    },
}

/// What an open volume looks like from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeStatus {
    /// Usable bytes.
    pub size: u64,
    /// How the disk lies in its blob.
    pub layout: Layout,
    /// The lease is lost for good: since when and why, in words.
    pub fenced: Option<String>,
    /// Finished reads, writes, flushes, trims and zeroes.
    pub completed: u64,
    /// Requests sent to the store.
    pub store_requests: u64,
    /// Requests under way.
    pub in_flight: u64,
}

/// A page blob opened as a disk.
pub struct Volume {}

impl Volume {
    /// Takes the lease, learns size and layout, raises the fence. At most four
    /// sequential store round trips. On any error nothing stays leased.
    pub async fn open(blob: PageBlob, options: OpenOptions) -> Result<Arc<Self>, OpenError> {
        todo!()
    }

    /// Its state now; never blocks.
    #[must_use]
    pub fn status(&self) -> VolumeStatus {
        todo!()
    }

    /// Refuses new I/O, waits for what is under way, releases the lease.
    pub async fn close(&self) -> Result<(), StorageError> {
        todo!()
    }
}

/// Creates a blob of the right size with its footer; refuses to replace one.
/// A half-made blob is removed again.
///
/// # Errors
/// `disk_size` is no multiple of 512 or out of (0, 8 TiB], or the store refuses.
pub async fn create(
    blob: &PageBlob,
    disk_size: u64,
    layout: Layout,
    deadline: Duration,
) -> Result<(), OpenError> {
    todo!()
}

/// Deletes the blob and its snapshots; refuses while it is leased.
pub async fn delete(blob: &PageBlob, deadline: Duration) -> Result<(), OpenError> {
    todo!()
}

impl BlockDevice for Volume {
    fn geometry(&self) -> Geometry {
        todo!()
    }
    async fn read(&self, offset: u64, len: u32) -> Result<ReadData, DeviceError> {
        todo!()
    }
    async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), DeviceError> {
        todo!()
    }
    async fn flush(&self) -> Result<(), DeviceError> {
        todo!()
    }
    async fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), DeviceError> {
        todo!()
    }
    async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        fua: bool,
        no_hole: bool,
    ) -> Result<(), DeviceError> {
        todo!()
    }
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, DeviceError> {
        todo!()
    }
}
