//! The run directory: private, and one daemon's at a time.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::api::SOCKET;

/// Between two looks at a lock that is about to be free.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// A run directory that is ours until this is dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: File,
}

/// Why a run directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// Another daemon has it.
    #[error(
        "run directory {path}: another dyskd (pid {pid}) uses it: stop that one, or choose another with --run-dir",
        path = path.display()
    )]
    Taken {
        /// The directory.
        path: PathBuf,
        /// What the other one wrote into the lock file.
        pid: String,
    },
    /// It cannot be made or made private.
    #[error("run directory {path}: {error}", path = path.display())]
    Io {
        /// The directory or a file in it.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

impl RunDir {
    /// Makes the directory (mode 0700) if need be and locks it.
    ///
    /// # Errors
    /// [`RunDirError::Taken`] when another process holds the lock.
    pub fn claim(path: &Path) -> Result<Self, RunDirError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |error| RunDirError::Io { path, error }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(io(path))?;
        std::fs::set_permissions(path, Permissions::from_mode(0o700)).map_err(io(path))?;
        let file = path.join("lock");
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&file)
            .map_err(io(&file))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                lock.read_to_string(&mut pid).map_err(io(&file))?;
                return Err(RunDirError::Taken {
                    path: path.to_owned(),
                    pid: pid.trim().to_owned(),
                });
            }
            Err(error) => return Err(io(&file)(error.into())),
        }
        lock.set_len(0).map_err(io(&file))?;
        lock.seek(SeekFrom::Start(0)).map_err(io(&file))?;
        writeln!(lock, "{}", std::process::id()).map_err(io(&file))?;
        Ok(Self {
            path: path.to_owned(),
            _lock: lock,
        })
    }

    /// As [`RunDir::claim`], waiting for another daemon that is about to end.
    ///
    /// # Errors
    /// [`RunDirError::Taken`] when it has not ended within `patience`.
    pub fn claim_within(path: &Path, patience: Duration) -> Result<Self, RunDirError> {
        let deadline = Instant::now() + patience;
        loop {
            match Self::claim(path) {
                Err(RunDirError::Taken { .. }) if Instant::now() < deadline => {
                    // A blocking flock would have no deadline.
                    std::thread::sleep(LOOK_AGAIN);
                }
                result => return result,
            }
        }
    }

    /// Where the control socket is.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.path.join(SOCKET)
    }

    /// Where the records are.
    #[must_use]
    pub fn records(&self) -> PathBuf {
        Self::records_in(&self.path)
    }

    /// Where the records are in a run directory that is another's.
    #[must_use]
    pub fn records_in(path: &Path) -> PathBuf {
        path.join("attachments")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_private_and_held_by_one() {
        let temp = tempfile::tempdir().expect("temp dir");
        let path = temp.path().join("run");
        let first = RunDir::claim(&path).expect("first");
        let mode = std::fs::metadata(&path).expect("stat").permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let error = RunDir::claim(&path).expect_err("second");
        let pid = std::process::id();
        assert!(
            error.to_string().contains(&format!("(pid {pid})")),
            "{error}"
        );
        drop(first);
        RunDir::claim(&path).expect("free again");
    }
}
