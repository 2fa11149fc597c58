//! A disk made as a full copy of another, by the store itself (Copy Blob).
//!
//! | the new blob's metadata | its copy | what it is |
//! |---|---|---|
//! | `dyskcopying` | pending | being copied; nobody opens it |
//! | `dyskcopying` | failed, aborted | to be deleted, by a repeated call |
//! | `dyskcopying` | done | a disk, which may still have to grow |
//! | `dyskcopied` | done | finished |
//!
//! Both hold who asked for it, so that a repeated call goes on where the last
//! one ended and never takes another's blob for its own.

use std::time::Duration;

use super::OpenError;
use super::create::remove;
use super::grow::{self, grow};
use super::open::unusable;
use super::patience::patiently;
use super::snapshot::{create_snapshot, delete_snapshot, metadata_text};
use crate::blob::{
    Conditions, CopyStatus, DeleteSnapshots, Effect, PageBlob, Properties, StorageError,
};

const COPYING: &str = "dyskcopying";
const COPIED: &str = "dyskcopied";
/// What the name of a snapshot that is taken for a copy begins with; the new
/// blob's address comes behind it.
const COPY_TO: &str = "copy to ";
/// Between two looks at a copy under way.
const SHORTEST_LOOK: Duration = Duration::from_millis(50);
const LONGEST_LOOK: Duration = Duration::from_secs(5);

/// What to copy to.
#[derive(Clone, Debug, Default)]
pub struct CopyPlan {
    /// Who asks, and for what: the same text at each repetition.
    pub mark: String,
    /// The new disk's size; the source's when `None`.
    pub disk_size: Option<u64>,
    /// Metadata of the new blob.
    pub metadata: Vec<(String, String)>,
}

/// How a copy came to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// By this call, or by an earlier one that this call brought to its end.
    Now(u64),
    /// By an earlier call, all of it; the disk's size as well.
    Before(u64),
}

/// Why a blob whose content is a copy that is not at its end is no disk.
pub fn incomplete(seen: &Properties) -> Option<String> {
    let copy = seen.copy.as_ref()?;
    let ours = seen.metadata.iter().any(|(name, _)| name == COPYING);
    match copy.status {
        CopyStatus::Pending => Some("it is still being copied: wait for the copy to end".into()),
        CopyStatus::Failed | CopyStatus::Aborted if ours => {
            let why = copy.description.as_deref().unwrap_or("no reason given");
            Some(format!(
                "the copy that makes it failed ({why}): create it again"
            ))
        }
        _ => None,
    }
}

