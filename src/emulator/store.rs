//! All containers and blobs of the account, and how they lie on disk.
//!
//! Layout of `--dir`: `lock`; below `containers`, `NAME/container.json` and per
//! blob or snapshot `NAME/HASH.json` (HASH of name and snapshot time),
//! `NAME/ID.data` and `NAME/ID.map`. Files and directories of any other kind are
//! somebody else's and are left alone. A record is replaced by rename, which is the moment
//! a blob comes to be, is overwritten or changes; files no record names are
//! left-overs of a death in between and are removed at the next start.
//!
//! Locks, always taken in this order and never held across an await: the table
//! of containers, one container's table of blobs, one blob. No operation holds
//! two blobs.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::blob::Blob;
use super::clock;
use super::record::{ContainerRecord, Record};
use super::refusal::{self, Refusal};
use super::sparse::SparseFile;
use super::throttle::Bucket;

/// Everything under one blob name.
#[derive(Debug, Default)]
pub(super) struct Versions {
    /// The blob itself; none after a delete.
    pub base: Option<Blob>,
    /// Its snapshots by time.
    pub snapshots: BTreeMap<String, Blob>,
}

impl Versions {
    /// The blob, or the snapshot taken at `snapshot`.
    pub(super) fn get(&self, snapshot: Option<&str>) -> Result<&Blob, Refusal> {
        match snapshot {
            None => self.base.as_ref(),
            Some(time) => self.snapshots.get(time),
        }
        .ok_or_else(|| (&refusal::BLOB_NOT_FOUND).into())
    }

    /// The blob, for a change.
    pub(super) fn base_mut(&mut self) -> Result<&mut Blob, Refusal> {
        self.base
            .as_mut()
            .ok_or_else(|| (&refusal::BLOB_NOT_FOUND).into())
    }
}

/// A blob name in a container: the unit of locking and of throttling.
#[derive(Debug)]
pub(super) struct Slot {
    /// Set while an operation that takes long (a snapshot's copy) has the
    /// lock: others then wait on a thread that may block.
    pub busy: AtomicBool,
    /// The caps of this blob.
    pub bucket: Mutex<Bucket>,
    versions: RwLock<Versions>,
}

impl Slot {
    fn new() -> Self {
        Self {
            busy: AtomicBool::new(false),
            bucket: Mutex::default(),
            versions: RwLock::default(),
        }
    }

    /// For reading.
    pub(super) fn read(&self) -> RwLockReadGuard<'_, Versions> {
        self.versions.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// For a change.
    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Versions> {
        self.versions
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// For a change that takes long.
    pub(super) fn write_long(&self) -> LongWrite<'_> {
        let guard = self.write();
        self.busy.store(true, Ordering::Release);
        LongWrite {
            guard,
            busy: &self.busy,
        }
    }
}

/// The lock of [`Slot::write_long`].
pub(super) struct LongWrite<'a> {
    guard: RwLockWriteGuard<'a, Versions>,
    busy: &'a AtomicBool,
}

impl std::ops::Deref for LongWrite<'_> {
    type Target = Versions;
    fn deref(&self) -> &Versions {
        &self.guard
    }
}

impl std::ops::DerefMut for LongWrite<'_> {
    fn deref_mut(&mut self) -> &mut Versions {
        &mut self.guard
    }
}

impl Drop for LongWrite<'_> {
    fn drop(&mut self) {
        self.busy.store(false, Ordering::Release);
    }
}

/// A container.
#[derive(Debug)]
pub(super) struct Container {
    /// What is known about it.
    pub record: ContainerRecord,
    dir: Option<PathBuf>,
    slots: RwLock<Slots>,
}

/// The blobs of a container. Names of deleted blobs stay, as empty slots.
#[derive(Debug, Default)]
pub(super) struct Slots {
    deleted: bool,
    /// By name.
    pub blobs: BTreeMap<String, Arc<Slot>>,
}

impl Container {
    /// The blobs.
    pub(super) fn slots(&self) -> RwLockReadGuard<'_, Slots> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The slot of `name`, made when missing. The guard keeps the container
    /// from being deleted while a blob comes to be in it.
    pub(super) fn slot_for_create(
        &self,
        name: &str,
    ) -> Result<(Arc<Slot>, RwLockReadGuard<'_, Slots>), Refusal> {
        if !self.slots().blobs.contains_key(name) {
            self.slots
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .blobs
                .entry(name.to_owned())
                .or_insert_with(|| Arc::new(Slot::new()));
        }
        let slots = self.slots();
        match slots.blobs.get(name) {
            Some(slot) if !slots.deleted => Ok((Arc::clone(slot), slots)),
            _ => Err((&refusal::CONTAINER_NOT_FOUND).into()),
        }
    }

