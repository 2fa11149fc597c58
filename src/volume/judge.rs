//! The one place where the outcome of an attempt at data is judged.
//!
//! | outcome | verdict |
//! |---|---|
//! | the store said 2xx | settled |
//! | not applied, transient | replay after a pause |
//! | not applied, throttled | replay after a longer pause |
//! | not applied, credentials or access refused | replay after a pause, and say so loudly |
//! | not applied, sequence number condition not met | raise past the bound used, replay |
//! | not applied, lease not held | have the lease confirmed, replay |
//! | unknown (write) | raise past the bound used, then replay |
//! | unknown (read) | replay after a pause |
//! | the blob is gone | fenced |
//! | anything else | failed: the request itself is wrong |

use crate::blob::{Advice, Effect, StorageError};

/// What to do after an attempt that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing happened in the store; send the same again after a pause.
    Replay,
    /// As `Replay`, but the store asks for less.
    SlowDown,
    /// As `Replay`, but a person has to mend something first.
    Blocked,
    /// Nothing happened: the sequence number is past this attempt's bound.
    /// Learn it, send again.
    Refence,
    /// It may have happened, or may yet: raise the sequence number past this
    /// attempt's bound, pause, send again.
    Unknown,
    /// Nothing happened: the store does not see our lease. Have it confirmed,
    /// send again.
    ConfirmLease,
    /// The blob is gone; there is nothing left to wait for.
    Gone,
    /// Sending it again cannot help.
    Failed,
}

/// Judges a failed write (Put Page, Clear Pages).
#[must_use]
pub fn write(error: &StorageError) -> Verdict {
    match error.effect() {
        // A success whose answer was garbled is no failure; the caller has
        // already taken it as one, and repeating the same write under the
        // range lock is safe once it is fenced.
        Effect::Applied | Effect::Unknown => Verdict::Unknown,
        Effect::NotApplied if error.is_sequence_number_not_met() => Verdict::Refence,
        Effect::NotApplied if error.is_lease_lost() => Verdict::ConfirmLease,
        Effect::NotApplied => not_applied(error),
    }
}

/// Judges a failed read: nothing a read does can come late.
#[must_use]
pub fn read(error: &StorageError) -> Verdict {
    match error.effect() {
        Effect::Applied | Effect::Unknown if error.advice() == Advice::SlowDown => {
            Verdict::SlowDown
        }
        Effect::Applied | Effect::Unknown => Verdict::Replay,
        Effect::NotApplied => not_applied(error),
    }
}

/// The store refuses access, whatever is asked: a person has to mend that.
#[must_use]
pub fn is_blocked(error: &StorageError) -> bool {
    error.effect() == Effect::NotApplied && not_applied(error) == Verdict::Blocked
}

fn not_applied(error: &StorageError) -> Verdict {
    match error.advice() {
        Advice::Retry => Verdict::Replay,
        Advice::SlowDown => Verdict::SlowDown,
        Advice::Reauthenticate => Verdict::Blocked,
        Advice::GiveUp => match error.status() {
            Some(404) => Verdict::Gone,
            // Firewall, disabled keys, https required: access may come back.
            Some(401 | 403) => Verdict::Blocked,
            Some(400) if error.code() == "AccountRequiresHttps" => Verdict::Blocked,
            _ => Verdict::Failed,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::{BlobAddress, Failure};

    fn error(failure: Failure) -> StorageError {
        StorageError::new(
            "put page 0+512",
            &BlobAddress::new("acct", "dysks", "vol1.vhd"),
            failure,
        )
    }

    fn status(status: u16, code: &str) -> StorageError {
        error(Failure::Status {
            status,
            code: code.into(),
        })
    }

    #[test]
    fn a_write_is_replayed_only_when_it_surely_did_not_happen() {
        for (failure, verdict) in [
            (status(503, "ServerBusy"), Verdict::SlowDown),
            (status(429, ""), Verdict::SlowDown),
            (status(500, "InternalError"), Verdict::Unknown),
            (status(500, "OperationTimedOut"), Verdict::Unknown),
            (status(504, ""), Verdict::Unknown),
            (error(Failure::Broken { written: true }), Verdict::Unknown),
            (error(Failure::Broken { written: false }), Verdict::Replay),
            (error(Failure::Deadline { written: true }), Verdict::Unknown),
            (error(Failure::Deadline { written: false }), Verdict::Replay),
            (error(Failure::BadAnswer), Verdict::Unknown),
            (error(Failure::Dns), Verdict::Replay),
            (
                status(412, "SequenceNumberConditionNotMet"),
                Verdict::Refence,
            ),
            (
                status(412, "LeaseIdMismatchWithBlobOperation"),
                Verdict::ConfirmLease,
            ),
            (status(412, "LeaseLost"), Verdict::ConfirmLease),
            (status(412, "LeaseIdMissing"), Verdict::ConfirmLease),
            (status(403, "AuthenticationFailed"), Verdict::Blocked),
            (status(403, "AuthorizationFailure"), Verdict::Blocked),
            (status(404, "BlobNotFound"), Verdict::Gone),
            (status(416, "InvalidPageRange"), Verdict::Failed),
            (status(400, "Md5Mismatch"), Verdict::Replay),
            (status(400, "Crc64Mismatch"), Verdict::Replay),
        ] {
            assert_eq!(write(&failure), verdict, "{failure}");
        }
    }

    #[test]
    fn a_read_is_replayed_freely() {
        for (failure, verdict) in [
            (status(500, "InternalError"), Verdict::Replay),
            (status(500, "OperationTimedOut"), Verdict::SlowDown),
            (error(Failure::Broken { written: true }), Verdict::Replay),
            (error(Failure::BadAnswer), Verdict::Replay),
            (status(404, "BlobNotFound"), Verdict::Gone),
            (status(416, "InvalidRange"), Verdict::Failed),
        ] {
            assert_eq!(read(&failure), verdict, "{failure}");
        }
    }
}
