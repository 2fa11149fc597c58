//! Settings that are changed from elsewhere while a disk is attached. A leased
//! blob takes no metadata without the lease's id, which its holder alone has.
//! So what is wished lies in a blob of its own beside the disk's, as metadata;
//! the holder looks there from time to time ([`Volume::wish`]), and notes when
//! it took the wish up ([`Volume::take_up`]).
//!
//! Every change hangs on the ETag that was seen before it: a wish is noted as
//! taken up only if it is still the last one.

use std::time::Duration;

use jiff::Timestamp;

use super::pace::Limits;
use super::patience::{Patience, patiently};
use super::{Caching, Volume};
use crate::blob::{
    Advice, Conditions, DeleteSnapshots, ETag, Effect, PageBlob, Properties, StorageError,
};
use crate::device::PAGE;

/// What the name of the blob beside a disk's ends with.
const SUFFIX: &str = ".settings";
const CACHING: &str = "dyskcaching";
const IOPS: &str = "dyskiops";
const BANDWIDTH: &str = "dyskbandwidth";
/// Tells one wish from the next.
const WISH: &str = "dyskwish";
/// `WISH,TIME,now` or `WISH,TIME,next`.
const TAKEN_UP: &str = "dysktakenup";

/// What can be wished. What is left out stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// The caching mode, from the next attach on.
    pub caching: Option<Caching>,
    /// Requests a second to the store; 0 lifts the limit.
    pub iops: Option<u32>,
    /// Bytes a second; 0 lifts the limit.
    pub bandwidth: Option<u64>,
}

/// When a wish was taken up by the disk's holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TakenUp {
    /// The holder's clock.
    pub at: Timestamp,
    /// The disk is attached with another caching mode: the one that is wished
    /// comes with the next attach.
    pub caching_waits: bool,
}

/// A wish as it lies in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    id: String,
    etag: ETag,
    /// What is wished, all wishes so far taken together.
    pub settings: Settings,
    /// Since when the holder goes by it, if one does.
    pub taken_up: Option<TakenUp>,
}

fn word(caching: Caching) -> &'static str {
    match caching {
        Caching::None => "none",
        Caching::ReadOnly => "read-only",
        Caching::ReadWrite => "read-write",
    }
}

impl Settings {
    /// Nothing is wished.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// `before` with what is wished in its place.
    #[must_use]
    pub fn limits(&self, before: Limits) -> Limits {
        let iops = self.iops.map(|iops| Some(iops).filter(|n| *n > 0));
        let bandwidth = self.bandwidth.map(|bytes| Some(bytes).filter(|n| *n > 0));
        Limits {
            iops: iops.unwrap_or(before.iops),
            bandwidth: bandwidth.unwrap_or(before.bandwidth),
        }
    }

    /// These, and of `before` what they leave out.
    fn over(self, before: Self) -> Self {
        Self {
            caching: self.caching.or(before.caching),
            iops: self.iops.or(before.iops),
            bandwidth: self.bandwidth.or(before.bandwidth),
        }
    }

    fn entries(&self) -> Vec<(String, String)> {
        let caching = self.caching.map(|caching| word(caching).to_owned());
        let all = [
            (CACHING, caching),
            (IOPS, self.iops.map(|n| n.to_string())),
            (BANDWIDTH, self.bandwidth.map(|n| n.to_string())),
        ];
        let some = all
            .into_iter()
            .filter_map(|(key, text)| Some((key.to_owned(), text?)));
        some.collect()
    }

    fn parse(metadata: &[(String, String)]) -> Self {
        let value = |key: &str| {
            let found = metadata.iter().find(|(name, _)| name == key);
            found.map(|(_, text)| text.as_str())
        };
        let modes = [Caching::None, Caching::ReadOnly, Caching::ReadWrite];
        Self {
            caching: modes
                .into_iter()
                .find(|mode| value(CACHING) == Some(word(*mode))),
            iops: value(IOPS).and_then(|text| text.parse().ok()),
            bandwidth: value(BANDWIDTH).and_then(|text| text.parse().ok()),
        }
    }
}

impl std::fmt::Display for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let caching = self
            .caching
            .map(|mode| format!("cachingMode {}", word(mode)));
        let limit = |what: &str, number: u64| match number {
            0 => format!("{what} unlimited"),
            some => format!("{what} {some}"),
        };
        let iops = self.iops.map(|n| limit("iops", n.into()));
        let bandwidth = self.bandwidth.map(|n| limit("bandwidth", n));
        let all: Vec<_> = [caching, iops, bandwidth].into_iter().flatten().collect();
        f.write_str(&all.join(", "))
    }
}

impl Wish {
    fn of(seen: Properties) -> Option<Self> {
        let value = |key: &str| {
            let found = seen.metadata.iter().find(|(name, _)| name == key);
            found.map(|(_, text)| text.clone())
        };
        let id = value(WISH)?;
        let taken_up = value(TAKEN_UP).and_then(|text| {
            let words: Vec<&str> = text.split(',').collect();
            let [of, at, when] = words.as_slice() else {
                return None;
            };
            (*of == id).then_some(TakenUp {
                at: at.parse().ok()?,
                caching_waits: *when == "next",
            })
        });
        Some(Self {
            settings: Settings::parse(&seen.metadata),
            etag: seen.etag,
            taken_up,
            id,
        })
    }

