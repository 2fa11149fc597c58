//! Volume and snapshot handles, and blob names for volume names of any
//! characters.

use std::fmt;

use sha2::{Digest, Sha256};
use tonic::Status;

use crate::blob::reference::VolumeRef;

/// Bytes in a handle: the specification's limit on strings is 128, and a
/// snapshot's handle has 29 more than its volume's.
const LONGEST: usize = 99;
/// The same, where even a short name does not fit into [`LONGEST`].
const LIMIT: usize = 128;

/// Which blob a volume is: `account/container/blob`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Handle {
    /// The storage account.
    pub account: String,
    /// The container.
    pub container: String,
    /// The blob.
    pub blob: String,
}

impl fmt::Display for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.account, self.container, self.blob)
    }
}

impl Handle {
    /// Reads a volume handle; `None` when it is none, so that there is no such
    /// volume.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        // A URL would name other things than a handle does.
        if text.contains("://") || text.trim() != text || text.matches('/').count() < 2 {
            return None;
        }
        let parsed = VolumeRef::parse(text).ok()?;
        Some(Self {
            account: parsed.account?,
            container: parsed.container?,
            blob: parsed.blob?,
        })
    }

    /// The volume that a call names.
    ///
    /// # Errors
    /// NOT_FOUND: it is no handle, so there is no such volume.
    pub fn named(id: &str) -> Result<Self, Status> {
        Self::parse(id).ok_or_else(|| Status::not_found(format!("{id}: no such volume")))
    }

    /// The handle of the volume called `name`: no two names share one.
    ///
    /// # Errors
    /// Account, container and prefix leave no room for a name.
    pub fn of_name(
        account: &str,
        container: &str,
        prefix: &str,
        name: &str,
    ) -> Result<Self, String> {
        let with = |blob: String| Self {
            account: account.to_owned(),
            container: container.to_owned(),
            blob: format!("{prefix}{blob}.vhd"),
        };
        let plain = with(escape(name));
        if plain.to_string().len() <= LONGEST {
            return Ok(plain);
        }
        // An escape is = and two digits or capitals, so none begins with =h.
        let hashed = with(format!("=h{}", hash(name)));
        if hashed.to_string().len() <= LIMIT {
            return Ok(hashed);
        }
        Err(format!(
            "container \"{container}\" and blobPrefix \"{prefix}\" leave no room for a name: shorten them"
        ))
    }
}

/// Which snapshot of which volume: `account/container/blob@time`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SnapshotHandle {
    /// The volume.
    pub volume: Handle,
    /// The store's time stamp.
    pub time: String,
}

impl fmt::Display for SnapshotHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.volume, self.time)
    }
}

impl SnapshotHandle {
    /// Reads a snapshot handle; `None` when it is none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (volume, time) = text.rsplit_once('@')?;
        time.parse::<jiff::Timestamp>().ok()?;
        Some(Self {
            volume: Handle::parse(volume)?,
            time: time.to_owned(),
        })
    }
}

/// Which group of snapshots: `account/container@group=HASH`, of the group's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GroupHandle {
    /// The storage account.
    pub account: String,
    /// The container, of all its volumes.
    pub container: String,
    /// The hash, as each snapshot has it.
    pub group: String,
}

/// Before the hash.
const GROUP: &str = "@group=";

impl fmt::Display for GroupHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}/{}{GROUP}{}",
            self.account, self.container, self.group
        )
    }
}

impl GroupHandle {
    /// The handle of the group called `name`.
    #[must_use]
    pub fn of_name(account: &str, container: &str, name: &str) -> Self {
        Self {
            account: account.to_owned(),
            container: container.to_owned(),
            group: hash(name),
        }
    }

    /// Reads a group's handle; `None` when it is none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (place, group) = text.split_once(GROUP)?;
        let (account, container) = place.split_once('/')?;
        let hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
        let wrong = account.is_empty() || container.is_empty() || container.contains('/');
        (!wrong && group.len() == 32 && group.chars().all(hex)).then(|| Self {
            account: account.to_owned(),
            container: container.to_owned(),
            group: group.to_owned(),
        })
    }
}

/// Half of the SHA-256 of `name`, as text.
fn hash(name: &str) -> String {
    let digest = Sha256::digest(name.as_bytes());
    digest[..16].iter().map(|b| format!("{b:02x}")).collect()
}

/// Letters, digits, `-`, `_` and `.` as they are, other bytes as `=XX`.
fn escape(name: &str) -> String {
    let mut escaped = String::new();
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("={byte:02X}"));
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn named(name: &str) -> Handle {
        Handle::of_name("acct", "dysks", "", name).expect("room")
    }

    #[test]
    fn names_become_blobs() {
        let claim = "pvc-0b5c8d4e-7a1f-4c39-9d0e-3f1a2b3c4d5e";
        for (name, blob) in [
            (claim, format!("{claim}.vhd")),
            ("a b/c", "a=20b=2Fc.vhd".into()),
            ("=h00", "=3Dh00.vhd".into()),
            (".", "..vhd".into()),
        ] {
            assert_eq!(named(name).blob, blob);
        }
        assert!(named(&"x".repeat(128)).blob.starts_with("=h"));
        let far = "x".repeat(63);
        assert!(Handle::of_name(&"a".repeat(24), &far, "", "n").is_ok());
        assert!(Handle::of_name(&"a".repeat(24), &far, &far, "n").is_err());
    }

    #[test]
    fn reads_handles_and_nothing_else() {
        let handle = named("vol");
        assert_eq!(Handle::parse(&handle.to_string()), Some(handle.clone()));
        for text in [
            "",
            "x",
            "acct/vol",
            "https://acct.blob.core.windows.net/dysks/vol",
            "ACCT/dysks/v",
        ] {
            assert_eq!(Handle::parse(text), None, "{text}");
        }
        let snapshot = SnapshotHandle {
            volume: handle,
            time: "2026-11-21T05:00:00.1234567Z".into(),
        };
        assert_eq!(SnapshotHandle::parse(&snapshot.to_string()), Some(snapshot));
        for text in [
            "acct/dysks/vol",
            "acct/dysks/vol@now",
            "vol@2026-11-21T05:00:00Z",
        ] {
            assert_eq!(SnapshotHandle::parse(text), None, "{text}");
        }
    }

    #[test]
    fn groups_have_handles_that_fit() {
        let longest = GroupHandle::of_name(&"a".repeat(24), &"c".repeat(63), &"n".repeat(500));
        let text = longest.to_string();
        assert!(text.len() <= LIMIT, "{text}");
        assert_eq!(GroupHandle::parse(&text), Some(longest));
        assert!(SnapshotHandle::parse(&text).is_none() && Handle::parse(&text).is_none());
        for text in [
            "",
            "a/b",
            "a/b@group=",
            "a/b/c@group=0",
            "/b@group=00000000000000000000000000000000",
        ] {
            assert_eq!(GroupHandle::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_two_names_share_a_blob(a in ".{1,140}", b in ".{1,140}", c in "[=hH0-9A-F]{1,12}") {
            prop_assert_eq!(named(&a) == named(&b), a == b);
            prop_assert_eq!(named(&a) == named(&c), a == c);
            let handle = named(&a);
            prop_assert!(handle.to_string().len() <= LONGEST);
            prop_assert_eq!(Handle::parse(&handle.to_string()), Some(handle));
        }
    }
}
