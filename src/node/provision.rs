//! New blobs: made with their container, and taken back when what they were
//! made for fails.

use std::time::Duration;

use super::account::ATTEMPT_DEADLINE;
use super::api::{ErrorCode, NewDisk};
use super::error::NodeError;
use crate::blob::{Account, Conditions, DeleteSnapshots, LeaseId, PageBlob};
use crate::volume::{self, OpenError};

/// Checks a disk size.
///
/// # Errors
/// It is no multiple of 512, 0, or more than a page blob holds.
pub fn check_size(disk: NewDisk) -> Result<(), NodeError> {
    volume::check_size(disk.size, disk.format.into())
        .map_err(|reason| NodeError::new(ErrorCode::InvalidRequest, reason))
}

/// Makes the blob, and its container when that is missing. An existing blob
/// is refused. A container that was made stays whatever happens: others may
/// use it already.
///
/// # Errors
/// As [`volume::create`]; nothing half-made is left.
pub async fn create(account: &Account, blob: &PageBlob, disk: NewDisk) -> Result<(), NodeError> {
    check_size(disk)?;
    let layout = disk.format.into();
    let attempt = || volume::create(blob, disk.size, layout, ATTEMPT_DEADLINE);
    with_container(account, &blob.address().container, attempt)
        .await
        .map_err(NodeError::from)
}

/// Makes an `attempt` at something in a container, and the container and one
/// more attempt when it turns out to be missing.
///
/// # Errors
/// As the attempt, or as Create Container.
pub async fn with_container<T, F>(
    account: &Account,
    container: &str,
    mut attempt: impl FnMut() -> F,
) -> Result<T, OpenError>
where
    F: Future<Output = Result<T, OpenError>>,
{
    match attempt().await {
        Err(OpenError::Storage(error)) if error.code() == "ContainerNotFound" => {}
        other => return other,
    }
    match account.create_container(container, ATTEMPT_DEADLINE).await {
        Ok(()) => tracing::info!(%container, account = account.name(), "container created"),
        Err(error) if error.code() == "ContainerAlreadyExists" => {}
        Err(error) => return Err(error.into()),
    }
    attempt().await
}

/// Takes back a blob that [`create`] made moments ago. It is deleted under a
/// lease of our own, and only if it holds no data but its footer: a blob that
/// somebody found useful meanwhile stays.
///
/// # Errors
/// The blob is left behind; the text says so and why.
pub async fn take_back(blob: &PageBlob, disk: NewDisk) -> Result<(), NodeError> {
    let left = |error: NodeError| {
        NodeError::new(
            error.code,
            format!("{}, just created, is left behind: {error}", blob.address()),
        )
    };
    let lease = LeaseId::random();
    match blob
        .acquire_lease(&lease, Some(15), &Conditions::default(), ATTEMPT_DEADLINE)
        .await
    {
        Ok(()) => {}
        Err(error) if error.is_not_found() => return Ok(()),
        Err(error) => return Err(left(error.into())),
    }
    let deleted = delete_if_blank(blob, disk, &lease).await;
    if deleted.is_err()
        && let Err(error) = blob.release_lease(&lease, ATTEMPT_DEADLINE).await
    {
        tracing::warn!(blob = %blob.address(), %error, "lease not released; it ends within 15 s");
    }
    deleted.map_err(left)
}

async fn delete_if_blank(blob: &PageBlob, disk: NewDisk, lease: &LeaseId) -> Result<(), NodeError> {
    // Shorter than the lease, so that what is checked is what is deleted.
    let deadline = Duration::from_secs(5);
    let held = Conditions::lease(lease);
    let ranges = blob
        .page_ranges(None, None, None, None, &held, deadline)
        .await?;
    if ranges.filled.iter().any(|r| r.start < disk.size) {
        return Err(NodeError::new(
            ErrorCode::UnusableBlob,
            "somebody has written to it",
        ));
    }
    blob.delete(DeleteSnapshots::Refuse, &held, deadline)
        .await?;
    Ok(())
}
