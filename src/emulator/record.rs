//! What is stored about blobs and containers beside their bytes: the JSON of
//! `--dir` mode, and the same structs in memory.

use serde::{Deserialize, Serialize};

use super::clock::{TICKS_BEFORE_EPOCH, TICKS_PER_SECOND};
use super::lease::Lease;

/// Kind of blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(clippy::enum_variant_names, reason = "these are the wire names")]
pub(super) enum Kind {
    /// A page blob.
    PageBlob,
    /// A block blob; exists so that "no page blob" can be tried.
    BlockBlob,
    /// An append blob; likewise.
    AppendBlob,
}

impl Kind {
    /// `x-ms-blob-type`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::PageBlob => "PageBlob",
            Self::BlockBlob => "BlockBlob",
            Self::AppendBlob => "AppendBlob",
        }
    }

    /// Parses `x-ms-blob-type`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        [Self::PageBlob, Self::BlockBlob, Self::AppendBlob]
            .into_iter()
            .find(|kind| kind.name().eq_ignore_ascii_case(text))
    }
}

/// The content headers a blob carries.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Content {
    /// `Content-Type`; `application/octet-stream` when absent.
    pub kind: Option<String>,
    /// `Content-Encoding`.
    pub encoding: Option<String>,
    /// `Content-Language`.
    pub language: Option<String>,
    /// `Content-MD5` as the client set it (never checked by the service).
    pub md5: Option<String>,
    /// `Cache-Control`.
    pub cache_control: Option<String>,
    /// `Content-Disposition`.
    pub disposition: Option<String>,
}

/// State of a Copy Blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum CopyStatus {
    /// Under way.
    Pending,
    /// Done.
    Success,
    /// Aborted by Abort Copy Blob.
    Aborted,
    /// Failed.
    Failed,
}

impl CopyStatus {
    /// `x-ms-copy-status`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Success => "success",
            Self::Aborted => "aborted",
            Self::Failed => "failed",
        }
    }
}

/// The last Copy Blob to a blob.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Copy {
    /// `x-ms-copy-id`.
    pub id: String,
    /// `x-ms-copy-source`, without a SAS's signature.
    pub source_url: String,
    /// The source in this account.
    pub source: Source,
    /// How it stands.
    pub status: CopyStatus,
    /// `x-ms-copy-status-description`.
    pub description: Option<String>,
    /// Bytes copied.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
    /// When it ended, in ticks.
    pub completed: Option<u64>,
}

/// A blob, or a snapshot of it, as the source of a copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Source {
    /// Container.
    pub container: String,
    /// Blob name.
    pub blob: String,
    /// Snapshot time, when it is one.
    pub snapshot: Option<String>,
    /// The version the copy started from; the copy fails when it changes.
    pub version: u64,
}

/// A blob or a snapshot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    /// Blob name.
    pub name: String,
    /// Snapshot time, when it is a snapshot.
    pub snapshot: Option<String>,
    /// Kind of blob.
    pub kind: Kind,
    /// Names the files with the bytes and the page map.
    pub files: String,
    /// `files` of the base blob at the time: tells snapshots of this blob from
    /// those of an earlier one under the same name.
    pub lineage: String,
    /// Bytes.
    pub size: u64,
    /// Counts changes: the entity tag and, since it counts in ticks since the
    /// year 1, the time of the last change.
    pub version: u64,
    /// Ticks since 1970.
    pub created: u64,
    /// `x-ms-blob-sequence-number`.
    pub sequence_number: u64,
    /// Content headers.
    pub content: Content,
    /// User metadata, names as they were sent.
    pub metadata: Vec<(String, String)>,
    /// The lease; snapshots have none.
    pub lease: Lease,
    /// The last copy to this blob.
    pub copy: Option<Copy>,
}

impl Record {
    /// The entity tag, quotes included.
    pub(super) fn etag(&self) -> String {
        etag(self.version)
    }

    /// Last change in ticks since 1970.
    pub(super) fn modified(&self) -> u64 {
        modified(self.version)
    }

    /// Last change in seconds since 1970, the resolution of HTTP dates.
    pub(super) fn modified_seconds(&self) -> i64 {
        i64::try_from(self.modified() / TICKS_PER_SECOND).unwrap_or(i64::MAX)
    }

    /// True while a copy to this blob is under way.
    pub(super) fn copy_pending(&self) -> bool {
        self.copy
            .as_ref()
            .is_some_and(|copy| copy.status == CopyStatus::Pending)
    }
}

/// A container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ContainerRecord {
    /// Container name.
    pub name: String,
    /// As [`Record::version`].
    pub version: u64,
    /// User metadata.
    pub metadata: Vec<(String, String)>,
    /// `x-ms-blob-public-access`.
    pub public: PublicAccess,
}

/// What a request without credentials may read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum PublicAccess {
    /// Nothing.
    #[default]
    None,
    /// Blobs whose name is known.
    Blob,
    /// Blobs and their list.
    Container,
}

/// The entity tag of a version.
pub(super) fn etag(version: u64) -> String {
    format!("\"0x{version:X}\"")
}

/// The time of a version, in ticks since 1970.
pub(super) fn modified(version: u64) -> u64 {
    version.saturating_sub(TICKS_BEFORE_EPOCH)
}
