//! The page blob of the simulation: Azure's rules for leases, sequence numbers
//! and conditions, evaluated at the moment of execution.
//!
//! Follows "Lease Blob", its table "Outcomes of lease operations on blobs by
//! lease state", and the conditional headers of "Put Page".

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use dysk::blob::{Conditions, ETag, LeaseId, LeaseState, Range, SequenceNumber};

/// A refusal: status and error code.
pub type Refusal = (u16, &'static str);

/// What a lease looks like at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Lease {
    Available,
    /// Held until `until`, `Expired` after it.
    Leased {
        id: String,
        seconds: u32,
        until: Duration,
        /// Granted by an acquire whose sender had given up on it.
        late: bool,
    },
    Broken {
        id: String,
    },
}

/// One page blob.
#[derive(Debug)]
pub struct Blob {
    data: Vec<u8>,
    filled: Vec<bool>,
    pub number: u64,
    etag: u64,
    lease: Lease,
    /// Which condition the store looks at first; the documents do not say.
    pub lease_first: bool,
    /// Lease ids that were taken from their holder, or given back.
    pub lost: BTreeSet<String>,
    /// In which order lease ids were first granted.
    pub granted: BTreeMap<String, u32>,
    /// When they run out, or would have.
    run_out: BTreeMap<String, Duration>,
}

const PAGE: usize = 512;

impl Blob {
    /// A blob with these bytes, in which no page has been written yet but the
    /// ones that are not zero.
    pub fn new(data: Vec<u8>, lease_first: bool) -> Self {
        let filled = data
            .chunks(PAGE)
            .map(|page| page.iter().any(|byte| *byte != 0))
            .collect();
        Self {
            data,
            filled,
            number: 0,
            etag: 1,
            lease: Lease::Available,
            lease_first,
            lost: BTreeSet::new(),
            granted: BTreeMap::new(),
            run_out: BTreeMap::new(),
        }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.data
    }

    pub fn len(&self) -> u64 {
        self.data.len() as u64
    }

    pub fn etag(&self) -> ETag {
        ETag(format!("\"0x8D{:04X}\"", self.etag))
    }

    pub fn lease_state(&self, now: Duration) -> LeaseState {
        match &self.lease {
            Lease::Available => LeaseState::Available,
            Lease::Leased { until, .. } if *until > now => LeaseState::Leased,
            Lease::Leased { .. } => LeaseState::Expired,
            Lease::Broken { .. } => LeaseState::Broken,
        }
    }

    /// Who holds the lease now, and whether by an acquire that came late.
    pub fn holder(&self, now: Duration) -> Option<(&str, bool)> {
        match &self.lease {
            Lease::Leased {
                id, until, late, ..
            } if *until > now => Some((id, *late)),
            _ => None,
        }
    }

    /// When a lease runs out that was granted, or would have run out if nobody
    /// had broken it or given it back.
    pub fn runs_out(&self, id: &str) -> Option<Duration> {
        self.run_out.get(id).copied()
    }

    fn lose(&mut self) {
        if let Lease::Leased { id, .. } | Lease::Broken { id } = &self.lease {
            self.lost.insert(id.clone());
        }
    }

    /// Whether a change that names `named` may happen.
    fn may_change(&self, named: Option<&LeaseId>, now: Duration) -> Result<(), Refusal> {
        let state = self.lease_state(now);
        match (&self.lease, named) {
            (Lease::Available, None) => Ok(()),
            (Lease::Available, Some(_)) => Err((412, "LeaseNotPresentWithBlobOperation")),
            (Lease::Leased { .. }, None) if state == LeaseState::Leased => {
                Err((412, "LeaseIdMissing"))
            }
            (Lease::Leased { id, .. }, Some(named)) if state == LeaseState::Leased => {
                if id == named.as_str() {
                    Ok(())
                } else {
                    Err((412, "LeaseIdMismatchWithBlobOperation"))
                }
            }
            // Expired or broken.
            (_, None) => Ok(()),
            (Lease::Leased { id, .. } | Lease::Broken { id }, Some(named)) => {
                if id == named.as_str() {
                    Err((412, "LeaseLost"))
                } else {
                    Err((412, "LeaseNotPresentWithBlobOperation"))
                }
            }
        }
    }

    fn check(&self, conditions: &Conditions, now: Duration) -> Result<(), Refusal> {
        let lease = self.may_change(conditions.lease.as_ref(), now);
        let number = match conditions.if_sequence_number_lt {
            Some(bound) if self.number >= bound => Err((412, "SequenceNumberConditionNotMet")),
            _ => Ok(()),
        };
        if self.lease_first {
            lease.and(number)
        } else {
            number.and(lease)
        }
    }

