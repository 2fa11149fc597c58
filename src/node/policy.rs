//! How a volume's I/O is to be treated: caching, deadlines, checksums. The same
//! for an attachment and for an export, and part of an attachment's record, so
//! that a restarted daemon goes on as before.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::blob::{Checksum, LeaseId};
use crate::volume::{Budget, Caching, DEFAULT_CACHE_SIZE, Limits, OpenOptions, StagingOptions};

/// The node's share in caching: where, and how much for all volumes together.
#[derive(Clone, Debug)]
pub struct Staging {
    /// The folder for staging files, unless a volume names its own.
    pub dir: PathBuf,
    /// The bound that all volumes share.
    pub budget: Arc<Budget>,
}

/// How a volume's I/O is to be treated.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Policy {
    /// Caching mode.
    pub caching: Caching,
    /// Where unflushed writes are staged; the node's folder when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub staging_dir: Option<PathBuf>,
    /// The most to cache, in bytes; [`DEFAULT_CACHE_SIZE`] when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_size: Option<u64>,
    /// After this many milliseconds a request's waiting for the store ends in
    /// EIO; never, when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_deadline_ms: Option<u64>,
    /// For how many milliseconds to wait for somebody else's lease to end.
    pub wait_ms: u64,
    /// Checksum on every write sent and read received.
    pub integrity: Checksum,
    /// What is sent to the store at most.
    #[serde(skip_serializing_if = "Limits::is_none")]
    pub limits: Limits,
}

impl Policy {
    /// What is wrong with it, if anything.
    ///
    /// # Errors
    /// The reason, with the remedy.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.caching == Caching::None
            && (self.staging_dir.is_some() || self.cache_size.is_some())
        {
            return Err(
                "nothing is cached with --caching none: leave out --staging-dir and --cache-size, \
                 or choose read-only or read-write",
            );
        }
        if self
            .staging_dir
            .as_ref()
            .is_some_and(|dir| !dir.is_absolute())
        {
            return Err("the staging folder must be an absolute path");
        }
        if self.io_deadline_ms == Some(0) {
            return Err(
                "an i/o deadline of 0 fails every request: leave out --io-deadline to wait for ever",
            );
        }
        self.limits.check()
    }

    /// The options to open a volume with, under `lease`.
    #[must_use]
    pub fn open_options(&self, lease: LeaseId, staging: &Staging) -> OpenOptions {
        OpenOptions {
            caching: self.caching,
            staging: StagingOptions {
                dir: self
                    .staging_dir
                    .clone()
                    .unwrap_or_else(|| staging.dir.clone()),
                size: self.cache_size.unwrap_or(DEFAULT_CACHE_SIZE),
                budget: Arc::clone(&staging.budget),
                ..StagingOptions::default()
            },
            io_deadline: self.io_deadline_ms.map(Duration::from_millis),
            wait: Duration::from_millis(self.wait_ms),
            integrity: self.integrity,
            limits: self.limits,
            ..OpenOptions::new(lease)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_refused_with_a_remedy() {
        let good = Policy {
            caching: Caching::ReadWrite,
            staging_dir: Some("/ssd".into()),
            cache_size: Some(1 << 20),
            io_deadline_ms: Some(1),
            ..Policy::default()
        };
        assert_eq!(good.check(), Ok(()));
        assert_eq!(Policy::default().check(), Ok(()));
        for (bad, remedy) in [
            (
                Policy {
                    caching: Caching::None,
                    ..good.clone()
                },
                "leave out --staging-dir",
            ),
            (
                Policy {
                    staging_dir: Some("ssd".into()),
                    ..good.clone()
                },
                "absolute",
            ),
            (
                Policy {
                    limits: Limits {
                        iops: Some(1),
                        bandwidth: None,
                    },
                    ..good.clone()
                },
                "10 or more",
            ),
            (
                Policy {
                    io_deadline_ms: Some(0),
                    ..good
                },
                "leave out --io-deadline",
            ),
        ] {
            let reason = bad.check().expect_err("a bad policy");
            assert!(reason.contains(remedy), "{reason}");
        }
    }

    #[test]
    fn a_policy_survives_its_record() {
        let policy = Policy {
            caching: Caching::ReadWrite,
            wait_ms: 1500,
            integrity: Checksum::Crc64,
            limits: Limits {
                iops: Some(500),
                bandwidth: None,
            },
            ..Policy::default()
        };
        let text = serde_json::to_string(&policy).expect("a policy is JSON");
        assert_eq!(
            serde_json::from_str::<Policy>(&text).expect("what was written"),
            policy
        );
        assert!(serde_json::from_str::<Policy>(r#"{"cashing": "none"}"#).is_err());
    }
}
