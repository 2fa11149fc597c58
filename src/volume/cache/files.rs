//! What a staging file asks of the file system, and the operating system's
//! answer to it. A simulation puts file systems of its own here, which lose
//! power at any moment.

use std::fmt;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::{DirBuilderExt as _, FileExt, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::{FallocateFlags, FlockOperation, OFlags};
use rustix::io::{Errno, ReadWriteFlags};

/// `TMPFS_MAGIC` and `RAMFS_MAGIC` of `linux/magic.h`.
const MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// A file system for staging files.
pub trait StagingFiles: fmt::Debug + Send + Sync {
    /// Makes an empty file, mode 0600, and its folder, mode 0700, if need be.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`], or what the file system says.
    fn create(&self, path: &Path) -> io::Result<Box<dyn StagingFile>>;

    /// Opens a file for reading and writing, following no symbolic link;
    /// `None` when there is none.
    ///
    /// # Errors
    /// What the file system says.
    fn open(&self, path: &Path) -> io::Result<Option<Box<dyn StagingFile>>>;

    /// Renames a file to a name that nothing has.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`], or what the file system says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file's name.
    ///
    /// # Errors
    /// What the file system says.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in a folder durable.
    ///
    /// # Errors
    /// What the file system says.
    fn sync_folder(&self, folder: &Path) -> io::Result<()>;

    /// Whether calls may wait for a device, and so belong on threads that may
    /// wait. A simulation has one thread and says no; its calls become tasks.
    fn may_wait(&self) -> bool {
        true
    }
}

/// An open staging file. Offsets and lengths are in bytes.
pub trait StagingFile: fmt::Debug + Send {
    /// Locks it against everybody else, until it is closed or unlocked.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when somebody else has it locked.
    fn lock(&self) -> io::Result<()>;

    /// Lets go of the lock.
    ///
    /// # Errors
    /// What the file system says.
    fn unlock(&self) -> io::Result<()>;

    /// Fills `buffer` with what is at `at`.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] beyond the end, or what the file
    /// system says.
    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()>;

    /// Writes all of `bytes` at `at`. The death of the process leaves it
    /// whole within each page of 4 KiB.
    ///
    /// # Errors
    /// [`io::ErrorKind::StorageFull`], or what the file system says; some of
    /// it may be written.
    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()>;

    /// As [`StagingFile::write_all_at`], and returns once these bytes outlive
    /// a power cut, whatever becomes of the rest of the file.
    ///
    /// # Errors
    /// What the file system says.
    fn write_durably(&self, bytes: &[u8], at: u64) -> io::Result<()>;

    /// Returns once everything written outlives a power cut.
    ///
    /// # Errors
    /// What the file system says.
    fn sync(&self) -> io::Result<()>;

    /// Makes sure that writing to the first `len` bytes never wants for room.
    ///
    /// # Errors
    /// [`io::ErrorKind::StorageFull`], or what the file system says.
    fn allocate(&self, len: u64) -> io::Result<()>;

    /// Gives the room of these bytes back; they read as zeroes.
    ///
    /// # Errors
    /// What the file system says.
    fn punch(&self, at: u64, len: u64) -> io::Result<()>;

    /// Whether the file system outlives a power cut.
    ///
    /// # Errors
    /// What the file system says.
    fn outlives_power(&self) -> io::Result<bool>;
}

/// The operating system's.
#[derive(Clone, Copy, Debug, Default)]
pub struct System;

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
    options
}

impl StagingFiles for System {
    fn create(&self, path: &Path) -> io::Result<Box<dyn StagingFile>> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path.parent().unwrap_or(Path::new("/")))?;
        Ok(Box::new(options().create_new(true).open(path)?))
    }

    fn open(&self, path: &Path) -> io::Result<Option<Box<dyn StagingFile>>> {
        match options().open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            opened => Ok(Some(Box::new(opened?))),
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let here = rustix::fs::CWD;
        let flags = rustix::fs::RenameFlags::NOREPLACE;
        Ok(rustix::fs::renameat_with(here, from, here, to, flags)?)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        File::open(folder)?.sync_all()
    }
}

impl StagingFile for File {
    fn lock(&self) -> io::Result<()> {
        Ok(rustix::fs::flock(
            self,
            FlockOperation::NonBlockingLockExclusive,
        )?)
    }

    fn unlock(&self) -> io::Result<()> {
        Ok(rustix::fs::flock(self, FlockOperation::Unlock)?)
    }

    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, at)
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, at)
    }

    fn write_durably(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        // RWF_DSYNC makes this page durable and no other.
        let slices = [IoSlice::new(bytes)];
        match rustix::io::pwritev2(self, &slices, at, ReadWriteFlags::DSYNC) {
            Ok(written) if written == bytes.len() => Ok(()),
            Ok(_) | Err(Errno::OPNOTSUPP | Errno::INTR) => {
                FileExt::write_all_at(self, bytes, at)?;
                self.sync_data()
            }
            Err(error) => Err(error.into()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(
            self,
            FallocateFlags::empty(),
            0,
            len,
        )?)
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(self, flags, at, len)?)
    }

    fn outlives_power(&self) -> io::Result<bool> {
        let kind = rustix::fs::fstatfs(self)?.f_type;
        Ok(!MEMORY.contains(&kind))
    }
}
