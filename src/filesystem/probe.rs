//! What is on a disk.
//!
//! `blkid -p` knows every signature, but its status 2 means "nothing" as well
//! as "I could not look". So the disk's first and last MiB, where signatures
//! are, are read here too: unless both could be read, nothing is known, and
//! unless both are zeroes, there is something.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::num::NonZeroU64;

use rustix::fs::{Advice, fadvise};

use super::FilesystemError;
use super::tool::{self, QUICK};

/// What a probe that succeeded found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// No signature of anything known, and zeroes where signatures are.
    Nothing,
    /// No signature of anything known, and bytes where signatures are.
    Bytes,
    /// A filesystem, or anything else that has a type.
    Filesystem {
        /// As blkid calls it.
        kind: String,
        /// Its id, where it has one.
        uuid: Option<String>,
    },
    /// A partition table, or a signature without a type.
    Other(String),
}

/// blkid's exit status for "nothing found", util-linux blkid(8).
const NOTHING: i32 = 2;
/// And for signatures that contradict each other.
const AMBIVALENT: i32 = 8;
/// Bytes at each end of the disk in which signatures are.
const END: u64 = 1 << 20;
/// Bytes in one read of them.
const PIECE: usize = 64 << 10;

/// Looks at `device`, past blkid's own cache.
///
/// # Errors
/// The probe failed: nothing is known.
pub async fn probe(device: &str) -> Result<Found, FilesystemError> {
    let (ends, found) = tokio::join!(zero_ends(device), signatures(device));
    let (ends, _open) = ends?;
    match found? {
        Found::Nothing if !ends => Ok(Found::Bytes),
        found => Ok(found),
    }
}

/// Whether the first and the last MiB are zeroes; no more is read than it takes
/// to know that they are not.
///
/// Gives the disk back, too: while somebody has it open, the kernel keeps what
/// was fetched of it.
async fn zero_ends(device: &str) -> Result<(bool, File), FilesystemError> {
    let path = device.to_owned();
    let read = tokio::task::spawn_blocking(move || read_ends(&path)).await;
    let unknown = |reason: String| FilesystemError::Unknown {
        device: device.to_owned(),
        reason: format!("cannot read it: {reason}"),
    };
    match read {
        Ok(Ok(read)) => Ok(read),
        Ok(Err(error)) => Err(unknown(error.to_string())),
        Err(error) => Err(unknown(error.to_string())),
    }
}

/// Has the kernel fetch, all at once, what this probe and blkid will read one
/// after the other, each at a round trip to the store. Signatures are in the
/// first and the last pages, copies of some at powers of two up to 4 MiB.
fn fetch_ahead(disk: &File, size: u64) {
    const FRONT: u64 = 256 << 10;
    const BACK: u64 = 128 << 10;
    let copies = [512 << 10, 1 << 20, 2 << 20, 4 << 20].map(|at| (at, 4096));
    let ends = [(0, FRONT), (size.saturating_sub(BACK), BACK)];
    for (at, len) in ends.into_iter().chain(copies) {
        let len = NonZeroU64::new(len).filter(|_| at < size);
        let Some(len) = len else { continue };
        if let Err(error) = fadvise(disk, at, Some(len), Advice::WillNeed) {
            tracing::debug!(%error, "cannot fetch ahead: the probe takes longer");
        }
    }
}

fn read_ends(path: &str) -> std::io::Result<(bool, File)> {
    let mut disk = File::open(path)?;
    let size = disk.seek(SeekFrom::End(0))?;
    if size == 0 {
        return Err(std::io::Error::other("it has no bytes"));
    }
    fetch_ahead(&disk, size);
    let len = size.min(END);
    let mut bytes = vec![0; PIECE];
    for start in [0, size - len] {
        disk.seek(SeekFrom::Start(start))?;
        let mut left = len;
        while left > 0 {
            let now = usize::try_from(left).map_or(PIECE, |left| left.min(PIECE));
            // A disk that ends before its size is an error too.
            disk.read_exact(&mut bytes[..now])?;
            if bytes[..now].iter().any(|byte| *byte != 0) {
                return Ok((false, disk));
            }
            left -= now as u64;
        }
    }
    Ok((true, disk))
}