/// Makes `new` a full copy of `source`, a snapshot or a disk; of a disk a
/// snapshot is taken first and deleted afterwards. Never replaces a blob.
/// `progress` gets bytes copied and bytes in all.
///
/// # Errors
/// There is another blob of that name; the source is no disk, or larger than
/// the new one; the store's copy fails, and its remains are deleted.
pub async fn copy(
    source: &PageBlob,
    new: &PageBlob,
    plan: &CopyPlan,
    mut progress: impl FnMut(u64, u64) + Send,
    deadline: Duration,
) -> Result<Copied, OpenError> {
    let none = Conditions::default();
    let mark = metadata_text(&plan.mark);
    let snapshot_name = format!("{COPY_TO}{}", new.address());
    let mut look = SHORTEST_LOOK;
    let mut begun = false;
    loop {
        let seen = match patiently!(new.properties(&none, deadline)) {
            Ok(seen) => seen,
            Err(error) if error.is_not_found() && !begun => {
                match begin(source, new, plan, &mark, &snapshot_name, deadline).await {
                    Ok(may_be_there) => begun = may_be_there,
                    Err(error) => {
                        forget_snapshot(source, &snapshot_name, deadline).await?;
                        return Err(error);
                    }
                }
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let marked = |key: &str| seen.metadata.iter().any(|(k, v)| k == key && *v == mark);
        if marked(COPIED) {
            let size = grow::inspect(new, deadline).await?.size;
            // The call that finished it may have died before this.
            forget_snapshot(source, &snapshot_name, deadline).await?;
            return Ok(Copied::Before(size));
        }
        let Some(state) = seen.copy.as_ref().filter(|_| marked(COPYING)) else {
            return Err(unusable(
                new,
                "there is a blob of this name already: choose another, or delete it first".into(),
            ));
        };
        begun = true;
        if let Some((done, all)) = state.progress {
            progress(done, all);
        }
        match state.status {
            CopyStatus::Pending => {
                tokio::time::sleep(look).await;
                look = (look * 2).min(LONGEST_LOOK);
            }
            CopyStatus::Success => {
                let size = finish(new, &seen, plan, mark, deadline).await?;
                forget_snapshot(source, &snapshot_name, deadline).await?;
                return Ok(Copied::Now(size));
            }
            CopyStatus::Failed | CopyStatus::Aborted => {
                let reason = incomplete(&seen).unwrap_or_default();
                remove(new, seen.etag.clone(), DeleteSnapshots::Include, deadline).await?;
                forget_snapshot(source, &snapshot_name, deadline).await?;
                return Err(unusable(new, reason));
            }
        }
    }
}

/// Starts the copy; true once it may have been started.
async fn begin(
    source: &PageBlob,
    new: &PageBlob,
    plan: &CopyPlan,
    mark: &str,
    snapshot_name: &str,
    deadline: Duration,
) -> Result<bool, OpenError> {
    let from = if source.is_snapshot() {
        source.clone()
    } else {
        // One that a call left which died before the copy: it may be old.
        forget_snapshot(source, snapshot_name, deadline).await?;
        let taken = create_snapshot(source, snapshot_name, deadline).await?;
        source.at_snapshot(taken.time)
    };
    let disk = grow::inspect(&from, deadline).await?;
    if let Some(wanted) = plan.disk_size.filter(|wanted| *wanted < disk.size) {
        let reason = format!(
            "a copy of {} bytes cannot hold the source's {}: choose a size of at least that",
            wanted, disk.size
        );
        return Err(unusable(new, reason));
    }
    let mut metadata = plan.metadata.clone();
    metadata.push((COPYING.to_owned(), mark.to_owned()));
    // A source in the middle of growing is completed in the copy.
    let intent = super::intent::Intent::of(&disk.properties.metadata);
    metadata.extend(intent.map(|intent| intent.entry()));
    let url = from.copy_url();
    let conditions = Conditions::not_existing();
    match new.start_copy(&url, &metadata, &conditions, deadline).await {
        Ok(_) => Ok(true),
        // Ours that was lost, or somebody's: the next look tells.
        Err(error) if error.effect() != Effect::NotApplied || exists(&error) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

fn exists(error: &StorageError) -> bool {
    matches!(
        error.code(),
        "BlobAlreadyExists" | "UnauthorizedBlobOverwrite" | "ConditionNotMet"
    )
}

/// Grows the copy to the size it is to have, and says that it is finished.
async fn finish(
    new: &PageBlob,
    seen: &Properties,
    plan: &CopyPlan,
    mark: String,
    deadline: Duration,
) -> Result<u64, OpenError> {
    let disk = grow::inspect(new, deadline).await?;
    let size = grow(
        new,
        plan.disk_size.unwrap_or(disk.size).max(disk.size),
        deadline,
    )
    .await?;
    // An intent of the source stays: it is what completes a copy that was
    // taken in the middle of growing, and means nothing to any other.
    let mut metadata = seen.metadata.clone();
    metadata.retain(|(name, _)| name != COPYING);
    metadata.push((COPIED.to_owned(), mark));
    let none = Conditions::default();
    patiently!(new.set_metadata(&metadata, &none, deadline))?;
    Ok(size)
}

/// Deletes the snapshots of `source` that were taken for copies which are not
/// under way any more: left by calls that died and were not repeated.
///
/// # Errors
/// The store refuses.
pub async fn forget_left_snapshots(source: &PageBlob, deadline: Duration) -> Result<(), OpenError> {
    let none = Conditions::default();
    let address = source.address();
    for left in super::snapshot::list_snapshots(source, deadline).await? {
        let to = left.name.as_deref().and_then(|name| {
            let to = name.strip_prefix(COPY_TO)?;
            to.strip_prefix(&*address.account)?.strip_prefix('/')
        });
        let Some((container, blob)) = to.and_then(|to| to.split_once('/')) else {
            continue;
        };
        let new = source.account().page_blob(container, blob);
        let seen = patiently!(new.properties(&none, deadline));
        let copying = match &seen {
            Ok(seen) => seen.copy.as_ref().map(|copy| copy.status) == Some(CopyStatus::Pending),
            Err(error) if error.is_not_found() => false,
            Err(_) => true,
        };
        if !copying {
            delete_snapshot(source, &left.time, deadline).await?;
        }
    }
    Ok(())
}

/// Deletes the snapshot that was taken for a copy.
async fn forget_snapshot(
    source: &PageBlob,
    name: &str,
    deadline: Duration,
) -> Result<(), OpenError> {
    if source.is_snapshot() {
        return Ok(());
    }
    for left in super::snapshot::list_snapshots(source, deadline).await? {
        if left.name.as_deref() == Some(name) {
            delete_snapshot(source, &left.time, deadline).await?;
        }
    }
    Ok(())
}
