//! Growing a disk while it is open and in use.
//!
//! | step | writes | ended after it, the blob is |
//! |---|---|---|
//! | 1. intent into the metadata ([`super::intent`]) | held | the old disk |
//! | 2. Set Blob Properties: the new size | held | unfinished: whoever opens it completes it |
//! | 3. the old footer's page emptied | flow, below the old end | unfinished |
//! | 4. the new footer | flow, below the old end | the new disk |
//! | 5. the new size is told | flow | the new disk |
//!
//! 1 and 2 carry `If-Match`: one of them that comes late, after the blob has
//! changed, is refused rather than undoing what was done since. That is why
//! writes, each of which changes the entity tag, are held meanwhile: for two
//! requests on connections of their own, and never longer than [`LONGEST_HOLD`].
//! 3 and 4 go the way of every write, so that a lost answer is followed by a
//! raise of the sequence number before anything else happens to the page: the
//! old footer's page is a page of the disk from 5 on, and an emptying that came
//! late would take what was written to it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;

use super::create::check_size;
use super::intent::{self, Intent};
use super::io::Change;
use super::open::{last_page, unusable};
use super::patience::Patience;
use super::{OpenError, Volume};
use crate::blob::vhd::{self, Layout};
use crate::blob::{Conditions, ETag, Failure, LeaseId, PageBlob, Properties, Range, StorageError};
use crate::device::{DeviceError, PAGE};

/// How long writes may be held for the store's sake.
pub(super) const LONGEST_HOLD: Duration = Duration::from_secs(10);
/// How long the footer's move may take.
const LONGEST_MOVE: Duration = Duration::from_secs(30);
/// Bound on one attempt while writes are held.
pub(super) const ATTEMPT: Duration = Duration::from_secs(5);
/// Attempts that find the blob changed meanwhile, by the keeper's raises.
const MOST_CHANGES: u32 = 8;

impl Volume {
    /// Grows the disk to `disk_size` bytes while it is in use, and answers
    /// with its size; one of that size or more stays as it is. What is between
    /// the old end and the new reads as zeroes. Ended anywhere, it is the old
    /// disk or the new one, and is repeated with the same call; the volume goes
    /// on with the old size.
    ///
    /// # Errors
    /// It is open for reading only, fenced or closing; `disk_size` is no
    /// multiple of 512 or too large; the store refuses, or does not answer
    /// within 10 s for the writes that are held, 40 s in all.
    pub async fn grow(&self, disk_size: u64) -> Result<u64, OpenError> {
        let blob = &self.io.blob;
        let _alone = self.reshaping.lock().await;
        let inside = self.gate.enter();
        let _inside = inside.ok_or_else(|| unusable(blob, "it is being detached".into()))?;
        if self.size() >= disk_size {
            return Ok(self.size());
        }
        let lease = self.io.lease.as_ref().ok_or_else(|| {
            unusable(
                blob,
                "open for reading only: grow it where it is attached for writing, \
                 or while it is attached nowhere"
                    .into(),
            )
        })?;
        check_size(disk_size, self.layout).map_err(|reason| unusable(blob, reason))?;
        let mut abandoned = self.abandoned.subscribe();
        tokio::select! {
            biased;
            grown = self.grow_to(lease, disk_size) => grown,
            _ = abandoned.wait_for(|abandoned| *abandoned) => {
                Err(unusable(blob, "it is being detached".into()))
            }
        }
    }

    async fn grow_to(&self, lease: &LeaseId, disk_size: u64) -> Result<u64, OpenError> {
        // An earlier call may have left the blob half way to another size: then
        // that one is completed first, and tells the size to go on from.
        while self.size() < disk_size {
            self.check_not_fenced()?;
            let old = self.layout.blob_size(self.size());
            let new = self.layout.blob_size(disk_size);
            let intent = self
                .held("resize blob", self.give_size(lease, old, new))
                .await?;
            let moved = tokio::time::timeout(LONGEST_MOVE, self.move_footer(&intent)).await;
            let moved = moved.unwrap_or_else(|_| {
                let cause = format!("not done within {LONGEST_MOVE:?}: repeat the resize");
                Err(DeviceError::Io(cause))
            });
            moved.map_err(|error| {
                unusable(&self.io.blob, format!("moving the vhd footer: {error}"))
            })?;
            self.size
                .store(self.layout.usable(intent.new), Ordering::Release);
            tracing::info!(
                "{}: grown from {} to {} bytes",
                self.io.blob.address(),
                self.layout.usable(old),
                self.size()
            );
        }
        Ok(self.size())
    }