async fn signatures(device: &str) -> Result<Found, FilesystemError> {
    let arguments = ["-p", "-u", "filesystem,raid,crypto,other", "-o", "export"];
    let all = ["-p", "-o", "export"];
    let found = look(device, &all).await?;
    // A partition table beside a filesystem would hide it.
    match found {
        Found::Other(_) => match look(device, &arguments).await? {
            Found::Nothing => Ok(found),
            other => Ok(other),
        },
        found => Ok(found),
    }
}

async fn look(device: &str, arguments: &[&str]) -> Result<Found, FilesystemError> {
    let mut arguments = arguments.to_vec();
    arguments.push(device);
    let ended = tool::ended("blkid", &arguments, QUICK).await?;
    match ended.status.code() {
        Some(0) => read(&ended.out).ok_or_else(|| FilesystemError::Unknown {
            device: device.to_owned(),
            reason: "blkid says that it found something and not what".into(),
        }),
        Some(NOTHING) if ended.words.is_empty() => Ok(Found::Nothing),
        Some(AMBIVALENT) => Ok(Found::Other("several signatures at once".into())),
        _ => Err(tool::failed("blkid", &ended).into()),
    }
}

fn read(text: &str) -> Option<Found> {
    let value = |key: &str| {
        let mut pairs = text.lines().filter_map(|line| line.split_once('='));
        pairs.find(|(k, _)| *k == key).map(|(_, v)| v.to_owned())
    };
    if let Some(kind) = value("TYPE") {
        let uuid = value("UUID");
        return Some(Found::Filesystem { kind, uuid });
    }
    if let Some(table) = value("PTTYPE") {
        return Some(Found::Other(format!("a partition table ({table})")));
    }
    let mut pairs = text.lines().filter_map(|line| line.split_once('='));
    let (key, _) = pairs.find(|(key, _)| *key != "DEVNAME")?;
    Some(Found::Other(format!("a signature ({key})")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_blkid_prints() {
        let ext4 = "DEVNAME=/dev/nbd0\nUUID=6a\nBLOCK_SIZE=4096\nTYPE=ext4\n";
        assert_eq!(
            read(ext4),
            Some(Found::Filesystem {
                kind: "ext4".into(),
                uuid: Some("6a".into())
            })
        );
        let table = "DEVNAME=/dev/nbd0\nPTUUID=1\nPTTYPE=gpt\n";
        assert_eq!(
            read(table),
            Some(Found::Other("a partition table (gpt)".into()))
        );
        assert_eq!(read("DEVNAME=/dev/nbd0\n"), None);
    }

    /// Files stand in for devices: blkid reads both alike.
    #[tokio::test]
    async fn nothing_something_and_a_failed_probe_are_three_things() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name).display().to_string();
        let disk = path("disk");
        std::fs::write(&disk, vec![0; 8 << 20]).expect("written");
        assert_eq!(probe(&disk).await, Ok(Found::Nothing));
        for at in [100_000, (8 << 20) - 1] {
            let mut bytes = vec![0; 8 << 20];
            bytes[at] = 1;
            std::fs::write(&disk, bytes).expect("written");
            assert_eq!(probe(&disk).await, Ok(Found::Bytes), "{at}");
        }
        tool::run("mkfs.ext4", &["-q", &disk], QUICK)
            .await
            .expect("made");
        let found = probe(&disk).await;
        assert!(
            matches!(&found, Ok(Found::Filesystem { kind, .. }) if kind == "ext4"),
            "{found:?}"
        );
        // What cannot be read is not empty, though blkid says of it what it
        // says of an empty disk.
        let ended = tool::ended("blkid", &["-p", &path("gone")], QUICK).await;
        assert_eq!(ended.expect("it runs").status.code(), Some(NOTHING));
        std::fs::write(path("none"), "").expect("written");
        for name in ["gone", "none", "."] {
            let found = probe(&path(name)).await;
            assert!(
                matches!(found, Err(FilesystemError::Unknown { .. })),
                "{found:?}"
            );
        }
    }
}
