//! The staging file: where acknowledged writes wait until the store has them.
//!
//! Plain pread and pwrite on a sparse file: a full tmpfs is an error value and
//! not a SIGBUS. A slot's bytes are written first, its table entry second;
//! that is the commit. Neither lies across pages, and a pwrite within one page
//! is not cut short by SIGKILL.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};

use super::files::{StagingFile, StagingFiles};
use super::layout::{BLOCK, ENTRY, Entry, HEADER, Header, TABLE_AT, data_at};
use super::leftover::put_away;

/// An open staging file, locked against everybody else.
#[derive(Debug)]
pub struct Staging {
    files: Arc<dyn StagingFiles>,
    file: Box<dyn StagingFile>,
    /// Where it is; `None` when it has no name (it holds nothing unflushed, ever).
    path: Option<PathBuf>,
    header: Header,
    data_at: u64,
    /// It is gone after a reboot, so nothing in it needs checksums or syncing.
    memory: bool,
    /// Pretends that the file system is full from this slot on.
    #[cfg(test)]
    pub full_from: Option<u32>,
}

/// A stretch of one slot and the bytes in memory that go with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Which slot.
    pub slot: u32,
    /// First byte within the slot.
    pub at: usize,
    /// Where in the caller's buffer.
    pub bytes: Range<usize>,
}

impl Stretch {
    fn end(&self) -> u64 {
        u64::from(self.slot) * BLOCK + (self.at + self.bytes.len()) as u64
    }

    /// Calls `work` with the file offset (relative to the slots) and buffer
    /// range of each run of stretches that lie together in both.
    fn runs(
        stretches: &[Self],
        mut work: impl FnMut(u64, Range<usize>) -> io::Result<()>,
    ) -> Result<(), (usize, io::Error)> {
        let mut first = 0;
        while first < stretches.len() {
            let mut next = first + 1;
            while let Some(stretch) = stretches.get(next) {
                let before = &stretches[next - 1];
                let together = before.end() == u64::from(stretch.slot) * BLOCK + stretch.at as u64
                    && before.bytes.end == stretch.bytes.start;
                if !together {
                    break;
                }
                next += 1;
            }
            let at = u64::from(stretches[first].slot) * BLOCK + stretches[first].at as u64;
            let bytes = stretches[first].bytes.start..stretches[next - 1].bytes.end;
            work(at, bytes).map_err(|error| (first, error))?;
            first = next;
        }
        Ok(())
    }
}

impl Staging {
    /// Makes an empty file at `path` in `files`, or one without a name there
    /// when `named` is false. `survives` overrides what the file system says.
    ///
    /// # Errors
    /// The folder cannot be made or written, or there is no room for the table.
    pub fn create(
        files: &Arc<dyn StagingFiles>,
        path: &Path,
        named: bool,
        header: Header,
        survives: Option<bool>,
    ) -> io::Result<Self> {
        let file = files.create(path)?;
        let mut staging = Self {
            data_at: data_at(header.slots),
            memory: !survives.map_or_else(|| file.outlives_power(), Ok)?,
            files: Arc::clone(files),
            file,
            path: named.then(|| path.to_owned()),
            header,
            #[cfg(test)]
            full_from: None,
        };
        let made = staging.set_up(named);
        if !named || made.is_err() {
            files.remove(path)?;
        }
        made.map(|()| staging)
    }

    fn set_up(&mut self, named: bool) -> io::Result<()> {
        self.file.lock()?;
        if !named {
            return Ok(());
        }
        // Committing an entry must never want for room.
        self.file.allocate(self.data_at)?;
        self.write_header()?;
        self.write_header()?;
        self.sync_folder()
    }

    /// Opens the file at `path`, if there is one.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when somebody else has it open,
    /// [`io::ErrorKind::InvalidData`] when it is no staging file.
    pub fn open(
        files: &Arc<dyn StagingFiles>,
        path: &Path,
        survives: Option<bool>,
    ) -> io::Result<Option<Self>> {
        let Some(file) = files.open(path)? else {
            return Ok(None);
        };
        file.lock()?;
        let mut bytes = vec![0; 2 * HEADER];
        let read = file.read_exact_at(&mut bytes, 0);
        let header = bytes
            .chunks(HEADER)
            .filter_map(Header::decode)
            .max_by_key(|header| header.generation)
            .filter(|_| read.is_ok())
            .ok_or(io::ErrorKind::InvalidData)?;
        Ok(Some(Self {
            data_at: data_at(header.slots),
            memory: !survives.map_or_else(|| file.outlives_power(), Ok)?,
            files: Arc::clone(files),
            file,
            path: Some(path.to_owned()),
            header,
            #[cfg(test)]
            full_from: None,
        }))
    }

    /// What the file says about itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Where it is.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Calls on it may wait for a device.
    pub fn may_wait(&self) -> bool {
        self.files.may_wait()
    }

