//! Making and removing the blob behind a volume.

use std::time::Duration;

use super::OpenError;
use super::intent::{self, Intent};
use super::open::unusable;
use super::patience::patiently;
use crate::blob::vhd::Layout;
use crate::blob::{Conditions, DeleteSnapshots, ETag, Effect, PageBlob, StorageError, Written};
use crate::device::PAGE;

/// The largest page blob: 8 TiB.
pub const LARGEST_BLOB: u64 = 8 << 40;

/// Metadata that marks a blob as made by one particular call, so that a call
/// whose answer was lost recognises its own work.
const CREATION_MARK: &str = "dyskcreation";

/// Seconds from the Unix epoch to 2000-01-01 00:00 UTC, the epoch of VHD.
const VHD_EPOCH: u64 = 946_684_800;

/// Creates a blob of the right size with its footer; refuses to replace one.
/// A half-made blob is removed again.
///
/// # Errors
/// `disk_size` is no multiple of 512 or out of (0, 8 TiB], or the store refuses.
pub async fn create(
    blob: &PageBlob,
    disk_size: u64,
    layout: Layout,
    deadline: Duration,
) -> Result<(), OpenError> {
    create_with(blob, disk_size, layout, &[], deadline).await
}

/// [`create`], with `metadata` on the blob from its first moment on. Should
/// this end between making the blob and writing its footer, [`super::grow`]
/// and whoever opens it complete it.
///
/// # Errors
/// As [`create`].
pub async fn create_with(
    blob: &PageBlob,
    disk_size: u64,
    layout: Layout,
    metadata: &[(String, String)],
    deadline: Duration,
) -> Result<(), OpenError> {
    check_size(disk_size, layout).map_err(|reason| unusable(blob, reason))?;
    let blob_size = layout.blob_size(disk_size);
    let intent = (layout != Layout::Raw).then(|| Intent {
        layout,
        old: 0,
        new: blob_size,
        id: *uuid::Uuid::new_v4().as_bytes(),
    });
    let mut metadata = metadata.to_vec();
    metadata.extend(intent.map(|intent| intent.entry()));
    let written = create_blob(blob, blob_size, metadata, deadline).await?;
    let Some(intent) = intent else {
        return Ok(());
    };
    let conditions = Conditions {
        if_sequence_number_lt: Some(1),
        ..Conditions::default()
    };
    if let Err(error) = intent::complete(blob, &intent, &conditions, deadline).await {
        discard(blob, &written, deadline).await;
        return Err(error.into());
    }
    Ok(())
}

/// What is wrong with a disk of `disk_size` bytes, if anything.
///
/// # Errors
/// The reason, with the remedy.
pub fn check_size(disk_size: u64, layout: Layout) -> Result<(), String> {
    if disk_size == 0 {
        return Err("size 0: a disk needs at least 512 bytes".into());
    }
    if !disk_size.is_multiple_of(PAGE) {
        let above = disk_size.next_multiple_of(PAGE);
        return Err(format!(
            "size {disk_size} is no multiple of 512 bytes: use {above}"
        ));
    }
    let largest = LARGEST_BLOB - (layout.blob_size(PAGE) - PAGE);
    if disk_size > largest {
        return Err(format!(
            "size {disk_size} is more than a page blob holds: use at most {largest} (8 TiB with the footer)"
        ));
    }
    Ok(())
}

async fn create_blob(
    blob: &PageBlob,
    size: u64,
    mut metadata: Vec<(String, String)>,
    deadline: Duration,
) -> Result<Written, OpenError> {
    let mark = uuid::Uuid::new_v4().simple().to_string();
    metadata.push((CREATION_MARK.to_owned(), mark.clone()));
    let mut unknown = false;
    let created = patiently!(async {
        let created = blob
            .create(size, &metadata, &Conditions::not_existing(), deadline)
            .await;
        unknown |= created
            .as_ref()
            .is_err_and(|error| error.effect() != Effect::NotApplied);
        created
    });
    match created {
        Ok(written) => Ok(written),
        Err(error) if unknown => own_creation(blob, &mark, deadline)
            .await
            .ok_or_else(|| refused(blob, error)),
        Err(error) => Err(refused(blob, error)),
    }
}

