//! Mount points: which there are (proc_pid_mountinfo(5)), making and removing
//! them. What is there is read from the kernel's table and never by looking at
//! the path itself: a dead disk's mount point would answer with an error.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};
use tonic::Status;

/// A mount point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
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

fn unescape(field: &str) -> PathBuf {
    let bytes = field.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let code = bytes
            .get(at + 1..at + 4)
            .filter(|_| bytes[at] == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        plain.push(code.unwrap_or(bytes[at]));
        at += if code.is_some() { 4 } else { 1 };
    }
    PathBuf::from(OsString::from_vec(plain))
}

fn parse(line: &str) -> Option<Mount> {
    let (ours, theirs) = line.split_once(" - ")?;
    let ours: Vec<&str> = ours.split(' ').collect();
    let theirs: Vec<&str> = theirs.split(' ').collect();
    let read_only = |options: &str| options.split(',').any(|option| option == "ro");
    Some(Mount {
        root: unescape(ours.get(3)?),
        path: unescape(ours.get(4)?),
        kind: (*theirs.first()?).to_owned(),
        source: unescape(theirs.get(1)?),
        read_only: read_only(ours.get(5)?) || theirs.get(2).is_some_and(|o| read_only(o)),
    })
}

/// Every mount point of this process, in the order of mounting.
pub fn list() -> Result<Vec<Mount>, Status> {
    let text = std::fs::read_to_string("/proc/self/mountinfo")
        .map_err(|error| Status::internal(format!("/proc/self/mountinfo: {error}")))?;
    Ok(text.lines().filter_map(parse).collect())
}

/// `path` as the kernel knows it: with links followed up to its last part,
/// which is not looked at.
pub fn canonical(path: &Path) -> Result<PathBuf, Status> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Status::invalid_argument(format!(
            "{}: not a path to mount at",
            path.display()
        )));
    };
    match std::fs::canonicalize(parent) {
        Ok(parent) => Ok(parent.join(name)),
        // Nothing is mounted below what is not there.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(path.to_owned()),
        Err(error) => Err(internal(path, &error)),
    }
}

/// What is mounted at `path`, on top.
pub fn at(path: &Path) -> Result<Option<Mount>, Status> {
    let path = canonical(path)?;
    Ok(list()?.into_iter().rfind(|mount| mount.path == path))
}

/// An error about a path.
pub fn internal(path: &Path, error: &io::Error) -> Status {
    Status::internal(format!("{}: {error}", path.display()))
}

/// Runs what blocks, off the runtime's threads.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Status::internal(format!("the call died: {error}"))))
}

/// Binds `source` at `target`, read-only when asked. Ended half way, it leaves
/// a bind that is not read-only yet; it is repeated by the same call.
pub fn bind(source: &Path, target: &Path, read_only: bool) -> Result<(), Status> {
    mount_bind(source, target).map_err(|error| internal(target, &error.into()))?;
    if read_only {
        make_read_only(target)?;
    }
    Ok(())
}

/// Makes a bound mount read-only.
pub fn make_read_only(target: &Path) -> Result<(), Status> {
    let flags = MountFlags::BIND | MountFlags::RDONLY;
    mount_remount(target, flags, "").map_err(|error| internal(target, &error.into()))
}

/// Unmounts all that is mounted at `path`; nothing is fine.
///
/// # Errors
/// FAILED_PRECONDITION while files on it are open.
pub fn unmount_all(path: &Path) -> Result<(), Status> {
    while let Some(mount) = at(path)? {
        match unmount(&mount.path, UnmountFlags::NOFOLLOW) {
            // Gone meanwhile; looked at again.
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(rustix::io::Errno::BUSY) => {
                return Err(Status::failed_precondition(format!(
                    "{}: in use: end what has files open there, then try again",
                    path.display()
                )));
            }
            Err(error) => return Err(internal(path, &error.into())),
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
        let root = at(Path::new("/proc")).expect("a table").expect("mounted");
        assert_eq!(root.kind, "proc");
        assert_eq!(at(Path::new("/no/such/place")).expect("a table"), None);
    }
}
