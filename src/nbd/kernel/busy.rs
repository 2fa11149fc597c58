//! Who uses a device: mounts, device-mapper and its like, swap, loop devices,
//! and whoever else has claimed it. Asked before a disconnect, which does not
//! ask and fails the user's I/O.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::error::KernelError;
use super::sysfs::{Sysfs, split};
use crate::mounts::{self, Mount, unescape};

/// A use of a device that a disconnect would break.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Busy {
    /// Mounted in our mount namespace.
    Mounted(PathBuf),
    /// Mounted in the mount namespace of another process.
    MountedElsewhere {
        /// As that process sees it.
        mount_point: PathBuf,
        /// A process there.
        pid: u32,
    },
    /// Part of another block device: device-mapper, md, bcache.
    Held(String),
    /// Behind a loop device.
    Loop(String),
    /// Used as swap space.
    Swap,
    /// Claimed by something that can be seen nowhere else.
    Claimed,
}

impl fmt::Display for Busy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted(at) => write!(f, "mounted at {0}: run `umount {0}`", at.display()),
            Self::MountedElsewhere { mount_point, pid } => write!(
                f,
                "mounted at {} in the mount namespace of process {pid}: unmount it there",
                mount_point.display()
            ),
            Self::Held(by) => write!(f, "in use by the block device {by}: remove that first"),
            Self::Loop(by) => write!(f, "behind the loop device {by}: run `losetup -d /dev/{by}`"),
            Self::Swap => f.write_str("in use as swap space: run `swapoff` on it"),
            Self::Claimed => f.write_str(
                "opened exclusively by some process: `fuser -v` on the device may name it",
            ),
        }
    }
}

/// The device numbers of a disk and its partitions.
type Numbers = HashSet<(u32, u32)>;

impl Sysfs {
    /// Fails when somebody uses the device or a partition of it.
    ///
    /// Opens the device exclusively for a moment, which may wait for I/O when
    /// its connections are dead: not to be called on a data thread.
    ///
    /// # Errors
    /// [`KernelError::Busy`], [`KernelError::NoSuchDevice`].
    pub fn expect_idle(&self, index: u32) -> Result<(), KernelError> {
        match self.busy(index)? {
            None => Ok(()),
            Some(busy) => Err(KernelError::Busy { index, busy }),
        }
    }

    /// Who uses the device or a partition of it, if anybody.
    ///
    /// # Errors
    /// As [`Sysfs::expect_idle`], which see.
    pub fn busy(&self, index: u32) -> Result<Option<Busy>, KernelError> {
        let block = self.block(index);
        if !block.exists() {
            return Err(KernelError::NoSuchDevice(index));
        }
        let folders = disk_and_partitions(&block)?;
        let numbers = self.numbers_of(&folders)?;

        if let Some(at) = mount_point(&self.proc.join("self/mountinfo"), &numbers)? {
            return Ok(Some(Busy::Mounted(at)));
        }
        for folder in &folders {
            if let Some(holder) = first_entry(&folder.join("holders"))? {
                return Ok(Some(Busy::Held(holder)));
            }
        }
        if self.is_swap(&numbers)? {
            return Ok(Some(Busy::Swap));
        }
        if let Some(device) = self.loop_device(&numbers)? {
            return Ok(Some(Busy::Loop(device)));
        }
        if self.is_claimed(index)? {
            return Ok(Some(
                self.mounted_elsewhere(&numbers).unwrap_or(Busy::Claimed),
            ));
        }
        Ok(None)
    }

    /// The device numbers, major and minor, of the device and its partitions.
    ///
    /// # Errors
    /// [`KernelError::NoSuchDevice`], or sysfs cannot be read.
    pub fn numbers(&self, index: u32) -> Result<HashSet<(u32, u32)>, KernelError> {
        let block = self.block(index);
        if !block.exists() {
            return Err(KernelError::NoSuchDevice(index));
        }
        self.numbers_of(&disk_and_partitions(&block)?)
    }

    fn numbers_of(&self, folders: &[PathBuf]) -> Result<Numbers, KernelError> {
        folders.iter().map(|folder| self.number(folder)).collect()
    }