    /// A reboot ends it.
    pub fn in_memory(&self) -> bool {
        self.memory
    }

    /// Changes the header, durably.
    ///
    /// # Errors
    /// The file system failed; the header in the file is the old or the new one.
    pub fn record(&mut self, change: impl FnOnce(&mut Header)) -> io::Result<()> {
        change(&mut self.header);
        if self.path.is_none() {
            return Ok(());
        }
        self.write_header()
    }

    fn write_header(&mut self) -> io::Result<()> {
        self.header.generation += 1;
        let bytes = self.header.encode();
        let at = self.header.generation % 2 * HEADER as u64;
        if self.memory {
            return self.file.write_all_at(&bytes, at);
        }
        self.file.write_durably(&bytes, at)
    }

    /// Writes stretches of `data` into slots.
    ///
    /// # Errors
    /// With the index of the first stretch that may not have been written.
    pub fn write(&self, stretches: &[Stretch], data: &[u8]) -> Result<(), (usize, io::Error)> {
        Stretch::runs(stretches, |at, bytes| {
            #[cfg(test)]
            if self
                .full_from
                .is_some_and(|from| at + bytes.len() as u64 > u64::from(from) * BLOCK)
            {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.file.write_all_at(&data[bytes], self.data_at + at)
        })
    }

    /// Reads stretches of `buffer` from slots.
    ///
    /// # Errors
    /// The file system failed.
    pub fn read(&self, stretches: &[Stretch], buffer: &mut [u8]) -> io::Result<()> {
        Stretch::runs(stretches, |at, bytes| {
            self.file
                .read_exact_at(&mut buffer[bytes], self.data_at + at)
        })
        .map_err(|(_, error)| error)
    }

    /// Writes table entries, given by slot in ascending runs; `None` for a
    /// slot that holds nothing unflushed.
    ///
    /// # Errors
    /// The file system failed; some entries may be written.
    pub fn commit(&self, entries: &[(u32, Option<Entry>)]) -> io::Result<()> {
        if self.path.is_none() {
            return Ok(());
        }
        if let [(slot, entry)] = entries {
            let bytes = entry.map_or([0; ENTRY], |entry| entry.encode(*slot));
            return self.file.write_all_at(&bytes, entry_at(*slot));
        }
        let mut bytes = Vec::with_capacity(entries.len() * ENTRY);
        for run in entries.chunk_by(|a, b| a.0 + 1 == b.0) {
            bytes.clear();
            for (slot, entry) in run {
                bytes.extend_from_slice(&entry.map_or([0; ENTRY], |entry| entry.encode(*slot)));
            }
            self.file.write_all_at(&bytes, entry_at(run[0].0))?;
        }
        Ok(())
    }

    /// The table's entry of `slot`, as it is in the file.
    ///
    /// # Errors
    /// The file system failed.
    #[cfg(any(test, debug_assertions))]
    pub fn entry(&self, slot: u32) -> io::Result<Result<Option<Entry>, super::layout::Torn>> {
        let mut bytes = [0; ENTRY];
        self.file.read_exact_at(&mut bytes, entry_at(slot))?;
        Ok(Entry::decode(&bytes, slot))
    }

    /// The whole table; torn entries are counted.
    ///
    /// # Errors
    /// The file system failed.
    pub fn table(&self) -> io::Result<(Vec<(u32, Entry)>, usize)> {
        let slots = self.header.slots;
        let mut bytes = vec![0; slots as usize * ENTRY];
        self.file.read_exact_at(&mut bytes, TABLE_AT)?;
        let (mut entries, mut torn) = (Vec::new(), 0);
        for (slot, bytes) in (0..slots).zip(bytes.chunks_exact(ENTRY)) {
            match Entry::decode(bytes, slot) {
                Ok(Some(entry)) => entries.push((slot, entry)),
                Ok(None) => {}
                Err(_) => torn += 1,
            }
        }
        Ok((entries, torn))
    }

    /// Makes the table exactly `entries`, durably.
    ///
    /// # Errors
    /// The file system failed.
    pub fn replace_table(&self, entries: &[(u32, Entry)]) -> io::Result<()> {
        let mut bytes = vec![0; self.header.slots as usize * ENTRY];
        for (slot, entry) in entries {
            let at = *slot as usize * ENTRY;
            bytes[at..at + ENTRY].copy_from_slice(&entry.encode(*slot));
        }
        self.file.write_all_at(&bytes, TABLE_AT)?;
        if self.memory {
            Ok(())
        } else {
            self.file.sync()
        }
    }

    /// Gives the memory behind a slot back to the file system.
    pub fn punch(&self, slot: u32) {
        let at = self.data_at + u64::from(slot) * BLOCK;
        if let Err(error) = self.file.punch(at, BLOCK) {
            tracing::debug!("cannot give staging memory back: {error}");
        }
    }

    /// Gives a file that is whole the name by which it is found.
    ///
    /// # Errors
    /// There is one of that name, or the file system failed.
    pub fn place(&mut self, path: &Path) -> io::Result<()> {
        let Some(made) = &self.path else {
            return Ok(());
        };
        self.files.rename(made, path)?;
        self.path = Some(path.to_owned());
        self.sync_folder()
    }

    /// Renames the file out of the way, so that nothing replays it, and lets
    /// go of its lock. Returns its new name.
    ///
    /// # Errors
    /// The file system failed.
    pub fn set_aside(&mut self) -> io::Result<Option<PathBuf>> {
        let Some(path) = &self.path else {
            return Ok(None);
        };
        let aside = put_away(&*self.files, path, "aside")?;
        self.sync_folder()?;
        self.path = Some(aside.clone());
        self.file.unlock()?;
        Ok(Some(aside))
    }

    /// Removes the file.
    ///
    /// # Errors
    /// The file system failed.
    pub fn remove(&mut self) -> io::Result<()> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        self.files.remove(path)?;
        self.sync_folder()?;
        self.path = None;
        Ok(())
    }