    /// New files for a blob.
    pub(super) fn new_files(&self, id: &str) -> io::Result<(SparseFile, Option<SparseFile>)> {
        let Some(dir) = &self.dir else {
            return Ok((SparseFile::memory()?, None));
        };
        let data = SparseFile::create(&dir.join(format!("{id}.data")))?;
        let map = SparseFile::create(&dir.join(format!("{id}.map")))?;
        Ok((data, Some(map)))
    }

    /// Stores `record`, replacing the one of the same name and snapshot time.
    pub(super) fn commit(&self, record: &Record) -> io::Result<()> {
        self.dir.as_ref().map_or(Ok(()), |dir| {
            let name = file_name(&record.name, record.snapshot.as_deref());
            write_json(dir, &name, record)
        })
    }

    /// Removes the record and then the files of a blob.
    pub(super) fn remove(&self, record: &Record) -> io::Result<()> {
        let Some(dir) = &self.dir else {
            return Ok(());
        };
        fs::remove_file(dir.join(file_name(&record.name, record.snapshot.as_deref())))?;
        self.remove_files(&record.files)
    }

    /// Removes the files of an overwritten blob.
    pub(super) fn remove_files(&self, id: &str) -> io::Result<()> {
        let Some(dir) = &self.dir else {
            return Ok(());
        };
        fs::remove_file(dir.join(format!("{id}.data")))?;
        fs::remove_file(dir.join(format!("{id}.map")))
    }
}

/// The account's containers.
#[derive(Debug)]
pub(super) struct Store {
    dir: Option<PathBuf>,
    containers: RwLock<BTreeMap<String, Arc<Container>>>,
    versions: AtomicU64,
    // Keeps a second emulator out of the directory; the kernel unlocks it when
    // the process dies.
    _lock: Option<fs::File>,
}

impl Store {
    /// An empty store in memory.
    pub(super) fn memory() -> Self {
        Self {
            dir: None,
            containers: RwLock::default(),
            versions: AtomicU64::new(0),
            _lock: None,
        }
    }

    /// The store in `dir`, which is made when missing.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let lock = fs::File::create(dir.join("lock"))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(
            |_| {
                io::Error::other(format!(
                    "another emulator uses {}: stop it first",
                    dir.display()
                ))
            },
        )?;
        let dir = dir.join("containers");
        fs::create_dir_all(&dir)?;
        let mut containers = BTreeMap::new();
        let mut newest = 0;
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            // None for one whose creation or deletion never came to its end.
            if path.is_dir()
                && let Some(container) = load_container(&path, &mut newest)?
            {
                containers.insert(container.record.name.clone(), Arc::new(container));
            }
        }
        Ok(Self {
            dir: Some(dir),
            containers: RwLock::new(containers),
            versions: AtomicU64::new(newest),
            _lock: Some(lock),
        })
    }

    /// A version no blob ever had, at least the present time.
    pub(super) fn next_version(&self) -> u64 {
        let now = clock::now() + clock::TICKS_BEFORE_EPOCH;
        let step = |last: u64| Some(now.max(last + 1));
        let last = match self
            .versions
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, step)
        {
            Ok(last) | Err(last) => last,
        };
        now.max(last + 1)
    }

    fn table(&self) -> RwLockReadGuard<'_, BTreeMap<String, Arc<Container>>> {
        self.containers
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// All containers by name.
    pub(super) fn containers(&self) -> Vec<Arc<Container>> {
        self.table().values().cloned().collect()
    }

    /// The container `name`.
    pub(super) fn container(&self, name: &str) -> Result<Arc<Container>, Refusal> {
        self.table()
            .get(name)
            .cloned()
            .ok_or_else(|| (&refusal::CONTAINER_NOT_FOUND).into())
    }

    /// The slot of a blob name that exists or existed.
    pub(super) fn slot(&self, container: &str, blob: &str) -> Result<Arc<Slot>, Refusal> {
        self.table()
            .get(container)
            .ok_or(&refusal::CONTAINER_NOT_FOUND)?
            .slots()
            .blobs
            .get(blob)
            .cloned()
            .ok_or_else(|| (&refusal::BLOB_NOT_FOUND).into())
    }

    /// Create Container.
    pub(super) fn create_container(&self, record: ContainerRecord) -> Result<(), Refusal> {
        let mut table = self
            .containers
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if table.contains_key(&record.name) {
            return Err((&refusal::CONTAINER_ALREADY_EXISTS).into());
        }
        let dir = self.dir.as_ref().map(|dir| dir.join(&record.name));
        if let Some(dir) = &dir {
            // What a deletion left behind that was cut short.
            if dir.exists() {
                remove_container(dir)?;
            }
            fs::create_dir(dir)?;
            write_json(dir, "container.json", &record)?;
        }
        let container = Container {
            record,
            dir,
            slots: RwLock::default(),
        };
        table.insert(container.record.name.clone(), Arc::new(container));
        Ok(())
    }

    /// Delete Container, with all its blobs, leased or not.
    pub(super) fn delete_container(&self, name: &str) -> Result<(), Refusal> {
        let mut table = self
            .containers
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let container = table.get(name).ok_or(&refusal::CONTAINER_NOT_FOUND)?;
        let mut slots = container
            .slots
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(dir) = &container.dir {
            // Without its record it is gone, whatever becomes of the rest.
            fs::remove_file(dir.join("container.json"))?;
            remove_container(dir)?;
        }
        slots.deleted = true;
        for slot in slots.blobs.values() {
            *slot.write() = Versions::default();
        }
        slots.blobs.clear();
        drop(slots);
        table.remove(name);
        Ok(())
    }
}

