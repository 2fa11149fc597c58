//! Growing a mounted filesystem to the size of its disk.

use super::tool::{self, SLOW};
use super::{FilesystemError, Kind, superblock};

/// A filesystem that is this much smaller than its disk was left behind;
/// within it, ext4 leaves out a last group that is not worth its tables.
const SLACK: u64 = 4 << 20;

/// Grows the filesystem on `device`, mounted at `path`, to the disk's size; a
/// no-op when it has it.
///
/// # Errors
/// The tool failed; the filesystem is as it was.
pub async fn grow(device: &str, path: &str, kind: Kind) -> Result<(), FilesystemError> {
    match kind {
        Kind::Ext4 => tool::run("resize2fs", &[device], SLOW).await?,
        Kind::Xfs => tool::run("xfs_growfs", &["-d", path], SLOW).await?,
        Kind::Btrfs => {
            let arguments = ["filesystem", "resize", "max", path];
            tool::run("btrfs", &arguments, SLOW).await?
        }
    };
    Ok(())
}

/// [`grow`], when the superblock says that the filesystem is clearly smaller
/// than its disk of `size` bytes: a copy on a larger disk.
///
/// # Errors
/// As [`grow`]; the superblock cannot be read.
pub async fn grow_if_larger(
    (device, size): (&str, u64),
    path: &str,
    kind: Kind,
) -> Result<(), FilesystemError> {
    let seen = superblock::read(device, kind).await?;
    if seen.size.saturating_add(SLACK) > size {
        return Ok(());
    }
    tracing::info!(
        device,
        from = seen.size,
        to = size,
        "growing the filesystem"
    );
    grow(device, path, kind).await
}
