//! The node's one bound on what all its volumes stage.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::layout::BLOCK;

/// Memory for staged blocks, shared by the volumes of a node.
///
/// Whoever is refused counts it; every member looks once in a while and, if
/// somebody was refused, gives back what it holds above its fair share.
#[derive(Debug)]
pub struct Budget {
    blocks: u64,
    used: AtomicU64,
    members: AtomicU64,
    refused: AtomicU64,
}

impl Budget {
    /// A budget of `bytes`, in whole blocks of 4 KiB.
    #[must_use]
    pub fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            blocks: bytes / BLOCK,
            used: AtomicU64::new(0),
            members: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        })
    }

    /// No bound but the volumes' own.
    #[must_use]
    pub fn unlimited() -> Arc<Self> {
        Self::new(u64::MAX)
    }

    /// Bytes held by all members together.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed) * BLOCK
    }
}

/// One volume's part of a budget; given back when dropped.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
    held: u64,
    /// Refusals that were seen and met.
    seen: u64,
}

impl Share {
    /// Joins with nothing held.
    pub fn join(budget: Arc<Budget>) -> Self {
        budget.members.fetch_add(1, Ordering::Relaxed);
        let seen = budget.refused.load(Ordering::Relaxed);
        Self {
            budget,
            held: 0,
            seen,
        }
    }

    /// Takes one block more, if there is one.
    pub fn take(&mut self) -> bool {
        let taken = self
            .budget
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                (used < self.budget.blocks).then_some(used + 1)
            })
            .is_ok();
        if taken {
            self.held += 1;
        } else {
            self.budget.refused.fetch_add(1, Ordering::Relaxed);
        }
        taken
    }

    /// Takes `blocks` whether they are there or not: what was staged by an
    /// earlier daemon is there already.
    pub fn take_over(&mut self, blocks: u64) {
        self.budget.used.fetch_add(blocks, Ordering::Relaxed);
        self.held += blocks;
    }

    /// Gives one block back.
    pub fn give(&mut self) {
        debug_assert!(self.held > 0);
        self.held -= 1;
        self.budget.used.fetch_sub(1, Ordering::Relaxed);
    }

    /// How many blocks to give back, because others were refused; asked again
    /// until they are given.
    pub fn owed(&mut self) -> u64 {
        let refused = self.budget.refused.load(Ordering::Relaxed);
        if refused == self.seen {
            return 0;
        }
        let members = self.budget.members.load(Ordering::Relaxed).max(1);
        let owed = self.held.saturating_sub(self.budget.blocks / members);
        if owed == 0 {
            self.seen = refused;
        }
        owed
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.held, Ordering::Relaxed);
        self.budget.members.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_keeps_more_than_a_fair_share_while_others_are_refused() {
        let budget = Budget::new(8 * BLOCK);
        let mut first = Share::join(budget.clone());
        assert_eq!((0..10).filter(|_| first.take()).count(), 8);
        assert_eq!(first.owed(), 0, "alone, all of it is its share");
        let mut second = Share::join(budget.clone());
        assert!(!second.take());
        assert_eq!(first.owed(), 4);
        assert_eq!(first.owed(), 4, "still");
        (0..4).for_each(|_| first.give());
        assert_eq!((first.owed(), first.owed()), (0, 0));
        assert_eq!((0..10).filter(|_| second.take()).count(), 4);
        assert_eq!(budget.used(), 8 * BLOCK);
        drop((first, second));
        assert_eq!(budget.used(), 0);
    }
}
