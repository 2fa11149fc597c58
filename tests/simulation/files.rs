//! The file systems under the nodes' staging folders. One is memory, gone when
//! the power is cut; or a disk, where each sector of 512 bytes that was not
//! synced is then any of what it has been since it was. A process that dies in
//! the middle of a write leaves its first pages.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use dysk::volume::{StagingFile, StagingFiles};
use rand::RngExt;
use rand::rngs::SmallRng;

use crate::world::{Sabotage, SharedWorld, lock};

const SECTOR: usize = 512;
const PAGE: u64 = 4096;
/// The two headers of a staging file.
const HEADERS: u64 = 2 * PAGE;
const HEADER_SECTORS: usize = 16;

/// A file's bytes, and what may be left of them after a power cut.
#[derive(Debug, Default)]
struct Data {
    bytes: Vec<u8>,
    /// What sectors have been since they were durable, oldest first.
    unsynced: BTreeMap<usize, Vec<Vec<u8>>>,
    /// The opening that has it locked.
    locked: Option<u32>,
    /// Room that was asked for.
    allocated: u64,
    /// Durable writes so far; the first two make the file one.
    made: u32,
}

impl Data {
    fn write(&mut self, bytes: &[u8], at: u64) {
        let start = usize::try_from(at).expect("a small file");
        let end = start + bytes.len();
        if self.bytes.len() < end {
            self.bytes.resize(end.next_multiple_of(SECTOR), 0);
        }
        for sector in start / SECTOR..end.div_ceil(SECTOR) {
            let was = self.bytes[sector * SECTOR..(sector + 1) * SECTOR].to_vec();
            self.unsynced.entry(sector).or_default().push(was);
        }
        self.bytes[start..end].copy_from_slice(bytes);
    }

    fn synced(&mut self, at: u64, len: usize) {
        let start = usize::try_from(at).expect("a small file");
        for sector in start / SECTOR..(start + len).div_ceil(SECTOR) {
            self.unsynced.remove(&sector);
        }
    }

    fn cut(&mut self, rng: &mut SmallRng) {
        self.locked = None;
        let stale = [0, 20, 50, 100][rng.random_range(0..4)];
        // Headers are only ever synced, unless they are sabotaged: then it is
        // an old one that is left, and whole.
        let header = rng.random_range(0..usize::MAX);
        for (sector, versions) in std::mem::take(&mut self.unsynced) {
            let in_header = sector < HEADER_SECTORS;
            if in_header || rng.random_range(0..100) < stale {
                let which = match in_header {
                    true => header,
                    false => rng.random_range(0..usize::MAX),
                };
                let version = &versions[which % versions.len()];
                self.bytes[sector * SECTOR..(sector + 1) * SECTOR].copy_from_slice(version);
            }
        }
    }
}

type SharedData = Arc<Mutex<Data>>;

/// What one node has in its staging folder.
#[derive(Debug, Default)]
pub struct Disk {
    names: BTreeMap<PathBuf, SharedData>,
    durable: BTreeMap<PathBuf, SharedData>,
}

impl Disk {
    /// The power is cut, of memory or a disk.
    pub fn cut(&mut self, outlives: bool, rng: &mut SmallRng) {
        if !outlives {
            *self = Self::default();
            return;
        }
        if rng.random_bool(0.5) {
            self.names = self.durable.clone();
        }
        for data in self.names.values() {
            locked(data).cut(rng);
        }
        self.durable = self.names.clone();
    }

    /// The daemon has died, and its locks with it.
    pub fn unlock(&self) {
        for data in self.names.values() {
            locked(data).locked = None;
        }
    }
}

pub type SharedDisk = Arc<Mutex<Disk>>;

fn locked<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().expect("nothing panics with it locked")
}

/// A node's file system, as the daemon that made one opening sees it.
#[derive(Clone, Debug)]
pub struct SimFiles {
    world: SharedWorld,
    disk: SharedDisk,
    node: usize,
    opening: u32,
}

#[derive(Debug)]
struct SimFile {
    files: SimFiles,
    data: SharedData,
}

impl SimFiles {
    pub fn new(world: &SharedWorld, node: usize, opening: u32) -> Self {
        Self {
            world: Arc::clone(world),
            disk: Arc::clone(&lock(world).disks[node]),
            node,
            opening,
        }
    }

    /// The dead change nothing; one more change may be what kills.
    fn alive(&self) -> io::Result<()> {
        let mut world = lock(&self.world);
        if world.dead.contains(&self.opening) || world.point(self.node) {
            return Err(io::Error::other("the daemon is dead"));
        }
        Ok(())
    }

    fn sabotaged(&self, what: Sabotage) -> bool {
        lock(&self.world).sabotage == Some(what)
    }