    fn is_swap(&self, numbers: &Numbers) -> Result<bool, KernelError> {
        let path = self.proc.join("swaps");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            // A kernel without swap.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(KernelError::file(path)(error)),
        };
        let mut areas = text
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().next());
        Ok(areas.any(|area| is_one_of(&unescape(area), numbers)))
    }

    fn loop_device(&self, numbers: &Numbers) -> Result<Option<String>, KernelError> {
        let folder = self.sys.join("block");
        for entry in fs::read_dir(&folder).map_err(KernelError::file(&folder))? {
            let name = entry.map_err(KernelError::file(&folder))?.file_name();
            let Some(name) = name.to_str().filter(|name| name.starts_with("loop")) else {
                continue;
            };
            // Only bound loop devices have the file.
            let backing = fs::read_to_string(folder.join(name).join("loop/backing_file"));
            if backing.is_ok_and(|file| is_one_of(Path::new(file.trim_end()), numbers)) {
                return Ok(Some(name.to_owned()));
            }
        }
        Ok(None)
    }

    /// Whether an exclusive open is refused: the last word on every use the
    /// kernel knows of, in whatever namespace.
    fn is_claimed(&self, index: u32) -> Result<bool, KernelError> {
        let node = self.node(index);
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NONBLOCK;
        match rustix::fs::open(&node, flags, Mode::empty()) {
            Ok(_) => Ok(false),
            Err(Errno::BUSY) => Ok(true),
            Err(errno) => Err(KernelError::file(node)(errno.into())),
        }
    }

    /// Looks for a mount in the mount namespaces of other processes; those
    /// that may not be read, or have just ended, are passed over.
    fn mounted_elsewhere(&self, numbers: &Numbers) -> Option<Busy> {
        let mut seen = HashSet::new();
        let processes = fs::read_dir(&self.proc).ok()?;
        for entry in processes.flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            let folder = entry.path();
            match fs::read_link(folder.join("ns/mnt")) {
                Ok(namespace) if seen.insert(namespace.clone()) => {}
                _ => continue,
            }
            if let Ok(Some(mount_point)) = mount_point(&folder.join("mountinfo"), numbers) {
                return Some(Busy::MountedElsewhere { mount_point, pid });
            }
        }
        None
    }
}

fn disk_and_partitions(block: &Path) -> Result<Vec<PathBuf>, KernelError> {
    let mut folders = vec![block.to_owned()];
    for entry in fs::read_dir(block).map_err(KernelError::file(block))? {
        let path = entry.map_err(KernelError::file(block))?.path();
        if path.join("partition").exists() {
            folders.push(path);
        }
    }
    Ok(folders)
}

fn first_entry(folder: &Path) -> Result<Option<String>, KernelError> {
    let mut entries = fs::read_dir(folder).map_err(KernelError::file(folder))?;
    let first = entries
        .next()
        .transpose()
        .map_err(KernelError::file(folder))?;
    Ok(first.map(|entry| entry.file_name().to_string_lossy().into_owned()))
}

/// Where a device of these numbers is mounted, by `proc(5)`, mountinfo. btrfs
/// mounts under a number of its own: there the source names the device.
fn mount_point(mountinfo: &Path, numbers: &Numbers) -> Result<Option<PathBuf>, KernelError> {
    let text = fs::read_to_string(mountinfo).map_err(KernelError::file(mountinfo))?;
    let is_ours = |mount: &Mount| {
        let anonymous = mount.number.0 == 0 && mount.source.starts_with("/dev");
        numbers.contains(&mount.number) || anonymous && is_one_of(&mount.source, numbers)
    };
    Ok(mounts::parse_all(&text)
        .find(is_ours)
        .map(|mount| mount.path))
}

/// True when `path` is a block device with one of these numbers.
fn is_one_of(path: &Path, numbers: &Numbers) -> bool {
    fs::metadata(path).is_ok_and(|found| numbers.contains(&split(found.rdev())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_number_and_their_paths_unescaped() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("mountinfo");
        let text = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
            40 22 43:32 / /mnt/a\\040b\\134c rw - xfs /dev/nbd1 rw\n\
            41 22 0:33 / /proc rw - proc proc rw\n";
        fs::write(&file, text).unwrap();
        let find = |number| mount_point(&file, &Numbers::from([number])).unwrap();
        assert_eq!(find((43, 32)), Some("/mnt/a b\\c".into()));
        assert_eq!(find((43, 33)), None);
        assert_eq!(find((0, 33)), Some("/proc".into()));
    }

    #[test]
    fn a_filesystem_with_a_number_of_its_own_is_found_by_its_source() {
        // /dev/null stands for the device: any node has a number.
        let number = split(fs::metadata("/dev/null").unwrap().rdev());
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("mountinfo");
        fs::write(&file, "50 22 0:44 /@ /data rw - btrfs /dev/null rw\n").unwrap();
        let numbers = Numbers::from([number]);
        assert_eq!(mount_point(&file, &numbers).unwrap(), Some("/data".into()));
    }
}
