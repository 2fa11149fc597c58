//! The lease of a blob: a pure state machine over "Lease Blob", REST reference.
//!
//! | operation | available | leased (A) | breaking (A) | broken (A) | expired (A) |
//! |---|---|---|---|---|---|
//! | acquire, A | leased | leased, new term | refused | leased | leased |
//! | acquire, other | leased | refused | refused | leased | leased |
//! | break | refused | breaking or broken | sooner of both | broken | broken |
//! | change A to B | refused | leased (B) | refused | refused | refused |
//! | renew A | refused | leased, term anew | refused | refused | leased |
//! | release A | refused | available | available | available | available |
//! | write, A | refused | written | written | refused | refused |
//! | write, no id | written | refused | refused | written, available | written, available |
//!
//! A write to a blob whose lease has expired or is broken ends that lease for
//! good, so "renew an expired lease unless the blob was modified" needs no
//! further memory. Expiry is not an event: it is judged by the clock whenever
//! the state is asked for.

use serde::{Deserialize, Serialize};

use crate::blob::LeaseState;

use super::clock::TICKS_PER_SECOND;
use super::refusal::{self, Kind, Refusal};

/// The lease as it is stored; times are ticks since 1970.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Lease {
    /// Nobody's.
    #[default]
    Available,
    /// Held until `expires` (expired after it); for ever when `None`.
    Leased {
        /// Lease id, lower case.
        id: String,
        /// Term in seconds, 15 to 60; `None` is infinite.
        seconds: Option<u32>,
        /// End of the term.
        expires: Option<u64>,
    },
    /// Broken from `ends` on.
    Breaking {
        /// Lease id.
        id: String,
        /// End of the break period.
        ends: u64,
    },
    /// Broken.
    Broken {
        /// Lease id.
        id: String,
    },
}

impl Lease {
    /// The state at `now`.
    pub(super) fn state(&self, now: u64) -> LeaseState {
        match self {
            Self::Available => LeaseState::Available,
            Self::Leased {
                expires: Some(end), ..
            } if *end <= now => LeaseState::Expired,
            Self::Leased { .. } => LeaseState::Leased,
            Self::Breaking { ends, .. } if *ends <= now => LeaseState::Broken,
            Self::Breaking { .. } => LeaseState::Breaking,
            Self::Broken { .. } => LeaseState::Broken,
        }
    }

    /// True for a lease that is held and never ends.
    pub(super) fn is_infinite(&self) -> bool {
        matches!(self, Self::Leased { expires: None, .. })
    }

    fn id(&self) -> Option<&str> {
        match self {
            Self::Available => None,
            Self::Leased { id, .. } | Self::Breaking { id, .. } | Self::Broken { id } => Some(id),
        }
    }

    fn is_id(&self, id: &str) -> bool {
        self.id().is_some_and(|own| own.eq_ignore_ascii_case(id))
    }

    fn held(id: &str, seconds: Option<u32>, now: u64) -> Self {
        Self::Leased {
            id: id.to_ascii_lowercase(),
            seconds,
            expires: seconds.map(|s| now + u64::from(s) * TICKS_PER_SECOND),
        }
    }

    /// Acquire for `seconds` (15 to 60, checked by the caller) or for ever.
    pub(super) fn acquire(
        &self,
        proposed: &str,
        seconds: Option<u32>,
        now: u64,
    ) -> Result<Self, Refusal> {
        match self.state(now) {
            LeaseState::Leased if !self.is_id(proposed) => {
                Err((&refusal::LEASE_ALREADY_PRESENT).into())
            }
            LeaseState::Breaking if self.is_id(proposed) => {
                Err((&refusal::LEASE_IS_BREAKING_AND_CANNOT_BE_ACQUIRED).into())
            }
            LeaseState::Breaking => Err((&refusal::LEASE_ALREADY_PRESENT).into()),
            _ => Ok(Self::held(proposed, seconds, now)),
        }
    }

    /// Renew: the term starts anew.
    pub(super) fn renew(&self, id: &str, now: u64) -> Result<Self, Refusal> {
        if !self.is_id(id) {
            return Err((&refusal::LEASE_ID_MISMATCH_WITH_LEASE).into());
        }
        match (self.state(now), self) {
            (LeaseState::Leased | LeaseState::Expired, Self::Leased { id, seconds, .. }) => {
                Ok(Self::held(id, *seconds, now))
            }
            _ => Err((&refusal::LEASE_IS_BROKEN_AND_CANNOT_BE_RENEWED).into()),
        }
    }