    fn file(&self, data: &SharedData) -> Box<dyn StagingFile> {
        Box::new(SimFile {
            files: self.clone(),
            data: Arc::clone(data),
        })
    }
}

impl StagingFiles for SimFiles {
    fn create(&self, path: &Path) -> io::Result<Box<dyn StagingFile>> {
        self.alive()?;
        let mut disk = locked(&self.disk);
        if disk.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let data = SharedData::default();
        disk.names.insert(path.to_owned(), Arc::clone(&data));
        Ok(self.file(&data))
    }

    fn open(&self, path: &Path) -> io::Result<Option<Box<dyn StagingFile>>> {
        self.alive()?;
        let disk = locked(&self.disk);
        Ok(disk.names.get(path).map(|data| self.file(data)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.alive()?;
        let mut disk = locked(&self.disk);
        if disk.names.contains_key(to) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let data = disk.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        disk.names.insert(to.to_owned(), data);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.alive()?;
        let removed = locked(&self.disk).names.remove(path);
        removed.map(drop).ok_or(io::ErrorKind::NotFound.into())
    }

    fn sync_folder(&self, _folder: &Path) -> io::Result<()> {
        self.alive()?;
        let mut disk = locked(&self.disk);
        disk.durable = disk.names.clone();
        Ok(())
    }

    fn may_wait(&self) -> bool {
        false
    }
}

impl SimFile {
    fn data(&self) -> MutexGuard<'_, Data> {
        locked(&self.data)
    }

    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        if let Err(dead) = self.files.alive() {
            let (died_here, whole) = lock(&self.files.world).died_in_write(self.files.node);
            if died_here {
                // Whole pages, from the first.
                let end = (at / PAGE + 1 + whole) * PAGE;
                let len = usize::try_from(end - at).expect("short").min(bytes.len());
                if len < bytes.len() {
                    self.data().write(&bytes[..len], at);
                }
            }
            return Err(dead);
        }
        let mut data = self.data();
        let table = HEADERS..data.allocated;
        if table.contains(&at) {
            let empties = bytes.iter().all(|byte| *byte == 0);
            let lost = if empties {
                Sabotage::Clean
            } else {
                Sabotage::Commit
            };
            if self.files.sabotaged(lost) {
                return Ok(());
            }
        }
        let room = lock(&self.files.world).plan.room;
        if let Some(room) = room
            && at + bytes.len() as u64 > data.allocated + room
        {
            return Err(io::ErrorKind::StorageFull.into());
        }
        data.write(bytes, at);
        Ok(())
    }
}

impl StagingFile for SimFile {
    fn lock(&self) -> io::Result<()> {
        let sabotaged = self.files.sabotaged(Sabotage::LetGo);
        let mut data = self.data();
        if data.locked.is_some() && !sabotaged {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        data.locked = Some(self.files.opening);
        Ok(())
    }

    fn unlock(&self) -> io::Result<()> {
        self.data().locked = None;
        Ok(())
    }

    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let start = usize::try_from(at).expect("a small file");
        let data = self.data();
        let bytes = data.bytes.get(start..start + buffer.len());
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        drop(data);
        if at == 0 && self.files.sabotaged(Sabotage::Epoch) {
            let number = lock(&self.files.world).blob.number;
            buffer
                .chunks_mut(4096)
                .for_each(|header| forge(header, number));
        }
        Ok(())
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write(bytes, at)
    }

    fn write_durably(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write(bytes, at)?;
        let sabotaged = self.files.sabotaged(Sabotage::Sync);
        let mut data = self.data();
        data.made += 1;
        if data.made <= 2 || !sabotaged {
            data.synced(at, bytes.len());
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.files.alive()?;
        if !self.files.sabotaged(Sabotage::Sync) {
            self.data().unsynced.clear();
        }
        Ok(())
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        self.files.alive()?;
        let mut data = self.data();
        data.allocated = len;
        let len = usize::try_from(len).expect("a small file");
        if data.bytes.len() < len {
            data.bytes.resize(len, 0);
        }
        Ok(())
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.files.alive()?;
        let len = usize::try_from(len).expect("a small file");
        self.data().write(&vec![0; len], at);
        Ok(())
    }

    fn outlives_power(&self) -> io::Result<bool> {
        Ok(lock(&self.files.world).plan.disk)
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        let mut data = self.data();
        if data.locked == Some(self.files.opening) {
            data.locked = None;
        }
    }
}

/// Makes a header name this sequence number, as `layout.rs` would write it.
fn forge(header: &mut [u8], number: u64) {
    if header.len() != 4096 || !header.starts_with(b"DYSKSTG1") {
        return;
    }
    header[20..28].copy_from_slice(&number.to_le_bytes());
    let mut digest = crc64fast_nvme::Digest::new();
    digest.write(&header[..4088]);
    let sum = digest.sum64().to_le_bytes();
    header[4088..].copy_from_slice(&sum);
}
