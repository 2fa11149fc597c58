//! Which parts of the volume hold no pages: they read as zeroes without a
//! request, and zeroes need not be sent there.
//!
//! It is knowledge about the store, filled in by [`super::load`] from Get Page
//! Ranges and by our own clears. What is not known to be empty is asked for, so
//! forgetting is always right; claiming too much would lose data.
//!
//! ## Invariants
//! - Nothing is in `empty` that a Put Page may fill: one that is about to be
//!   sent takes its range out first ([`Unwritten::put`]), and stays in
//!   `putting` until its fate is settled. If its caller gave up, the debt that
//!   it leaves ([`super::standing`]) is posted before it leaves `putting`.
//! - An answer of Get Page Ranges says what was so at some moment between
//!   [`Unwritten::ask`] and [`Unwritten::answered`]. What was in `putting` at
//!   the first, or came since, is in `touched` and not taken from the answer.
//!   Whoever asks waits between [`Unwritten::ask`] and the request until
//!   nothing is owed: what had left `putting` unsettled is dead by then.
//! - A clear puts its range in after the store's answer, while it holds the
//!   range lock: every Put Page to it is over, or has not begun.
//! - All of it was so at a moment at which the lease was ours: an answer is used
//!   once the lease was confirmed after it, a clear carries the lease.
//! - It is trusted only while the lease is ours for certain, see
//!   [`super::standing::Standing::certain`]: another holder may write anywhere.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::range_set::RangeSet;
use crate::blob::Range;

/// The most ranges that are kept: 100 KiB of them.
const MOST: usize = 4096;

/// What is known of one open volume.
#[derive(Debug)]
pub struct Unwritten {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    empty: RangeSet,
    /// Put Pages that were begun and are not settled, in order.
    putting: Vec<(u64, Range)>,
    next: u64,
    asked: Option<Asked>,
    /// Nothing is to be known.
    off: bool,
}

#[derive(Debug)]
struct Asked {
    id: u64,
    within: Range,
    touched: RangeSet,
}

/// A Put Page under way, until dropped.
#[derive(Debug)]
pub struct Putting<'a> {
    unwritten: &'a Unwritten,
    id: u64,
}

/// A question under way.
#[derive(Debug)]
pub struct Question(u64);

impl Default for Unwritten {
    fn default() -> Self {
        let state = State {
            empty: RangeSet::new(MOST),
            putting: Vec::new(),
            next: 0,
            asked: None,
            off: false,
        };
        Self {
            state: Mutex::new(state),
        }
    }
}

impl Unwritten {
    fn state(&self) -> MutexGuard<'_, State> {
        // No section leaves it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `range` without what is known to be empty at its ends; `None` if all of
    /// it is.
    pub fn needed(&self, range: Range) -> Option<Range> {
        self.state().empty.trimmed(range)
    }

    /// A Put Page to `range` is about to be sent, under the range lock. The
    /// guard is dropped after whatever stands for its unsettled outcome.
    pub fn put(&self, range: Range) -> Putting<'_> {
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        state.putting.push((id, range));
        state.empty.remove(range);
        if let Some(asked) = &mut state.asked {
            asked.touched.insert(range);
        }
        Putting {
            unwritten: self,
            id,
        }
    }

    /// The store has cleared `range`, which is still locked.
    pub fn cleared(&self, range: Range) {
        let mut state = self.state();
        if !state.off {
            state.empty.insert(range);
        }
    }

    /// Begins to ask for the part `within`; an earlier question is void.
    pub fn ask(&self, within: Range) -> Question {
        let mut state = self.state();
        let mut touched = RangeSet::new(MOST);
        for (_, range) in &state.putting {
            touched.insert(*range);
        }
        let id = state.next;
        state.next += 1;
        state.asked = Some(Asked {
            id,
            within,
            touched,
        });
        Question(id)
    }

    /// The answer: within what was asked for, up to `known_to`, only `filled`
    /// (ascending) holds pages. Says whether it could be used.
    pub fn answered(&self, question: &Question, filled: &[Range], known_to: u64) -> bool {
        let mut state = self.state();
        let state = &mut *state;
        let Some(asked) = state.asked.take_if(|asked| asked.id == question.0) else {
            return false;
        };
        // Too much was written meanwhile to remember what.
        if state.off || !asked.touched.is_whole() {
            return false;
        }
        let mut at = asked.within.start;
        let end = asked.within.end.min(known_to);
        let none = Range { start: end, end };
        let touched: Vec<Range> = asked.touched.iter().collect();
        for filled in filled.iter().chain([&none]) {
            let gap = Range {
                start: at,
                end: filled.start.min(end),
            };
            state.learn(gap, &touched);
            at = at.max(filled.end);
        }
        true
    }

    /// Nothing is known any more, nor will be until [`Unwritten::learn_anew`].
    pub fn forget(&self) {
        let mut state = self.state();
        state.off = true;
        state.asked = None;
        state.empty = RangeSet::new(MOST);
    }

    /// Goes on after [`Unwritten::forget`].
    pub fn learn_anew(&self) {
        self.state().off = false;
    }
}

