//! Keeps a volume's right to write: renews its lease, raises its sequence
//! number when the data path asks for it, and lets the fence fall when the
//! store says that the lease is somebody else's.
//!
//! All keepers run on one thread of their own with connections of their own:
//! a data path that is stalled, saturated or throttled cannot keep a lease
//! from being renewed.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, Handle};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::judge;
use super::moment::Moment;
use super::standing::Standing;
use super::store::PageStore;
use crate::blob::retry::Backoff;
use crate::blob::{Conditions, LeaseId, LeaseState, SequenceNumber, StorageError};

/// Seconds for which a lease is taken: the longest finite one there is.
pub const LEASE_SECONDS: u32 = 60;
const RENEW_EVERY: Duration = Duration::from_secs(15);
/// Bound on one attempt: several must fit into what is left of a lease.
const ATTEMPT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);

static RUNTIME: Mutex<Option<Handle>> = Mutex::new(None);

/// The runtime of the keepers' own thread, started at first use.
///
/// # Errors
/// The thread or its runtime could not be made.
pub fn runtime() -> std::io::Result<Handle> {
    let mut slot = RUNTIME.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(handle) = &*slot {
        return Ok(handle.clone());
    }
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    thread::Builder::new()
        .name("dysk-keeper".into())
        .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
    *slot = Some(handle.clone());
    Ok(handle)
}

/// Returns once the keepers' thread has done something: at once, when it is
/// well or there is none yet.
pub async fn answers() {
    let runtime = {
        let slot = RUNTIME.lock().unwrap_or_else(PoisonError::into_inner);
        slot.clone()
    };
    if let Some(runtime) = runtime {
        // It can neither panic nor be aborted.
        runtime.spawn(async {}).await.ok();
    }
}

/// A lease that is being kept; dropped unreleased, it is released in the
/// background.
#[derive(Debug)]
pub struct Keeper<S: PageStore> {
    lease: HeldLease<S>,
    stop: watch::Sender<bool>,
    task: Option<JoinHandle<()>>,
}

/// A lease that was acquired, or may have been: released when dropped.
#[derive(Debug)]
pub struct HeldLease<S: PageStore> {
    runtime: Handle,
    blob: S,
    id: LeaseId,
    release_on_drop: bool,
}

impl<S: PageStore> HeldLease<S> {
    /// Takes charge of `id` on `blob`, whose handle must have connections of
    /// its own that nothing but the keeper's thread uses.
    #[must_use]
    pub fn new(runtime: Handle, blob: S, id: LeaseId) -> Self {
        Self {
            runtime,
            blob,
            id,
            release_on_drop: true,
        }
    }

    /// Takes charge of a lease that an earlier daemon holds: not released
    /// when dropped before [`HeldLease::resumed`].
    #[must_use]
    pub fn of_an_earlier_daemon(runtime: Handle, blob: S, id: LeaseId) -> Self {
        let mut lease = Self::new(runtime, blob, id);
        lease.release_on_drop = false;
        lease
    }

    /// From now on it is held like any other.
    #[must_use]
    pub fn resumed(mut self) -> Self {
        self.release_on_drop = true;
        self
    }

    /// Releases the lease now.
    ///
    /// # Errors
    /// The store could not be told; the lease ends by itself within a minute.
    pub async fn release(mut self) -> Result<(), StorageError> {
        self.release_on_drop = false;
        let (blob, id) = (self.blob.clone(), self.id.clone());
        self.runtime
            .spawn(async move { release(&blob, &id).await })
            .await
            .expect("the release task neither panics nor is aborted")
    }

    /// Leaves the lease as it is: it is not ours any more.
    pub fn forget(mut self) {
        self.release_on_drop = false;
    }
}

impl<S: PageStore> Drop for HeldLease<S> {
    fn drop(&mut self) {
        if self.release_on_drop {
            let (blob, id) = (self.blob.clone(), self.id.clone());
            self.runtime.spawn(async move {
                if let Err(error) = release(&blob, &id).await {
                    warn!("{error}: the lease ends by itself within {LEASE_SECONDS} s");
                }
            });
        }
    }
}

/// A few attempts, bounded in all by about 15 s.
async fn release<S: PageStore>(blob: &S, id: &LeaseId) -> Result<(), StorageError> {
    let mut backoff = Backoff::new(PAUSE, LONGEST_PAUSE);
    let give_up = Instant::now() + 2 * ATTEMPT;
    loop {
        match blob.release_lease(id, ATTEMPT).await {
            Ok(()) => return Ok(()),
            // Released already (an answer was lost), broken, or deleted.
            Err(error) if is_conflict(&error) || error.is_not_found() => return Ok(()),
            Err(error) if Instant::now() >= give_up => return Err(error),
            Err(error) => tokio::time::sleep(backoff.pause(error.retry_after)).await,
        }
    }
}

/// The store refused a lease operation because of who holds the lease.
fn is_conflict(error: &StorageError) -> bool {
    matches!(error.status(), Some(409 | 412))
}