    pub(super) fn check_not_fenced(&self) -> Result<(), OpenError> {
        match self.io.standing.fenced() {
            None => Ok(()),
            Some(fenced) => Err(OpenError::Fenced {
                object: self.io.blob.address().to_string(),
                reason: fenced.reason.clone(),
            }),
        }
    }

    /// Does `work` with all changes of the blob held back. The caller has
    /// locked `reshaping`.
    pub(super) async fn held<T>(
        &self,
        what: &'static str,
        work: impl Future<Output = Result<T, OpenError>>,
    ) -> Result<T, OpenError> {
        let holding = async {
            let _held = self.io.hold.hold().await;
            work.await
        };
        tokio::time::timeout(LONGEST_HOLD, holding)
            .await
            .unwrap_or_else(|_| {
                let address = self.io.blob.address();
                let silent = Failure::Deadline { written: true };
                let mut error = StorageError::new(what, address, silent);
                error.detail = format!(
                    ": held writes for {LONGEST_HOLD:?} and let them go on: repeat it when the store answers"
                );
                Err(error.into())
            })
    }

    /// Steps 1 and 2. The intent that the blob's size says is to be completed:
    /// this one, or that of an earlier call.
    async fn give_size(&self, lease: &LeaseId, old: u64, new: u64) -> Result<Intent, OpenError> {
        // The pool of the data path may be full of reads.
        let blob = self.io.blob.isolated(1);
        let mut patience = Patience::begin();
        let mut changes = 0;
        loop {
            let error = match self.try_size(&blob, lease, old, new).await? {
                Ok(intent) => return Ok(intent),
                Err(error) => error,
            };
            if error.code() == "ConditionNotMet" && changes < MOST_CHANGES {
                changes += 1;
            } else {
                patience.after(error).await?;
            }
        }
    }

    /// One attempt; the inner error may be overcome by looking again.
    async fn try_size(
        &self,
        blob: &PageBlob,
        lease: &LeaseId,
        old: u64,
        new: u64,
    ) -> Result<Result<Intent, StorageError>, OpenError> {
        let none = Conditions::default();
        let seen = match blob.properties(&none, ATTEMPT).await {
            Ok(seen) => seen,
            Err(error) => return Ok(Err(error)),
        };
        if seen.size != old {
            return self.begun(&seen, old).map(Ok);
        }
        let mut intent = Intent {
            layout: self.layout,
            old,
            new,
            id: [0; 16],
        };
        let mut etag = seen.etag.clone();
        if self.layout != Layout::Raw {
            let end = last_page(blob, old, ATTEMPT).await?;
            if end.layout != self.layout {
                let reason = "its vhd footer is not where it was: other hands changed the blob";
                return Err(unusable(blob, reason.into()));
            }
            intent.id = vhd::unique_id(&end.page);
            let mut metadata = intent::without(&seen.metadata);
            metadata.push(intent.entry());
            let conditions = bound_to(lease, &etag);
            match blob.set_metadata(&metadata, &conditions, ATTEMPT).await {
                Ok(marked) => etag = marked.etag,
                Err(error) => return Ok(Err(error)),
            }
        }
        let resized = blob.resize(new, &bound_to(lease, &etag), ATTEMPT).await;
        Ok(resized.map(|_| intent))
    }

    /// What an earlier call had begun with the blob, which has another size by
    /// now than when it was opened.
    fn begun(&self, seen: &Properties, old: u64) -> Result<Intent, OpenError> {
        let new = seen.size;
        let left = match self.layout {
            Layout::Raw => Some(Intent {
                layout: Layout::Raw,
                old,
                new,
                id: [0; 16],
            }),
            Layout::Vhd | Layout::LegacyVhd => Intent::of(&seen.metadata),
        };
        left.filter(|left| left.old == old && left.new == new && new > old)
            .ok_or_else(|| {
                let reason = format!(
                    "the blob has {new} bytes instead of {old}: other hands resized it; \
                     detach it and look at it before anything else"
                );
                unusable(&self.io.blob, reason)
            })
    }

    /// Steps 3 and 4: like any write of this volume.
    async fn move_footer(&self, intent: &Intent) -> Result<(), DeviceError> {
        if intent.layout == Layout::Raw {
            return Ok(());
        }
        let old = Range::at(intent.old - PAGE, PAGE);
        {
            let _locked = self.locks.lock(super::cache::blocks_around(old)).await;
            self.io.change(&Change::Clear(old)).await?;
        }
        let offset = intent.new - PAGE;
        let data = Bytes::copy_from_slice(&intent.footer());
        self.io.change(&Change::Put { offset, data }).await
    }
}

fn bound_to(lease: &LeaseId, etag: &ETag) -> Conditions {
    Conditions {
        if_match: Some(etag.clone()),
        ..Conditions::lease(lease)
    }
}
