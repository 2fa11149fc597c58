//! Whether a disk may be given a filesystem: was anything ever written to it,
//! and has a format of ours begun or ended? The answer to the second is a mark
//! in the blob's metadata, written before the first byte of the filesystem and
//! completed after the last.
//!
//! | mark | what a format that finds it may do |
//! |---|---|
//! | none | format a disk that nothing was ever written to |
//! | begun | finish: what is there is nothing, or a filesystem with the mark's id |
//! | complete | nothing: what is there is somebody's data |
//!
//! A mark is bound to the ETag that its writer saw: one that comes late, after
//! the filesystem was made, could declare it unfinished.

use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Volume;
use super::patience::{Patience, patiently};
use crate::blob::{Advice, Conditions, Effect, LeaseId, PageBlob, Range, StorageError};
use crate::device::{BlockDevice, DeviceError};

/// The name of the mark among a blob's metadata.
const KEY: &str = "dyskformat";

/// A format of ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FormatMark {
    /// The kind of filesystem, as mkfs calls it.
    pub filesystem: String,
    /// The filesystem's own id, a UUID chosen before it is made.
    pub uuid: String,
    /// It was made.
    pub complete: bool,
}

/// What a disk says about being formatted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FormatState {
    /// Pages of the disk were written, be it with zeroes.
    pub written: bool,
    /// The last format of ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<FormatMark>,
}

/// Why the mark cannot be read or set.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FormatError {
    /// The store refused or could not be reached.
    #[error("{0}")]
    Storage(#[from] StorageError),
    /// The volume cannot be asked.
    #[error("{object}: {reason}")]
    Device {
        /// `account/container/blob`.
        object: String,
        /// Why.
        reason: DeviceError,
    },
    /// The metadata holds a mark that this version does not understand.
    #[error("{0}: its format mark is not understood: leave the disk to the version that wrote it")]
    Mark(String),
    /// It is not ours to format.
    #[error("{0}: attached read-only: nothing can be formatted")]
    ReadOnly(String),
}

impl FormatMark {
    fn entry(&self) -> (String, String) {
        let state = if self.complete { "complete" } else { "begun" };
        let value = format!("{}:{}:{state}", self.filesystem, self.uuid);
        (KEY.to_owned(), value)
    }
}

impl FromStr for FormatMark {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let words: Vec<&str> = text.split(':').collect();
        let [filesystem, uuid, state] = words.as_slice() else {
            return Err(());
        };
        Ok(Self {
            filesystem: (*filesystem).to_owned(),
            uuid: uuid.parse::<Uuid>().map_err(drop)?.to_string(),
            complete: match *state {
                "begun" => false,
                "complete" => true,
                _ => return Err(()),
            },
        })
    }
}

impl Volume {
    fn object(&self) -> String {
        self.io.blob.address().to_string()
    }

    fn lease(&self) -> Result<&LeaseId, FormatError> {
        let lease = self.io.lease.as_ref();
        lease.ok_or_else(|| FormatError::ReadOnly(self.object()))
    }

    fn mark_of(&self, metadata: &[(String, String)]) -> Result<Option<FormatMark>, FormatError> {
        let Some((_, text)) = metadata.iter().find(|(name, _)| name == KEY) else {
            return Ok(None);
        };
        let mark = text
            .parse()
            .map_err(|()| FormatError::Mark(self.object()))?;
        Ok(Some(mark))
    }

    /// Whether pages of the disk were ever written (what is cached is written
    /// first), and the mark of a format.
    ///
    /// # Errors
    /// The store or the volume cannot answer: then nothing is known, and
    /// nothing may be formatted.
    pub async fn format_state(&self) -> Result<FormatState, FormatError> {
        self.lease()?;
        let device = |reason| FormatError::Device {
            object: self.object(),
            reason,
        };
        self.flush().await.map_err(device)?;
        let size = self.status().size;
        let disk = Range::at(0, size);
        let deadline = self.io.attempt_deadline;
        let filled = self.io.filled(disk, 1, deadline).await.map_err(device)?;
        let none = Conditions::default();
        let seen = patiently!(self.io.blob.properties(&none, deadline))?;
        Ok(FormatState {
            written: !filled.ranges.is_empty() || filled.known_to < size,
            mark: self.mark_of(&seen.metadata)?,
        })
    }

    /// Sets the mark, under the lease.
    ///
    /// # Errors
    /// The store refuses, or the disk is written to all the while.
    pub async fn set_format_mark(&self, mark: &FormatMark) -> Result<(), FormatError> {
        let lease = self.lease()?;
        let deadline = self.io.attempt_deadline;
        set(&self.io.blob, lease, mark, deadline).await
    }
}

async fn set(
    blob: &PageBlob,
    lease: &LeaseId,
    mark: &FormatMark,
    deadline: Duration,
) -> Result<(), FormatError> {
    let none = Conditions::default();
    let mut patience = Patience::begin();
    loop {
        let seen = patiently!(blob.properties(&none, deadline))?;
        let mut metadata = seen.metadata;
        if metadata.contains(&mark.entry()) {
            return Ok(());
        }
        metadata.retain(|(name, _)| name != KEY);
        metadata.push(mark.entry());
        let conditions = Conditions {
            if_match: Some(seen.etag),
            ..Conditions::lease(lease)
        };
        let Err(error) = blob.set_metadata(&metadata, &conditions, deadline).await else {
            return Ok(());
        };
        let changed = error.code() == "ConditionNotMet";
        if changed || error.effect() != Effect::NotApplied || error.advice() != Advice::GiveUp {
            // Looked at again: it was applied, or is bound to the new ETag.
            patience.after_change(error, changed).await?;
        } else {
            return Err(error.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_survives_its_metadata() {
        for complete in [false, true] {
            let mark = FormatMark {
                filesystem: "ext4".into(),
                uuid: Uuid::from_u128(7).to_string(),
                complete,
            };
            let (name, value) = mark.entry();
            assert_eq!(name, KEY);
            assert_eq!(value.parse(), Ok(mark));
        }
    }

    #[test]
    fn what_is_no_mark_is_an_error_and_not_none() {
        for text in [
            "",
            "ext4",
            "ext4:x:begun",
            "ext4:00000000-0000-0000-0000-000000000007:done",
        ] {
            assert_eq!(text.parse::<FormatMark>(), Err(()), "{text}");
        }
    }
}
