//! ControllerPublishVolume and ControllerUnpublishVolume: which nodes may
//! attach a volume, where the cluster has attachRequired on. What is written
//! for that is in `volume::published`.

use std::collections::HashMap;

use tonic::Status;

use super::handle::Handle;
use super::locks::Locks;
use super::v1::volume_capability::AccessMode;
use super::v1::volume_capability::access_mode::Mode;
use super::v1::*;
use super::{capability, failure, node_id, secrets};
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
