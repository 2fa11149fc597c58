//! The options that say how a volume's I/O is to be treated, shared by
//! `attach` and `serve`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::error::CliError;
use crate::blob::Checksum;
use crate::node::policy::Policy;
use crate::size::ByteSize;
use crate::volume::{Caching, Limits, Recover};

#[derive(Debug, Args)]
pub struct PolicyOptions {
    /// What is cached: none, read-only or read-write
    #[arg(long, value_enum, default_value = "none", hide_possible_values = true)]
    caching: CachingArg,
    /// Where unflushed writes are staged: tmpfs or a local disk
    #[arg(long, value_name = "DIR")]
    staging_dir: Option<PathBuf>,
    /// The most to cache of this volume [default: 256MiB]
    #[arg(long, value_name = "SIZE")]
    cache_size: Option<ByteSize>,
    /// Fail I/O that waited this long for the store [default: wait]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    io_deadline: Option<Duration>,
    /// Wait this long for somebody else's lease to end
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "0s")]
    wait: Duration,
    /// Send at most N requests a second to the store
    #[arg(long, value_name = "N")]
    iops: Option<u32>,
    /// Send and receive at most SIZE a second
    #[arg(long, value_name = "SIZE")]
    bandwidth: Option<ByteSize>,
    /// Old unflushed writes: set-aside, discard or force
    #[arg(long, value_enum, value_name = "HOW", hide_possible_values = true)]
    recover: Option<RecoverArg>,
    /// Checksum on writes and reads: off, md5 or crc64
    #[arg(long, value_enum, default_value = "off", hide_possible_values = true)]
    integrity: IntegrityArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CachingArg {
    None,
    ReadOnly,
    ReadWrite,
}

impl From<CachingArg> for Caching {
    fn from(caching: CachingArg) -> Self {
        match caching {
            CachingArg::None => Self::None,
            CachingArg::ReadOnly => Self::ReadOnly,
            CachingArg::ReadWrite => Self::ReadWrite,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RecoverArg {
    SetAside,
    Discard,
    Force,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum IntegrityArg {
    Off,
    Md5,
    Crc64,
}

/// A duration as people write it: `500ms`, `30s`, `5m`, `1h30m`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let refuse = || format!("\"{text}\" is not a duration: write something like 500ms, 30s or 5m");
    let span: jiff::SignedDuration = text.parse().map_err(|_| refuse())?;
    Duration::try_from(span).map_err(|_| refuse())
}

/// Milliseconds, rounded up so that no wish becomes nothing.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

/// The line that says that `volume` waits for somebody else's lease.
pub fn waits_for(volume: &str, policy: &Policy) -> String {
    let millis = i64::try_from(policy.wait_ms).unwrap_or(i64::MAX);
    let wait = jiff::SignedDuration::from_millis(millis);
    format!("{volume}: leased elsewhere: waiting up to {wait:#} for the lease to end")
}

impl PolicyOptions {
    /// What to do with unflushed writes that are found.
    pub fn recover(&self) -> Recover {
        match self.recover {
            None => Recover::Replay,
            Some(RecoverArg::SetAside) => Recover::SetAside,
            Some(RecoverArg::Discard) => Recover::Discard,
            Some(RecoverArg::Force) => Recover::Force,
        }
    }

    /// The policy.
    ///
    /// # Errors
    /// Options that contradict each other.
    pub fn policy(&self) -> Result<Policy, CliError> {
        let policy = Policy {
            caching: self.caching.into(),
            staging_dir: self.staging_dir.clone(),
            cache_size: self.cache_size.map(|size| size.0),
            io_deadline_ms: self.io_deadline.map(millis),
            wait_ms: millis(self.wait),
            integrity: match self.integrity {
                IntegrityArg::Off => Checksum::Off,
                IntegrityArg::Md5 => Checksum::Md5,
                IntegrityArg::Crc64 => Checksum::Crc64,
            },
            limits: Limits {
                iops: self.iops,
                bandwidth: self.bandwidth.map(|size| size.0),
            },
        };
        policy.check().map_err(CliError::failed)?;
        Ok(policy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_as_people_write_them() {
        for (text, millis) in [
            ("0s", 0),
            ("500ms", 500),
            ("30s", 30_000),
            ("5m", 300_000),
            ("1h30m", 5_400_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "5", "-5s", "soon"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
