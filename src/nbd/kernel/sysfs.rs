//! What `/sys` and `/dev` say of nbd devices: whose they are, their size, and
//! the limits of their request queue. Everything here blocks for as long as
//! the kernel takes to answer a file read, which is short.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::error::KernelError;

/// Bytes in a sector, the unit of `/sys/block/*/size`.
const SECTOR: u64 = 512;
/// How often a file is looked at again while waiting for it to change. sysfs
/// attributes of nbd send no events.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// The places to look in; real ones by default, others in tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysfs {
    /// `/sys`.
    pub sys: PathBuf,
    /// `/proc`.
    pub proc: PathBuf,
    /// `/dev`.
    pub dev: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self {
            sys: "/sys".into(),
            proc: "/proc".into(),
            dev: "/dev".into(),
        }
    }
}

/// One device as the kernel has it now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// N of `/dev/nbdN`.
    pub index: u32,
    /// The thread that connected it; `None`: not connected.
    pub pid: Option<u32>,
    /// The backend identifier; `None`: not connected, or connected without.
    pub backend: Option<String>,
    /// Size in bytes, 0 when not connected.
    pub size_bytes: u64,
    /// Writes are refused by the block layer.
    pub read_only: bool,
}

/// Limits of a device's request queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimits {
    /// The largest request in KiB; lowered to what the driver can do.
    pub max_sectors_kb: u32,
    /// Read-ahead of buffered reads in KiB.
    pub read_ahead_kb: u32,
}

impl Default for QueueLimits {
    /// Requests as large as a Put Page can be (4 MiB), the read-ahead the same.
    fn default() -> Self {
        Self {
            max_sectors_kb: 4096,
            read_ahead_kb: 4096,
        }
    }
}

impl Sysfs {
    /// `/sys/block/nbdN`.
    #[must_use]
    pub fn block(&self, index: u32) -> PathBuf {
        self.sys.join(format!("block/nbd{index}"))
    }

    /// `/dev/nbdN`.
    #[must_use]
    pub fn node(&self, index: u32) -> PathBuf {
        self.dev.join(format!("nbd{index}"))
    }

    /// The device as it is now.
    ///
    /// # Errors
    /// [`KernelError::NoSuchDevice`].
    pub fn state(&self, index: u32) -> Result<DeviceState, KernelError> {
        let block = self.block(index);
        if !block.join("size").exists() {
            return Err(KernelError::NoSuchDevice(index));
        }
        let sectors: u64 = parse(&block.join("size"), &read(&block.join("size"))?)?;
        let pid = read_present(&block.join("pid"))?;
        Ok(DeviceState {
            index,
            pid: pid
                .map(|text| parse(&block.join("pid"), &text))
                .transpose()?,
            backend: read_present(&block.join("backend"))?,
            size_bytes: sectors * SECTOR,
            read_only: read(&block.join("ro"))? != "0",
        })
    }

    /// Has udev look at the device again. Without udev nobody listens, which is
    /// fine.
    pub fn announce(&self, index: u32) {
        let path = self.block(index).join("uevent");
        if let Err(error) = fs::write(&path, "change") {
            tracing::debug!(path = %path.display(), %error, "udev is not told");
        }
    }

    /// All nbd devices there are, connected or not, by index.
    ///
    /// # Errors
    /// [`KernelError::File`].
    pub fn list(&self) -> Result<Vec<DeviceState>, KernelError> {
        let folder = self.sys.join("block");
        let mut devices = Vec::new();
        for entry in fs::read_dir(&folder).map_err(KernelError::file(&folder))? {
            let name = entry.map_err(KernelError::file(&folder))?.file_name();
            let index = name.to_str().and_then(|name| name.strip_prefix("nbd"));
            let Some(index) = index.and_then(|digits| digits.parse().ok()) else {
                continue;
            };
            match self.state(index) {
                Ok(state) => devices.push(state),
                // Destroyed since the folder was read.
                Err(KernelError::NoSuchDevice(_)) => {}
                Err(error) => return Err(error),
            }
        }
        devices.sort_by_key(|device| device.index);
        Ok(devices)
    }

    /// The device, provided it is connected under this backend identifier.
    ///
    /// # Errors
    /// [`KernelError::NotOurs`], [`KernelError::NoSuchDevice`].
    pub fn expect_ours(&self, index: u32, backend: &str) -> Result<DeviceState, KernelError> {
        let state = self.state(index)?;
        if state.pid.is_some() && state.backend.as_deref() == Some(backend) {
            return Ok(state);
        }
        Err(KernelError::NotOurs {
            index,
            wanted: backend.to_owned(),
            found: state.backend,
        })
    }

