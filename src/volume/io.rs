//! One page-aligned piece of I/O, from the first attempt to a settled outcome.
//!
//! This is the one place where writes are fenced and attempts repeated; below
//! it nothing retries. What an outcome means is decided in [`super::judge`],
//! how fast attempts may follow each other in [`super::pace`].

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::hold::Hold;
use super::judge::{self, Verdict};
use super::pace::{Cap, Pace, Permit};
use super::progress::Progress;
use super::standing::{Fenced, Standing};
use super::stats::Sent;
use super::store::PageStore;
use super::trouble::Trouble;
use super::unwritten::Unwritten;
use crate::blob::retry::Backoff;
use crate::blob::{Attempt, Checksum, Conditions, LeaseId, PageRanges, Range, StorageError};
use crate::caller::unless_gone;
use crate::device::{DeviceError, ReadData};

/// The most that one Put Page takes, and the most that one read asks for.
pub const LARGEST_PIECE: u64 = 4 << 20;

const PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
const THROTTLED_PAUSE: Duration = Duration::from_millis(100);
const BLOCKED_PAUSE: Duration = Duration::from_secs(1);
/// Added to an attempt's deadline for each MiB it moves.
const PER_MIB: Duration = Duration::from_secs(2);

/// What changes pages.
#[derive(Clone, Debug)]
pub enum Change {
    /// Put Page, update: at most [`LARGEST_PIECE`].
    Put {
        /// Where, on a page boundary.
        offset: u64,
        /// What, whole pages.
        data: Bytes,
    },
    /// Put Page, clear: what it covers is zeroes from then on.
    Clear(Range),
    /// The same for what nobody counts on any more.
    Trim(Range),
}

impl Change {
    /// What it changes.
    #[must_use]
    pub fn range(&self) -> Range {
        match self {
            Self::Put { offset, data } => Range::at(*offset, data.len() as u64),
            Self::Clear(range) | Self::Trim(range) => *range,
        }
    }

    /// Bytes that it moves.
    fn bytes(&self) -> u64 {
        match self {
            Self::Put { data, .. } => data.len() as u64,
            Self::Clear(_) | Self::Trim(_) => 0,
        }
    }
}

/// An answer of Get Page Ranges.
#[derive(Clone, Debug)]
pub struct Filled {
    /// Ranges with pages, ascending; may begin before and end after what was
    /// asked for.
    pub ranges: Vec<Range>,
    /// Up to where the answer is complete.
    pub known_to: u64,
}

impl Filled {
    /// Takes in what else is filled, ascending, known up to `known_to`.
    pub fn add(&mut self, others: Vec<Range>, known_to: u64) {
        self.known_to = self.known_to.min(known_to);
        if others.is_empty() {
            return;
        }
        self.ranges.extend(others);
        self.ranges.sort_unstable();
        self.ranges.dedup_by(|next, last| {
            let together = next.start <= last.end;
            if together {
                last.end = last.end.max(next.end);
            }
            together
        });
    }
}

/// The store side of an open volume.
#[derive(Debug)]
pub struct Io<S> {
    pub(super) blob: S,
    /// `None` when the volume is open for reading only.
    pub(super) lease: Option<LeaseId>,
    pub(super) standing: Arc<Standing>,
    /// Bound on one attempt that moves little.
    pub(super) attempt_deadline: Duration,
    /// Bound on one request, waiting included.
    pub(super) io_deadline: Option<Duration>,
    /// Sent with writes, demanded of reads.
    pub(super) integrity: Checksum,
    /// Requests sent to the store.
    pub(super) requests: AtomicU64,
    /// Keeps changes back while the blob's entity tag has to stay as it is.
    pub(super) hold: Hold,
    pub(super) sent: Sent,
    /// What the store has no pages for; `None` when that is not to be known.
    pub(super) unwritten: Option<Unwritten>,
    pub(super) trouble: Trouble,
    /// What the owner allows.
    pub(super) cap: Cap,
    /// What the store allows.
    pub(super) pace: Pace,
}