    fn entries(&self) -> Vec<(String, String)> {
        let mut entries = self.settings.entries();
        entries.push((WISH.to_owned(), self.id.clone()));
        if let Some(taken) = &self.taken_up {
            let when = if taken.caching_waits { "next" } else { "now" };
            let text = format!("{},{},{when}", self.id, taken.at);
            entries.push((TAKEN_UP.to_owned(), text));
        }
        entries
    }
}

/// The blob beside that of `disk`.
fn beside(disk: &PageBlob) -> PageBlob {
    let at = disk.address();
    let name = format!("{}{SUFFIX}", at.blob);
    disk.account().page_blob(&at.container, &name)
}

fn if_match(etag: &ETag) -> Conditions {
    Conditions {
        if_match: Some(etag.clone()),
        ..Conditions::default()
    }
}

/// What is wished for `disk`, if anything ever was.
///
/// # Errors
/// The store refuses or cannot be reached.
pub async fn wish(disk: &PageBlob, deadline: Duration) -> Result<Option<Wish>, StorageError> {
    let none = Conditions::default();
    let blob = beside(disk);
    match patiently!(blob.properties(&none, deadline)) {
        Ok(seen) => Ok(Wish::of(seen)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Leaves a wish for whoever has `disk` attached, or will have. The same once
/// more is the same wish.
///
/// # Errors
/// The store refuses or cannot be reached.
pub async fn leave_wish(
    disk: &PageBlob,
    settings: Settings,
    deadline: Duration,
) -> Result<Wish, StorageError> {
    let blob = beside(disk);
    let mut patience = Patience::begin();
    loop {
        let before = wish(disk, deadline).await?;
        let old = before
            .as_ref()
            .map_or_else(Settings::default, |wish| wish.settings);
        let all = settings.over(old);
        if let Some(before) = before.as_ref().filter(|_| all == old) {
            return Ok(before.clone());
        }
        let mut left = Wish {
            id: uuid::Uuid::new_v4().simple().to_string(),
            etag: ETag(String::new()),
            settings: all,
            taken_up: None,
        };
        let entries = left.entries();
        let written = match &before {
            Some(before) => {
                let conditions = if_match(&before.etag);
                blob.set_metadata(&entries, &conditions, deadline).await
            }
            None => {
                let new = Conditions::not_existing();
                blob.create(PAGE, &entries, &new, deadline).await
            }
        };
        match written {
            Ok(written) => {
                left.etag = written.etag;
                return Ok(left);
            }
            Err(error) => {
                let changed = matches!(error.code(), "ConditionNotMet" | "BlobAlreadyExists");
                if !changed
                    && error.effect() == Effect::NotApplied
                    && error.advice() == Advice::GiveUp
                {
                    return Err(error);
                }
                patience.after_change(error, changed).await?;
            }
        }
    }
}

/// Deletes what lies beside a disk that was deleted; nothing is fine.
///
/// # Errors
/// The store refuses or cannot be reached.
pub async fn forget_wish(disk: &PageBlob, deadline: Duration) -> Result<(), StorageError> {
    let (blob, none) = (beside(disk), Conditions::default());
    match patiently!(blob.delete(DeleteSnapshots::Include, &none, deadline)) {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}

impl Volume {
    /// What is wished for it, from one look.
    ///
    /// # Errors
    /// The store refuses or cannot be reached.
    pub async fn wish(&self) -> Result<Option<Wish>, StorageError> {
        let blob = beside(&self.io.blob);
        let none = Conditions::default();
        match blob.properties(&none, self.io.attempt_deadline).await {
            Ok(seen) => Ok(Wish::of(seen)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Goes by the limits of `wish`, and notes that in it. One that was
    /// replaced meanwhile stays as it is: the next look finds the new one.
    ///
    /// # Errors
    /// It could not be noted; the limits hold.
    pub async fn take_up(&self, wish: &Wish, caching: Caching) -> Result<(), StorageError> {
        self.set_limits(wish.settings.limits(self.limits()));
        let mut noted = wish.clone();
        noted.taken_up = Some(TakenUp {
            at: Timestamp::now(),
            caching_waits: wish
                .settings
                .caching
                .is_some_and(|wished| wished != caching),
        });
        let blob = beside(&self.io.blob);
        let conditions = if_match(&wish.etag);
        let deadline = self.io.attempt_deadline;
        let noted = blob
            .set_metadata(&noted.entries(), &conditions, deadline)
            .await;
        match noted {
            Err(error) if error.code() != "ConditionNotMet" => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_stays_and_nought_lifts_a_limit() {
        let before = Settings {
            caching: Some(Caching::ReadOnly),
            iops: Some(500),
            bandwidth: None,
        };
        let wished = Settings {
            iops: Some(0),
            bandwidth: Some(1 << 20),
            ..Settings::default()
        };
        let all = wished.over(before);
        assert_eq!(all.caching, Some(Caching::ReadOnly));
        assert_eq!(Settings::parse(&all.entries()), all);
        let limits = all.limits(Limits {
            iops: Some(500),
            bandwidth: None,
        });
        assert_eq!((limits.iops, limits.bandwidth), (None, Some(1 << 20)));
        assert_eq!(
            all.to_string(),
            "cachingMode read-only, iops unlimited, bandwidth 1048576"
        );
        assert_eq!(Settings::default().limits(limits), limits);
    }
}
