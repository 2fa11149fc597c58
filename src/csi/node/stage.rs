//! NodeStageVolume and NodeUnstageVolume: attached, proven, mounted once for
//! the node; and back.
//!
//! Every step finds its own work done, so the call may end anywhere and be
//! repeated: the attachment has the volume's name, a format its mark, a mount
//! its device.

use std::path::{Path, PathBuf};
use std::time::Instant;

use tonic::Status;

use super::{Node, Want, attach, blocking};
use crate::csi::failure;
use crate::csi::v1::{NodeStageVolumeRequest, NodeUnstageVolumeRequest};
use crate::filesystem::format::{self, Disk, Prepared};
use crate::filesystem::{self, Kind, grow_if_larger};
use crate::mounts;
use crate::node::api::Attachment;

/// NodeStageVolume.
pub async fn stage(node: &Node, asked: NodeStageVolumeRequest) -> Result<(), Status> {
    let volume_id = asked.volume_id.as_str();
    failure::given(volume_id, "volume id")?;
    let staging = super::path("staging target path", &asked.staging_target_path)?;
    let want = Want::of(asked.volume_capability.as_ref())?;
    let request = attach::request(
        volume_id,
        &asked.secrets,
        &asked.volume_context,
        &asked.publish_context,
        want.reads_only(),
    )?;
    node.is_meant(&asked.publish_context)?;
    let _held = node.locks.take(volume_id)?;
    let begun = Instant::now();
    let attachment = attach::attach(node, &request, &staging).await?;
    let attached = begun.elapsed();
    let Want::Mount { kind, options, .. } = &want else {
        tracing::info!(name = %request.name, ?attached, "staged a block volume");
        return Ok(());
    };
    if is_mounted(&attachment, &staging, *kind).await? {
        return Ok(());
    }
    let prepared = prepare(node, &attachment, *kind).await?;
    let ready = begun.elapsed();
    mount(&attachment, &staging, *kind, options).await?;
    let mounted = begun.elapsed();
    let writable = !attachment.read_only && !options.iter().any(|option| option == "ro");
    if prepared == Prepared::Found && writable {
        let device = text(attach::device(&attachment)?)?;
        let path = text(&staging)?;
        let size = attachment.size.unwrap_or_default();
        grow_if_larger((&device, size), &path, *kind)
            .await
            .map_err(|error| failure::of_filesystem(&error))?;
    }
    tracing::info!(
        name = %request.name,
        volume = volume_id,
        attach_ms = attached.as_millis(),
        prepare_ms = (ready - attached).as_millis(),
        mount_ms = (mounted - ready).as_millis(),
        grow_ms = (begun.elapsed() - mounted).as_millis(),
        formatted = prepared == Prepared::Formatted,
        "staged"
    );
    Ok(())
}

/// Whether an earlier call mounted it. A mount of a device that this volume
/// had before is taken away.
async fn is_mounted(attachment: &Attachment, staging: &Path, kind: Kind) -> Result<bool, Status> {
    let device = attach::device(attachment)?.to_owned();
    let path = staging.to_owned();
    blocking(move || match mounts::at(&path)? {
        None => Ok(false),
        Some(there) if there.source == device && there.kind == kind.as_str() => Ok(true),
        Some(there) if there.source == device => Err(Status::already_exists(format!(
            "{}: staged already, as {}",
            path.display(),
            there.kind
        ))),
        Some(there) if is_nbd(&there.source) => {
            mounts::unmount_all(&path)?;
            Ok(false)
        }
        Some(there) => Err(Status::failed_precondition(format!(
            "{}: {} is mounted there: unmount it first",
            path.display(),
            there.source.display()
        ))),
    })
    .await
}

fn is_nbd(source: &Path) -> bool {
    let name = source.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.starts_with("nbd"))
}

async fn prepare(node: &Node, attachment: &Attachment, kind: Kind) -> Result<Prepared, Status> {
    let device = text(attach::device(attachment)?)?;
    let disk = Disk {
        daemon: &node.daemon,
        name: &attachment.name,
        device: &device,
        read_only: attachment.read_only,
    };
    format::prepare(disk, kind)
        .await
        .map_err(|error| failure::of_preparing(&error))
}

async fn mount(
    attachment: &Attachment,
    staging: &Path,
    kind: Kind,
    options: &[String],
) -> Result<(), Status> {
    let device = text(attach::device(attachment)?)?;
    filesystem::mount(&device, staging, kind, attachment.read_only, options)
        .await
        .map_err(|error| failure::of_filesystem(&error))
}

fn text(path: &Path) -> Result<String, Status> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| Status::invalid_argument(format!("{}: not UTF-8", path.display())))
}

/// NodeUnstageVolume.
pub async fn unstage(node: &Node, asked: NodeUnstageVolumeRequest) -> Result<(), Status> {
    failure::given(&asked.volume_id, "volume id")?;
    let staging: PathBuf = super::path("staging target path", &asked.staging_target_path)?;
    let name = attach::name_of(&asked.volume_id)?;
    let _held = node.locks.take(&asked.volume_id)?;
    blocking(move || Ok(mounts::unmount_all(&staging)?)).await?;
    attach::detach(node, &name).await?;
    tracing::info!(%name, volume = asked.volume_id, "unstaged");
    Ok(())
}
