//! The nouns of page blobs: addresses, leases, conditions, properties, ranges.

use std::fmt;
use std::time::SystemTime;

/// Which blob of which account: printed as `account/container/blob`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlobAddress {
    /// Storage account name.
    pub account: String,
    /// Container name.
    pub container: String,
    /// Blob name; may contain `/`. Empty when the address means a container,
    /// as is `container` when it means the account.
    pub blob: String,
}

impl BlobAddress {
    /// The address of `blob`.
    #[must_use]
    pub fn new(
        account: impl Into<String>,
        container: impl Into<String>,
        blob: impl Into<String>,
    ) -> Self {
        Self {
            account: account.into(),
            container: container.into(),
            blob: blob.into(),
        }
    }
}

impl fmt::Display for BlobAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.account)?;
        for part in [&self.container, &self.blob] {
            if !part.is_empty() {
                write!(f, "/{part}")?;
            }
        }
        Ok(())
    }
}

/// A lease id, a UUID in lower-case hyphenated form.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LeaseId(String);

impl LeaseId {
    /// A fresh random id (version 4).
    #[must_use]
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().to_string())
    }

    /// An id read back from a record or an answer, kept as it is.
    #[must_use]
    pub fn from_text(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The id as it goes into `x-ms-lease-id`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// An entity tag, quotes included, as the store sent it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ETag(pub String);

/// Conditions on a request; all that are set must hold. `Default` is none.
///
/// Follows "Specifying conditional headers for Blob service operations" and
/// the headers of Put Page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conditions {
    /// `x-ms-lease-id`.
    pub lease: Option<LeaseId>,
    /// `If-Match`; [`ETag`] `*` means that the blob exists.
    pub if_match: Option<ETag>,
    /// `If-None-Match`; [`ETag`] `*` means that the blob does not exist.
    pub if_none_match: Option<ETag>,
    /// `If-Modified-Since`.
    pub if_modified_since: Option<SystemTime>,
    /// `If-Unmodified-Since`.
    pub if_unmodified_since: Option<SystemTime>,
    /// `x-ms-if-sequence-number-lt`, for page writes only.
    pub if_sequence_number_lt: Option<u64>,
    /// `x-ms-if-sequence-number-le`, for page writes only.
    pub if_sequence_number_le: Option<u64>,
    /// `x-ms-if-sequence-number-eq`, for page writes only.
    pub if_sequence_number_eq: Option<u64>,
}

impl Conditions {
    /// Only that the lease `id` be held.
    #[must_use]
    pub fn lease(id: &LeaseId) -> Self {
        Self {
            lease: Some(id.clone()),
            ..Self::default()
        }
    }

    /// Only that the blob does not exist yet.
    #[must_use]
    pub fn not_existing() -> Self {
        Self {
            if_none_match: Some(ETag("*".into())),
            ..Self::default()
        }
    }
}

/// `x-ms-lease-state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LeaseState {
    /// Nobody holds it and nobody did since it was last released.
    Available,
    /// Held.
    Leased,
    /// A finite lease ran out; its holder may still renew it.
    Expired,
    /// Somebody broke it; the break period runs.
    Breaking,
    /// Somebody broke it; it is over.
    Broken,
}

/// Kinds of blobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlobType {
    /// The kind that is a disk.
    Page,
    /// Not a disk.
    Block,
    /// Not a disk.
    Append,
}

/// Get Blob Properties, as far as a disk needs them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// Size in bytes.
    pub size: u64,
    /// Kind of blob.
    pub blob_type: BlobType,
    /// Entity tag.
    pub etag: ETag,
    /// `Last-Modified`.
    pub last_modified: SystemTime,
    /// `x-ms-blob-sequence-number`; 0 for other kinds than page blobs.
    pub sequence_number: u64,
    /// State of the lease.
    pub lease_state: LeaseState,
    /// True when the lease that is held never ends (`x-ms-lease-duration: infinite`).
    pub lease_infinite: bool,
    /// User metadata, names in lower case.
    pub metadata: Vec<(String, String)>,
    /// State of the last copy to this blob, when there was one.
    pub copy: Option<CopyState>,
}

/// The state of a Copy Blob whose destination this blob is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyState {
    /// `x-ms-copy-id`.
    pub id: String,
    /// `x-ms-copy-status`.
    pub status: CopyStatus,
    /// Bytes copied and bytes in all, from `x-ms-copy-progress`.
    pub progress: Option<(u64, u64)>,
    /// `x-ms-copy-status-description`.
    pub description: Option<String>,
}

/// `x-ms-copy-status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CopyStatus {
    /// Under way.
    Pending,
    /// Done.
    Success,
    /// Aborted by Abort Copy Blob.
    Aborted,
    /// Failed; the description says why.
    Failed,
}

/// Conditions and identity of a blob after a write of any kind to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The new entity tag.
    pub etag: ETag,
    /// The sequence number after the operation (0 where the store sent none).
    pub sequence_number: u64,
}

/// The action of Set Blob Properties on the sequence number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SequenceNumber {
    /// Raise to this number unless it is higher already; may be repeated.
    Max(u64),
    /// Set to this number.
    Update(u64),
    /// Add one.
    Increment,
}

/// A half-open byte range, aligned to pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// First byte after the range.
    pub end: u64,
}

impl Range {
    /// `len` bytes from `start`.
    #[must_use]
    pub fn at(start: u64, len: u64) -> Self {
        Self {
            start,
            end: start + len,
        }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// True when the range holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start >= self.end
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start, self.len())
    }
}

/// One page of Get Page Ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRanges {
    /// Ranges with data (for a diff: changed since the earlier snapshot), ascending.
    pub filled: Vec<Range>,
    /// For a diff: ranges cleared since the earlier snapshot, ascending.
    pub cleared: Vec<Range>,
    /// Where the next page starts; `None` on the last one.
    pub next_marker: Option<String>,
    /// Size of the blob in bytes (`x-ms-blob-content-length`).
    pub blob_size: u64,
    /// Entity tag of the blob.
    pub etag: ETag,
}

impl PageRanges {
    /// Up to where they are all of those in `within`, which was asked for: beyond
    /// a page that is not the last nothing is known.
    #[must_use]
    pub fn known_to(&self, within: Range) -> u64 {
        match (&self.next_marker, self.filled.last()) {
            (Some(_), Some(last)) => last.end,
            (Some(_), None) => within.start,
            (None, _) => within.end,
        }
    }
}

/// A blob as List Blobs shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedBlob {
    /// Name.
    pub name: String,
    /// The snapshot's time stamp, when this is a snapshot.
    pub snapshot: Option<String>,
    /// Kind of blob.
    pub blob_type: BlobType,
    /// Size in bytes.
    pub size: u64,
    /// State of its lease.
    pub lease_state: LeaseState,
    /// Entity tag.
    pub etag: ETag,
    /// Sequence number, 0 when the store sent none.
    pub sequence_number: u64,
    /// User metadata, when it was asked for.
    pub metadata: Vec<(String, String)>,
}
