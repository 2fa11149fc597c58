//! NodePublishVolume and NodeUnpublishVolume: the staged volume at a pod's
//! path, and away from it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tonic::Status;

use super::{Node, Want, attach, blocking};
use crate::csi::v1::{NodePublishVolumeRequest, NodeUnpublishVolumeRequest};
use crate::csi::{failure, publishing};
use crate::mounts::{self, Mount};
use crate::node::api::{Attachment, State};

/// NodePublishVolume.
pub async fn publish(node: &Node, asked: NodePublishVolumeRequest) -> Result<(), Status> {
    let volume_id = asked.volume_id.as_str();
    failure::given(volume_id, "volume id")?;
    let target = super::path("target path", &asked.target_path)?;
    let want = Want::of(asked.volume_capability.as_ref())?;
    if asked.staging_target_path.is_empty() {
        return Err(Status::failed_precondition(
            "staging target path is missing",
        ));
    }
    let staging = super::path("staging target path", &asked.staging_target_path)?;
    let _held = node.locks.take(volume_id)?;
    let name = attach::name_of(volume_id)?;
    let attachment = attach::look(node, &name).await?;
    let attachment = attachment.ok_or_else(|| {
        Status::failed_precondition(format!("{volume_id}: not staged on this node"))
    })?;
    let read_only =
        asked.readonly || want.reads_only() || publishing::reads_only(&asked.publish_context);
    check(&attachment, read_only)?;
    if asked.secrets.contains_key("accountname") {
        let request = attach::request(
            volume_id,
            &asked.secrets,
            &asked.volume_context,
            &asked.publish_context,
            attachment.read_only,
        )?;
        attach::renew_credential(node, &request).await?;
    }
    let device = attach::device(&attachment)?.to_owned();
    if matches!(want, Want::Block { .. }) && read_only && !attachment.read_only {
        return Err(Status::failed_precondition(format!(
            "{volume_id}: staged for writing: a raw block volume cannot be read-only \
             for one pod alone: use an access mode that only reads"
        )));
    }
    let place = Place {
        volume: volume_id.to_owned(),
        device,
        staging,
        target,
        read_only,
        block: matches!(want, Want::Block { .. }),
        alone: want.is_alone(),
    };
    blocking(move || place.publish()).await
}

fn check(attachment: &Attachment, read_only: bool) -> Result<(), Status> {
    let name = &attachment.name;
    if attachment.state != State::Attached {
        return Err(Status::unavailable(format!(
            "{name}: {}: try again in a moment",
            attachment.state
        )));
    }
    if let Some(reason) = &attachment.fenced {
        return Err(Status::failed_precondition(format!(
            "{name}: fenced: {reason}: end its pods on this node"
        )));
    }
    if attachment.read_only && !read_only {
        return Err(Status::failed_precondition(format!(
            "{name}: staged read-only"
        )));
    }
    Ok(())
}

/// What is to be seen where.
struct Place {
    volume: String,
    device: PathBuf,
    staging: PathBuf,
    target: PathBuf,
    read_only: bool,
    block: bool,
    /// One path at a time.
    alone: bool,
}

impl Place {
    fn publish(&self) -> Result<(), Status> {
        if self.found()? {
            return Ok(());
        }
        let mounts = mounts::list()?;
        let (staging, target) = (
            mounts::canonical(&self.staging)?,
            mounts::canonical(&self.target)?,
        );
        if !self.block {
            let staged = mounts.iter().rfind(|mount| mount.path == staging);
            if staged.is_none_or(|mount| mount.source != self.device) {
                return Err(Status::failed_precondition(format!(
                    "{}: not mounted at {}: stage it first",
                    self.volume,
                    staging.display()
                )));
            }
        }
        let other = |mount: &&Mount| {
            mount.is_of(&self.device) && mount.path != staging && mount.path != target
        };
        if self.alone
            && let Some(other) = mounts.iter().find(other)
        {
            return Err(Status::failed_precondition(format!(
                "{}: published at {} already, and for one path alone",
                self.volume,
                other.path.display()
            )));
        }
        self.make_target()?;
        let source = if self.block {
            &self.device
        } else {
            &self.staging
        };
        // A node that is read-only is so by its device.
        mounts::bind(source, &self.target, self.read_only && !self.block)?;
        Ok(())
    }

    /// Whether an earlier call did it, or most of it.
    fn found(&self) -> Result<bool, Status> {
        let Some(there) = mounts::at(&self.target)? else {
            return Ok(false);
        };
        let right = if self.block {
            there.is_node_of(&self.device)
        } else {
            there.source == self.device
        };
        if !right {
            // Of a device that the volume had before, or a half-made target.
            mounts::unmount_all(&self.target)?;
            return Ok(false);
        }
        if self.block || there.read_only == self.read_only {
            return Ok(true);
        }
        if self.read_only {
            mounts::make_read_only(&self.target)?;
            return Ok(true);
        }
        Err(Status::already_exists(format!(
            "{}: published at {} already, read-only",
            self.volume,
            self.target.display()
        )))
    }

    fn make_target(&self) -> Result<(), Status> {
        let target = &self.target;
        let wrong = |error: io::Error| failure::of_path(target, &error);
        if !self.block {
            return fs::create_dir_all(target).map_err(wrong);
        }
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(wrong)?;
        }
        match File::options().write(true).create_new(true).open(target) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && target.is_file() => {
                Ok(())
            }
            Err(error) => Err(wrong(error)),
        }
    }
}

/// NodeUnpublishVolume.
pub async fn unpublish(node: &Node, asked: NodeUnpublishVolumeRequest) -> Result<(), Status> {
    failure::given(&asked.volume_id, "volume id")?;
    let target = super::path("target path", &asked.target_path)?;
    let _held = node.locks.take(&asked.volume_id)?;
    blocking(move || {
        mounts::unmount_all(&target)?;
        remove(&target)
    })
    .await
}

/// Removes what a publish made; never what is in it.
fn remove(target: &Path) -> Result<(), Status> {
    let wrong = |error: io::Error| failure::of_path(target, &error);
    match fs::symlink_metadata(target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(wrong(error)),
        Ok(there) if there.is_dir() => fs::remove_dir(target).map_err(wrong),
        Ok(there) if there.is_file() && there.len() == 0 => fs::remove_file(target).map_err(wrong),
        Ok(_) => Err(Status::internal(format!(
            "{}: neither a folder nor an empty file: it is left as it is",
            target.display()
        ))),
    }
}
