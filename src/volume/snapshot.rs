//! Snapshots of a disk: named in their own metadata, so that a call whose
//! answer was lost finds what it made.

use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::OpenError;
use super::open::unusable;
use super::patience::{Patience, patiently};
use super::snapshot_group::{self, Membership};
use crate::blob::{
    Account, Conditions, DeleteSnapshots, Effect, ListedBlob, PageBlob, StorageError,
};

/// The name of a snapshot, among its metadata.
const KEY: &str = "dysksnapshot";

/// What metadata, a header of HTTP, holds as it is.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');

/// A snapshot of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The store's time stamp, which addresses it (`x-ms-snapshot`).
    pub time: String,
    /// The name it was made under; none for one that was made elsewhere.
    pub name: Option<String>,
    /// Bytes in the blob at that time, footer included.
    pub blob_size: u64,
    /// It is of a group, which has a name of its own.
    pub of_group: bool,
}

/// Text as a metadata value: any text in, ASCII without blanks out.
#[must_use]
pub fn metadata_text(text: &str) -> String {
    utf8_percent_encode(text, PLAIN).to_string()
}

/// The name in the metadata of a snapshot.
#[must_use]
pub fn snapshot_name(metadata: &[(String, String)]) -> Option<String> {
    let (_, value) = metadata.iter().find(|(name, _)| name == KEY)?;
    Some(percent_decode_str(value).decode_utf8_lossy().into_owned())
}

/// Takes a snapshot called `name`, or finds the one that an earlier call of
/// that name took. Needs no lease: of a disk in use it holds what a power cut
/// at this moment would leave.
///
/// # Errors
/// There is no such blob, it is being copied, or the store refuses.
pub async fn create_snapshot(
    blob: &PageBlob,
    name: &str,
    deadline: Duration,
) -> Result<Snapshot, OpenError> {
    check_name(blob, name)?;
    let none = Conditions::default();
    let mut patience = Patience::begin();
    loop {
        // Also after one was taken: a request of an earlier call, which was given
        // up, may have come in before it, and whoever asks is told the same one.
        let listed = list_snapshots(blob, deadline).await?;
        if let Some(there) = find(listed, name) {
            return Ok(there);
        }
        let seen = patiently!(blob.properties(&none, deadline))?;
        if let Some(reason) = super::copy::incomplete(&seen) {
            return Err(unusable(blob, reason));
        }
        let metadata = named(seen.metadata, name);
        // One attempt: after one whose outcome is unknown, look before the next.
        let conditions = Conditions {
            if_match: Some(seen.etag),
            ..Conditions::default()
        };
        match blob.create_snapshot(&metadata, &conditions, deadline).await {
            Ok(_) => {}
            // A disk in use changes all the time; its metadata does not.
            Err(error) if error.code() == "ConditionNotMet" => {
                match snapshot_of_busy(blob, &metadata, deadline).await {
                    Ok(_) => {}
                    Err(error) if error.effect() == Effect::NotApplied => return Err(error.into()),
                    Err(error) => patience.after(error).await?,
                }
            }
            Err(error) => patience.after(error).await?,
        }
    }
}

pub(super) fn check_name(blob: &PageBlob, name: &str) -> Result<(), OpenError> {
    if name.is_empty() || name.len() > 1024 {
        let reason = "a snapshot's name has 1 to 1024 bytes".to_owned();
        return Err(unusable(blob, reason));
    }
    Ok(())
}

/// The metadata of a snapshot called `name`. A snapshot's own replaces the
/// blob's, which says how the disk lies in it while it grows: so both.
pub(super) fn named(mut metadata: Vec<(String, String)>, name: &str) -> Vec<(String, String)> {
    metadata.retain(|(key, _)| key != KEY && key != snapshot_group::KEY);
    metadata.push((KEY.to_owned(), metadata_text(name)));
    metadata
}

async fn snapshot_of_busy(
    blob: &PageBlob,
    metadata: &[(String, String)],
    deadline: Duration,
) -> Result<String, StorageError> {
    let none = Conditions::default();
    blob.create_snapshot(metadata, &none, deadline).await
}

/// The first of that name: a request that came late may have made a second.
pub(super) fn find(snapshots: Vec<Snapshot>, name: &str) -> Option<Snapshot> {
    let named = snapshots
        .into_iter()
        .filter(|snapshot| !snapshot.of_group && snapshot.name.as_deref() == Some(name));
    named.min_by(|a, b| a.time.cmp(&b.time))
}

/// The blob's snapshots, oldest first.
///
/// # Errors
/// The container is not there, or the store refuses.
pub async fn list_snapshots(
    blob: &PageBlob,
    deadline: Duration,
) -> Result<Vec<Snapshot>, OpenError> {
    let address = blob.address();
    let (container, name) = (&address.container, &address.blob);
    let listed = list_with_snapshots(blob.account(), container, name, deadline).await?;
    // The prefix finds longer names too.
    let own = listed.into_iter().filter(|listed| listed.name == *name);
    let mut found: Vec<Snapshot> = own.filter_map(of_listed).collect();
    found.sort_by(|a, b| a.time.cmp(&b.time));
    Ok(found)
}

/// All pages of the list of blobs whose names begin with `prefix`, and of their
/// snapshots.
pub(super) async fn list_with_snapshots(
    account: &Account,
    container: &str,
    prefix: &str,
    deadline: Duration,
) -> Result<Vec<ListedBlob>, StorageError> {
    let mut marker: Option<String> = None;
    let mut found = Vec::new();
    loop {
        let (page, next) =
            patiently!(account.list_blobs(container, prefix, true, marker.as_deref(), deadline))?;
        found.extend(page);
        marker = next.filter(|next| !next.is_empty());
        if marker.is_none() {
            return Ok(found);
        }
    }
}

fn of_listed(listed: ListedBlob) -> Option<Snapshot> {
    Some(Snapshot {
        time: listed.snapshot?,
        name: snapshot_name(&listed.metadata),
        blob_size: listed.size,
        of_group: Membership::of(&listed.metadata).is_some(),
    })
}

/// Deletes the snapshot called `name` that was taken at `time`, the one which
/// [`create_snapshot`] told, and others of that name: requests of calls that were
/// given up took them, and nobody knows of them.
///
/// # Errors
/// The store refuses.
pub async fn delete_snapshots_of_name(
    blob: &PageBlob,
    (name, time): (&str, &str),
    deadline: Duration,
) -> Result<(), OpenError> {
    for other in list_snapshots(blob, deadline).await? {
        let same = !other.of_group && other.name.as_deref() == Some(name);
        if same && other.time != time {
            delete_snapshot(blob, &other.time, deadline).await?;
        }
    }
    // The last, as it is what a repeated call looks for.
    delete_snapshot(blob, time, deadline).await
}

/// Deletes the snapshot taken at `time`; one that is not there is deleted.
///
/// # Errors
/// The store refuses.
pub async fn delete_snapshot(
    blob: &PageBlob,
    time: &str,
    deadline: Duration,
) -> Result<(), OpenError> {
    let snapshot = blob.at_snapshot(time);
    let none = Conditions::default();
    match patiently!(snapshot.delete(DeleteSnapshots::Refuse, &none, deadline)) {
        Err(error) if !error.is_not_found() => Err(error.into()),
        _ => Ok(()),
    }
}
