//! The control API's types, shared by server and client. Version 1:
//!
//! | request | answer |
//! |---|---|
//! | `POST /v1/attachments` with an [`AttachRequest`] | 201 and the [`Attachment`]; 200 when `reuse` found it |
//! | the same with `?progress=true` | 200 and JSON lines: [`AttachEvent`]s, the last of them `attached` or `failed` |
//! | `GET /v1/attachments` | 200 and an [`AttachmentList`] |
//! | `GET /v1/attachments/NAME` | 200 and the [`Attachment`] |
//! | `DELETE /v1/attachments/NAME[?force=true]` | 200 and a [`Detached`] |
//! | `POST /v1/attachments/NAME/resize` with a [`ResizeRequest`] | 200 and the [`Attachment`] |
//! | `POST /v1/attachments/NAME/snapshot` with a [`SnapshotRequest`] | 200 and a [`SnapshotTaken`] |
//! | `PUT /v1/attachments/NAME/credential` with a [`CredentialChange`] | 200 and the [`Attachment`] |
//! | `GET /v1/attachments/NAME/format` | 200 and a [`FormatState`](crate::volume::FormatState) |
//! | `PUT /v1/attachments/NAME/format` with a [`FormatMark`](crate::volume::FormatMark) | 200 and the same |
//! | `GET /v1/stats` | 200 and a [`Stats`] |
//! | `GET /metrics` | 200 and the same for Prometheus |
//! | `GET /v1/version` | 200 and a [`Version`] |
//! | `GET /v1/health` | 200 and a [`Health`] |
//!
//! Anything else is answered by an [`ErrorAnswer`]. Closing the connection of
//! an attach before its answer came rolls the attach back; a detach, once
//! begun, runs to its end. Requests with unknown fields are refused; clients
//! must ignore unknown fields in answers.

use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use super::error_code::{ErrorAnswer, ErrorBody, ErrorCode};
use super::name::AttachmentName;
use super::policy::Policy;
use crate::blob::source::CredentialSource;
use crate::blob::vhd::Layout;
use crate::volume::{
    CacheStatus, Caching, Limits, Recover, SetAside, Snapshot, Throttled, VolumeStats,
};

/// Where `dyskd` keeps its socket and records.
pub const RUN_DIR: &str = "/run/dysk";
/// The control socket's name within the run directory.
pub const SOCKET: &str = "dyskd.sock";
/// Connections to the kernel per disk when none are asked for. Each one more
/// costs an attach a freeze of the disk's queue, while all other attaches wait;
/// one carries more than a page blob does. One that the kernel gives up is
/// replaced, however many there are.
pub const CONNECTIONS: u16 = 1;
/// Most connections to the kernel per disk.
pub const MAX_CONNECTIONS: u16 = 16;

/// A storage account as a request names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AccountSpec {
    /// Account name.
    pub name: String,
    /// Base URL of its blob service.
    pub endpoint: String,
    /// Where its credentials come from. Paths are absolute, the daemon's.
    pub credential: Secret,
    /// PEM file with certificate authorities to trust beside the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
}

/// A [`CredentialSource`] that compares by what it would print, so that
/// requests can be compared without looking at secrets.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub CredentialSource);

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        format!("{:?}", self.0) == format!("{:?}", other.0)
    }
}

impl Eq for Secret {}

/// How a new blob is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// A fixed VHD: the disk and a footer behind it.
    #[default]
    Vhd,
    /// The blob is the disk.
    Raw,
}

impl From<Format> for Layout {
    fn from(format: Format) -> Self {
        match format {
            Format::Vhd => Self::Vhd,
            Format::Raw => Self::Raw,
        }
    }
}

/// The blob that an attach makes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NewDisk {
    /// Usable bytes: a multiple of 512.
    pub size: u64,
    /// Layout.
    #[serde(default)]
    pub format: Format,
}

