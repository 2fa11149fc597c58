//! What an open volume counts: the requests it serves and those it makes.

use serde::{Deserialize, Serialize};

use super::store::PageStore;
use super::{CacheStatus, Volume};
use crate::metrics::{Meter, Metered};

/// The requests of a volume's clients.
#[derive(Debug, Default)]
pub(super) struct Served {
    pub read: Meter,
    pub write: Meter,
    pub flush: Meter,
    pub trim: Meter,
    pub zeroes: Meter,
    pub extents: Meter,
}

/// Requests for data to the store, each attempt for itself.
#[derive(Debug, Default)]
pub(super) struct Sent {
    pub get: Meter,
    pub put: Meter,
    pub clear: Meter,
    pub ranges: Meter,
}

/// What was counted since the volume was opened, and what is the case now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeStats {
    /// Usable bytes.
    pub size: u64,
    /// Reads by clients.
    pub read: Metered,
    /// Writes by clients.
    pub write: Metered,
    /// Flushes.
    pub flush: Metered,
    /// Trims; the bytes are those given back.
    pub trim: Metered,
    /// Writes of zeroes.
    pub zeroes: Metered,
    /// Questions for allocation.
    pub extents: Metered,
    /// Clients' requests under way.
    pub in_flight: u64,
    /// Get Blob, each attempt.
    pub store_get: Metered,
    /// Put Page, each attempt.
    pub store_put: Metered,
    /// Clear Pages, each attempt.
    pub store_clear: Metered,
    /// Get Page Ranges, each attempt.
    pub store_ranges: Metered,
    /// Attempts that the store refused because there were too many.
    pub refused: u64,
    /// The store throttles, so requests wait here.
    pub throttled: bool,
    /// The store refuses access, so requests wait here.
    pub blocked: bool,
    /// The lease is lost for good.
    pub fenced: bool,
    /// The cache, unless the mode is `none`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheStatus>,
}

impl VolumeStats {
    /// Clients' requests by kind, as metrics name them.
    #[must_use]
    pub fn served(&self) -> [(&'static str, &Metered); 6] {
        [
            ("read", &self.read),
            ("write", &self.write),
            ("flush", &self.flush),
            ("trim", &self.trim),
            ("write_zeroes", &self.zeroes),
            ("extents", &self.extents),
        ]
    }

    /// Requests to the store by kind, as metrics name them.
    #[must_use]
    pub fn sent(&self) -> [(&'static str, &Metered); 4] {
        [
            ("get", &self.store_get),
            ("put", &self.store_put),
            ("clear", &self.store_clear),
            ("ranges", &self.store_ranges),
        ]
    }
}

impl<S: PageStore> Volume<S> {
    /// What was counted so far. Waits for at most a short section of the cache.
    #[must_use]
    pub fn stats(&self) -> VolumeStats {
        let (served, sent) = (&self.served, &self.io.sent);
        VolumeStats {
            size: self.size(),
            read: served.read.snapshot(),
            write: served.write.snapshot(),
            flush: served.flush.snapshot(),
            trim: served.trim.snapshot(),
            zeroes: served.zeroes.snapshot(),
            extents: served.extents.snapshot(),
            in_flight: self.gate.count(),
            store_get: sent.get.snapshot(),
            store_put: sent.put.snapshot(),
            store_clear: sent.clear.snapshot(),
            store_ranges: sent.ranges.snapshot(),
            refused: self.io.pace.refused(),
            throttled: self.io.pace.throttled().is_some(),
            blocked: self.io.standing.blockage.describe().is_some(),
            fenced: self.is_fenced(),
            cache: self.cache.as_ref().map(|cache| cache.status()),
        }
    }
}
