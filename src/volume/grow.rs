//! Looking at a disk without opening it, and growing one that is detached.
//!
//! Growing goes: lease, raise the sequence number, intent ([`super::intent`])
//! into the metadata, Set Blob Properties with the new size, the old footer's
//! page emptied, the new footer, intent out of the metadata, lease released.
//! Ended anywhere, it leaves the old disk or the new one, and is repeated with
//! the same call.

use std::time::Duration;

use super::OpenError;
use super::create::check_size;
use super::intent::{self, Intent};
use super::keeper::{self, HeldLease, LEASE_SECONDS};
use super::open::{last_page, properties, unusable};
use super::patience::patiently;
use crate::blob::vhd::{self, Layout};
use crate::blob::{
    Conditions, ETag, Effect, LeaseId, PageBlob, Properties, SequenceNumber, StorageError,
};

/// A disk as it lies in the store.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Usable bytes. While a resize is unfinished, those of the old disk; 0
    /// when the blob was made and its footer was not yet.
    pub size: u64,
    /// How it lies in its blob.
    pub layout: Layout,
    /// The blob's properties.
    pub properties: Properties,
}

/// Looks at the disk in `blob`: no lease, no writes.
///
/// # Errors
/// The blob is no disk, or a copy that has not come to its end.
pub async fn inspect(blob: &PageBlob, deadline: Duration) -> Result<Disk, OpenError> {
    let seen = properties(blob, deadline).await?;
    let end = last_page(blob, seen.size, deadline).await?;
    let (layout, blob_size) = end.as_is(&seen);
    Ok(Disk {
        size: layout.usable(blob_size),
        layout,
        properties: seen,
    })
}

/// Grows the disk to `disk_size` bytes, and completes what an interrupted call
/// left; a disk of that size or more stays as it is. Answers with its size.
/// What is between the old end and the new reads as zeroes.
///
/// # Errors
/// [`OpenError::Leased`] when it is attached somewhere; `disk_size` is no
/// multiple of 512 or too large; or the store refuses.
pub async fn grow(blob: &PageBlob, disk_size: u64, deadline: Duration) -> Result<u64, OpenError> {
    let disk = inspect(blob, deadline).await?;
    if disk.size >= disk_size {
        return Ok(disk.size);
    }
    check_size(disk_size, disk.layout).map_err(|reason| unusable(blob, reason))?;
    let runtime = keeper::runtime()
        .map_err(|error| unusable(blob, format!("cannot start a thread: {error}")))?;
    let id = LeaseId::random();
    let conditions = if_match(&disk.properties.etag);
    // From here on a lease may exist; dropped early, it is released.
    let held = HeldLease::new(runtime, blob.isolated(1), id.clone());
    let acquired = patiently!(blob.acquire_lease(&id, Some(LEASE_SECONDS), &conditions, deadline));
    if let Err(error) = acquired {
        if error.is_leased_elsewhere() {
            held.forget();
            return Err(OpenError::Leased {
                object: blob.address().to_string(),
                remedy: "its holder alone can resize it: detach it first, \
                         or resize it where it is attached"
                    .into(),
            });
        }
        return Err(error.into());
    }
    let grown = grow_held(blob, &disk.properties, &id, disk_size, deadline).await;
    if let Err(error) = held.release().await {
        tracing::warn!("{error}: the lease ends by itself within {LEASE_SECONDS} s");
    }
    grown
}

/// Grows the blob that was `seen` when the lease `id` was taken.
async fn grow_held(
    blob: &PageBlob,
    seen: &Properties,
    id: &LeaseId,
    disk_size: u64,
    deadline: Duration,
) -> Result<u64, OpenError> {
    let held = Conditions::lease(id);
    let raised = patiently!(blob.set_sequence_number(SequenceNumber::Increment, &held, deadline))?;
    let fenced = intent::fenced(id, raised.sequence_number);
    let end = last_page(blob, seen.size, deadline).await?;
    let mut layout = end.layout;
    let mut disk_id = vhd::unique_id(&end.page);
    if let Some(left) = end.unfinished(seen) {
        intent::complete(blob, &left, &fenced, deadline).await?;
        (layout, disk_id) = (left.layout, left.id);
    }
    let (old, new) = (end.blob_size, layout.blob_size(disk_size));
    if new > old {
        let intent = Intent {
            layout,
            old,
            new,
            id: disk_id,
        };
        let mut metadata = intent::without(&seen.metadata);
        if layout != Layout::Raw {
            metadata.push(intent.entry());
        }
        let marked = patiently!(blob.set_metadata(&metadata, &held, deadline))?;
        resize(blob, new, id, &marked.etag, deadline).await?;
        if layout != Layout::Raw {
            intent::complete(blob, &intent, &fenced, deadline).await?;
        }
    }
    let metadata = intent::without(&seen.metadata);
    patiently!(blob.set_metadata(&metadata, &held, deadline))?;
    Ok(layout.usable(old.max(new)))
}

/// Set Blob Properties, bound to `etag`: one that comes late, after the blob
/// has grown further, would shrink it.
async fn resize(
    blob: &PageBlob,
    size: u64,
    id: &LeaseId,
    etag: &ETag,
    deadline: Duration,
) -> Result<(), StorageError> {
    let conditions = Conditions {
        if_match: Some(etag.clone()),
        ..Conditions::lease(id)
    };
    let mut unknown = false;
    let resized = patiently!(async {
        let resized = blob.resize(size, &conditions, deadline).await;
        unknown |= resized
            .as_ref()
            .is_err_and(|error| error.effect() != Effect::NotApplied);
        resized
    });
    match resized {
        Err(error) if unknown => {
            // Perhaps the refused repetition met the ETag of the lost success.
            let none = Conditions::default();
            let seen = patiently!(blob.properties(&none, deadline))?;
            if seen.size == size {
                Ok(())
            } else {
                Err(error)
            }
        }
        other => other.map(drop),
    }
}

fn if_match(etag: &ETag) -> Conditions {
    Conditions {
        if_match: Some(etag.clone()),
        ..Conditions::default()
    }
}