impl<S: PageStore> Keeper<S> {
    /// Starts to keep `lease`, confirmed last at the time in `standing`.
    #[must_use]
    pub fn start(lease: HeldLease<S>, standing: Arc<Standing>) -> Self {
        let (stop, stopped) = watch::channel(false);
        let (blob, id) = (lease.blob.clone(), lease.id.clone());
        let task = lease.runtime.spawn(keep(blob, id, standing, stopped));
        Self {
            lease,
            stop,
            task: Some(task),
        }
    }

    /// Stops renewing and releases the lease; a fenced volume's is left alone.
    ///
    /// # Errors
    /// As [`HeldLease::release`].
    pub async fn release(mut self, standing: &Standing) -> Result<(), StorageError> {
        self.stop.send_replace(true);
        if let Some(task) = self.task.take() {
            task.await
                .expect("the keeper neither panics nor is aborted");
        }
        if standing.fenced().is_some() {
            self.lease.forget();
            return Ok(());
        }
        self.lease.release().await
    }
}

async fn keep<S: PageStore>(
    blob: S,
    id: LeaseId,
    standing: Arc<Standing>,
    // Closed when the volume was dropped: nobody needs the lease any more.
    mut stop: watch::Receiver<bool>,
) {
    let mut renew_at = Instant::now() + RENEW_EVERY;
    let mut backoff = Backoff::new(PAUSE, LONGEST_PAUSE);
    let mut doubtful = false;
    // A raise comes next, if one is wanted: those who have the lease confirmed
    // may be so many that one of them always waits.
    let mut raise_next = false;
    while standing.fenced().is_none() && !*stop.borrow() {
        let wishes = standing.wishes();
        let confirm = wishes.confirm && !(raise_next && wishes.raise_to.is_some());
        let step = if doubtful || confirm || Instant::now() >= renew_at {
            let renewed = renew(&blob, &id, &standing).await;
            if renewed.is_ok() {
                renew_at = Instant::now() + RENEW_EVERY;
                doubtful = false;
            }
            raise_next = true;
            renewed
        } else if let Some(number) = wishes.raise_to {
            raise_next = false;
            let raised = raise(&blob, &id, number, &standing).await;
            doubtful = raised.as_ref().is_err_and(StorageError::is_lease_lost);
            raised
        } else {
            tokio::select! {
                biased;
                () = standing.wished() => {}
                () = tokio::time::sleep_until(renew_at) => {}
                changed = stop.changed() => if changed.is_err() { break },
            }
            continue;
        };
        match step {
            Ok(()) => {
                standing.blockage.lifted(blob.address());
                backoff.reset();
            }
            Err(error) if doubtful => info!("{error}: asking for the lease"),
            Err(error) => {
                if judge::is_blocked(&error) {
                    standing.blockage.because(&error);
                }
                warn!("{error}: trying again");
                tokio::select! {
                    biased;
                    () = standing.progress.pause(backoff.pause(error.retry_after)) => {}
                    changed = stop.changed() => if changed.is_err() { break },
                }
            }
        }
    }
    if standing.fenced().is_some() {
        look(&blob, &standing).await;
    }
    if let Some(fenced) = standing.fenced() {
        error!("{}: fenced for good {fenced}", blob.address());
    }
}

/// What the state of a lease that is not ours any more tells of its holder.
pub(super) fn whose(lease: LeaseState) -> &'static str {
    match lease {
        LeaseState::Leased => "another holder has the lease",
        LeaseState::Breaking | LeaseState::Broken => "the lease was broken and nobody has taken it",
        LeaseState::Available | LeaseState::Expired => {
            "another holder had the lease and has it no more"
        }
    }
}

/// Asks once who has the blob now that it is not ours. The store names no
/// holder: what can be told is whether there is one.
async fn look<S: PageStore>(blob: &S, standing: &Standing) {
    match blob.properties(ATTEMPT).await {
        Ok(seen) => standing.found(whose(seen.lease_state)),
        Err(error) if error.is_not_found() => standing.found("the blob is gone"),
        Err(error) => info!("{error}: not known who has the lease"),
    }
}

async fn renew<S: PageStore>(
    blob: &S,
    id: &LeaseId,
    standing: &Standing,
) -> Result<(), StorageError> {
    let asked = Moment::now();
    match blob.renew_lease(id, ATTEMPT).await {
        Ok(()) => standing.confirmed(asked),
        Err(error) if is_conflict(&error) || error.is_not_found() => standing.fence_because(&error),
        Err(error) => return Err(error),
    }
    Ok(())
}

async fn raise<S: PageStore>(
    blob: &S,
    id: &LeaseId,
    number: u64,
    standing: &Standing,
) -> Result<(), StorageError> {
    let action = SequenceNumber::Max(number);
    match blob
        .set_sequence_number(action, &Conditions::lease(id), ATTEMPT)
        .await
    {
        Ok(written) => standing.raised(written.sequence_number.max(number)),
        Err(error) if error.is_not_found() => standing.fence_because(&error),
        Err(error) => return Err(error),
    }
    Ok(())
}
