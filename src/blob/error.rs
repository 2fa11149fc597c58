//! What went wrong at the store, and what that means for the data.

use std::fmt;
use std::time::Duration;

use super::types::BlobAddress;

/// Whether the request took effect in the store.
///
/// This is the fact on which every retry hangs; it is decided in one place,
/// [`StorageError::effect`], from the status, the error code and how far the
/// request got ("the late write", `docs/design.md`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// It took effect (some later part failed, such as reading the answer's body).
    Applied,
    /// It did not and never will: never written to a connection, or refused
    /// with a status from 100 to 499 or with 503.
    NotApplied,
    /// It may have taken effect, or may yet do so later.
    Unknown,
}

/// What can be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Advice {
    /// Try again after a pause; the store or the network is in trouble.
    Retry,
    /// The store is throttling: slow down, then try again.
    SlowDown,
    /// Credentials were refused: reload them, then try again.
    Reauthenticate,
    /// Trying the same again cannot help.
    GiveUp,
}

/// What kind of failure it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The store answered with this status and error code (`x-ms-error-code`,
    /// or the `<Code>` of the body; empty when it sent none).
    Status {
        /// The HTTP status.
        status: u16,
        /// The storage error code, such as `LeaseIdMismatchWithBlobOperation`.
        code: String,
    },
    /// The host name did not resolve.
    Dns,
    /// No connection could be made.
    Connect,
    /// The TLS handshake failed.
    Tls,
    /// The connection broke; `written` says whether any of the request had
    /// been handed to it.
    Broken {
        /// True when the request may have reached the store.
        written: bool,
    },
    /// The attempt's deadline passed; `written` as in [`Failure::Broken`].
    Deadline {
        /// True when the request may have reached the store.
        written: bool,
    },
    /// The answer makes no sense: wrong length, failed checksum, bad header.
    BadAnswer,
    /// The credentials cannot sign a request (no or malformed key).
    Credential,
}

/// A failed attempt at one storage operation.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{operation} on {object}: {}{detail}", FailureText(.failure))]
pub struct StorageError {
    /// The operation with its range, such as `put page 4096+8192`.
    pub operation: String,
    /// The object, such as `acct/dysks/vol1.vhd`.
    pub object: String,
    /// What happened.
    pub failure: Failure,
    /// More for a person, with its own leading separator: the remedy where one
    /// is known (`: the account has Shared Key disabled; ...`), never a secret.
    pub detail: String,
    /// The store's clock is so far from this machine's that it refuses every
    /// signature.
    pub clock: bool,
    /// `Retry-After`, when the store sent one.
    pub retry_after: Option<Duration>,
    /// `x-ms-request-id`, for the store's own support.
    pub request_id: Option<String>,
}

struct FailureText<'a>(&'a Failure);

impl fmt::Display for FailureText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Failure::Status { status, code } if code.is_empty() => write!(f, "{status}"),
            Failure::Status { status, code } => write!(f, "{status} {code}"),
            Failure::Dns => f.write_str("host name not found"),
            Failure::Connect => f.write_str("cannot connect"),
            Failure::Tls => f.write_str("tls handshake failed"),
            Failure::Broken { .. } => f.write_str("connection broken"),
            Failure::Deadline { .. } => f.write_str("no answer in time"),
            Failure::BadAnswer => f.write_str("bad answer"),
            Failure::Credential => f.write_str("credentials unusable"),
        }
    }
}

impl StorageError {
    /// An error about `address` with no further detail.
    #[must_use]
    pub fn new(operation: impl Into<String>, address: &BlobAddress, failure: Failure) -> Self {
        Self {
            operation: operation.into(),
            object: address.to_string(),
            failure,
            detail: String::new(),
            clock: false,
            retry_after: None,
            request_id: None,
        }
    }

    /// The one judgement of what an attempt did to the store.
    #[must_use]
    pub fn effect(&self) -> Effect {
        match &self.failure {
            Failure::Status {
                status: 100..=499 | 503,
                ..
            } => Effect::NotApplied,
            Failure::Status { .. } => Effect::Unknown,
            Failure::Dns | Failure::Connect | Failure::Tls | Failure::Credential => {
                Effect::NotApplied
            }
            Failure::Broken { written } | Failure::Deadline { written } => {
                if *written {
                    Effect::Unknown
                } else {
                    Effect::NotApplied
                }
            }
            // A 2xx whose answer was garbled took effect; whoever builds this
            // error for any other status must not.
            Failure::BadAnswer => Effect::Applied,
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn advice(&self) -> Advice {
        match &self.failure {
            Failure::Status { status, code } => status_advice(*status, code),
            Failure::Dns
            | Failure::Connect
            | Failure::Tls
            | Failure::Broken { .. }
            | Failure::Deadline { .. }
            | Failure::BadAnswer => Advice::Retry,
            Failure::Credential => Advice::Reauthenticate,
        }
    }

    /// The HTTP status, if the store answered.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        match self.failure {
            Failure::Status { status, .. } => Some(status),
            _ => None,
        }
    }