    fn changed(&mut self, conditions: &Conditions) {
        self.etag += 1;
        if conditions.lease.is_none() {
            // Whoever changes a blob without a lease ends what was left of one.
            self.lose();
            self.lease = Lease::Available;
        }
    }

    fn pages(&mut self, range: Range) -> Result<(std::ops::Range<usize>, &mut [bool]), Refusal> {
        let bytes = index(range.start)..index(range.end);
        if bytes.end > self.data.len() || bytes.is_empty() {
            return Err((416, "InvalidPageRange"));
        }
        assert!(bytes.start.is_multiple_of(PAGE) && bytes.end.is_multiple_of(PAGE));
        let pages = bytes.start / PAGE..bytes.end / PAGE;
        Ok((bytes, &mut self.filled[pages]))
    }

    /// Put Page, update.
    pub fn put(
        &mut self,
        offset: u64,
        data: &[u8],
        conditions: &Conditions,
        now: Duration,
    ) -> Result<(), Refusal> {
        self.check(conditions, now)?;
        let (bytes, filled) = self.pages(Range::at(offset, data.len() as u64))?;
        filled.fill(true);
        self.data[bytes].copy_from_slice(data);
        self.changed(conditions);
        Ok(())
    }

    /// Put Page, clear.
    pub fn clear(
        &mut self,
        range: Range,
        conditions: &Conditions,
        now: Duration,
    ) -> Result<(), Refusal> {
        self.check(conditions, now)?;
        let (bytes, filled) = self.pages(range)?;
        filled.fill(false);
        self.data[bytes].fill(0);
        self.changed(conditions);
        Ok(())
    }

    /// Get Blob.
    pub fn get(&self, range: Range) -> Result<Vec<u8>, Refusal> {
        let bytes = index(range.start)..index(range.end);
        let data = self.data.get(bytes).ok_or((416, "InvalidRange"))?;
        Ok(data.to_vec())
    }

    /// Get Page Ranges.
    pub fn ranges(&self, within: Range) -> Vec<Range> {
        let mut ranges: Vec<Range> = Vec::new();
        for (page, filled) in self.filled.iter().enumerate() {
            let start = (page * PAGE) as u64;
            if !filled || start < within.start || start >= within.end {
                continue;
            }
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end += PAGE as u64,
                _ => ranges.push(Range::at(start, PAGE as u64)),
            }
        }
        ranges
    }

    /// Set Blob Properties on the sequence number.
    pub fn set_number(
        &mut self,
        action: SequenceNumber,
        conditions: &Conditions,
        now: Duration,
    ) -> Result<(), Refusal> {
        self.may_change(conditions.lease.as_ref(), now)?;
        self.number = match action {
            SequenceNumber::Max(number) => self.number.max(number),
            SequenceNumber::Update(number) => number,
            SequenceNumber::Increment => self.number + 1,
        };
        self.changed(conditions);
        Ok(())
    }

    fn matches(&self, conditions: &Conditions) -> Result<(), Refusal> {
        match &conditions.if_match {
            Some(etag) if *etag != self.etag() => Err((412, "ConditionNotMet")),
            _ => Ok(()),
        }
    }

    /// Lease Blob, acquire.
    pub fn acquire(
        &mut self,
        new: &LeaseId,
        seconds: u32,
        conditions: &Conditions,
        late: bool,
        now: Duration,
    ) -> Result<(), Refusal> {
        self.matches(conditions)?;
        match self.holder(now) {
            Some((id, _)) if id != new.as_str() => return Err((409, "LeaseAlreadyPresent")),
            Some(_) => {}
            None => self.lose(),
        }
        let order = u32::try_from(self.granted.len()).expect("few leases");
        self.granted.entry(new.as_str().into()).or_insert(order);
        let until = now + Duration::from_secs(seconds.into());
        self.run_out.insert(new.as_str().into(), until);
        self.lease = Lease::Leased {
            id: new.as_str().into(),
            seconds,
            until,
            late,
        };
        Ok(())
    }

    /// Lease Blob, renew: an expired lease too, while nobody else leased or
    /// changed the blob.
    pub fn renew(&mut self, named: &LeaseId, now: Duration) -> Result<(), Refusal> {
        match &mut self.lease {
            Lease::Available => Err((409, "LeaseNotPresentWithLeaseOperation")),
            Lease::Broken { id } if id == named.as_str() => {
                Err((409, "LeaseIsBrokenAndCannotBeRenewed"))
            }
            Lease::Leased {
                id, seconds, until, ..
            } if id == named.as_str() => {
                *until = now + Duration::from_secs((*seconds).into());
                self.run_out.insert(id.clone(), *until);
                Ok(())
            }
            _ => Err((409, "LeaseIdMismatchWithLeaseOperation")),
        }
    }

    /// Lease Blob, release.
    pub fn release(&mut self, named: &LeaseId) -> Result<(), Refusal> {
        match &self.lease {
            Lease::Available => Err((409, "LeaseNotPresentWithLeaseOperation")),
            Lease::Leased { id, .. } | Lease::Broken { id } if id == named.as_str() => {
                self.lose();
                self.lease = Lease::Available;
                Ok(())
            }
            _ => Err((409, "LeaseIdMismatchWithLeaseOperation")),
        }
    }

    /// Lease Blob, break at once.
    pub fn break_now(&mut self, conditions: &Conditions) -> Result<u32, Refusal> {
        self.matches(conditions)?;
        match &self.lease {
            Lease::Available => Err((409, "LeaseNotPresentWithLeaseOperation")),
            Lease::Leased { id, .. } | Lease::Broken { id } => {
                let id = id.clone();
                self.lose();
                self.lease = Lease::Broken { id };
                Ok(0)
            }
        }
    }
}

