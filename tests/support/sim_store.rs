//! A page blob in memory whose requests may be refused, may lose their answer,
//! and may be executed late: after later requests, and after their sender died.

// Each test uses part of it, and its sizes fit memory.
#![allow(dead_code, clippy::cast_possible_truncation)]

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use dysk::blob::{
    Attempt, BlobAddress, BlobType, Checksum, Conditions, ETag, Failure, LeaseId, LeaseState,
    PageRanges, Properties, Range, RangeRead, SequenceNumber, StorageError, Written,
};
use dysk::volume::PageStore;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

/// What happens to requests that change pages or the number, in percent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Refused with 503.
    pub refused: u32,
    /// Answered 500; done or not.
    pub unknown: u32,
    /// Answered 500 and done some requests later, unless refused by then.
    pub late: u32,
}

enum Change {
    Put(u64, Bytes),
    Clear(Range),
    Number(SequenceNumber),
}

struct Late {
    after: u64,
    change: Change,
    conditions: Conditions,
}

pub struct Blob {
    pub bytes: Vec<u8>,
    pub number: u64,
    pub lease: Option<LeaseId>,
    pub faults: Faults,
    pub latency: Duration,
    /// Put Pages done, with their lengths.
    pub puts: Vec<usize>,
    pub gets: u64,
    /// Everything that changes pages waits while this is set.
    pub stalled: bool,
    /// So does everything about leases.
    pub leases_stalled: bool,
    /// What changes pages is done and never answered.
    pub mute: bool,
    /// Everything that changes pages is answered so.
    pub failing: Option<(u16, &'static str)>,
    /// Requests of all kinds.
    pub requests: u64,
    late: Vec<Late>,
    rng: SmallRng,
}

type Refusal = (u16, &'static str);

impl Blob {
    fn check(&self, conditions: &Conditions) -> Result<(), Refusal> {
        match (&self.lease, &conditions.lease) {
            (Some(_), None) => return Err((412, "LeaseIdMissing")),
            (None, Some(_)) => return Err((412, "LeaseNotPresentWithBlobOperation")),
            (Some(held), Some(sent)) if held != sent => {
                return Err((412, "LeaseIdMismatchWithBlobOperation"));
            }
            _ => {}
        }
        if conditions
            .if_sequence_number_lt
            .is_some_and(|bound| self.number >= bound)
        {
            return Err((412, "SequenceNumberConditionNotMet"));
        }
        Ok(())
    }

    fn change(&mut self, change: &Change, conditions: &Conditions) -> Result<(), Refusal> {
        self.check(conditions)?;
        match change {
            Change::Put(offset, data) => {
                assert!(data.len() <= 4 << 20 && data.len() % 512 == 0 && offset % 512 == 0);
                let at = *offset as usize;
                self.bytes[at..at + data.len()].copy_from_slice(data);
                self.puts.push(data.len());
            }
            Change::Clear(range) => {
                let (start, end) = (range.start as usize, range.end as usize);
                self.bytes[start..end].fill(0);
            }
            Change::Number(SequenceNumber::Increment) => self.number += 1,
            Change::Number(SequenceNumber::Max(to)) => self.number = self.number.max(*to),
            Change::Number(SequenceNumber::Update(to)) => self.number = *to,
        }
        Ok(())
    }

    fn begin(&mut self) {
        self.requests += 1;
        let due = self.requests;
        let (now, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.late)
            .into_iter()
            .partition(|late| late.after <= due);
        self.late = later;
        for late in now {
            // Its sender is gone: nobody hears that it was refused.
            self.change(&late.change, &late.conditions).ok();
        }
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }
}

#[derive(Clone)]
pub struct SimStore {
    blob: Arc<Mutex<Blob>>,
    address: Arc<BlobAddress>,
    waiting: Arc<tokio::sync::Notify>,
}

impl std::fmt::Debug for SimStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SimStore")
    }
}