    /// Change to the id `proposed`; the term goes on. Repeating a change whose
    /// answer was lost succeeds.
    pub(super) fn change(&self, id: &str, proposed: &str, now: u64) -> Result<Self, Refusal> {
        let known = self.is_id(id) || self.is_id(proposed);
        match (self.state(now), self) {
            (
                LeaseState::Leased,
                Self::Leased {
                    seconds, expires, ..
                },
            ) if known => Ok(Self::Leased {
                id: proposed.to_ascii_lowercase(),
                seconds: *seconds,
                expires: *expires,
            }),
            (LeaseState::Leased, _) => Err((&refusal::LEASE_ID_MISMATCH_WITH_LEASE).into()),
            (LeaseState::Breaking, _) if self.is_id(id) => {
                Err((&refusal::LEASE_IS_BREAKING_AND_CANNOT_BE_CHANGED).into())
            }
            (LeaseState::Breaking, _) => Err((&refusal::LEASE_ID_MISMATCH_WITH_LEASE).into()),
            _ => Err((&refusal::LEASE_NOT_PRESENT_WITH_LEASE).into()),
        }
    }

    /// Release.
    pub(super) fn release(&self, id: &str) -> Result<Self, Refusal> {
        if self.is_id(id) {
            Ok(Self::Available)
        } else {
            Err((&refusal::LEASE_ID_MISMATCH_WITH_LEASE).into())
        }
    }

    /// Break after `period` seconds at most (`None`: what is left of a finite
    /// term, at once for an infinite one). Also gives the seconds left.
    pub(super) fn break_(&self, period: Option<u32>, now: u64) -> Result<(Self, u64), Refusal> {
        let Some(id) = self.id().map(str::to_owned) else {
            return Err((&refusal::LEASE_NOT_PRESENT_WITH_LEASE).into());
        };
        let asked = period.map(|s| now + u64::from(s) * TICKS_PER_SECOND);
        let ends = match (self.state(now), self) {
            (LeaseState::Leased, Self::Leased { expires, .. }) => match (asked, *expires) {
                (Some(asked), Some(expires)) => asked.min(expires),
                (Some(asked), None) => asked,
                (None, Some(expires)) => expires,
                (None, None) => now,
            },
            (LeaseState::Breaking, Self::Breaking { ends, .. }) => {
                asked.map_or(*ends, |asked| asked.min(*ends))
            }
            _ => now,
        };
        if ends <= now {
            return Ok((Self::Broken { id }, 0));
        }
        Ok((
            Self::Breaking { id, ends },
            (ends - now).div_ceil(TICKS_PER_SECOND),
        ))
    }

    /// Ends the term now (for tests that cannot wait a lease out). False when
    /// no finite lease is held.
    pub(super) fn expire(&mut self, now: u64) -> bool {
        match self {
            Self::Leased {
                expires: Some(end), ..
            } if *end > now => {
                *end = now;
                true
            }
            _ => false,
        }
    }

    /// May a read go on that names the lease `id`, or none?
    pub(super) fn check_read(&self, id: Option<&str>, now: u64) -> Result<(), Refusal> {
        id.map_or(Ok(()), |id| self.check_id(id, now))
    }

    /// May a write go on that names the lease `id`, or none? Says whether the
    /// write ends an expired or broken lease for good.
    pub(super) fn check_write(&self, id: Option<&str>, now: u64) -> Result<bool, Refusal> {
        match (id, self.state(now)) {
            (Some(id), _) => self.check_id(id, now).map(|()| false),
            (None, LeaseState::Leased | LeaseState::Breaking) => {
                Err((&refusal::LEASE_ID_MISSING).into())
            }
            (None, LeaseState::Expired | LeaseState::Broken) => Ok(true),
            (None, LeaseState::Available) => Ok(false),
        }
    }

    fn check_id(&self, id: &str, now: u64) -> Result<(), Refusal> {
        let kind: &'static Kind = match self.state(now) {
            LeaseState::Leased | LeaseState::Breaking if self.is_id(id) => return Ok(()),
            LeaseState::Leased | LeaseState::Breaking => &refusal::LEASE_ID_MISMATCH_WITH_BLOB,
            // The lease this very caller held ran out: Azure's documents call
            // that LeaseLost, Azurite LeaseNotPresentWithBlobOperation.
            LeaseState::Expired if self.is_id(id) => &refusal::LEASE_LOST,
            _ => &refusal::LEASE_NOT_PRESENT_WITH_BLOB,
        };
        Err(kind.into())
    }
}

/// `x-ms-lease-state`.
pub(super) fn state_name(state: LeaseState) -> &'static str {
    match state {
        LeaseState::Available => "available",
        LeaseState::Leased => "leased",
        LeaseState::Expired => "expired",
        LeaseState::Breaking => "breaking",
        LeaseState::Broken => "broken",
    }
}