    /// Sets the queue's limits, and no I/O scheduler: the store orders
    /// nothing by place. What is set already is not written again: each write
    /// waits until no request is under way, and on a device without live
    /// connections that is never.
    ///
    /// # Errors
    /// [`KernelError::File`] with the file that could not be written.
    pub fn set_queue(&self, index: u32, limits: QueueLimits) -> Result<(), KernelError> {
        let queue = self.block(index).join("queue");
        let most = queue.join("max_hw_sectors_kb");
        let most: u32 = parse(&most, &read(&most)?)?;
        let max_sectors_kb = limits.max_sectors_kb.min(most);
        set(&queue.join("scheduler"), "none")?;
        set(&queue.join("max_sectors_kb"), &max_sectors_kb.to_string())?;
        set(
            &queue.join("read_ahead_kb"),
            &limits.read_ahead_kb.to_string(),
        )
    }

    /// Waits until no request of the device is under way, for `patience` at
    /// most: a device in use may never be quiet.
    ///
    /// # Errors
    /// [`KernelError::File`].
    pub fn wait_quiet(&self, index: u32, patience: Duration) -> Result<(), KernelError> {
        let path = self.block(index).join("inflight");
        let busy = || {
            let text = read(&path)?;
            let quiet = text.split_whitespace().all(|count| count == "0");
            Ok((!quiet).then_some(text))
        };
        wait(patience, busy).map(drop)
    }

    /// Waits until `/dev/nbdN` is a block device of the right number and the
    /// disk has `size_bytes`, and returns its path.
    ///
    /// # Errors
    /// [`KernelError::NotReady`] after `patience`.
    pub fn wait_ready(
        &self,
        index: u32,
        size_bytes: u64,
        patience: Duration,
    ) -> Result<PathBuf, KernelError> {
        let node = self.node(index);
        let missing = || -> Result<Option<String>, KernelError> {
            let state = self.state(index)?;
            if state.size_bytes != size_bytes {
                return Ok(Some(format!(
                    "its size is {} bytes instead of {size_bytes}",
                    state.size_bytes
                )));
            }
            let number = self.number(&self.block(index))?;
            match fs::metadata(&node) {
                Ok(found)
                    if found.file_type().is_block_device() && split(found.rdev()) == number =>
                {
                    Ok(None)
                }
                Ok(_) => Ok(Some(format!(
                    "{} is something else: remove it",
                    node.display()
                ))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Some(format!(
                    "there is no {}: mount devtmpfs there, or the host's /dev",
                    node.display()
                ))),
                Err(error) => Err(KernelError::file(&node)(error)),
            }
        };
        wait(patience, missing)
            .and_then(|left| match left {
                None => Ok(()),
                Some(what) => Err(KernelError::NotReady { index, what }),
            })
            .map(|()| node.clone())
    }

    /// Waits until the driver has let go of a disconnected device, which it
    /// does when the last open file is closed.
    ///
    /// # Errors
    /// [`KernelError::NotReady`] after `patience`.
    pub fn wait_gone(&self, index: u32, patience: Duration) -> Result<(), KernelError> {
        let left = wait(patience, || match self.state(index) {
            Ok(state) if state.pid.is_some() => {
                Ok(Some("still connected: something holds it open".to_owned()))
            }
            Ok(_) | Err(KernelError::NoSuchDevice(_)) => Ok(None),
            Err(error) => Err(error),
        })?;
        match left {
            None => Ok(()),
            Some(what) => Err(KernelError::NotReady { index, what }),
        }
    }

    /// Major and minor number of a disk or partition folder in `/sys/block`.
    pub(super) fn number(&self, block: &Path) -> Result<(u32, u32), KernelError> {
        let path = block.join("dev");
        let text = read(&path)?;
        let wrong = || KernelError::file(&path)(io::ErrorKind::InvalidData.into());
        let (major, minor) = text.split_once(':').ok_or_else(wrong)?;
        Ok((parse(&path, major)?, parse(&path, minor)?))
    }

    /// Why the kernel knows no nbd family: no module, or a network namespace
    /// the family hides from.
    pub(super) fn why_no_family(&self) -> KernelError {
        if self.sys.join("module/nbd").exists() {
            KernelError::NetworkNamespace
        } else {
            KernelError::NoModule
        }
    }
}

/// Major and minor of a `st_rdev`.
pub(super) fn split(rdev: u64) -> (u32, u32) {
    (rustix::fs::major(rdev), rustix::fs::minor(rdev))
}

/// Asks what is missing until nothing is or patience ends.
fn wait(
    patience: Duration,
    missing: impl Fn() -> Result<Option<String>, KernelError>,
) -> Result<Option<String>, KernelError> {
    let deadline = Instant::now() + patience;
    loop {
        let left = missing()?;
        if left.is_none() || Instant::now() >= deadline {
            return Ok(left);
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

fn read(path: &Path) -> Result<String, KernelError> {
    let text = fs::read_to_string(path).map_err(KernelError::file(path))?;
    Ok(text.trim_end_matches('\n').to_owned())
}

/// A file that is there only while the device is connected. ENODEV: it went
/// while it was read.
fn read_present(path: &Path) -> Result<Option<String>, KernelError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim_end_matches('\n').to_owned())),
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) =>
        {
            Ok(None)
        }
        Err(error) => Err(KernelError::file(path)(error)),
    }
}