impl<S: PageStore> Io<S> {
    /// Reads exactly `range`.
    ///
    /// # Errors
    /// Only what waiting cannot mend; see [`judge::read`].
    pub async fn read(&self, range: Range) -> Result<ReadData, DeviceError> {
        // Boxed here and below: what is made of these on the way up is moved
        // into place several times, for every request.
        let read = Box::pin(self.read_settled(range));
        self.within_deadline("read", range, read).await
    }

    /// Reads exactly `range`, which the caller has locked, for writing it back
    /// changed: not before no late write can change it any more, or the write
    /// back would undo that.
    ///
    /// # Errors
    /// As [`Io::read`] and [`Io::change`].
    pub async fn read_to_change(&self, range: Range) -> Result<ReadData, DeviceError> {
        let read = async {
            let owed = unless_gone(self.standing.nothing_owed()).await?;
            owed.map_err(|fenced| self.fenced(&fenced))?;
            self.read_settled(range).await
        };
        self.within_deadline("read", range, Box::pin(read)).await
    }

    /// Reads `range` from the store.
    pub(super) async fn fetch(&self, range: Range) -> Result<ReadData, DeviceError> {
        let deadline = self.deadline(range.len());
        self.admit(range.len()).await?;
        let under_way = self.standing.progress.begin();
        let mut pauses = Pauses::default();
        loop {
            let permit = self.permit(range.len(), pauses.again()).await?;
            self.requests.fetch_add(1, Ordering::Relaxed);
            let begun = Instant::now();
            let attempt = self
                .blob
                .get_range(range, self.integrity, &Conditions::default(), deadline)
                .await;
            self.sent.get.ended(begun, range.len(), attempt.is_err());
            permit.settle(&attempt);
            match attempt {
                Ok(read) => {
                    under_way.done();
                    self.standing.blockage.lifted(self.blob.address());
                    let mut data = ReadData::new();
                    read.pieces.into_iter().for_each(|piece| data.push(piece));
                    return Ok(data);
                }
                Err(error) => {
                    let verdict = judge::read(&error);
                    self.recover_read(verdict, &error, &mut pauses).await?;
                }
            }
        }
    }

    /// Which parts of `within` hold pages, from one Get Page Ranges.
    ///
    /// # Errors
    /// As [`Io::read`].
    pub async fn filled(
        &self,
        within: Range,
        most: u32,
        deadline: Duration,
    ) -> Result<Filled, DeviceError> {
        self.admit(0).await?;
        let under_way = self.standing.progress.begin();
        let mut pauses = Pauses::default();
        loop {
            let again = pauses.again();
            match self.ranges_once(within, most, again, deadline).await? {
                Ok(page) => {
                    under_way.done();
                    return Ok(Filled {
                        known_to: page.known_to(within),
                        ranges: page.filled,
                    });
                }
                Err(error) => {
                    let verdict = judge::read(&error);
                    self.recover_read(verdict, &error, &mut pauses).await?;
                }
            }
        }
    }

    /// One attempt at Get Page Ranges.
    pub(super) async fn ranges_once(
        &self,
        within: Range,
        most: u32,
        again: bool,
        deadline: Duration,
    ) -> Result<Attempt<PageRanges>, DeviceError> {
        let permit = self.permit(0, again).await?;
        self.requests.fetch_add(1, Ordering::Relaxed);
        let begun = Instant::now();
        let attempt = self.blob.page_ranges(within, most, deadline).await;
        self.sent.ranges.ended(begun, 0, attempt.is_err());
        permit.settle(&attempt);
        Ok(attempt)
    }

    async fn recover_read(
        &self,
        verdict: Verdict,
        error: &StorageError,
        pauses: &mut Pauses,
    ) -> Result<(), DeviceError> {
        match verdict {
            Verdict::Replay | Verdict::SlowDown | Verdict::Blocked => {
                self.waits(verdict, error, "reading again");
                unless_gone(pauses.pause(&self.standing.progress, verdict, error)).await?;
                match self.standing.fenced() {
                    Some(fenced) => Err(self.fenced(&fenced)),
                    None => Ok(()),
                }
            }
            _ => Err(self.fail(error)),
        }
    }