/// Attach a page blob as a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AttachRequest {
    /// The attachment's name; the link is `/dev/dysk/NAME`.
    pub name: AttachmentName,
    /// The account.
    pub account: AccountSpec,
    /// The container.
    pub container: String,
    /// The blob.
    pub blob: String,
    /// Take no lease, refuse writes.
    #[serde(default)]
    pub read_only: bool,
    /// How its I/O is to be treated.
    #[serde(default)]
    pub policy: Policy,
    /// Connections to the kernel, 1 to [`MAX_CONNECTIONS`]; [`CONNECTIONS`] when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<u16>,
    /// Break somebody else's lease first.
    #[serde(default)]
    pub break_lease: bool,
    /// What to do with unflushed writes that an earlier attach left on this
    /// node. Of this attach alone: a restarted daemon takes up what is its own.
    #[serde(default)]
    pub recover: Recover,
    /// Create the blob first; it must not exist. Removed again when the attach fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub create: Option<NewDisk>,
    /// Answer with the attachment that is there already when it has this
    /// name, this volume and these options. Off by default: two callers that
    /// both believe a disk theirs will both format it.
    #[serde(default)]
    pub reuse: bool,
    /// What the cluster calls this node, where its controller says which nodes
    /// may attach: the volume must be published to it, and it is named in the
    /// blob's metadata as the lease's holder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<String>,
    /// Follow the settings that are left for it in a blob beside its own, see
    /// [`crate::volume::Settings`].
    #[serde(default)]
    pub follow_settings: bool,
}

impl AttachRequest {
    /// `account/container/blob`.
    #[must_use]
    pub fn volume(&self) -> String {
        format!("{}/{}/{}", self.account.name, self.container, self.blob)
    }
}

/// Have an attachment use other credentials, from now on and after a restart
/// of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CredentialChange {
    /// Where they come from. Paths are absolute, the daemon's.
    pub credential: Secret,
}

/// Grow an attached disk, in use or not. Its filesystem is the caller's to
/// grow, afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ResizeRequest {
    /// Usable bytes to have at least: a multiple of 512. A larger disk stays
    /// as it is, and the answer says how large it is.
    #[serde(alias = "size_bytes")]
    pub size_bytes: u64,
}

/// Take a snapshot of an attached disk: with everything acknowledged before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SnapshotRequest {
    /// Its name, 1 to 1024 bytes. One of that name is found, not taken again.
    pub name: String,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotTaken {
    /// `account/container/blob@time`.
    pub snapshot: String,
    /// The name it was made under; none for one that was made elsewhere.
    pub name: Option<String>,
    /// The store's time stamp.
    pub time: String,
    /// Bytes in the blob at that time, footer included.
    pub blob_size: u64,
}

impl SnapshotTaken {
    /// The snapshot `taken` of `volume`, which is `account/container/blob`.
    #[must_use]
    pub fn new(volume: &str, taken: Snapshot) -> Self {
        Self {
            snapshot: format!("{volume}@{}", taken.time),
            name: taken.name,
            time: taken.time,
            blob_size: taken.blob_size,
        }
    }
}

/// Where an attachment is in its life; the table of transitions is in
/// [`super::registry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// On its way in.
    Attaching,
    /// In use or ready to be.
    Attached,
    /// An earlier daemon's, being taken up; its I/O waits.
    Recovering,
    /// On its way out.
    Detaching,
    /// Something of it is left that could not be undone; detach it to try again.
    Failed,
    /// An earlier daemon's device whose recovery was given up; not served.
    Stale,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Attaching => "attaching",
            Self::Attached => "attached",
            Self::Recovering => "recovering",
            Self::Detaching => "detaching",
            Self::Failed => "failed",
            Self::Stale => "stale",
        })
    }
}

/// An attachment as it is now. Carries no secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// Unique for all time; the kernel knows the device by it.
    pub id: String,
    /// Its name.
    pub name: AttachmentName,
    /// Where it is in its life.
    pub state: State,
    /// Why it is failed or stale; what an attach or a recovery is doing.
    pub reason: Option<String>,
    /// Account name.
    pub account: String,
    /// The account's blob endpoint.
    pub endpoint: String,
    /// Container.
    pub container: String,
    /// Blob.
    pub blob: String,
    /// Usable bytes, once known.
    pub size: Option<u64>,
    /// How the disk lies in its blob, once known.
    pub layout: Option<Layout>,
    /// No lease, no writes.
    pub read_only: bool,
    /// Caching mode.
    pub caching: Caching,
    /// What is sent to the store at most.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub limits: Limits,
    /// Connections to the kernel.
    pub connections: u16,
    /// The device, `/dev/nbdN`, once there is one.
    pub device: Option<PathBuf>,
    /// The stable link to it.
    pub link: Option<PathBuf>,
    /// When the attach began.
    pub since: Timestamp,
    /// The disk was taken by another holder: since when, by whom as far as the
    /// store tells, and the store's answer.
    pub fenced: Option<String>,
    /// When that was noticed.
    #[serde(default)]
    pub fenced_since: Option<Timestamp>,
    /// The cache, unless the mode is `none`.
    #[serde(default)]
    pub cache: Option<CacheStatus>,
    /// Unflushed writes to this volume that are kept out of the way on this
    /// node, until somebody drops them or puts them back.
    #[serde(default)]
    pub kept_aside: Vec<SetAside>,
    /// Finished requests of the kernel.
    pub completed: u64,
    /// Requests sent to the store.
    pub store_requests: u64,
    /// Requests under way.
    pub in_flight: u64,
    /// Requests that the store refused because there were too many.
    #[serde(default)]
    pub refused: u64,
    /// The store throttles, so requests wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttled: Option<Throttled>,
    /// The store refuses access and I/O waits: why, what to do, since when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocked: Option<String>,
}

