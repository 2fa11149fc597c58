//! A page blob as a block device: open, lease, fence, ordering of overlapping
//! writes. Neither NBD nor the kernel is known here.
//!
//! A write walks: [`disk`] (bounds, alignment, [`range_lock`]) to [`io`]
//! (bound by [`standing`], judged by [`judge`], repeated) to one Put Page. The
//! [`keeper`] renews the lease and raises the sequence number beside it, and
//! [`load`] finds out which parts need no request at all ([`unwritten`]).

mod blockage;
mod cache;
mod copy;
mod create;
mod disk;
mod format_mark;
mod gate;
mod grow;
mod grow_open;
mod hold;
mod intent;
mod io;
mod judge;
mod keeper;
mod load;
mod moment;
mod open;
mod pace;
mod patience;
mod progress;
mod published;
mod range_lock;
mod range_set;
mod settings;
mod snapshot;
mod snapshot_group;
mod snapshot_open;
mod sparse;
mod standing;
mod stats;
mod store;
mod trouble;
mod unwritten;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use cache::Cache;
pub use cache::{
    Budget, CacheStatus, DEFAULT_CACHE_SIZE, DEFAULT_STAGING_DIR, Leftover, LeftoverState, Recover,
    SetAside, StagingFile, StagingFiles, StagingInfo, StagingOptions, System, discard_staging,
    inspect_staging, kept_aside, list_staging, restore_staging,
};
pub use copy::{Copied, CopyPlan, copy, forget_left_snapshots};
pub use create::{LARGEST_BLOB, check_size, create, create_with, delete};
pub use format_mark::{FormatError, FormatMark, FormatState};
use gate::Gate;
pub use grow::{Disk, grow, inspect};
use io::Io;
use keeper::Keeper;
pub use keeper::answers as keepers_answer;
pub use pace::{AccountPace, Limits, Pace, Permit, Throttled};
pub use published::{
    Access, PublishError, Published, expect_published, publish, published, unpublish,
};
use range_lock::RangeLock;
pub use settings::{Settings, TakenUp, Wish, forget_wish, leave_wish, wish};
pub use snapshot::{
    Snapshot, create_snapshot, delete_snapshot, delete_snapshots_of_name, list_snapshots,
    metadata_text, snapshot_name,
};
pub use snapshot_group::{
    GroupError, GroupSnapshots, Member, Membership, create_group, find_group,
};
pub use stats::VolumeStats;
pub use store::PageStore;

use crate::blob::vhd::Layout;
use crate::blob::{Account, Checksum, LeaseId, PageBlob, StorageError};

/// Azure's names for what a disk may cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Caching {
    /// Write-through; nothing is cached.
    #[default]
    None,
    /// Reads are cached; writes go through.
    ReadOnly,
    /// A volatile write cache: writes may wait for flush or FUA.
    ReadWrite,
}

/// The usual bound on one attempt that moves little: well above the store's
/// worst normal latency, well below a lease.
pub const DEFAULT_ATTEMPT_DEADLINE: Duration = Duration::from_secs(10);

/// How to open a volume.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Take no lease, refuse writes.
    pub read_only: bool,
    /// Caching mode. A volume opened `read_only` has no lease, so somebody else
    /// may write to it: nothing of it is cached, whatever is said here.
    pub caching: Caching,
    /// Where and how much to cache, and what to do with what an earlier attach
    /// left there.
    pub staging: StagingOptions,
    /// The lease is ours already: an earlier daemon of this node took it and
    /// died. It is renewed rather than acquired, and stays when opening fails.
    pub resume: bool,
    /// Write back nothing of what was staged before [`Volume::go_on`].
    pub hold_back: bool,
    /// Break somebody else's lease first.
    pub break_lease: bool,
    /// The lease id to take, fresh at each attach.
    pub lease: LeaseId,
    /// Bound on each attempt at a request that moves little.
    pub attempt_deadline: Duration,
    /// For how long to wait for somebody else's lease to end.
    pub wait: Duration,
    /// Told while that is being waited for.
    pub waiting: Option<tokio::sync::watch::Sender<bool>>,
    /// After this long one request's waiting for the store ends in EIO; never,
    /// when `None`.
    pub io_deadline: Option<Duration>,
    /// Checksum on every write sent and read received.
    pub integrity: Checksum,
    /// Learn in the background which parts hold no pages, and make no requests
    /// for them. Only who holds the lease may know.
    pub allocation_map: bool,
    /// What it sends to the store at most.
    pub limits: Limits,
    /// What it shares with the account's other volumes; `None` for a limit of
    /// its own.
    pub pace: Option<AccountPace>,
    /// Where the lease is kept; `None` for the keepers' own thread. A
    /// simulation puts its one runtime here.
    pub keeper: Option<tokio::runtime::Handle>,
}