    /// Waits until the owner's cap admits a request that moves `bytes`. What
    /// waits here asks nothing of the store yet.
    async fn admit(&self, bytes: u64) -> Result<(), DeviceError> {
        if self.cap.is_open() {
            return Ok(());
        }
        tokio::select! {
            biased;
            fenced = self.standing.fence_fallen() => Err(self.fenced(&fenced)),
            () = self.cap.admit(bytes) => Ok(()),
        }
    }

    /// Waits until a request that moves `bytes` may be sent.
    async fn permit(&self, bytes: u64, again: bool) -> Result<Permit, DeviceError> {
        if let Some(permit) = self.pace.at_once(bytes) {
            return Ok(permit);
        }
        tokio::select! {
            biased;
            fenced = self.standing.fence_fallen() => Err(self.fenced(&fenced)),
            permit = self.pace.permit_for(bytes, again) => Ok(permit),
        }
    }

    /// Says what is waited for.
    fn waits(&self, verdict: Verdict, error: &StorageError, then: &str) {
        if verdict == Verdict::Blocked {
            self.trouble.blocked(error);
            self.standing.blockage.because(error);
        } else {
            self.trouble.waiting(error, then);
        }
    }

    /// Makes `change`, whose range the caller has locked, and answers once it
    /// is committed.
    ///
    /// # Errors
    /// The volume is fenced, what waiting cannot mend (see [`judge::write`]),
    /// or the caller has gone while nothing was under way.
    pub async fn change(&self, change: &Change) -> Result<(), DeviceError> {
        let range = change.range();
        let settled = Box::pin(self.change_settled(change));
        self.within_deadline("write", range, settled).await
    }

    /// Ends `work` at the operator's deadline. A write that is dropped half way
    /// leaves a debt in the standing.
    ///
    /// # Errors
    /// The deadline passed, or as `work`.
    pub async fn within_deadline<T>(
        &self,
        what: &str,
        range: Range,
        work: impl Future<Output = Result<T, DeviceError>>,
    ) -> Result<T, DeviceError> {
        let Some(deadline) = self.io_deadline else {
            return work.await;
        };
        match Box::pin(tokio::time::timeout(deadline, work)).await {
            Ok(result) => result,
            Err(_) => {
                let blob = self.blob.address();
                let cause = format!(
                    "{what} {range} on {blob}: not done within the i/o deadline of {deadline:?}"
                );
                self.trouble.failed(&cause);
                Err(DeviceError::Io(cause))
            }
        }
    }

    /// Sends `change` until its outcome is settled.
    pub(super) async fn send_settled(&self, change: &Change) -> Result<(), DeviceError> {
        // Before it goes inside: who holds would wait for it.
        unless_gone(self.admit(change.bytes())).await??;
        let under_way = self.standing.progress.begin();
        let mut pauses = Pauses::default();
        loop {
            // What waits for a raise is not under way, and takes nobody's room.
            unless_gone(self.standing.nothing_owed())
                .await?
                .map_err(|fenced| self.fenced(&fenced))?;
            // Before the bound is drawn: what only waits here is owed to nobody.
            let inside = unless_gone(self.hold.enter()).await?;
            let permit = unless_gone(self.permit(change.bytes(), pauses.again())).await??;
            let unsettled = unless_gone(self.standing.begin())
                .await?
                .map_err(|fenced| self.fenced(&fenced))?;
            let attempt = self.attempt(change, unsettled.less_than()).await;
            permit.settle(&attempt);
            let error = match attempt {
                Ok(()) => {
                    unsettled.settle();
                    under_way.done();
                    self.standing.blockage.lifted(self.blob.address());
                    return Ok(());
                }
                Err(error) => error,
            };
            let verdict = judge::write(&error);
            let fate = match verdict {
                Verdict::Unknown => {
                    self.trouble
                        .waiting(&error, "outcome unknown, raising the fence");
                    let bound = unsettled.bound();
                    // Until the raise is certain, `unsettled` stands for the
                    // write that may still happen; left here, it is a debt.
                    let raised = unless_gone(self.standing.raise_past(bound)).await?;
                    if raised.is_ok() {
                        unsettled.settle();
                        drop(inside);
                        unless_gone(pauses.pause(&self.standing.progress, verdict, &error)).await?;
                    }
                    raised
                }
                Verdict::Refence => {
                    let bound = unsettled.bound();
                    unsettled.settle();
                    drop(inside);
                    unless_gone(self.standing.raise_past(bound)).await?
                }
                Verdict::ConfirmLease => {
                    unsettled.settle();
                    drop(inside);
                    self.trouble.waiting(&error, "confirming the lease");
                    unless_gone(self.standing.confirm_lease()).await?
                }
                Verdict::Replay | Verdict::SlowDown | Verdict::Blocked => {
                    unsettled.settle();
                    drop(inside);
                    self.waits(verdict, &error, "writing again");
                    unless_gone(pauses.pause(&self.standing.progress, verdict, &error)).await?;
                    Ok(())
                }
                Verdict::Gone => {
                    unsettled.settle();
                    self.standing.fence_because(&error);
                    return Err(self.fail(&error));
                }
                Verdict::Failed => {
                    unsettled.settle();
                    return Err(self.fail(&error));
                }
            };
            fate.map_err(|fenced| self.fenced(&fenced))?;
        }
    }