/// Writes `value` unless it is there; of several to choose from the chosen one
/// is in brackets.
fn set(path: &Path, value: &str) -> Result<(), KernelError> {
    let now = fs::read_to_string(path).unwrap_or_default();
    if now.trim() == value || now.contains(&format!("[{value}]")) {
        return Ok(());
    }
    fs::write(path, value).map_err(KernelError::file(path))
}

fn parse<T: std::str::FromStr>(path: &Path, text: &str) -> Result<T, KernelError> {
    text.trim()
        .parse()
        .map_err(|_| KernelError::file(path)(io::ErrorKind::InvalidData.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake(root: &Path, index: u32, files: &[(&str, &str)]) -> Sysfs {
        let block = root.join(format!("block/nbd{index}"));
        fs::create_dir_all(block.join("queue")).unwrap();
        for (name, text) in files {
            fs::write(block.join(name), text).unwrap();
        }
        Sysfs {
            sys: root.to_owned(),
            proc: root.to_owned(),
            dev: root.join("dev"),
        }
    }

    #[test]
    fn a_device_is_ours_only_when_connected_under_our_identifier() {
        let root = tempfile::tempdir().unwrap();
        let idle = [("size", "0\n"), ("ro", "0\n")];
        let sysfs = fake(root.path(), 0, &idle);
        let live = [
            ("size", "8\n"),
            ("ro", "1\n"),
            ("pid", "77\n"),
            ("backend", "a/b\n"),
        ];
        fake(root.path(), 12, &live);
        fs::create_dir(root.path().join("block/sda")).unwrap();

        let state = sysfs.expect_ours(12, "a/b").unwrap();
        assert_eq!(
            (state.size_bytes, state.read_only, state.pid),
            (4096, true, Some(77))
        );
        let error = sysfs.expect_ours(12, "a/c").unwrap_err().to_string();
        assert_eq!(error, "nbd12 is not the device of a/c: its backend is a/b");
        let error = sysfs.expect_ours(0, "a/b").unwrap_err().to_string();
        assert_eq!(
            error,
            "nbd0 is not the device of a/b: its backend is not set"
        );
        assert!(matches!(
            sysfs.expect_ours(3, "a"),
            Err(KernelError::NoSuchDevice(3))
        ));
        let indices: Vec<_> = sysfs.list().unwrap().iter().map(|d| d.index).collect();
        assert_eq!(indices, [0, 12]);
    }

    #[test]
    fn queue_limits_stop_at_what_the_driver_can_do() {
        let root = tempfile::tempdir().unwrap();
        let sysfs = fake(root.path(), 1, &[("queue/max_hw_sectors_kb", "1024\n")]);
        sysfs.set_queue(1, QueueLimits::default()).unwrap();
        let queue = sysfs.block(1).join("queue");
        assert_eq!(read(&queue.join("max_sectors_kb")).unwrap(), "1024");
        assert_eq!(read(&queue.join("read_ahead_kb")).unwrap(), "4096");
        assert_eq!(read(&queue.join("scheduler")).unwrap(), "none");
        fs::write(queue.join("scheduler"), "[none] mq-deadline\n").unwrap();
        sysfs.set_queue(1, QueueLimits::default()).unwrap();
        let kept = read(&queue.join("scheduler")).unwrap();
        assert_eq!(kept, "[none] mq-deadline", "written again");
    }

    #[test]
    fn waiting_ends_with_the_reason() {
        let root = tempfile::tempdir().unwrap();
        let files = [
            ("size", "8\n"),
            ("ro", "0\n"),
            ("dev", "43:0\n"),
            ("pid", "1\n"),
        ];
        let sysfs = fake(root.path(), 0, &files);
        let error = sysfs
            .wait_ready(0, 8192, Duration::ZERO)
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "nbd0 not ready: its size is 4096 bytes instead of 8192"
        );
        let error = sysfs
            .wait_ready(0, 4096, Duration::ZERO)
            .unwrap_err()
            .to_string();
        assert!(error.contains("mount devtmpfs"), "{error}");
        let error = sysfs.wait_gone(0, Duration::ZERO).unwrap_err().to_string();
        assert!(error.contains("holds it open"), "{error}");
        fs::remove_file(sysfs.block(0).join("pid")).unwrap();
        sysfs.wait_gone(0, Duration::ZERO).unwrap();
    }

    #[test]
    fn a_missing_family_is_told_from_a_hidden_one() {
        let root = tempfile::tempdir().unwrap();
        let sysfs = fake(root.path(), 0, &[]);
        assert!(matches!(sysfs.why_no_family(), KernelError::NoModule));
        fs::create_dir_all(root.path().join("module/nbd")).unwrap();
        assert!(matches!(
            sysfs.why_no_family(),
            KernelError::NetworkNamespace
        ));
    }
}
