//! The name of an attachment: a word that is safe as a file name, in a URL
//! path and under `/dev/dysk`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Longest name in bytes.
const LONGEST: usize = 63;

/// A checked attachment name: 1 to 63 of `A-Z a-z 0-9 . _ -`, first neither
/// `.` nor `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AttachmentName(String);

/// A text that cannot be a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "name {0:?} is not usable: take 1 to {LONGEST} of A-Z a-z 0-9 . _ -, the first no dot or dash"
)]
pub struct NameError(String);

impl AttachmentName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name a blob gets when none is given: the last part of its path,
    /// without `.vhd`.
    ///
    /// # Errors
    /// When that part is no usable name.
    pub fn of_blob(blob: &str) -> Result<Self, NameError> {
        let last = blob.rsplit('/').next().unwrap_or(blob);
        last.strip_suffix(".vhd").unwrap_or(last).parse()
    }
}

/// What tells `text` from any other in a file name or an attachment's: 16
/// hexadecimal digits of its SHA-256.
#[must_use]
pub fn fingerprint(text: &[u8]) -> String {
    let digest = Sha256::digest(text);
    digest[..8].iter().map(|b| format!("{b:02x}")).collect()
}

impl FromStr for AttachmentName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let usable = (1..=LONGEST).contains(&text.len())
            && !text.starts_with(['.', '-'])
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if usable {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError(text.to_owned()))
        }
    }
}

impl TryFrom<String> for AttachmentName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<AttachmentName> for String {
    fn from(name: AttachmentName) -> Self {
        name.0
    }
}

impl fmt::Display for AttachmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_plain_words_and_refuses_what_could_leave_a_directory() {
        let longest = "a".repeat(63);
        for good in ["a", "vol1", "A.b_c-9", "_x", longest.as_str()] {
            assert_eq!(
                good.parse::<AttachmentName>().map(String::from),
                Ok(good.into())
            );
        }
        let too_long = "a".repeat(64);
        for bad in [
            "",
            ".",
            "..",
            ".x",
            "-x",
            "a/b",
            "a b",
            "ä",
            "a\n",
            "a\0",
            too_long.as_str(),
        ] {
            assert!(bad.parse::<AttachmentName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_a_blob_by_its_last_part() {
        for (blob, name) in [
            ("vol1.vhd", "vol1"),
            ("a/b/c.vhd", "c"),
            ("data", "data"),
            ("x.vhd.vhd", "x.vhd"),
        ] {
            assert_eq!(
                AttachmentName::of_blob(blob).map(String::from),
                Ok(name.into())
            );
        }
        assert!(AttachmentName::of_blob("a/.vhd").is_err());
    }
}
