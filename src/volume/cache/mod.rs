//! The caching modes `read-only` and `read-write`: blocks of 4 KiB, staged in
//! slots of a file, in front of the store.
//!
//! In `read-write` the disk has a volatile write cache as the block layer
//! means it. A write is acknowledged once it is committed in the staging file
//! ([`staging`]), so the daemon's death loses nothing; FLUSH returns once
//! everything acknowledged before it is in the store; FUA, trim and large
//! zeroes go to the store first. In `read-only` every write does.
//!
//! ## A block's states
//! | state | `valid` | `dirty` | `picked` | in the queue | slot's table entry |
//! |---|---|---|---|---|---|
//! | absent | | | | | |
//! | clean | some | none | no | no | empty |
//! | dirty | some | some | no | under `oldest` | what is dirty |
//! | picked, for one write-back | some | some | yes | no | what is dirty |
//!
//! | event | change |
//! |---|---|
//! | write staged | absent, clean → dirty; dirty, picked stay, `touched` grows |
//! | read filled | absent → clean; else `valid` grows |
//! | write-back picks | dirty → picked |
//! | write-back takes its copy | `sent` = `dirty`, `touched` = none |
//! | write-back delivered | `sent` and not `touched` is clean; the rest → dirty since the first write after the copy |
//! | write-back failed | → dirty, `oldest` as before |
//! | written through | `touched` = none before; afterwards what is not `touched` takes the new bytes and is clean |
//! | cleared | `touched` = none before; afterwards what is not `touched` is gone |
//! | evicted | clean → absent |
//!
//! ## Invariants
//! Those of the index, and that the table agrees with it, are asserted after
//! each section of a debug build while little is cached (`Core::check`).
//!
//! - `dirty` is part of `valid`; a sector that is not valid is the store's.
//! - Table and index agree whenever the mutex is free: an entry names exactly
//!   the dirty sectors of its slot. An entry is written after the slot's bytes
//!   when sectors become dirty, and before the slot may be used for another
//!   block when they become clean. So at any instant the file holds every
//!   acknowledged write that the store may lack.
//! - Whatever changes a block in the store (write-back, write-through, clear)
//!   holds the volume's range lock on whole blocks; there is one such change
//!   of a block at a time, so one mask `touched` a block tells what was staged
//!   since it began. Staging takes no range lock.
//! - `oldest` is at most the sequence of every write of the block that the
//!   store lacks. So when no block and no write-back has an `oldest` up to
//!   `n`, the store has every write up to `n`, however often blocks were
//!   overwritten since.
//! - A read fills in only what nobody staged or changed since it began.
//! - What a section begins for a request (a change, a registration, a place in
//!   the queue for room) ends with a guard that the section itself makes: the
//!   section may outlive the request.
//! - No more slots have memory than the volume's size and the node's
//!   [`Budget`] allow; a file system that is full is one more such bound.

mod block;
mod budget;
mod close;
mod core;
mod data;
mod files;
mod flush;
mod follow;
mod hand_over;
mod index;
mod layout;
mod leftover;
mod recovery;
mod send;
mod staging;
mod through;
mod write_back;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, Semaphore};

pub use budget::Budget;
pub(in crate::volume) use data::blocks_around;
pub use files::{StagingFile, StagingFiles, System};
pub use leftover::{Leftover, LeftoverState, kept_aside, list_staging, restore_staging};
use recovery::Origin;
pub use recovery::{StagingInfo, discard_staging, inspect_staging};
pub(super) use recovery::{adopt, run, start, withdraw};

use self::core::Core;
use super::Caching;
use crate::device::DeviceError;

/// Where staging files lie unless told otherwise; a tmpfs on any systemd host.
pub const DEFAULT_STAGING_DIR: &str = "/run/dysk/staging";
/// The usual bound on what one volume caches, in bytes.
pub const DEFAULT_CACHE_SIZE: u64 = 256 << 20;

/// What to do with unflushed writes that an earlier attach left behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recover {
    /// Take them up if it is certain that nobody has held the volume since;
    /// refuse to open otherwise.
    #[default]
    Replay,
    /// Rename the file out of the way and open without them.
    SetAside,
    /// Delete them and open without them.
    Discard,
    /// Take them up though somebody may have written to the volume since: they
    /// go over whatever is there.
    Force,
}

/// Where and how much to cache.
#[derive(Clone, Debug)]
pub struct StagingOptions {
    /// The folder for staging files. On a tmpfs unflushed writes outlive the
    /// daemon, on a local disk a reboot as well.
    pub dir: PathBuf,
    /// The most to cache of this volume, in bytes; at least 256 KiB are taken.
    pub size: u64,
    /// The bound shared with the node's other volumes.
    pub budget: Arc<Budget>,
    /// What to do with unflushed writes that are found.
    pub recover: Recover,
    /// Which boot this is; `None` asks the kernel. A simulation reboots here.
    pub boot: Option<String>,
    /// Whether `dir` outlives a power cut; `None` asks the file system.
    pub survives_power_cut: Option<bool>,
    /// The file system that has `dir`.
    pub files: Arc<dyn StagingFiles>,
}

impl Default for StagingOptions {
    fn default() -> Self {
        Self {
            dir: DEFAULT_STAGING_DIR.into(),
            size: DEFAULT_CACHE_SIZE,
            budget: Budget::unlimited(),
            recover: Recover::default(),
            boot: None,
            survives_power_cut: None,
            files: Arc::new(System),
        }
    }
}