    /// Lets go of the file and its lock, for another process to open it.
    /// Whatever is written here afterwards goes nowhere.
    ///
    /// # Errors
    /// Nothing was let go of.
    pub fn let_go(&mut self) -> io::Result<()> {
        let nowhere = memfd_create("let-go", MemfdFlags::CLOEXEC)?;
        // Not dup'ed anywhere: closing it gives the lock back.
        self.file = Box::new(File::from(nowhere));
        self.path = None;
        Ok(())
    }

    fn sync_folder(&self) -> io::Result<()> {
        match self.path.as_deref().and_then(Path::parent) {
            Some(folder) if !self.memory => self.files.sync_folder(folder),
            _ => Ok(()),
        }
    }
}

fn entry_at(slot: u32) -> u64 {
    TABLE_AT + u64::from(slot) * ENTRY as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn system() -> Arc<dyn StagingFiles> {
        Arc::new(crate::volume::cache::System)
    }

    fn header() -> Header {
        Header {
            generation: 0,
            slots: 16,
            epoch: 1,
            flushed: 0,
            volume: [7; 32],
            address: "acct/dysks/vol1.vhd".into(),
            lease: "l".into(),
            boot: "b".into(),
        }
    }

    fn entry(block: u64) -> Entry {
        Entry {
            block,
            sequence: block + 1,
            dirty: 3,
            sums: [5; 8],
        }
    }

    #[test]
    fn what_is_committed_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep").join("v.staging");
        for survives in [false, true] {
            let mut staging =
                Staging::create(&system(), &path, true, header(), Some(survives)).unwrap();
            let stretch = |slot, at, bytes| Stretch { slot, at, bytes };
            let data: Vec<u8> = (0..=255u8).flat_map(|n| [n; 32]).collect();
            staging
                .write(
                    &[
                        stretch(3, 2048, 0..2048),
                        stretch(4, 0, 2048..6144),
                        stretch(9, 0, 6144..8192),
                    ],
                    &data,
                )
                .unwrap();
            staging
                .commit(&[
                    (3, Some(entry(3))),
                    (4, Some(entry(8))),
                    (9, Some(entry(1))),
                ])
                .unwrap();
            staging.commit(&[(4, None)]).unwrap();
            staging.record(|header| header.epoch = 9).unwrap();
            assert_eq!(
                Staging::open(&system(), &path, None).unwrap_err().kind(),
                io::ErrorKind::WouldBlock,
                "one daemon at a time"
            );
            drop(staging);
            let mut staging = Staging::open(&system(), &path, Some(survives))
                .unwrap()
                .unwrap();
            assert_eq!(staging.header().epoch, 9);
            assert_eq!(
                staging.table().unwrap(),
                (vec![(3, entry(3)), (9, entry(1))], 0)
            );
            let mut read = vec![0; 8192];
            staging
                .read(
                    &[
                        stretch(9, 0, 6144..8192),
                        stretch(3, 2048, 0..2048),
                        stretch(4, 0, 2048..6144),
                    ],
                    &mut read,
                )
                .unwrap();
            assert_eq!(read, data);
            let aside = staging.set_aside().unwrap().unwrap();
            assert!(!path.exists() && aside.exists());
            staging.remove().unwrap();
            assert_eq!(
                std::fs::read_dir(path.parent().unwrap()).unwrap().count(),
                0
            );
        }
    }

    #[test]
    fn only_the_owner_may_look() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new").join("v.staging");
        let _staging = Staging::create(&system(), &path, true, header(), None).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
    }

    #[test]
    fn a_file_of_another_kind_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v.staging");
        assert!(Staging::open(&system(), &path, None).unwrap().is_none());
        std::fs::write(&path, "something else").unwrap();
        let error = Staging::open(&system(), &path, None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
