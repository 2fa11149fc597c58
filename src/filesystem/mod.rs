//! Filesystems on attached disks: found, made, checked, mounted and grown
//! with the tools of the system. What decides whether one may be made is in
//! [`format`].

pub mod format;
mod grow;
mod mount;
mod probe;
pub mod superblock;
pub mod tool;

use std::fmt;
use std::str::FromStr;

pub use grow::{grow, grow_if_larger};
pub use mount::mount;
pub use probe::{Found, probe};

/// A kind of filesystem that is made and mounted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The usual one.
    #[default]
    Ext4,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
}

impl Kind {
    /// As mkfs, mount and blkid call it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = String;

    /// The empty text is the usual kind.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" | "ext4" => Ok(Self::Ext4),
            "xfs" => Ok(Self::Xfs),
            "btrfs" => Ok(Self::Btrfs),
            _ => Err(format!(
                "filesystem \"{text}\" is none of ext4, xfs and btrfs"
            )),
        }
    }
}

/// What went wrong with a filesystem. The disk is as it was, unless a format
/// or a growing that was allowed failed half way: both are finished by a
/// repetition.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilesystemError {
    /// What is on the disk is not what was asked for: nothing was changed.
    #[error("{device}: {reason}")]
    Refused {
        /// The device.
        device: String,
        /// What was found, and the remedy.
        reason: String,
    },
    /// Nothing is known, so nothing was changed.
    #[error("{device}: {reason}")]
    Unknown {
        /// The device.
        device: String,
        /// What could not be found out.
        reason: String,
    },
    /// A tool failed.
    #[error(transparent)]
    Tool(#[from] tool::ToolError),
}
