//! Mount points: which there are (proc_pid_mountinfo(5)), making and removing
//! them. What is there is read from the kernel's table and never by looking at
//! the path itself: a dead disk's mount point would answer with an error.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};

const TABLE: &str = "/proc/self/mountinfo";

/// What went wrong about a mount point.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// It has no last part, or none below a folder.
    #[error("{0}: not a path to mount at")]
    NotAPlace(PathBuf),
    /// Files on it are open.
    #[error("{0}: in use: end what has files open there, then try again")]
    Busy(PathBuf),
    /// The system refused.
    #[error("{0}: {1}")]
    Io(PathBuf, #[source] io::Error),
}

impl MountError {
    /// The error of a call that was about `path`.
    pub fn about(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Io(path.to_owned(), error)
    }
}

/// A mount point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The filesystem's device number, major and minor; btrfs has one of its
    /// own, with major 0.
    pub number: (u32, u32),
    /// Where.
    pub path: PathBuf,
    /// Which part of the filesystem: `/`, or what was bound.
    pub root: PathBuf,
    /// The kind of filesystem.
    pub kind: String,
    /// The device, as it was named to mount.
    pub source: PathBuf,
    /// Nothing can be written through it.
    pub read_only: bool,
}

impl Mount {
    /// Is it of the disk at `device`: its filesystem, or its bound node?
    pub fn is_of(&self, device: &Path) -> bool {
        self.source == device || self.is_node_of(device)
    }

    /// Is it the bound node of `device`?
    pub fn is_node_of(&self, device: &Path) -> bool {
        let name = device.file_name();
        self.kind == "devtmpfs" && self.root.file_name() == name && self.root != Path::new("/")
    }
}

/// Undoes the octal escapes of `/proc` for space, tab, newline and backslash.
#[must_use]
pub fn unescape(field: &str) -> PathBuf {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = match after {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] if first == b'\\' => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        plain.push(code.unwrap_or(first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(plain).into()
}

fn parse(line: &str) -> Option<Mount> {
    let (ours, theirs) = line.split_once(" - ")?;
    let ours: Vec<&str> = ours.split(' ').collect();
    let theirs: Vec<&str> = theirs.split(' ').collect();
    let read_only = |options: &str| options.split(',').any(|option| option == "ro");
    let (major, minor) = ours.get(2)?.split_once(':')?;
    Some(Mount {
        number: (major.parse().ok()?, minor.parse().ok()?),
        root: unescape(ours.get(3)?),
        path: unescape(ours.get(4)?),
        kind: (*theirs.first()?).to_owned(),
        source: unescape(theirs.get(1)?),
        read_only: read_only(ours.get(5)?) || theirs.get(2).is_some_and(|o| read_only(o)),
    })
}

/// Every mount point in the text of a mountinfo file, in the order of mounting.
pub fn parse_all(text: &str) -> impl DoubleEndedIterator<Item = Mount> + '_ {
    text.lines().filter_map(parse)
}

/// Every mount point of this process, in the order of mounting.
///
/// # Errors
/// The kernel's table cannot be read.
pub fn list() -> Result<Vec<Mount>, MountError> {
    let text = std::fs::read_to_string(TABLE).map_err(MountError::about(Path::new(TABLE)))?;
    Ok(parse_all(&text).collect())
}

/// `path` as the kernel knows it: with links followed up to its last part,
/// which is not looked at.
///
/// # Errors
/// It is no path to mount at, or a folder on the way cannot be looked at.
pub fn canonical(path: &Path) -> Result<PathBuf, MountError> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(MountError::NotAPlace(path.to_owned()));
    };
    match std::fs::canonicalize(parent) {
        Ok(parent) => Ok(parent.join(name)),
        // Nothing is mounted below what is not there.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(path.to_owned()),
        Err(error) => Err(MountError::about(path)(error)),
    }
}

/// What is mounted at `path`, on top.
///
/// # Errors
/// As [`list`] and [`canonical`].
pub fn at(path: &Path) -> Result<Option<Mount>, MountError> {
    let path = canonical(path)?;
    Ok(list()?.into_iter().rfind(|mount| mount.path == path))
}

/// Binds `source` at `target`, read-only when asked. Ended half way, it leaves
/// a bind that is not read-only yet; it is repeated by the same call.
///
/// # Errors
/// The kernel's, about `target`.
pub fn bind(source: &Path, target: &Path, read_only: bool) -> Result<(), MountError> {
    mount_bind(source, target).map_err(|error| MountError::about(target)(error.into()))?;
    if read_only {
        make_read_only(target)?;
    }
    Ok(())
}

/// Makes a bound mount read-only.
///
/// # Errors
/// The kernel's, about `target`.
pub fn make_read_only(target: &Path) -> Result<(), MountError> {
    let flags = MountFlags::BIND | MountFlags::RDONLY;
    mount_remount(target, flags, "").map_err(|error| MountError::about(target)(error.into()))
}

/// Unmounts all that is mounted at `path`; nothing is fine.
///
/// # Errors
/// [`MountError::Busy`] while files on it are open; as [`at`].
pub fn unmount_all(path: &Path) -> Result<(), MountError> {
    while let Some(mount) = at(path)? {
        match unmount(&mount.path, UnmountFlags::NOFOLLOW) {
            // Gone meanwhile; looked at again.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(Errno::BUSY) => return Err(MountError::Busy(path.to_owned())),
            Err(error) => return Err(MountError::about(path)(error.into())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_table() {
        let line = r"36 35 98:0 /a\040b /mnt/x\134y rw,noatime master:1 - ext4 /dev/nbd0 ro,errors=continue";
        assert_eq!(
            parse(line),
            Some(Mount {
                number: (98, 0),
                path: r"/mnt/x\y".into(),
                root: "/a b".into(),
                kind: "ext4".into(),
                source: "/dev/nbd0".into(),
                read_only: true,
            })
        );
        let node =
            parse("9 1 0:5 /nbd1 /pods/p/dev rw - devtmpfs dev rw,size=1k").expect("a mount");
        assert!(node.is_of(Path::new("/dev/nbd1")) && !node.read_only);
        assert!(!node.is_of(Path::new("/dev/nbd11")));
        assert_eq!(parse("nonsense"), None);
        assert_eq!(unescape("a\\04"), PathBuf::from("a\\04"));
        assert_eq!(unescape("\\"), PathBuf::from("\\"));
        assert_eq!(unescape("\\011x"), PathBuf::from("\tx"));
        let root = at(Path::new("/proc")).expect("a table").expect("mounted");
        assert_eq!(root.kind, "proc");
        assert_eq!(at(Path::new("/no/such/place")).expect("a table"), None);
    }
}