/// `x-ms-lease-status`.
pub(super) fn status_name(state: LeaseState) -> &'static str {
    match state {
        LeaseState::Leased | LeaseState::Breaking => "locked",
        _ => "unlocked",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "11111111-1111-1111-1111-111111111111";
    const B: &str = "22222222-2222-2222-2222-222222222222";
    const C: &str = "33333333-3333-3333-3333-333333333333";
    const T: u64 = 1_000 * TICKS_PER_SECOND;

    fn states() -> [(LeaseState, Lease); 5] {
        let leased = Lease::held(A, Some(15), T);
        let expired = Lease::held(A, Some(15), T - 20 * TICKS_PER_SECOND);
        let breaking = Lease::held(A, None, T)
            .break_(Some(10), T)
            .expect("breaks")
            .0;
        let broken = Lease::held(A, None, T).break_(None, T).expect("breaks").0;
        [
            (LeaseState::Available, Lease::Available),
            (LeaseState::Leased, leased),
            (LeaseState::Breaking, breaking),
            (LeaseState::Broken, broken),
            (LeaseState::Expired, expired),
        ]
    }

    fn outcome(result: Result<Lease, Refusal>) -> String {
        match result {
            Ok(lease) => state_name(lease.state(T)).to_owned(),
            Err(refusal) => refusal.code().to_owned(),
        }
    }

    #[test]
    fn follows_the_table_of_the_reference() {
        let states = states();
        for (state, lease) in &states {
            assert_eq!(lease.state(T), *state);
        }
        let row = |f: &dyn Fn(&Lease) -> Result<Lease, Refusal>| {
            states
                .iter()
                .map(|(_, lease)| outcome(f(lease)))
                .collect::<Vec<_>>()
        };
        let mismatch = "LeaseIdMismatchWithLeaseOperation";
        let absent = "LeaseNotPresentWithLeaseOperation";
        assert_eq!(
            row(&|l| l.acquire(A, None, T)),
            [
                "leased",
                "leased",
                "LeaseIsBreakingAndCannotBeAcquired",
                "leased",
                "leased"
            ]
        );
        assert_eq!(
            row(&|l| l.acquire(B, None, T)),
            [
                "leased",
                "LeaseAlreadyPresent",
                "LeaseAlreadyPresent",
                "leased",
                "leased"
            ]
        );
        assert_eq!(
            row(&|l| l.break_(Some(0), T).map(|(l, _)| l)),
            [absent, "broken", "broken", "broken", "broken"]
        );
        assert_eq!(
            row(&|l| l.break_(Some(5), T).map(|(l, _)| l)),
            [absent, "breaking", "breaking", "broken", "broken"]
        );
        assert_eq!(
            row(&|l| l.change(A, B, T)),
            [
                absent,
                "leased",
                "LeaseIsBreakingAndCannotBeChanged",
                absent,
                absent
            ]
        );
        assert_eq!(
            row(&|l| l.change(B, A, T)),
            [absent, "leased", mismatch, absent, absent]
        );
        assert_eq!(
            row(&|l| l.change(B, C, T)),
            [absent, mismatch, mismatch, absent, absent]
        );
        let broken = "LeaseIsBrokenAndCannotBeRenewed";
        assert_eq!(
            row(&|l| l.renew(A, T)),
            [mismatch, "leased", broken, broken, "leased"]
        );
        assert_eq!(row(&|l| l.renew(B, T)), [mismatch; 5]);
        assert_eq!(
            row(&|l| l.release(A)),
            [mismatch, "available", "available", "available", "available"]
        );
        assert_eq!(row(&|l| l.release(B)), [mismatch; 5]);
    }

    #[test]
    fn guards_reads_and_writes() {
        let codes = |id: Option<&str>| {
            states().map(|(_, lease)| match lease.check_write(id, T) {
                Ok(ends) => format!("ok {ends}"),
                Err(refusal) => refusal.code().to_owned(),
            })
        };
        let absent = "LeaseNotPresentWithBlobOperation";
        assert_eq!(
            codes(None),
            [
                "ok false",
                "LeaseIdMissing",
                "LeaseIdMissing",
                "ok true",
                "ok true"
            ]
        );
        assert_eq!(
            codes(Some(A)),
            [absent, "ok false", "ok false", absent, "LeaseLost"]
        );
        let mismatch = "LeaseIdMismatchWithBlobOperation";
        assert_eq!(codes(Some(B)), [absent, mismatch, mismatch, absent, absent]);
        for (_, lease) in states() {
            assert!(lease.check_read(None, T).is_ok());
            assert_eq!(
                lease.check_read(Some(A), T).is_ok(),
                lease.check_write(Some(A), T).is_ok()
            );
        }
    }

    #[test]
    fn a_break_waits_for_the_shorter_time() {
        let lease = Lease::held(A, Some(15), T);
        assert_eq!(lease.break_(None, T).expect("breaks").1, 15);
        assert_eq!(lease.break_(Some(60), T).expect("breaks").1, 15);
        let (breaking, left) = lease.break_(Some(7), T).expect("breaks");
        assert_eq!(left, 7);
        assert_eq!(breaking.break_(Some(60), T).expect("breaks").1, 7);
        assert_eq!(breaking.state(T + 7 * TICKS_PER_SECOND), LeaseState::Broken);
        let forever = Lease::held(A, None, T);
        assert_eq!(forever.break_(None, T).expect("breaks").1, 0);
        assert_eq!(forever.break_(Some(30), T).expect("breaks").1, 30);
    }
}