/// Unflushed writes of a volume that lost its lease or was given up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SetAside {
    /// The file they are kept in; nothing replays it, [`discard_staging`]
    /// removes it.
    pub path: PathBuf,
    /// How many bytes were never written to the store.
    pub dirty_bytes: u64,
}

/// What a cache looks like from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CacheStatus {
    /// The mode.
    pub mode: Caching,
    /// Acknowledged bytes that the store may not have yet.
    pub dirty_bytes: u64,
    /// Bytes in use, in whole blocks.
    pub cached_bytes: u64,
    /// The most that can be in use.
    pub capacity_bytes: u64,
    /// Reads answered without the store.
    pub hits: u64,
    /// Reads that needed the store.
    pub misses: u64,
    /// The staging file; `None` in `read-only`, which needs none by name.
    pub staging: Option<PathBuf>,
    /// Unflushed writes that will not reach the store by themselves.
    pub set_aside: Option<SetAside>,
}

/// Runs `work` to its end, though its future be dropped: on a thread that may
/// wait, or as a task of this one.
async fn apart<T: Send + 'static>(may_wait: bool, work: impl FnOnce() -> T + Send + 'static) -> T {
    let done = if may_wait {
        tokio::task::spawn_blocking(work)
    } else {
        tokio::spawn(async { work() })
    };
    match done.await {
        Ok(done) => done,
        Err(failed) => match failed.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is going down, and this task with it.
            Err(_) => std::future::pending().await,
        },
    }
}

/// The cache of one open volume.
#[derive(Debug)]
pub(super) struct Cache {
    mode: Caching,
    /// Its file is memory: no call on it waits for a device.
    memory: bool,
    /// Other calls on it belong on threads that may wait.
    may_wait: bool,
    core: Mutex<Core>,
    /// Something is to be written back, or to be reconsidered.
    work: Notify,
    /// Something became clean or free, or never will. Told after every change
    /// of the index that can end a wait.
    progress: Notify,
    /// Writers that wait for room form a queue.
    turn: Semaphore,
    failures: AtomicU64,
    last_failure: Mutex<String>,
    set_aside: Mutex<Option<SetAside>>,
    writer: Mutex<Option<write_back::Writer>>,
    origin: Origin,
}

impl Cache {
    fn new(mode: Caching, core: Core, origin: Origin) -> Arc<Self> {
        Arc::new(Self {
            mode,
            origin,
            memory: core.staging.in_memory(),
            may_wait: core.staging.may_wait(),
            core: Mutex::new(core),
            work: Notify::new(),
            progress: Notify::new(),
            turn: Semaphore::new(1),
            failures: AtomicU64::new(0),
            last_failure: Mutex::default(),
            set_aside: Mutex::default(),
            writer: Mutex::default(),
        })
    }

    /// Writes may wait here.
    fn stages(&self) -> bool {
        self.mode == Caching::ReadWrite
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        // The sections leave nothing half changed when they panic but the
        // invariants' own assertions, which are debugging aids.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One short section on the core.
    fn section<T>(&self, work: impl FnOnce(&mut Core) -> T) -> T {
        let mut core = self.core();
        let done = work(&mut core);
        #[cfg(any(test, debug_assertions))]
        core.check();
        done
    }

    /// Runs a short section on the core: at once when its file is memory, on
    /// a thread that may wait when it is a disk's. Dropping the future may
    /// leave the section to run to its end.
    async fn with<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&mut Core) -> T + Send + 'static,
    ) -> T {
        if self.memory {
            return self.section(work);
        }
        let cache = Arc::clone(self);
        apart(self.may_wait, move || cache.section(work)).await
    }

    /// As [`Cache::with`] for what nobody waits for.
    fn soon(self: &Arc<Self>, work: impl FnOnce(&mut Core) + Send + 'static) {
        if self.memory {
            return self.section(work);
        }
        match self.core.try_lock() {
            Ok(mut core) => work(&mut core),
            Err(TryLockError::Poisoned(core)) => work(&mut core.into_inner()),
            Err(TryLockError::WouldBlock) => match tokio::runtime::Handle::try_current() {
                Ok(runtime) => {
                    let cache = Arc::clone(self);
                    // Nobody waits for it.
                    drop(runtime.spawn_blocking(move || work(&mut cache.core())));
                }
                Err(_) => work(&mut self.core()),
            },
        }
    }

    fn failed(&self, cause: String) {
        *self
            .last_failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = cause;
        self.failures.fetch_add(1, Ordering::Release);
        self.progress.notify_waiters();
    }

    fn failure(&self) -> DeviceError {
        let cause = self
            .last_failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        DeviceError::Io(cause.clone())
    }

    /// Its state now. Waits for at most a short section.
    pub(super) fn status(&self) -> CacheStatus {
        let core = self.core();
        CacheStatus {
            mode: self.mode,
            dirty_bytes: core.index.dirty_sectors() * layout::SECTOR as u64,
            cached_bytes: core.index.cached_blocks() as u64 * layout::BLOCK,
            capacity_bytes: u64::from(core.index.capacity()) * layout::BLOCK,
            hits: core.hits,
            misses: core.misses,
            staging: core.staging.path().map(PathBuf::from),
            set_aside: self
                .set_aside
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        }
    }
}
