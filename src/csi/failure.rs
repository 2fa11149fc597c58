//! Errors of the floors below, and of what a call leaves out, as gRPC codes.

use std::io;
use std::path::Path;

use tonic::Status;

use crate::blob::{Advice, StorageError};
use crate::filesystem::FilesystemError;
use crate::filesystem::format::PrepareError;
use crate::mounts::MountError;
use crate::node::NodeError;
use crate::node::api::ErrorCode;
use crate::node::client::ClientError;
use crate::volume::OpenError;

/// Makes sure that a call gives a `value` for `what`.
///
/// # Errors
/// INVALID_ARGUMENT names what is missing.
pub fn given(value: &str, what: &str) -> Result<(), Status> {
    if value.is_empty() {
        return Err(Status::invalid_argument(format!("{what} is missing")));
    }
    Ok(())
}

/// A storage error as the caller's next step needs it.
pub fn of_storage(error: &StorageError) -> Status {
    let text = error.to_string();
    if error.is_not_found() {
        return Status::not_found(text);
    }
    match error.advice() {
        Advice::Retry | Advice::SlowDown => Status::unavailable(text),
        Advice::Reauthenticate => Status::unauthenticated(text),
        Advice::GiveUp if error.status() == Some(403) => Status::permission_denied(text),
        Advice::GiveUp if error.is_lease_lost() || error.is_leased_elsewhere() => {
            Status::failed_precondition(text)
        }
        Advice::GiveUp => Status::internal(text),
    }
}

/// A volume's error.
pub fn of_volume(error: &OpenError) -> Status {
    match error {
        OpenError::Storage(error) => of_storage(error),
        _ => Status::failed_precondition(error.to_string()),
    }
}

/// An account that cannot be used.
pub fn of_account(error: &NodeError) -> Status {
    match error.code {
        ErrorCode::BadAccount | ErrorCode::InvalidRequest => {
            Status::invalid_argument(error.to_string())
        }
        _ => Status::internal(error.to_string()),
    }
}

/// What the daemon answered, or did not.
pub fn of_daemon(error: &ClientError) -> Status {
    let text = error.to_string();
    let ClientError::Refused(refused) = error else {
        return Status::unavailable(text);
    };
    match refused.code {
        ErrorCode::NoSuchBlob | ErrorCode::NotAttached => Status::not_found(text),
        ErrorCode::BadAccount | ErrorCode::InvalidRequest => Status::invalid_argument(text),
        ErrorCode::Busy
        | ErrorCode::Overloaded
        | ErrorCode::Stopping
        | ErrorCode::Cancelled
        | ErrorCode::StoreUnreachable => Status::unavailable(text),
        ErrorCode::StoreRefused => Status::permission_denied(text),
        ErrorCode::Leased
        | ErrorCode::InUse
        | ErrorCode::AlreadyAttached
        | ErrorCode::NameInUse
        | ErrorCode::BlobExists
        | ErrorCode::UnusableBlob => Status::failed_precondition(text),
        _ => Status::internal(text),
    }
}

/// A disk that could not be given its filesystem.
pub fn of_preparing(error: &PrepareError) -> Status {
    match error {
        PrepareError::Filesystem(error) => of_filesystem(error),
        PrepareError::Daemon(error) => of_daemon(error),
    }
}

/// A call of the system's about `path`.
pub fn of_path(path: &Path, error: &io::Error) -> Status {
    Status::internal(format!("{}: {error}", path.display()))
}

impl From<MountError> for Status {
    fn from(error: MountError) -> Self {
        let text = error.to_string();
        match error {
            MountError::NotAPlace(_) => Self::invalid_argument(text),
            MountError::Busy(_) => Self::failed_precondition(text),
            MountError::Io(..) => Self::internal(text),
        }
    }
}

/// What is on a disk, or a tool that failed.
pub fn of_filesystem(error: &FilesystemError) -> Status {
    match error {
        FilesystemError::Refused { .. } => Status::failed_precondition(error.to_string()),
        _ => Status::internal(error.to_string()),
    }
}