impl SimStore {
    pub fn new(size: usize, seed: u64) -> Self {
        let blob = Blob {
            bytes: vec![0; size],
            number: 0,
            lease: None,
            faults: Faults::default(),
            latency: Duration::from_millis(5),
            puts: Vec::new(),
            gets: 0,
            stalled: false,
            leases_stalled: false,
            mute: false,
            failing: None,
            requests: 0,
            late: Vec::new(),
            rng: SmallRng::seed_from_u64(seed),
        };
        Self {
            blob: Arc::new(Mutex::new(blob)),
            address: Arc::new(BlobAddress::new("acct", "dysks", "vol1.vhd")),
            waiting: Arc::default(),
        }
    }

    pub fn blob(&self) -> MutexGuard<'_, Blob> {
        self.blob.lock().expect("the simulation panicked before")
    }

    /// Lets go of everything that waits because of [`Blob::stalled`] or
    /// [`Blob::leases_stalled`].
    pub fn resume(&self) {
        {
            let mut blob = self.blob();
            (blob.stalled, blob.leases_stalled) = (false, false);
        }
        self.waiting.notify_waiters();
    }

    /// Waits until a change was done that is never answered.
    pub async fn muted(&self) {
        self.waiting.notified().await;
    }

    fn error(&self, what: &str, (status, code): Refusal) -> StorageError {
        let code = code.into();
        StorageError::new(what, &self.address, Failure::Status { status, code })
    }

    async fn wait(&self) {
        let latency = {
            let mut blob = self.blob();
            let latency = blob.latency;
            latency.mul_f64(blob.rng.random_range(0.5..1.5))
        };
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
    }

    async fn unstalled(&self, stalled: impl Fn(&Blob) -> bool) {
        loop {
            let resumed = self.waiting.notified();
            if !stalled(&self.blob()) {
                return;
            }
            resumed.await;
        }
    }

    async fn attempt(
        &self,
        what: &str,
        change: Change,
        conditions: &Conditions,
    ) -> Attempt<Written> {
        if !matches!(change, Change::Number(_)) {
            self.unstalled(|blob| blob.stalled).await;
        }
        self.wait().await;
        let pages = !matches!(change, Change::Number(_));
        let answer = self.take_effect(what, change, conditions);
        if pages && self.blob().mute {
            self.waiting.notify_waiters();
            std::future::pending::<()>().await;
        }
        answer
    }

    fn take_effect(&self, what: &str, change: Change, conditions: &Conditions) -> Attempt<Written> {
        let mut blob = self.blob();
        blob.begin();
        if let (Some(failing), false) = (blob.failing, matches!(change, Change::Number(_))) {
            return Err(self.error(what, failing));
        }
        let faults = blob.faults;
        if blob.chance(faults.refused) {
            return Err(self.error(what, (503, "ServerBusy")));
        }
        if blob.chance(faults.late) {
            let after = blob.requests + blob.rng.random_range(1..12);
            let conditions = conditions.clone();
            blob.late.push(Late {
                after,
                change,
                conditions,
            });
            return Err(self.error(what, (500, "InternalError")));
        }
        let unknown = blob.chance(faults.unknown);
        if unknown && blob.chance(50) {
            return Err(self.error(what, (500, "InternalError")));
        }
        let done = blob.change(&change, conditions);
        if unknown {
            return Err(self.error(what, (500, "InternalError")));
        }
        done.map_err(|refusal| self.error(what, refusal))?;
        Ok(Written {
            etag: ETag(format!("\"{}\"", blob.requests)),
            sequence_number: blob.number,
        })
    }

    async fn lease(
        &self,
        what: &str,
        work: impl FnOnce(&mut Blob) -> Result<(), Refusal>,
    ) -> Attempt<()> {
        self.unstalled(|blob| blob.leases_stalled).await;
        self.wait().await;
        let mut blob = self.blob();
        blob.begin();
        work(&mut blob).map_err(|refusal| self.error(what, refusal))
    }
}

impl PageStore for SimStore {
    fn address(&self) -> &BlobAddress {
        &self.address
    }

    fn isolated(&self, _max_connections: usize) -> Self {
        self.clone()
    }

    async fn put_page(
        &self,
        offset: u64,
        data: Bytes,
        _checksum: Checksum,
        conditions: &Conditions,
        _deadline: Duration,
    ) -> Attempt<Written> {
        self.attempt("put page", Change::Put(offset, data), conditions)
            .await
    }