    async fn attempt(&self, change: &Change, less_than: u64) -> Attempt<()> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let conditions = Conditions {
            lease: self.lease.clone(),
            if_sequence_number_lt: Some(less_than),
            ..Conditions::default()
        };
        let begun = Instant::now();
        let (meter, written) = match change {
            Change::Put { offset, data } => {
                let deadline = self.deadline(data.len() as u64);
                let put = self.blob.put_page(
                    *offset,
                    data.clone(),
                    self.integrity,
                    &conditions,
                    deadline,
                );
                (&self.sent.put, put.await)
            }
            Change::Clear(range) | Change::Trim(range) => {
                let clear = self
                    .blob
                    .clear_pages(*range, &conditions, self.attempt_deadline);
                (&self.sent.clear, clear.await)
            }
        };
        meter.ended(begun, change.bytes(), written.is_err());
        written.map(drop)
    }

    /// The volume is fenced: what its I/O is answered.
    pub fn fenced(&self, fenced: &Fenced) -> DeviceError {
        self.trouble.failed(&format_args!(
            "{} is fenced: {}",
            self.blob.address(),
            fenced.reason
        ));
        DeviceError::Io(format!("fenced: {}", fenced.reason))
    }

    fn fail(&self, error: &StorageError) -> DeviceError {
        self.trouble.failed(error);
        DeviceError::Io(error.to_string())
    }

    fn deadline(&self, len: u64) -> Duration {
        // At most LARGEST_PIECE, so the quotient is tiny.
        let mib = u32::try_from(len >> 20).unwrap_or(u32::MAX);
        self.attempt_deadline + PER_MIB.saturating_mul(mib)
    }
}

/// The pauses of one request.
#[derive(Default)]
struct Pauses {
    backoff: Option<Backoff>,
    slowed: bool,
    attempts: u32,
}

impl Pauses {
    /// Counts an attempt; says whether there was one before.
    fn again(&mut self) -> bool {
        self.attempts = self.attempts.saturating_add(1);
        self.attempts > 1
    }

    async fn pause(&mut self, progress: &Progress, verdict: Verdict, error: &StorageError) {
        // The first time it is the pace that says when: the request goes to the
        // head of its queue. One that is refused over and over stands back.
        if verdict == Verdict::SlowDown && !std::mem::replace(&mut self.slowed, true) {
            return;
        }
        let first = match verdict {
            Verdict::SlowDown => THROTTLED_PAUSE,
            Verdict::Blocked => BLOCKED_PAUSE,
            _ => PAUSE,
        };
        let backoff = self
            .backoff
            .get_or_insert_with(|| Backoff::new(first, LONGEST_PAUSE));
        progress.pause(backoff.pause(error.retry_after)).await;
    }
}