impl State {
    /// `gap` holds no pages, except what was `touched` (ascending).
    fn learn(&mut self, gap: Range, touched: &[Range]) {
        let mut at = gap.start;
        let first = touched.partition_point(|range| range.end <= gap.start);
        for touched in &touched[first..] {
            if touched.start >= gap.end || at >= gap.end {
                break;
            }
            self.empty.insert(Range {
                start: at,
                end: touched.start,
            });
            at = at.max(touched.end);
        }
        self.empty.insert(Range {
            start: at,
            end: gap.end,
        });
    }
}

impl Drop for Putting<'_> {
    fn drop(&mut self) {
        let mut state = self.unwritten.state();
        let at = state.putting.iter().position(|(id, _)| *id == self.id);
        if let Some(at) = at {
            state.putting.remove(at);
        }
    }
}

/// Nothing but zeroes.
pub fn is_zero(data: &[u8]) -> bool {
    let mut chunks = data.chunks_exact(256);
    chunks.all(|chunk| {
        let any = chunk.iter().fold(0, |any, byte| any | byte);
        any == 0
    }) && chunks.remainder().iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: u64, end: u64) -> Range {
        Range { start, end }
    }

    /// What is known to be empty, by single bytes from 0 to 100.
    fn known(unwritten: &Unwritten) -> Vec<Range> {
        unwritten.state().empty.iter().collect()
    }

    #[test]
    fn an_answer_leaves_out_what_was_put_since_it_was_asked_for() {
        let unwritten = Unwritten::default();
        let before = unwritten.put(at(10, 20));
        let over = unwritten.put(at(90, 95));
        drop(over);
        let question = unwritten.ask(at(0, 100));
        drop(before);
        let during = unwritten.put(at(30, 40));
        drop(during);
        assert!(unwritten.answered(&question, &[at(50, 60)], 80));
        assert_eq!(
            known(&unwritten),
            [at(0, 10), at(20, 30), at(40, 50), at(60, 80)]
        );
        assert!(!unwritten.answered(&question, &[], 100), "only once");
    }

    #[test]
    fn a_put_takes_out_what_a_clear_puts_in() {
        let unwritten = Unwritten::default();
        unwritten.cleared(at(0, 100));
        assert_eq!(unwritten.needed(at(0, 100)), None);
        drop(unwritten.put(at(40, 50)));
        assert_eq!(unwritten.needed(at(0, 100)), Some(at(40, 50)));
        assert_eq!(unwritten.needed(at(50, 100)), None);
        unwritten.cleared(at(40, 50));
        assert_eq!(unwritten.needed(at(0, 100)), None);
    }

    #[test]
    fn what_was_cleared_and_put_again_is_not_taken_from_an_answer() {
        let unwritten = Unwritten::default();
        let question = unwritten.ask(at(0, 100));
        unwritten.cleared(at(0, 50));
        drop(unwritten.put(at(0, 50)));
        assert!(unwritten.answered(&question, &[], 100));
        assert_eq!(known(&unwritten), [at(50, 100)]);
    }

    #[test]
    fn a_later_question_voids_an_earlier_one() {
        let unwritten = Unwritten::default();
        let first = unwritten.ask(at(0, 50));
        let second = unwritten.ask(at(50, 100));
        drop(unwritten.put(at(0, 50)));
        assert!(!unwritten.answered(&first, &[], 50));
        assert!(unwritten.answered(&second, &[], 100));
        assert_eq!(known(&unwritten), [at(50, 100)]);
    }

    #[test]
    fn once_forgotten_nothing_is_known() {
        let unwritten = Unwritten::default();
        let question = unwritten.ask(at(0, 50));
        unwritten.forget();
        assert!(!unwritten.answered(&question, &[], 50));
        unwritten.cleared(at(0, 100));
        assert_eq!(known(&unwritten), []);
        unwritten.learn_anew();
        unwritten.cleared(at(0, 100));
        assert_eq!(known(&unwritten), [at(0, 100)]);
    }

    #[test]
    fn zeroes_are_told_from_anything_else() {
        for len in [0, 1, 255, 256, 512, 4096] {
            let mut data = vec![0; len];
            assert!(is_zero(&data));
            for at in [0, len / 2, len.saturating_sub(1)] {
                if let Some(byte) = data.get_mut(at) {
                    *byte = 1;
                    assert!(!is_zero(&data), "{at} of {len}");
                    data[at] = 0;
                }
            }
        }
    }
}