impl OpenOptions {
    fn tell_waiting(&self, waiting: bool) {
        if let Some(told) = &self.waiting {
            told.send_if_modified(|now| std::mem::replace(now, waiting) != waiting);
        }
    }

    /// Read and write, uncached, under the fresh lease `lease`, waiting for
    /// nobody and for ever for the store.
    #[must_use]
    pub fn new(lease: LeaseId) -> Self {
        Self {
            read_only: false,
            caching: Caching::None,
            staging: StagingOptions::default(),
            resume: false,
            hold_back: false,
            break_lease: false,
            lease,
            attempt_deadline: DEFAULT_ATTEMPT_DEADLINE,
            wait: Duration::ZERO,
            waiting: None,
            io_deadline: None,
            integrity: Checksum::Off,
            allocation_map: true,
            limits: Limits::default(),
            pace: None,
            keeper: None,
        }
    }
}

/// Why a volume did not open. Nothing stays leased but a lease that was to be
/// resumed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OpenError {
    /// The store refused or could not be reached.
    #[error("{0}")]
    Storage(#[from] StorageError),
    /// Another holder has the lease.
    #[error("{object}: leased elsewhere: {remedy}")]
    Leased {
        /// `account/container/blob`.
        object: String,
        /// What to do.
        remedy: String,
    },
    /// The lease that was to be resumed is not ours any more.
    #[error("{object}: fenced: {reason}")]
    Fenced {
        /// `account/container/blob`.
        object: String,
        /// The store's answer, and what is left of unflushed writes.
        reason: String,
    },
    /// The blob cannot be a disk.
    #[error("{object}: {reason}")]
    Unusable {
        /// `account/container/blob`.
        object: String,
        /// Why, and what to do.
        reason: String,
    },
}

/// What an open volume looks like from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeStatus {
    /// Usable bytes.
    pub size: u64,
    /// How the disk lies in its blob.
    pub layout: Layout,
    /// The lease is lost for good: why, since when and to whom as far as the
    /// store tells, in words.
    pub fenced: Option<String>,
    /// When that was noticed.
    pub fenced_since: Option<jiff::Timestamp>,
    /// Finished reads, writes, flushes, trims and zeroes.
    pub completed: u64,
    /// Requests for data sent to the store.
    pub store_requests: u64,
    /// Requests under way.
    pub in_flight: u64,
    /// Requests that the store refused because there were too many.
    #[serde(default)]
    pub refused: u64,
    /// The store throttles, so requests wait here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttled: Option<Throttled>,
    /// The store refuses access and I/O waits: why, what to do, since when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocked: Option<String>,
    /// The cache, unless the mode is [`Caching::None`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheStatus>,
}

/// A page blob opened as a disk; its [`crate::device::BlockDevice`] side is in
/// [`disk`].
#[derive(Debug)]
pub struct Volume<S: PageStore = PageBlob> {
    io: Io<S>,
    layout: Layout,
    /// Usable bytes; grows, see [`grow_open`].
    size: AtomicU64,
    cache: Option<Arc<Cache>>,
    locks: RangeLock,
    gate: Gate,
    /// Held by whoever grows the disk or takes a snapshot: one at a time.
    reshaping: tokio::sync::Mutex<()>,
    completed: AtomicU64,
    served: stats::Served,
    /// Set to give up on everything under way.
    abandoned: tokio::sync::watch::Sender<bool>,
    keeper: Mutex<Option<Keeper<S>>>,
}

impl Volume {
    /// The account it is in.
    #[must_use]
    pub fn account(&self) -> &Account {
        self.io.blob.account()
    }
}

