//! ControllerPublishVolume and ControllerUnpublishVolume: which nodes may
//! attach a volume, where the cluster has attachRequired on. What is written
//! for that is in `volume::published`.

use std::collections::HashMap;

use tokio::sync::{Mutex, MutexGuard};
use tonic::Status;

use super::handle::Handle;
use super::locks::Locks;
use super::v1::volume_capability::AccessMode;
use super::v1::volume_capability::access_mode::Mode;
use super::v1::*;
use super::{capability, failure, listing, node_id, secrets};
use crate::blob::Account;
use crate::node::account::ATTEMPT_DEADLINE;
use crate::volume::{self, Access, PublishError};

/// In the publish context: the node that the volume was published to.
pub const NODE: &str = "node";
/// In the publish context: `rw` or `ro`.
pub const ACCESS: &str = "access";

/// Whether the publish context of a call of the node says that it may only
/// read.
pub fn reads_only(context: &HashMap<String, String>) -> bool {
    context.get(ACCESS).is_some_and(|access| access == "ro")
}

/// How many volumes a node may have, where the controller was told: what the
/// scheduler keeps to by what the nodes tell, kept here too.
#[derive(Debug)]
pub struct NodeLimit {
    most: u32,
    /// Held from counting to publishing, so that no two calls take one place.
    turn: Mutex<()>,
}

impl NodeLimit {
    /// At most `most`.
    #[must_use]
    pub fn new(most: u32) -> Self {
        Self {
            most,
            turn: Mutex::default(),
        }
    }

    /// Makes sure that `node` has room for the volume, or has it already: of the
    /// volumes in its container, since no call names others. The place is kept
    /// as long as the guard.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED: the node is full.
    async fn room(
        &self,
        account: &Account,
        handle: &Handle,
        node: &str,
    ) -> Result<MutexGuard<'_, ()>, Status> {
        let turn = self.turn.lock().await;
        let mut others: u32 = 0;
        for listed in listing::blobs(account, &handle.container, "", false).await? {
            let published = volume::published(&listed.metadata);
            if published.iter().all(|entry| entry.node != node) {
                continue;
            }
            if listed.name == handle.blob {
                return Ok(turn);
            }
            others = others.saturating_add(1);
        }
        if others >= self.most {
            return Err(Status::resource_exhausted(format!(
                "{handle}: {node} has {others} volumes, and may have {}: unpublish one of them first",
                self.most
            )));
        }
        Ok(turn)
    }
}

fn of_publishing(error: &PublishError) -> Status {
    let text = error.to_string();
    match error {
        PublishError::Open(error) => failure::of_volume(error),
        PublishError::OtherAccess { .. } => Status::already_exists(text),
        PublishError::Elsewhere { .. }
        | PublishError::Leased { .. }
        | PublishError::NotPublished { .. } => Status::failed_precondition(text),
        PublishError::Full { .. } => Status::resource_exhausted(text),
    }
}

/// ControllerPublishVolume.
pub async fn publish(
    locks: &Locks,
    limit: Option<&NodeLimit>,
    asked: ControllerPublishVolumeRequest,
) -> Result<ControllerPublishVolumeResponse, Status> {
    failure::given(&asked.volume_id, "volume id")?;
    failure::given(&asked.node_id, "node id")?;
    let Some(capability) = &asked.volume_capability else {
        return Err(Status::invalid_argument("volume capability is missing"));
    };
    if let Some(reason) = capability::unsupported(capability) {
        return Err(Status::invalid_argument(reason));
    }
    let handle = Handle::named(&asked.volume_id)?;
    let _held = locks.take(&handle)?;
    let value = |key: &str| asked.volume_context.get(key).map(String::as_str);
    let account = secrets::open(&asked.secrets, value("endpoint"), value("realm")).await?;
    super::volumes::look(&account, &handle).await?;
    if !node_id::is_one(&asked.node_id) {
        return Err(Status::not_found(format!(
            "{}: no such node: it is none that csi-dysk has registered",
            asked.node_id
        )));
    }
    let mode = capability.access_mode.as_ref().map(AccessMode::mode);
    let reader = matches!(
        mode,
        Some(Mode::SingleNodeReaderOnly | Mode::MultiNodeReaderOnly)
    );
    let (access, word) = if asked.readonly || reader {
        (Access::Read, "ro")
    } else {
        (Access::Write, "rw")
    };
    let _place = match limit {
        Some(limit) => Some(limit.room(&account, &handle, &asked.node_id).await?),
        None => None,
    };
    let blob = account.page_blob(&handle.container, &handle.blob);
    volume::publish(&blob, &asked.node_id, access, ATTEMPT_DEADLINE)
        .await
        .map_err(|error| of_publishing(&error))?;
    tracing::info!(volume = %handle, node = asked.node_id, access = word, "published");
    let context = [(NODE, asked.node_id), (ACCESS, word.to_owned())];
    Ok(ControllerPublishVolumeResponse {
        publish_context: context.map(|(key, text)| (key.to_owned(), text)).into(),
    })
}

/// ControllerUnpublishVolume; from every node, when none is named. Its request
/// brings no volume context, so an endpoint comes from the Secret.
pub async fn unpublish(
    locks: &Locks,
    asked: ControllerUnpublishVolumeRequest,
) -> Result<(), Status> {
    failure::given(&asked.volume_id, "volume id")?;
    // A handle that is none names a volume that is nowhere.
    let Some(handle) = Handle::parse(&asked.volume_id) else {
        return Ok(());
    };
    let _held = locks.take(&handle)?;
    let account = secrets::open(&asked.secrets, None, None).await?;
    secrets::are_of(&handle.account, account.name(), &handle)?;
    let blob = account.page_blob(&handle.container, &handle.blob);
    let node = Some(asked.node_id.as_str()).filter(|node| !node.is_empty());
    volume::unpublish(&blob, node, ATTEMPT_DEADLINE)
        .await
        .map_err(|error| of_publishing(&error))?;
    tracing::info!(volume = %handle, node = asked.node_id, "unpublished");
    Ok(())
}