fn file_name(blob: &str, snapshot: Option<&str>) -> String {
    let hash = Sha256::new()
        .chain_update(blob)
        .chain_update([0])
        .chain_update(snapshot.unwrap_or_default())
        .finalize();
    let hex: String = hash[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("{hex}.json")
}

fn write_json(dir: &Path, name: &str, value: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(value).map_err(io::Error::other)?;
    let temporary = dir.join(format!("{name}.tmp"));
    fs::write(&temporary, text)?;
    fs::rename(&temporary, dir.join(name))
}

/// Is this the name of a file the store makes?
fn is_ours(name: &str) -> bool {
    [".json", ".data", ".map", ".tmp"]
        .iter()
        .any(|suffix| name.ends_with(suffix))
}

/// Removes a container's directory; fails when it holds anything but our files.
fn remove_container(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if is_ours(&entry.file_name().to_string_lossy()) {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir(dir)
}

fn load_container(dir: &Path, newest: &mut u64) -> io::Result<Option<Container>> {
    let record: ContainerRecord = match fs::read(dir.join("container.json")) {
        Ok(text) => parse_json(dir, &text)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    *newest = (*newest).max(record.version);
    let mut known = HashSet::from(["container.json".to_owned()]);
    let mut blobs: BTreeMap<String, Arc<Slot>> = BTreeMap::new();
    let names: Vec<String> = fs::read_dir(dir)?
        .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<_>>()?;
    for name in &names {
        if !name.ends_with(".json") || name == "container.json" {
            continue;
        }
        let record: Record = parse_json(&dir.join(name), &fs::read(dir.join(name))?)?;
        let (data, map) = (
            format!("{}.data", record.files),
            format!("{}.map", record.files),
        );
        let blob = Blob::load(
            record,
            SparseFile::open(&dir.join(&data))?,
            SparseFile::open(&dir.join(&map))?,
        )?;
        known.extend([name.clone(), data, map]);
        *newest = (*newest).max(blob.record.version);
        let slot = blobs
            .entry(blob.record.name.clone())
            .or_insert_with(|| Arc::new(Slot::new()));
        let mut versions = slot.write();
        match blob.record.snapshot.clone() {
            Some(time) => {
                versions.snapshots.insert(time, blob);
            }
            None => versions.base = Some(blob),
        }
    }
    for name in names
        .iter()
        .filter(|name| is_ours(name) && !known.contains(*name))
    {
        fs::remove_file(dir.join(name))?;
    }
    for slot in blobs.values() {
        let mut versions = slot.write();
        let lineages: HashSet<String> = versions
            .snapshots
            .values()
            .map(|snapshot| snapshot.record.lineage.clone())
            .collect();
        if let Some(base) = &mut versions.base {
            base.tracking = lineages.contains(&base.record.lineage);
        }
    }
    Ok(Some(Container {
        record,
        dir: Some(dir.to_owned()),
        slots: RwLock::new(Slots {
            deleted: false,
            blobs,
        }),
    }))
}

fn parse_json<T: serde::de::DeserializeOwned>(path: &Path, text: &[u8]) -> io::Result<T> {
    serde_json::from_slice(text)
        .map_err(|error| io::Error::other(format!("{}: {error}", path.display())))
}