impl<S: PageStore> Volume<S> {
    /// Takes the lease, learns size and layout, raises the fence. At most four
    /// sequential store round trips. On any error nothing stays leased.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(blob: S, options: OpenOptions) -> Result<Arc<Self>, OpenError> {
        open::open(blob, options).await
    }

    /// A volume that another holder has taken while nobody kept it here: as
    /// one that is fenced while it is open. Every request ends in EIO; the
    /// store is never asked. `size` and `layout` are what it had.
    #[must_use]
    pub fn fenced(
        blob: S,
        options: &OpenOptions,
        (size, layout): (u64, Layout),
        reason: String,
    ) -> Arc<Self> {
        open::fenced(blob, options, (size, layout), reason)
    }

    fn new(
        io: Io<S>,
        layout: Layout,
        size: u64,
        cache: Option<Arc<Cache>>,
        keeper: Option<Keeper<S>>,
    ) -> Self {
        Self {
            io,
            layout,
            size: AtomicU64::new(size),
            cache,
            locks: RangeLock::default(),
            gate: Gate::default(),
            reshaping: tokio::sync::Mutex::default(),
            completed: AtomicU64::new(0),
            served: stats::Served::default(),
            abandoned: tokio::sync::watch::Sender::new(false),
            keeper: Mutex::new(keeper),
        }
    }

    /// Its state now; never waits for the store.
    #[must_use]
    pub fn status(&self) -> VolumeStatus {
        let fenced = self.io.standing.fenced();
        VolumeStatus {
            size: self.size(),
            layout: self.layout,
            fenced: fenced.as_ref().map(ToString::to_string),
            fenced_since: fenced.as_ref().map(|fenced| fenced.since),
            completed: self.completed.load(Ordering::Acquire),
            store_requests: self.io.requests.load(Ordering::Relaxed),
            in_flight: self.gate.count(),
            refused: self.io.pace.refused(),
            throttled: self.io.pace.throttled(),
            blocked: self.io.standing.blockage.describe(),
            cache: self.cache.as_ref().map(|cache| cache.status()),
        }
    }

    /// Usable bytes now.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Has it send no more than `limits` to the store from now on.
    pub fn set_limits(&self, limits: Limits) {
        self.io.cap.set(limits);
    }

    /// What it sends to the store at most.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.io.cap.limits()
    }

    /// Another holder has taken it, for good.
    #[must_use]
    pub fn is_fenced(&self) -> bool {
        self.io.standing.fenced().is_some()
    }

    /// Waits until no request is under way.
    pub async fn idle(&self) {
        self.gate.empty().await;
    }

    /// Refuses new I/O, waits for what is under way, flushes what is cached,
    /// releases the lease. May be called again.
    ///
    /// # Errors
    /// The lease could not be released; it ends by itself within a minute.
    pub async fn close(&self) -> Result<(), StorageError> {
        self.gate.close();
        self.gate.empty().await;
        if let Some(cache) = &self.cache {
            self.close_cache(cache).await;
        }
        let keeper = self
            .keeper
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match keeper {
            Some(keeper) => {
                let _under_way = self.io.standing.progress.begin();
                keeper.release(&self.io.standing).await
            }
            None => Ok(()),
        }
    }

    /// Waiting for it is of no use now: something is asked of the store, and
    /// the store refuses access or has done nothing for `patience`. An idle
    /// volume is never stuck, nor is one that is merely slow.
    #[must_use]
    pub fn is_stuck(&self, patience: Duration) -> bool {
        let still = self.io.standing.progress.stands_still();
        still.is_some_and(|still| still >= patience || self.io.standing.blockage.stands())
    }

    /// Waits until it [is stuck](Self::is_stuck), perhaps for ever.
    pub async fn stuck(&self, patience: Duration) {
        while !self.is_stuck(patience) {
            tokio::time::sleep(patience / 10).await;
        }
    }

    /// Ends everything under way with an error, so that [`Volume::close`] need
    /// not wait for a store that does not answer. Writes that are not flushed
    /// then are kept aside, see [`CacheStatus::set_aside`].
    pub fn abandon(&self) {
        self.gate.close();
        self.abandoned.send_replace(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_send<T: Send>(_: &T) {}

    fn size_of_future<F>(_: impl FnOnce(&'static Volume) -> F) -> usize {
        size_of::<F>()
    }

    /// Each layer moves the future of the one below into its own: what is
    /// large there is copied over and over, for every request.
    #[test]
    fn the_futures_of_requests_are_small() {
        use crate::device::BlockDevice as _;
        let sizes = [
            size_of_future(|volume| volume.read(0, 4096)),
            size_of_future(|volume| volume.write(0, bytes::Bytes::new(), false)),
            size_of_future(Volume::flush),
            size_of_future(|volume| volume.trim(0, 4096, false)),
            size_of_future(|volume| volume.write_zeroes(0, 4096, false, false)),
            size_of_future(|volume| volume.extents(0, 4096)),
        ];
        assert!(sizes.iter().all(|size| *size <= 1024), "{sizes:?}");
    }

    /// Compiles: the daemon runs these in tasks.
    #[allow(dead_code)]
    fn futures_are_send(blob: &PageBlob, options: OpenOptions, volume: &Volume) {
        is_send(&create(blob, 512, Layout::Raw, Duration::ZERO));
        is_send(&delete(
            blob,
            crate::blob::DeleteSnapshots::Refuse,
            Duration::ZERO,
        ));
        is_send(&grow(blob, 512, Duration::ZERO));
        is_send(&volume.grow(512));
        is_send(&volume.snapshot("a"));
        is_send(&create_snapshot(blob, "a", Duration::ZERO));
        is_send(&volume.close());
        is_send(&Volume::open(blob.clone(), options));
    }
}
