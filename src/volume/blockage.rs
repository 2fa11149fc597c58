//! Why a volume's I/O waits for a person: the store refuses access (a wrong
//! key, a firewall), and nothing but a change of that helps.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;

use crate::blob::BlobAddress;

/// Set by whoever was refused, data path and keeper alike; lifted by the next
/// request that was not.
#[derive(Debug, Default)]
pub struct Blockage {
    /// So that requests that go well need no lock.
    blocked: AtomicBool,
    why: Mutex<Option<(String, Timestamp)>>,
}

impl Blockage {
    fn lock(&self) -> MutexGuard<'_, Option<(String, Timestamp)>> {
        self.why.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The store refused access; the reason is the newest, the time the first.
    pub fn because(&self, reason: &dyn std::fmt::Display) {
        let mut why = self.lock();
        let since = why
            .as_ref()
            .map_or_else(Timestamp::now, |(_, since)| *since);
        *why = Some((reason.to_string(), since));
        self.blocked.store(true, Ordering::Release);
    }

    /// The store let a request for `blob` in.
    pub fn lifted(&self, blob: &BlobAddress) {
        if self.stands() {
            let mut why = self.lock();
            self.blocked.store(false, Ordering::Release);
            if let Some((_, since)) = why.take() {
                tracing::info!("{blob}: i/o is not blocked any more (it was since {since:.0})");
            }
        }
    }

    /// Access is refused now.
    #[must_use]
    pub fn stands(&self) -> bool {
        self.blocked.load(Ordering::Acquire)
    }

    /// Reason and time, in words.
    #[must_use]
    pub fn describe(&self) -> Option<String> {
        if !self.stands() {
            return None;
        }
        let why = self.lock();
        let (reason, since) = why.as_ref()?;
        Some(format!("{reason} (since {since:.0})"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_newest_reason_until_it_is_lifted() {
        let blockage = Blockage::default();
        assert_eq!(blockage.describe(), None);
        blockage.because(&"403 AuthorizationFailure");
        let since = blockage.lock().as_ref().map(|(_, since)| *since);
        blockage.because(&"403 AuthenticationFailed");
        let said = blockage.describe().expect("blocked");
        assert!(
            said.starts_with("403 AuthenticationFailed (since "),
            "{said}"
        );
        assert_eq!(blockage.lock().as_ref().map(|(_, since)| *since), since);
        blockage.lifted(&BlobAddress::new("acct", "dysks", "vol1.vhd"));
        assert_eq!(blockage.describe(), None);
    }
}