/// The answer to a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AttachmentList {
    /// All of them, by name.
    pub attachments: Vec<Attachment>,
}

/// The answer to a request for numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Stats {
    /// Microseconds on the daemon's clock, which only goes forward: what lies
    /// between two answers.
    pub at: u64,
    /// The open volumes, by name.
    pub volumes: Vec<VolumeNumbers>,
}

/// One volume's numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeNumbers {
    /// The attachment's name.
    pub name: AttachmentName,
    /// Unique for all time: counters of another id begin anew.
    pub id: String,
    /// `account/container/blob`.
    pub volume: String,
    /// What was counted since it was opened.
    pub stats: VolumeStats,
}

/// The answer to a detach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Detached {
    /// The name that is free again.
    pub name: AttachmentName,
    /// What could not be tidied up and will settle by itself, one line each.
    pub warnings: Vec<String>,
}

/// The answer to a version request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Version {
    /// The daemon's version.
    pub version: String,
    /// The newest version of this API that it speaks.
    pub api: u32,
}

/// The answer to a health request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Health {
    /// `ok`, or `stopping`.
    pub status: String,
    /// Attachments in any state.
    pub attachments: usize,
    /// Those of them whose disk another holder has taken.
    #[serde(default)]
    pub fenced: usize,
}

/// What an attach is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Checking that the node can attach, and writing the record.
    Recording,
    /// Making the blob.
    Creating,
    /// Lease, size, layout, fence.
    Opening,
    /// Waiting for another holder's lease to end.
    Waiting,
    /// Handing the disk to the kernel.
    Connecting,
    /// Taking back what was done.
    Undoing,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Recording => "writing the record",
            Self::Creating => "creating the blob",
            Self::Opening => "opening the volume",
            Self::Waiting => "waiting for another holder's lease to end",
            Self::Connecting => "connecting the device",
            Self::Undoing => "undoing a failed attach",
        })
    }
}

/// One line of an attach with progress.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttachEvent {
    /// A stage began.
    Stage(Stage),
    /// Done: the last line.
    Attached(Box<Attachment>),
    /// Failed and undone: the last line.
    Failed(ErrorBody),
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: &str = r#"{
        "name": "vol1",
        "account": {
            "name": "acct",
            "endpoint": "https://acct.blob.core.windows.net",
            "credential": { "key-file": "/etc/dysk/key" }
        },
        "container": "dysks",
        "blob": "vol1.vhd"
    }"#;

    #[test]
    fn takes_a_minimal_request_with_defaults() {
        let request: AttachRequest = serde_json::from_str(REQUEST).expect("parses");
        assert_eq!(request.volume(), "acct/dysks/vol1.vhd");
        assert_eq!(request.policy, Policy::default());
        assert!(!request.read_only && !request.break_lease && !request.reuse);
    }

    #[test]
    fn refuses_unknown_fields_at_every_level() {
        for (from, to) in [
            ("\"blob\":", "\"readonly\": true, \"blob\":"),
            ("\"endpoint\":", "\"key\": \"x\", \"endpoint\":"),
            ("\"vol1\"", "\"../vol1\""),
        ] {
            let changed = REQUEST.replacen(from, to, 1);
            assert!(
                serde_json::from_str::<AttachRequest>(&changed).is_err(),
                "{changed}"
            );
        }
    }

    #[test]
    fn a_code_from_a_newer_daemon_is_still_an_error_answer() {
        let text = r#"{"error":{"code":"moon-phase","message":"m"}}"#;
        let answer: ErrorAnswer = serde_json::from_str(text).expect("parses");
        assert_eq!(answer.error.code, ErrorCode::Unknown);
    }
}
