//! Why the node could not do what it was asked: a code for programs, one line
//! for people. Errors of the floors below get the remedy that only this floor
//! knows.

use super::api::{ErrorBody, ErrorCode};
use crate::blob::{Advice, Failure, StorageError};
use crate::volume::{OpenError, PublishError};

/// A refused or failed operation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct NodeError {
    /// For a program.
    pub code: ErrorCode,
    /// For a person: one line, names the object and what to do.
    pub message: String,
}

impl NodeError {
    /// An error with its line.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// A failure of the node itself.
    #[must_use]
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Internal, message)
    }
}

impl From<NodeError> for ErrorBody {
    fn from(error: NodeError) -> Self {
        Self {
            code: error.code,
            message: error.message,
        }
    }
}

impl From<StorageError> for NodeError {
    fn from(error: StorageError) -> Self {
        let (code, remedy) = judge(&error);
        let message = if error.detail.is_empty() && !remedy.is_empty() {
            format!("{error}: {remedy}")
        } else {
            error.to_string()
        };
        Self::new(code, message)
    }
}

impl From<OpenError> for NodeError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Storage(error) => error.into(),
            OpenError::Leased { .. } | OpenError::Fenced { .. } => {
                Self::new(ErrorCode::Leased, error.to_string())
            }
            OpenError::Unusable { .. } => Self::new(ErrorCode::UnusableBlob, error.to_string()),
        }
    }
}

impl From<PublishError> for NodeError {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::Open(error) => error.into(),
            _ => Self::new(ErrorCode::Leased, error.to_string()),
        }
    }
}

/// The code of a storage error, and what to do about it where the storage
/// floor has nothing to say.
fn judge(error: &StorageError) -> (ErrorCode, &'static str) {
    match (&error.failure, error.code()) {
        (_, "BlobNotFound") => (
            ErrorCode::NoSuchBlob,
            "check the name, or make it with `dyskctl create`",
        ),
        (_, "ContainerNotFound") => (
            ErrorCode::NoSuchBlob,
            "check the name; `dyskctl create` makes the container too",
        ),
        (_, "BlobAlreadyExists") => (
            ErrorCode::BlobExists,
            "it is never replaced; attach it, or choose another name",
        ),
        (_, "ContainerBeingDeleted") => (
            ErrorCode::StoreRefused,
            "the container is being deleted; try again in a minute",
        ),
        (Failure::Credential, _) => (ErrorCode::BadAccount, "check the account key"),
        (Failure::Status { status: 404, .. }, _) => {
            (ErrorCode::NoSuchBlob, "check account, container and blob")
        }
        (Failure::Dns, _) => (
            ErrorCode::StoreUnreachable,
            "check the account name, --endpoint and the resolver",
        ),
        (Failure::Connect, _) => (
            ErrorCode::StoreUnreachable,
            "check --endpoint, the network and firewalls",
        ),
        (Failure::Tls, _) => (
            ErrorCode::StoreUnreachable,
            "check --endpoint, or name the authority with --ca-file",
        ),
        (Failure::Broken { .. } | Failure::Deadline { .. }, _) => (
            ErrorCode::StoreUnreachable,
            "check the network, then try again",
        ),
        _ if error.is_leased_elsewhere() || error.is_lease_lost() => (
            ErrorCode::Leased,
            "detach it where it is attached, or take it over with --break-lease",
        ),
        _ => match error.advice() {
            Advice::Reauthenticate => (ErrorCode::BadAccount, "check the account key or signature"),
            Advice::SlowDown | Advice::Retry => {
                (ErrorCode::StoreUnreachable, "try again in a moment")
            }
            Advice::GiveUp => (ErrorCode::StoreRefused, ""),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::BlobAddress;

    fn storage(failure: Failure) -> StorageError {
        let address = BlobAddress::new("acct", "dysks", "vol1.vhd");
        StorageError::new("get properties", &address, failure)
    }

    #[test]
    fn adds_the_remedy_only_where_none_is_given() {
        let mut error = storage(Failure::Dns);
        assert_eq!(
            NodeError::from(error.clone()).to_string(),
            "get properties on acct/dysks/vol1.vhd: host name not found: \
             check the account name, --endpoint and the resolver"
        );
        error.detail = ": own remedy".into();
        assert!(
            NodeError::from(error)
                .to_string()
                .ends_with("found: own remedy")
        );
    }

    #[test]
    fn codes_follow_the_store_s_code() {
        for (status, code, expected) in [
            (404, "BlobNotFound", ErrorCode::NoSuchBlob),
            (404, "ContainerNotFound", ErrorCode::NoSuchBlob),
            (404, "", ErrorCode::NoSuchBlob),
            (409, "BlobAlreadyExists", ErrorCode::BlobExists),
            (409, "LeaseAlreadyPresent", ErrorCode::Leased),
            (403, "AuthenticationFailed", ErrorCode::BadAccount),
            (403, "AuthorizationFailure", ErrorCode::StoreRefused),
            (503, "ServerBusy", ErrorCode::StoreUnreachable),
        ] {
            let code = code.to_owned();
            let error = storage(Failure::Status { status, code });
            assert_eq!(NodeError::from(error).code, expected, "{status}");
        }
    }
}
