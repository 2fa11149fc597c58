//! NodeGetVolumeStats and NodeExpandVolume: how full, how well, how large.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::Status;

use super::{Node, attach, blocking};
use crate::csi::failure;
use crate::csi::v1::volume_usage::Unit;
use crate::csi::v1::*;
use crate::filesystem::{Kind, grow};
use crate::mounts::{self, Mount};
use crate::node::api::{Attachment, State};

const MIB: u64 = 1 << 20;
/// How long a filesystem may take to say how full it is.
const STAT: Duration = Duration::from_secs(10);

/// The attachment of a volume, and what of it is mounted at `path`.
async fn find(
    node: &Node,
    volume_id: &str,
    path: &str,
) -> Result<(Attachment, Mount, PathBuf), Status> {
    failure::given(volume_id, "volume id")?;
    failure::given(path, "volume path")?;
    let nowhere = || Status::not_found(format!("{volume_id}: not at {path} on this node"));
    let name = attach::name_of(volume_id)?;
    let attachment = attach::look(node, &name).await?;
    let attachment = attachment.ok_or_else(nowhere)?;
    let path = PathBuf::from(path);
    let at = path.clone();
    let mount = blocking(move || Ok(mounts::at(&at)?)).await?;
    let mount = mount
        .filter(|mount| {
            let device = attachment.device.as_deref();
            device.is_some_and(|device| mount.is_of(device))
        })
        .ok_or_else(nowhere)?;
    Ok((attachment, mount, path))
}

fn condition(attachment: &Attachment) -> VolumeCondition {
    let name = &attachment.name;
    let wrong = match attachment.state {
        State::Failed | State::Stale => Some(format!(
            "{name}: {}: {}",
            attachment.state,
            attachment.reason.as_deref().unwrap_or("no reason given")
        )),
        _ => None,
    };
    let fenced = attachment.fenced.as_ref();
    let wrong = wrong
        .or_else(|| fenced.map(|reason| format!("{name}: fenced: {reason}")))
        .or_else(|| attachment.blocked.clone());
    VolumeCondition {
        abnormal: wrong.is_some(),
        message: wrong.unwrap_or_else(|| format!("{name}: {}", attachment.state)),
    }
}

fn usage(unit: Unit, total: u64, available: u64, used: u64) -> VolumeUsage {
    let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    VolumeUsage {
        available: number(available),
        total: number(total),
        used: number(used),
        unit: unit.into(),
    }
}

fn measure(path: &Path) -> Result<Vec<VolumeUsage>, Status> {
    let seen = rustix::fs::statvfs(path).map_err(|error| failure::of_path(path, &error.into()))?;
    let bytes = |blocks: u64| blocks.saturating_mul(seen.f_frsize);
    Ok(vec![
        usage(
            Unit::Bytes,
            bytes(seen.f_blocks),
            bytes(seen.f_bavail),
            bytes(seen.f_blocks.saturating_sub(seen.f_bfree)),
        ),
        usage(
            Unit::Inodes,
            seen.f_files,
            seen.f_favail,
            seen.f_files.saturating_sub(seen.f_ffree),
        ),
    ])
}

/// NodeGetVolumeStats.
pub async fn stats(
    node: &Node,
    asked: NodeGetVolumeStatsRequest,
) -> Result<NodeGetVolumeStatsResponse, Status> {
    let (attachment, mount, path) = find(node, &asked.volume_id, &asked.volume_path).await?;
    let condition = condition(&attachment);
    let block = attachment
        .device
        .as_deref()
        .is_some_and(|device| mount.is_node_of(device));
    let usage = if block {
        let size = attachment.size.unwrap_or_default();
        vec![usage(Unit::Bytes, size, 0, size)]
    } else {
        let measured = blocking(move || measure(&path));
        match tokio::time::timeout(STAT, measured).await {
            Ok(Ok(usage)) => usage,
            // The condition says why, and is what is asked for then.
            Ok(Err(_)) if condition.abnormal => Vec::new(),
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                return Err(Status::unavailable(format!(
                    "{}: the filesystem does not answer: {}",
                    asked.volume_id, condition.message
                )));
            }
        }
    };
    Ok(NodeGetVolumeStatsResponse {
        usage,
        volume_condition: Some(condition),
    })
}

/// NodeExpandVolume.
pub async fn expand(
    node: &Node,
    asked: NodeExpandVolumeRequest,
) -> Result<NodeExpandVolumeResponse, Status> {
    let (mut attachment, mount, path) = find(node, &asked.volume_id, &asked.volume_path).await?;
    let _held = node.locks.take(&asked.volume_id)?;
    let range = asked.capacity_range.unwrap_or_default();
    let wanted = u64::try_from(range.required_bytes)
        .map_err(|_| Status::invalid_argument("capacity: a size below 0"))?;
    if attachment.size.is_none_or(|size| size < wanted) {
        let size = wanted.div_ceil(MIB).saturating_mul(MIB);
        if range.limit_bytes > 0 && i64::try_from(size).is_ok_and(|size| size > range.limit_bytes) {
            return Err(Status::out_of_range(format!(
                "{}: {size} bytes (whole MiB) are above the limit of {}",
                asked.volume_id, range.limit_bytes
            )));
        }
        // The lease is the daemon's: blob, footer and device are too.
        let resized = node.daemon.resize(&attachment.name, size).await;
        attachment = resized.map_err(|error| failure::of_daemon(&error))?;
    }
    let size = attachment.size.unwrap_or_default();
    let device = attach::device(&attachment)?;
    if !mount.is_node_of(device) {
        let kind: Kind = mount.kind.parse().map_err(Status::internal)?;
        let (device, path) = (device.display().to_string(), path.display().to_string());
        grow(&device, &path, kind)
            .await
            .map_err(|error| failure::of_filesystem(&error))?;
    }
    Ok(NodeExpandVolumeResponse {
        capacity_bytes: i64::try_from(size).unwrap_or(i64::MAX),
    })
}