    /// The storage error code, or "" when the store sent none.
    #[must_use]
    pub fn code(&self) -> &str {
        match &self.failure {
            Failure::Status { code, .. } => code,
            _ => "",
        }
    }

    /// The blob or container is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.status() == Some(404)
    }

    /// A write or lease operation failed because the lease it named is not
    /// held any more: somebody else has it, or it is gone.
    #[must_use]
    pub fn is_lease_lost(&self) -> bool {
        matches!(
            self.code(),
            "LeaseIdMismatchWithBlobOperation"
                | "LeaseIdMismatchWithLeaseOperation"
                | "LeaseNotPresentWithBlobOperation"
                | "LeaseNotPresentWithLeaseOperation"
                | "LeaseLost"
                | "LeaseIsBrokenAndCannotBeRenewed"
                | "LeaseIsBreakingAndCannotBeAcquired"
                | "LeaseIsBreakingAndCannotBeChanged"
                | "LeaseIdMissing"
        )
    }

    /// Somebody else holds the lease (an acquire was refused).
    #[must_use]
    pub fn is_leased_elsewhere(&self) -> bool {
        matches!(
            self.code(),
            "LeaseAlreadyPresent" | "LeaseIsBreakingAndCannotBeAcquired"
        )
    }

    /// The write's sequence-number bound did not hold: it was fenced off.
    #[must_use]
    pub fn is_sequence_number_not_met(&self) -> bool {
        self.code() == "SequenceNumberConditionNotMet"
    }
}

fn status_advice(status: u16, code: &str) -> Advice {
    match (status, code) {
        (503 | 429, _) | (500, "OperationTimedOut") => Advice::SlowDown,
        (401, _) | (403, "AuthenticationFailed" | "InvalidAuthenticationInfo") => {
            Advice::Reauthenticate
        }
        (500 | 502 | 504 | 408, _) => Advice::Retry,
        // Damaged on its way, and refused: what is sent again may arrive whole.
        (400, "Md5Mismatch" | "Crc64Mismatch") => Advice::Retry,
        _ => Advice::GiveUp,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(status: u16, code: &str) -> StorageError {
        let address = BlobAddress::new("acct", "dysks", "vol1.vhd");
        StorageError::new(
            "put page 4096+8192",
            &address,
            Failure::Status {
                status,
                code: code.into(),
            },
        )
    }

    #[test]
    fn names_operation_object_and_cause() {
        let error = status(412, "LeaseIdMismatchWithBlobOperation");
        assert_eq!(
            error.to_string(),
            "put page 4096+8192 on acct/dysks/vol1.vhd: 412 LeaseIdMismatchWithBlobOperation"
        );
        assert!(error.is_lease_lost());
    }

    #[test]
    fn judges_effect_by_status_and_how_far_it_got() {
        for (definite, code) in [
            (400, "X"),
            (403, "AuthenticationFailed"),
            (412, "Y"),
            (429, ""),
            (503, "ServerBusy"),
        ] {
            assert_eq!(
                status(definite, code).effect(),
                Effect::NotApplied,
                "{definite}"
            );
        }
        for vague in [500, 502, 504, 599] {
            assert_eq!(status(vague, "").effect(), Effect::Unknown, "{vague}");
        }
        for (written, effect) in [(true, Effect::Unknown), (false, Effect::NotApplied)] {
            for failure in [Failure::Broken { written }, Failure::Deadline { written }] {
                let mut error = status(0, "");
                error.failure = failure;
                assert_eq!(error.effect(), effect);
            }
        }
    }

    #[test]
    fn advises_by_code_not_by_text() {
        assert_eq!(status(503, "ServerBusy").advice(), Advice::SlowDown);
        assert_eq!(status(500, "OperationTimedOut").advice(), Advice::SlowDown);
        assert_eq!(status(500, "InternalError").advice(), Advice::Retry);
        assert_eq!(
            status(403, "AuthenticationFailed").advice(),
            Advice::Reauthenticate
        );
        assert_eq!(status(403, "AuthorizationFailure").advice(), Advice::GiveUp);
        assert_eq!(status(404, "BlobNotFound").advice(), Advice::GiveUp);
    }
}
