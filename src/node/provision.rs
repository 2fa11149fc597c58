//! New blobs: made with their container, and taken back when what they were
//! made for fails.

use std::time::Duration;

use super::account::ATTEMPT_DEADLINE;
use super::api::{ErrorCode, NewDisk};
use super::error::NodeError;
use crate::blob::vhd::{FOOTER, Layout};
use crate::blob::{Account, Conditions, DeleteSnapshots, LeaseId, PageBlob};
use crate::volume::{self, OpenError};

/// The largest page blob, and so the largest disk with its footer.
pub const MAX_BLOB: u64 = 8 << 40;

/// Checks a disk size.
///
/// # Errors
/// It is no multiple of 512, 0, or more than a page blob holds.
pub fn check_size(disk: NewDisk) -> Result<(), NodeError> {
    let size = disk.size;
    let refuse = |what: String| Err(NodeError::new(ErrorCode::InvalidRequest, what));
    if size == 0 || !size.is_multiple_of(512) {
        return refuse(format!(
            "size {size} is not usable: take a multiple of 512 bytes, more than 0"
        ));
    }
    let layout = Layout::from(disk.format);
    let footer = if layout == Layout::Raw { 0 } else { FOOTER as u64 };
    if size > MAX_BLOB - footer {
        let most = MAX_BLOB - footer;
        return refuse(format!(
            "size {size} is not usable: a page blob holds a disk of at most {most} bytes \
             (8 TiB, the footer of a vhd included)"
        ));
    }
    Ok(())
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
    let first = volume::create(blob, disk.size, layout, ATTEMPT_DEADLINE).await;
    let Err(OpenError::Storage(error)) = &first else {
        return first.map_err(NodeError::from);
    };
    if error.code() != "ContainerNotFound" {
        return first.map_err(NodeError::from);
    }
    let container = &blob.address().container;
    match account.create_container(container, ATTEMPT_DEADLINE).await {
        Ok(()) => tracing::info!(%container, account = account.name(), "container created"),
        Err(error) if error.code() == "ContainerAlreadyExists" => {}
        Err(error) => return Err(error.into()),
    }
    volume::create(blob, disk.size, layout, ATTEMPT_DEADLINE)
        .await
        .map_err(NodeError::from)
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
    if deleted.is_err() {
        if let Err(error) = blob.release_lease(&lease, ATTEMPT_DEADLINE).await {
            tracing::warn!(blob = %blob.address(), %error, "lease not released; it ends within 15 s");
        }
    }
    deleted.map_err(left)
}

async fn delete_if_blank(
    blob: &PageBlob,
    disk: NewDisk,
    lease: &LeaseId,
) -> Result<(), NodeError> {
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
    blob.delete(DeleteSnapshots::Refuse, &held, deadline).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::api::Format;

    #[test]
    fn sizes_stop_at_what_a_page_blob_holds() {
        let check = |size, format| check_size(NewDisk { size, format }).is_ok();
        for size in [0, 1, 511, 513, u64::MAX, MAX_BLOB + 512] {
            assert!(!check(size, Format::Raw) && !check(size, Format::Vhd), "{size}");
        }
        assert!(check(MAX_BLOB, Format::Raw));
        assert!(!check(MAX_BLOB, Format::Vhd));
        assert!(check(MAX_BLOB - 512, Format::Vhd));
        assert!(check(512, Format::Vhd));
    }
}
