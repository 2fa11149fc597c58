//! A sparse file that holds a blob's bytes: a memfd in memory mode, a file on
//! disk otherwise. Everything above is the same for both.

use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bytes::Bytes;
use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom};

/// Bytes moved at a time where the kernel cannot copy by itself.
const STEP: usize = 1 << 20;

/// A file with holes.
#[derive(Debug)]
pub(super) struct SparseFile(File);

impl SparseFile {
    /// An empty one in memory.
    pub(super) fn memory() -> io::Result<Self> {
        let fd = rustix::fs::memfd_create("dysk-emulator", MemfdFlags::CLOEXEC)?;
        Ok(Self(File::from(fd)))
    }

    /// A new, empty file at `path`, which must not exist.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let mut options = File::options();
        options.read(true).write(true).create_new(true);
        Ok(Self(options.open(path)?))
    }

    /// An existing file.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(File::options().read(true).write(true).open(path)?))
    }

    /// Sets the length; new bytes are zeroes and cost nothing.
    pub(super) fn resize(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    /// Reads `len` bytes from `offset`; all of them must be there.
    pub(super) fn read(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        let mut buffer: Vec<u8> = Vec::with_capacity(len);
        while buffer.len() < len {
            let at = offset + buffer.len() as u64;
            let read = rustix::io::retry_on_intr(|| {
                rustix::io::pread(&self.0, rustix::buffer::spare_capacity(&mut buffer), at)
            })?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        buffer.truncate(len);
        Ok(Bytes::from(buffer))
    }

    pub(super) fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self
                .0
                .read_at(&mut buffer[filled..], offset + filled as u64)
            {
                // A mirror's last chunk may be cut by the end of the file.
                Ok(0) => {
                    buffer[filled..].fill(0);
                    return Ok(());
                }
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    pub(super) fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    /// Writes `pieces` one after the other from `offset` on.
    pub(super) fn write_pieces(&self, pieces: &[Bytes], offset: u64) -> io::Result<()> {
        let mut slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        let mut rest = &mut slices[..];
        let mut at = offset;
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            // IOV_MAX is 1024 on Linux.
            let batch = &rest[..rest.len().min(1024)];
            let written = rustix::io::retry_on_intr(|| rustix::io::pwritev(&self.0, batch, at))?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            at += written as u64;
            IoSlice::advance_slices(&mut rest, written);
        }
        Ok(())
    }

    /// Turns `range` into zeroes and gives its storage back.
    pub(super) fn punch(&self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::io::retry_on_intr(|| {
            rustix::fs::fallocate(&self.0, mode, range.start, range.end - range.start)
        })?;
        Ok(())
    }

    /// The first stretch with data in `from..end`, as the file system keeps it.
    pub(super) fn next_data(&self, from: u64, end: u64) -> io::Result<Option<Range<u64>>> {
        if from >= end {
            return Ok(None);
        }
        let start = match rustix::fs::seek(&self.0, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if start >= end {
            return Ok(None);
        }
        let stop = rustix::fs::seek(&self.0, SeekFrom::Hole(start))?;
        Ok(Some(start..stop.min(end)))
    }

    /// Copies `range` to the same place in `target`, which must be empty there,
    /// without filling holes.
    pub(super) fn copy_to(&self, target: &Self, range: Range<u64>) -> io::Result<()> {
        let mut at = range.start;
        while let Some(data) = self.next_data(at, range.end)? {
            at = data.end;
            self.copy_data(target, data)?;
        }
        Ok(())
    }

    /// As [`SparseFile::copy_to`] for the whole file; shares the storage where
    /// the file system can.
    pub(super) fn clone_to(&self, target: &Self, len: u64) -> io::Result<()> {
        if rustix::fs::ioctl_ficlone(&target.0, &self.0).is_ok() {
            return Ok(());
        }
        self.copy_to(target, 0..len)
    }

    fn copy_data(&self, target: &Self, data: Range<u64>) -> io::Result<()> {
        let mut at = data.start;
        while at < data.end {
            let left = usize::try_from(data.end - at).unwrap_or(usize::MAX);
            let (mut from, mut to) = (at, at);
            match rustix::fs::copy_file_range(
                &self.0,
                Some(&mut from),
                &target.0,
                Some(&mut to),
                left,
            ) {
                Ok(copied) if copied > 0 => at += copied as u64,
                // No help from the kernel (or the end of the file): by hand.
                _ => {
                    let bytes = self.read(at, left.min(STEP))?;
                    target.write_all_at(&bytes, at)?;
                    at += bytes.len() as u64;
                }
            }
        }
        Ok(())
    }

    /// Bytes of storage in use.
    pub(super) fn allocated(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        Ok(self.0.metadata()?.blocks() * 512)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_stay_holes_through_writes_clears_and_copies() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let on_disk = |name: &str| SparseFile::create(&dir.path().join(name)).expect("create");
        let pairs = [
            (
                SparseFile::memory().expect("memfd"),
                SparseFile::memory().expect("memfd"),
            ),
            (on_disk("a"), on_disk("b")),
        ];
        for (file, copy) in pairs {
            let size = 1 << 40;
            file.resize(size).expect("resize");
            copy.resize(size).expect("resize");
            let pieces = [
                Bytes::from(vec![1; 700]),
                Bytes::new(),
                Bytes::from(vec![2; 324]),
            ];
            file.write_pieces(&pieces, 1 << 30).expect("write");
            file.write_all_at(&[3; 4096], 5 << 30).expect("write");
            file.punch((5 << 30)..(5 << 30) + 512).expect("punch");
            assert_eq!(file.read(5 << 30, 512).expect("read"), vec![0; 512]);
            assert_eq!(file.read((5 << 30) + 512, 1).expect("read")[0], 3);
            file.clone_to(&copy, size).expect("copy");
            let back = copy.read(1 << 30, 1024).expect("read");
            assert_eq!((back[699], back[700], back[1023]), (1, 2, 2));
            assert_eq!(copy.read((5 << 30) + 4095, 2).expect("read")[..], [3, 0]);
            assert!(copy.allocated().expect("stat") < 1 << 20);
            assert!(file.read(size - 1, 2).is_err());
        }
    }
}
