//! ControllerGetVolumeHealth and ControllerListVolumeHealth: what is wrong with
//! volumes as they lie in the store. What is wrong with them where they are
//! attached the node says, in [`super::node`].

use std::collections::HashMap;
use std::pin::pin;

use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use tonic::Status;

use super::handle::Handle;
use super::v1::volume_health::VolumeHealthEntry;
use super::v1::*;
use super::{failure, listing, secrets};
use crate::blob::{Account, ListedBlob};
use crate::node::account::ATTEMPT_DEADLINE;
use crate::volume::{self, OpenError};

/// Volumes that are looked at together.
const AT_ONCE: usize = 16;

/// One thing that is wrong with a volume.
pub fn entry(status: VolumeHealthErrorType, reason: &str, message: String) -> VolumeHealthEntry {
    VolumeHealthEntry {
        status: status.into(),
        reason: reason.into(),
        message,
    }
}

/// Looks at a volume; `None` when there is no such blob.
///
/// # Errors
/// What the store answered instead of telling.
async fn look(account: &Account, handle: &Handle) -> Result<Option<VolumeHealth>, Status> {
    let blob = account.page_blob(&handle.container, &handle.blob);
    let health_statuses = match volume::inspect(&blob, ATTEMPT_DEADLINE).await {
        Ok(_) => Vec::new(),
        Err(OpenError::Storage(error)) if error.is_not_found() => return Ok(None),
        Err(OpenError::Storage(error)) => return Err(failure::of_storage(&error)),
        Err(error) => vec![entry(
            VolumeHealthErrorType::Inaccessible,
            "UnusableBlob",
            error.to_string(),
        )],
    };
    Ok(Some(VolumeHealth {
        volume_id: handle.to_string(),
        health_statuses,
    }))
}

/// Looks at each of `listed`, of the default container, in their order; at some
/// of them together. `None` where one was deleted meanwhile.
pub fn look_at_each(
    account: &Account,
    listed: Vec<ListedBlob>,
) -> impl Stream<Item = Result<(ListedBlob, Option<VolumeHealth>), Status>> {
    let looked = futures_util::stream::iter(listed).map(move |listed| async move {
        let handle = listing::handle(account, &listed);
        let health = look(account, &handle).await?;
        Ok((listed, health))
    });
    looked.buffered(AT_ONCE)
}

/// ControllerGetVolumeHealth.
pub async fn get(
    secret: &HashMap<String, String>,
    volume_id: &str,
) -> Result<ControllerGetVolumeHealthResponse, Status> {
    let handle = Handle::named(volume_id)?;
    let account = secrets::open(secret, None, None).await?;
    let nowhere = || Status::not_found(format!("{handle}: no such volume"));
    if account.name() != handle.account {
        return Err(nowhere());
    }
    let health = look(&account, &handle).await?.ok_or_else(nowhere)?;
    Ok(ControllerGetVolumeHealthResponse {
        volume_health: Some(health),
    })
}

/// ControllerListVolumeHealth: of the volumes that ListVolumes lists, those
/// that something is wrong with. The token is the last handle of the page
/// before.
pub async fn list(
    secret: &HashMap<String, String>,
    max_entries: i32,
    starting_token: &str,
) -> Result<ControllerListVolumeHealthResponse, Status> {
    let (most, after) = listing::page(max_entries, starting_token)?;
    let account = secrets::open(secret, None, None).await?;
    let all = listing::made_here(&account, after.as_ref()).await?;
    let mut looked = pin!(look_at_each(&account, all));
    let mut entries: Vec<VolumeHealth> = Vec::new();
    while let Some((_, health)) = looked.try_next().await? {
        // One that is gone was deleted meanwhile.
        let Some(health) = health.filter(|health| !health.health_statuses.is_empty()) else {
            continue;
        };
        if most > 0 && entries.len() == most {
            let last = entries.last().map(|last| last.volume_id.clone());
            return Ok(ControllerListVolumeHealthResponse {
                entries,
                next_token: last.unwrap_or_default(),
            });
        }
        entries.push(health);
    }
    Ok(ControllerListVolumeHealthResponse {
        entries,
        next_token: String::new(),
    })
}