    async fn clear_pages(
        &self,
        range: Range,
        conditions: &Conditions,
        _deadline: Duration,
    ) -> Attempt<Written> {
        self.attempt("clear pages", Change::Clear(range), conditions)
            .await
    }

    async fn get_range(
        &self,
        range: Range,
        _checksum: Checksum,
        _conditions: &Conditions,
        _deadline: Duration,
    ) -> Attempt<RangeRead> {
        self.wait().await;
        let read = {
            let mut blob = self.blob();
            blob.begin();
            blob.gets += 1;
            let data = &blob.bytes[range.start as usize..range.end as usize];
            RangeRead {
                pieces: data.chunks(1536).map(Bytes::copy_from_slice).collect(),
                blob_size: blob.bytes.len() as u64,
                etag: ETag("\"0\"".into()),
                sequence_number: blob.number,
            }
        };
        // The answer is on its way, and may be old when it comes.
        self.wait().await;
        Ok(read)
    }

    async fn page_ranges(
        &self,
        within: Range,
        max_results: u32,
        _deadline: Duration,
    ) -> Attempt<PageRanges> {
        self.wait().await;
        let mut blob = self.blob();
        blob.begin();
        let mut filled: Vec<Range> = Vec::new();
        for start in (within.start..within.end).step_by(512) {
            let page = &blob.bytes[start as usize..start as usize + 512];
            if page.iter().any(|byte| *byte != 0) {
                match filled.last_mut() {
                    Some(last) if last.end == start => last.end += 512,
                    _ => filled.push(Range::at(start, 512)),
                }
            }
        }
        let most = max_results as usize;
        Ok(PageRanges {
            next_marker: (filled.len() > most).then(|| "more".into()),
            filled: filled.into_iter().take(most).collect(),
            cleared: Vec::new(),
            blob_size: blob.bytes.len() as u64,
            etag: ETag("\"0\"".into()),
        })
    }

    async fn properties(&self, _deadline: Duration) -> Attempt<Properties> {
        self.wait().await;
        let mut blob = self.blob();
        blob.begin();
        Ok(Properties {
            size: blob.bytes.len() as u64,
            blob_type: BlobType::Page,
            etag: ETag(format!("\"{}\"", blob.requests)),
            last_modified: UNIX_EPOCH,
            sequence_number: blob.number,
            lease_state: match blob.lease {
                Some(_) => LeaseState::Leased,
                None => LeaseState::Available,
            },
            lease_infinite: false,
            metadata: Vec::new(),
            copy: None,
        })
    }

    async fn set_sequence_number(
        &self,
        action: SequenceNumber,
        conditions: &Conditions,
        _deadline: Duration,
    ) -> Attempt<Written> {
        self.attempt("set blob properties", Change::Number(action), conditions)
            .await
    }

    async fn acquire_lease(
        &self,
        id: &LeaseId,
        _seconds: u32,
        _conditions: &Conditions,
        _deadline: Duration,
    ) -> Attempt<()> {
        self.lease("acquire lease", |blob| match &blob.lease {
            Some(held) if held != id => Err((409, "LeaseAlreadyPresent")),
            _ => {
                blob.lease = Some(id.clone());
                Ok(())
            }
        })
        .await
    }

    async fn renew_lease(&self, id: &LeaseId, _deadline: Duration) -> Attempt<()> {
        self.lease("renew lease", |blob| match &blob.lease {
            Some(held) if held == id => Ok(()),
            _ => Err((409, "LeaseIdMismatchWithLeaseOperation")),
        })
        .await
    }

    async fn release_lease(&self, id: &LeaseId, _deadline: Duration) -> Attempt<()> {
        self.lease("release lease", |blob| match &blob.lease {
            Some(held) if held == id => {
                blob.lease = None;
                Ok(())
            }
            _ => Err((409, "LeaseIdMismatchWithLeaseOperation")),
        })
        .await
    }

    async fn break_lease(
        &self,
        _period: Option<u32>,
        _conditions: &Conditions,
        _deadline: Duration,
    ) -> Attempt<u32> {
        self.lease("break lease", |blob| {
            blob.lease = None;
            Ok(())
        })
        .await
        .map(|()| 0)
    }
}