fn index(at: u64) -> usize {
    usize::try_from(at).expect("a simulated blob is small")
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn any() -> Conditions {
        Conditions::default()
    }

    fn id(text: &str) -> LeaseId {
        LeaseId::from_text(text)
    }

    #[test]
    fn an_expired_lease_is_renewed_unless_the_blob_was_touched() {
        let mut blob = Blob::new(vec![0; 1024], true);
        let (a, b) = (id("a"), id("b"));
        blob.acquire(&a, 60, &any(), false, S).unwrap();
        assert_eq!(
            blob.acquire(&b, 60, &any(), false, 2 * S),
            Err((409, "LeaseAlreadyPresent"))
        );
        let ours = Conditions::lease(&a);
        assert_eq!(
            blob.put(0, &[1; 512], &ours, 61 * S),
            Err((412, "LeaseLost"))
        );
        blob.renew(&a, 70 * S).unwrap();
        blob.put(0, &[1; 512], &ours, 71 * S).unwrap();

        blob.put(0, &[2; 512], &Conditions::default(), 131 * S)
            .unwrap();
        assert!(blob.renew(&a, 132 * S).is_err(), "changed since");
        blob.acquire(&a, 60, &any(), false, 133 * S).unwrap();
        blob.acquire(&b, 60, &any(), false, 200 * S).unwrap();
        assert_eq!(
            blob.renew(&a, 201 * S),
            Err((409, "LeaseIdMismatchWithLeaseOperation"))
        );
        assert_eq!(
            blob.put(0, &[1; 512], &ours, 201 * S),
            Err((412, "LeaseIdMismatchWithBlobOperation"))
        );
    }

    #[test]
    fn a_break_hangs_on_the_etag_which_leases_leave_alone() {
        let mut blob = Blob::new(vec![0; 1024], true);
        let a = id("a");
        let before = Conditions {
            if_match: Some(blob.etag()),
            ..Conditions::default()
        };
        blob.acquire(&a, 60, &any(), false, S).unwrap();
        let mut twin = Blob::new(vec![0; 1024], true);
        twin.acquire(&a, 60, &any(), false, S).unwrap();
        twin.break_now(&before).unwrap();
        assert_eq!(
            twin.renew(&a, S),
            Err((409, "LeaseIsBrokenAndCannotBeRenewed"))
        );

        blob.set_number(SequenceNumber::Increment, &Conditions::lease(&a), S)
            .unwrap();
        assert_eq!(blob.break_now(&before), Err((412, "ConditionNotMet")));
    }

    #[test]
    fn the_number_bounds_writes() {
        let mut blob = Blob::new(vec![0; 1024], false);
        let below = |bound| Conditions {
            if_sequence_number_lt: Some(bound),
            ..Conditions::default()
        };
        blob.put(0, &[1; 512], &below(1), S).unwrap();
        blob.set_number(SequenceNumber::Max(3), &Conditions::default(), S)
            .unwrap();
        blob.set_number(SequenceNumber::Max(2), &Conditions::default(), S)
            .unwrap();
        assert_eq!(
            blob.clear(Range::at(0, 512), &below(3), S),
            Err((412, "SequenceNumberConditionNotMet"))
        );
        blob.clear(Range::at(0, 512), &below(4), S).unwrap();
        assert_eq!(blob.ranges(Range::at(0, 1024)), []);
    }
}
