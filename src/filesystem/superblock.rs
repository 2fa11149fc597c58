//! The few fields of a superblock that decide about a mount or a growing, read
//! from the disk: the size of the filesystem, and whether ext4 has recorded
//! errors. Layouts: kernel documentation, ext4/super.rst; xfs_db(8), sb; btrfs
//! on-disk format, superblock.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{FilesystemError, Kind};

/// What a superblock tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Bytes that the filesystem covers.
    pub size: u64,
    /// It has recorded errors: only a check may touch it.
    pub errors: bool,
}

/// Reads the superblock of a filesystem of `kind` on `device`.
///
/// # Errors
/// [`FilesystemError::Unknown`]: it cannot be read, or there is none.
pub async fn read(device: &str, kind: Kind) -> Result<Superblock, FilesystemError> {
    let of = device.to_owned();
    let read = tokio::task::spawn_blocking(move || read_now(&of, kind)).await;
    read.unwrap_or_else(|died| Err(io::Error::other(died)))
        .map_err(|error| FilesystemError::Unknown {
            device: device.to_owned(),
            reason: error.to_string(),
        })
}

fn read_now(device: &str, kind: Kind) -> io::Result<Superblock> {
    let disk = File::open(device)?;
    let mut bytes = [0; 4096];
    let at = match kind {
        Kind::Ext4 => 1024,
        Kind::Xfs => 0,
        Kind::Btrfs => 64 << 10,
    };
    disk.read_exact_at(&mut bytes, at)?;
    parse(&bytes, kind).ok_or_else(|| io::Error::other(format!("no {kind} superblock")))
}

fn parse(bytes: &[u8; 4096], kind: Kind) -> Option<Superblock> {
    match kind {
        Kind::Ext4 => {
            if le(bytes, 0x38, 2) != 0xef53 {
                return None;
            }
            let incompatible = le(bytes, 0x60, 4);
            let high = if incompatible & 0x80 == 0 {
                0
            } else {
                le(bytes, 0x150, 4)
            };
            let block = 1024_u64.checked_shl(u32::try_from(le(bytes, 0x18, 4)).ok()?)?;
            Some(Superblock {
                size: (le(bytes, 0x4, 4) | high << 32).checked_mul(block)?,
                errors: le(bytes, 0x3a, 2) & 2 != 0,
            })
        }
        Kind::Xfs => {
            let be = |at: usize, len: usize| {
                let field = bytes[at..at + len].iter();
                field.fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte))
            };
            (&bytes[..4] == b"XFSB").then_some(())?;
            Some(Superblock {
                size: be(8, 8).checked_mul(be(4, 4))?,
                errors: false,
            })
        }
        Kind::Btrfs => {
            (&bytes[0x40..0x48] == b"_BHRfS_M").then_some(())?;
            Some(Superblock {
                size: le(bytes, 0x70, 8),
                errors: false,
            })
        }
    }
}

fn le(bytes: &[u8], at: usize, len: usize) -> u64 {
    let field = bytes[at..at + len].iter().rev();
    field.fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filesystem::tool::{self, SLOW};

    #[tokio::test]
    async fn reads_what_mkfs_makes() {
        let folder = tempfile::tempdir().expect("a folder");
        let disk = folder.path().join("disk").display().to_string();
        for (kind, mkfs, quiet) in [
            (Kind::Ext4, "mkfs.ext4", "-q"),
            (Kind::Xfs, "mkfs.xfs", "-q"),
            (Kind::Btrfs, "mkfs.btrfs", "-q"),
        ] {
            let file = File::create(&disk).expect("a file");
            file.set_len(320 << 20).expect("sparse");
            assert!(read_now(&disk, kind).is_err(), "{kind}: there is none yet");
            tool::run(mkfs, &[quiet, &disk], SLOW).await.expect(mkfs);
            let seen = read_now(&disk, kind).expect(mkfs);
            assert_eq!((seen.size, seen.errors), (320 << 20, false), "{kind}");
        }
        let file = File::create(&disk).expect("a file");
        file.set_len(16 << 20).expect("sparse");
        tool::run("mkfs.ext4", &["-q", &disk], SLOW)
            .await
            .expect("made");
        tool::run("debugfs", &["-w", "-R", "ssv state 2", &disk], SLOW)
            .await
            .expect("marked");
        assert!(read_now(&disk, Kind::Ext4).expect("there").errors);
    }
}