/// After an attempt whose outcome is unknown: the blob, if it is ours.
async fn own_creation(blob: &PageBlob, mark: &str, deadline: Duration) -> Option<Written> {
    let none = Conditions::default();
    let seen = patiently!(blob.properties(&none, deadline)).ok()?;
    let ours = seen
        .metadata
        .iter()
        .any(|(name, value)| name == CREATION_MARK && value == mark);
    ours.then_some(Written {
        etag: seen.etag,
        sequence_number: seen.sequence_number,
    })
}

fn refused(blob: &PageBlob, error: StorageError) -> OpenError {
    match error.code() {
        "BlobAlreadyExists" | "UnauthorizedBlobOverwrite" | "ConditionNotMet" => unusable(
            blob,
            "there is a blob of this name already: choose another, or delete it first".into(),
        ),
        _ => error.into(),
    }
}

/// Removes a blob whose making failed, only if nobody changed it since.
async fn discard(blob: &PageBlob, written: &Written, deadline: Duration) {
    let snapshots = DeleteSnapshots::Include;
    if let Err(error) = remove(blob, written.etag.clone(), snapshots, deadline).await {
        tracing::warn!("{error}: a half-made blob may be left; delete it");
    }
}

pub(super) async fn remove(
    blob: &PageBlob,
    etag: ETag,
    snapshots: DeleteSnapshots,
    deadline: Duration,
) -> Result<(), StorageError> {
    // A late delete could destroy a blob made since under the same name.
    let conditions = Conditions {
        if_match: Some(etag),
        ..Conditions::default()
    };
    let mut unknown = false;
    let deleted = patiently!(async {
        let deleted = blob.delete(snapshots, &conditions, deadline).await;
        unknown |= deleted
            .as_ref()
            .is_err_and(|error| error.effect() != Effect::NotApplied);
        deleted
    });
    match deleted {
        Err(error) if unknown && error.is_not_found() => Ok(()),
        other => other,
    }
}

/// Deletes the blob, with its `snapshots` or only while it has none; refuses
/// while it is leased.
///
/// # Errors
/// The blob is leased, has snapshots (409 `SnapshotsPresent`), changes under our
/// hands, or the store refuses.
pub async fn delete(
    blob: &PageBlob,
    snapshots: DeleteSnapshots,
    deadline: Duration,
) -> Result<(), OpenError> {
    let none = Conditions::default();
    let seen = patiently!(blob.properties(&none, deadline))?;
    match remove(blob, seen.etag, snapshots, deadline).await {
        Ok(()) => Ok(()),
        Err(error) if error.code() == "LeaseIdMissing" => Err(OpenError::Leased {
            object: blob.address().to_string(),
            remedy: "detach it where it is attached before deleting it".into(),
        }),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn vhd_now() -> u32 {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    // Saturates in 2136; a clock before 2000 counts as 2000.
    u32::try_from(now.as_secs().saturating_sub(VHD_EPOCH)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_checked_with_a_remedy() {
        for (size, layout) in [
            (512, Layout::Raw),
            (512, Layout::Vhd),
            (LARGEST_BLOB, Layout::Raw),
            (LARGEST_BLOB - 512, Layout::Vhd),
        ] {
            assert_eq!(check_size(size, layout), Ok(()), "{size}");
        }
        for (size, layout, remedy) in [
            (0, Layout::Raw, "at least 512"),
            (1000, Layout::Vhd, "use 1024"),
            (LARGEST_BLOB + 512, Layout::Raw, "use at most 8796093022208"),
            (LARGEST_BLOB, Layout::Vhd, "use at most 8796093021696"),
        ] {
            let reason = check_size(size, layout).expect_err("a bad size");
            assert!(reason.contains(remedy), "{reason}");
        }
    }
}
