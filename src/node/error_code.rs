//! What an answer of the daemon's that is no success says: a code for programs,
//! one line for people.

use serde::{Deserialize, Serialize};

/// What kind of error it is; a program's handle, stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The request makes no sense.
    InvalidRequest,
    /// The peer may not ask.
    Forbidden,
    /// No such path.
    NoSuchPath,
    /// The path takes another method.
    WrongMethod,
    /// No attachment has this name.
    NotAttached,
    /// Another attachment has this name.
    NameInUse,
    /// The volume is attached on this node already.
    AlreadyAttached,
    /// The device is mounted, held or swapped to.
    InUse,
    /// Another operation on this attachment is under way.
    Busy,
    /// Too many operations at once; try again.
    Overloaded,
    /// The caller went away, or a forced detach overtook the attach.
    Cancelled,
    /// Another node holds the lease.
    Leased,
    /// Blob or container is not there.
    NoSuchBlob,
    /// The blob is there already.
    BlobExists,
    /// The blob cannot be a disk.
    UnusableBlob,
    /// Account, credentials or endpoint cannot work.
    BadAccount,
    /// The store refused.
    StoreRefused,
    /// The store could not be reached or is in trouble.
    StoreUnreachable,
    /// This node cannot attach: no driver, no privilege.
    NodeUnable,
    /// The kernel refused the device.
    DeviceFailed,
    /// The daemon is stopping.
    Stopping,
    /// A bug or a broken node (disk full).
    Internal,
    /// A code that this client does not know.
    #[serde(other)]
    Unknown,
}

impl ErrorCode {
    /// The HTTP status that goes with it.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            Self::InvalidRequest | Self::BadAccount => 400,
            Self::Forbidden => 403,
            Self::NoSuchPath | Self::NotAttached | Self::NoSuchBlob => 404,
            Self::WrongMethod => 405,
            Self::NameInUse
            | Self::AlreadyAttached
            | Self::InUse
            | Self::Busy
            | Self::Cancelled
            | Self::Leased
            | Self::BlobExists
            | Self::UnusableBlob => 409,
            Self::Overloaded | Self::Stopping => 503,
            Self::StoreRefused | Self::StoreUnreachable => 502,
            Self::NodeUnable | Self::DeviceFailed | Self::Internal | Self::Unknown => 500,
        }
    }
}

/// Every answer that is no success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ErrorAnswer {
    /// The error.
    pub error: ErrorBody,
}

/// An error for a program and a person.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ErrorBody {
    /// For a program.
    pub code: ErrorCode,
    /// For a person: one line, names the object and what to do.
    pub message: String,
}
