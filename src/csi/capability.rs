//! Which access a page blob can give: one node that writes, or many that read.

use tonic::Status;

use super::v1::VolumeCapability;
use super::v1::volume_capability::access_mode::Mode;
use super::v1::volume_capability::{AccessMode, AccessType};

/// Filesystems that the node makes and mounts.
const FILESYSTEMS: [&str; 4] = ["", "ext4", "xfs", "btrfs"];

/// Why the volume cannot be used so; `None` when it can.
pub fn unsupported(capability: &VolumeCapability) -> Option<String> {
    let mode = capability.access_mode.as_ref().map(AccessMode::mode);
    match mode {
        None | Some(Mode::Unknown) => return Some("a capability names no access mode".into()),
        Some(Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter) => {
            return Some(
                "access mode: a page blob has one writing node: use ReadWriteOnce, \
                 ReadWriteOncePod or ReadOnlyMany"
                    .into(),
            );
        }
        Some(_) => {}
    }
    match &capability.access_type {
        None => Some("a capability is neither mount nor block".into()),
        Some(AccessType::Mount(mount)) if !FILESYSTEMS.contains(&mount.fs_type.as_str()) => {
            Some(format!(
                "fstype \"{}\" is none of ext4, xfs and btrfs",
                mount.fs_type
            ))
        }
        Some(_) => None,
    }
}

/// Checks the capabilities of a call that must have some.
///
/// # Errors
/// INVALID_ARGUMENT: there are none, or one cannot be.
pub fn check(capabilities: &[VolumeCapability]) -> Result<(), Status> {
    if capabilities.is_empty() {
        return Err(Status::invalid_argument("volume capabilities are missing"));
    }
    match capabilities.iter().find_map(unsupported) {
        Some(reason) => Err(Status::invalid_argument(reason)),
        None => Ok(()),
    }
}
