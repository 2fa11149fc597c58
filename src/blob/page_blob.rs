//! One page blob: each method is exactly one attempt at one REST operation.
//!
//! Nothing here retries. `deadline` bounds the whole attempt, from picking a
//! connection to the last byte of the answer; when it passes, the connection
//! is closed and the error says whether the request may have been written.

use std::time::Duration;

use bytes::Bytes;

use super::account::Account;
use super::error::StorageError;
use super::types::*;

/// The result of one attempt.
pub type Attempt<T> = Result<T, StorageError>;

/// A handle on one page blob (or one snapshot of it); cheap to clone.
#[derive(Clone, Debug)]
pub struct PageBlob {
    pub(super) account: Account,
    pub(super) address: BlobAddress,
    pub(super) snapshot: Option<String>,
}

/// The answer of Get Blob on a range.
#[derive(Clone, Debug)]
pub struct RangeRead {
    /// The bytes, as the pieces in which they came; lengths add up to exactly
    /// the range that was asked for.
    pub pieces: Vec<Bytes>,
    /// Size of the whole blob, from `Content-Range`.
    pub blob_size: u64,
    /// Entity tag.
    pub etag: ETag,
    /// `x-ms-blob-sequence-number`.
    pub sequence_number: u64,
}

/// A checksum to send with a write or to demand of a read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// None.
    #[default]
    Off,
    /// `Content-MD5`; on reads `x-ms-range-get-content-md5` (ranges up to 4 MiB).
    Md5,
    /// `x-ms-content-crc64`; on reads `x-ms-range-get-content-crc64`.
    Crc64,
}

/// What Delete Blob does with snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeleteSnapshots {
    /// Fails when there are any (no header sent).
    Refuse,
    /// `include`: the blob and its snapshots.
    Include,
    /// `only`: the snapshots and not the blob.
    Only,
}

impl PageBlob {
    /// The address, without the snapshot.
    #[must_use]
    pub fn address(&self) -> &BlobAddress {
        &self.address
    }

    /// The same blob with connections of its own, at most `max_connections`;
    /// see [`Account::isolated`].
    #[must_use]
    pub fn isolated(&self, max_connections: usize) -> Self {
        Self {
            account: self.account.isolated(max_connections),
            ..self.clone()
        }
    }

    /// The same blob as of the snapshot taken at `time` (an `x-ms-snapshot` value).
    #[must_use]
    pub fn at_snapshot(&self, time: impl Into<String>) -> Self {
        Self {
            snapshot: Some(time.into()),
            ..self.clone()
        }
    }

    /// Put Blob: creates (or, unless conditioned, replaces) an empty page blob of `size` bytes.
    pub async fn create(
        &self,
        size: u64,
        metadata: &[(String, String)],
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Written> {
        todo!()
    }

    /// Put Page, update: at most 4 MiB, both ends on page boundaries.
    pub async fn put_page(
        &self,
        offset: u64,
        data: Bytes,
        checksum: Checksum,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Written> {
        todo!()
    }

    /// Put Page, clear: any length, both ends on page boundaries.
    pub async fn clear_pages(
        &self,
        range: Range,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Written> {
        todo!()
    }

    /// Put Page From URL: copies `source_range` of `source_url` (which carries
    /// its own authorisation) to the same length at `offset`.
    pub async fn put_page_from_url(
        &self,
        offset: u64,
        source_url: &str,
        source_range: Range,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Written> {
        todo!()
    }

    /// Get Blob on a range.
    pub async fn get_range(
        &self,
        range: Range,
        checksum: Checksum,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<RangeRead> {
        todo!()
    }

    /// Get Page Ranges within `within` (all when `None`); the differences since
    /// the snapshot `since` when given.
    pub async fn page_ranges(
        &self,
        within: Option<Range>,
        since: Option<&str>,
        marker: Option<&str>,
        max_results: Option<u32>,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<PageRanges> {
        todo!()
    }

    /// Get Blob Properties (HEAD).
    pub async fn properties(
        &self,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Properties> {
        todo!()
    }

    /// Set Blob Properties: a new size.
    pub async fn resize(
        &self,
        size: u64,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Written> {
        todo!()
    }

    /// Set Blob Properties: the sequence number.
    pub async fn set_sequence_number(
        &self,
        action: SequenceNumber,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Written> {
        todo!()
    }

    /// Set Blob Metadata: replaces all of it.
    pub async fn set_metadata(
        &self,
        metadata: &[(String, String)],
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Written> {
        todo!()
    }

    /// Lease Blob, acquire, for 15 to 60 `seconds`, or for ever when `None`.
    pub async fn acquire_lease(
        &self,
        id: &LeaseId,
        seconds: Option<u32>,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<()> {
        todo!()
    }

    /// Lease Blob, renew.
    pub async fn renew_lease(&self, id: &LeaseId, deadline: Duration) -> Attempt<()> {
        todo!()
    }

    /// Lease Blob, change.
    pub async fn change_lease(
        &self,
        id: &LeaseId,
        proposed: &LeaseId,
        deadline: Duration,
    ) -> Attempt<()> {
        todo!()
    }

    /// Lease Blob, release.
    pub async fn release_lease(&self, id: &LeaseId, deadline: Duration) -> Attempt<()> {
        todo!()
    }

    /// Lease Blob, break, after at most `period` seconds (0 to 60; `None`: the
    /// store's default). Answers with the seconds left.
    pub async fn break_lease(
        &self,
        period: Option<u32>,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<u32> {
        todo!()
    }

    /// Snapshot Blob: answers with the snapshot's time stamp.
    pub async fn create_snapshot(
        &self,
        metadata: &[(String, String)],
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<String> {
        todo!()
    }

    /// Copy Blob from `source_url` (a snapshot's URL for a source in use).
    /// Asynchronous: follow it with [`PageBlob::properties`].
    pub async fn start_copy(
        &self,
        source_url: &str,
        metadata: &[(String, String)],
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<CopyState> {
        todo!()
    }

    /// Abort Copy Blob.
    pub async fn abort_copy(
        &self,
        copy_id: &str,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<()> {
        todo!()
    }

    /// Delete Blob.
    pub async fn delete(
        &self,
        snapshots: DeleteSnapshots,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<()> {
        todo!()
    }

    /// The URL of this blob (or snapshot) on its endpoint, unsigned: a copy
    /// source within the same account.
    #[must_use]
    pub fn url(&self) -> String {
        todo!()
    }
}
