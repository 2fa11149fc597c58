//! One cell as a register with a volatile cache before it, in every state that
//! is possible.
//!
//! A write that was acknowledged took effect at one moment between its
//! beginning and its end. One that failed or was dropped is *unsettled*: it
//! takes effect once, at any time after it began, or never; but it is dead once
//! a write over it that began later took effect, or once another node has
//! opened the volume. What a read returned was the value at one moment between
//! its beginning and its end.
//!
//! What the store has may be older. It becomes the value at any moment, unseen;
//! a flush, a close and a write that goes through the cache end only after such
//! a moment. An unsettled write may also reach the store alone, under newer
//! ones that are only cached. When a loss comes, what the store has becomes the
//! value.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use dysk::volume::Caching;

use crate::check::{Loss, Sessions};

/// One event, as one cell sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Touch {
    Write {
        step: u32,
        session: u32,
        value: u64,
        /// It is in the store before it is acknowledged.
        through: bool,
    },
    Written {
        step: u32,
    },
    GivenUp {
        step: u32,
    },
    Read {
        step: u32,
        session: u32,
        value: u64,
    },
    Answered {
        step: u32,
    },
    Flush {
        step: u32,
        session: u32,
    },
    Flushed {
        step: u32,
    },
    Opened {
        session: u32,
        loss: Loss,
    },
    Closed {
        session: u32,
    },
}

/// Requests that touch one cell, each a bit by its place among them.
type Bits = u128;

/// One possible state of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Possible {
    value: u64,
    /// What the store has.
    stored: u64,
    /// Open writes that took effect, or cannot any more.
    past: Bits,
    /// Those of them that the store has, or will never have; and open flushes
    /// that may end.
    durable: Bits,
    /// Open reads that saw what they will return.
    satisfied: Bits,
}

#[derive(Clone, Copy, Debug)]
struct Open {
    step: u32,
    session: u32,
    value: u64,
    bit: Bits,
    through: bool,
    began: usize,
    gave_up: Option<usize>,
}

/// A read under way.
#[derive(Clone, Copy, Debug)]
pub struct Read {
    pub step: u32,
    session: u32,
    bit: Bits,
    pub value: u64,
}

/// One timeline of a cell.
#[derive(Clone)]
pub struct Register<'a> {
    sessions: &'a Sessions,
    /// The latest holder that has opened.
    opened: Option<u32>,
    /// Nothing reaches the store any more: this is its holder's own view.
    apart: bool,
    bits: BTreeMap<u32, Bits>,
    /// Writes that may take effect yet.
    open: Vec<Open>,
    /// Writes that were neither answered nor given up.
    unanswered: Bits,
    flushes: Bits,
    pub reads: Vec<Read>,
    possible: HashSet<Possible>,
}

impl<'a> Register<'a> {
    pub fn new(sessions: &'a Sessions) -> Self {
        Self {
            sessions,
            opened: None,
            apart: false,
            bits: BTreeMap::new(),
            open: Vec::new(),
            unanswered: 0,
            flushes: 0,
            reads: Vec::new(),
            possible: HashSet::from([Possible {
                value: 0,
                stored: 0,
                past: 0,
                durable: 0,
                satisfied: 0,
            }]),
        }
    }

    fn bit(&mut self, step: u32) -> Bits {
        let next = self.bits.len();
        assert!(
            next < 128,
            "more requests to one cell than the judge counts"
        );
        *self.bits.entry(step).or_insert(1 << next)
    }

    /// The store has the value: whatever came before is there or over.
    fn in_step(&self, mut state: Possible) -> Possible {
        if state.stored == state.value {
            state.durable |= state.past | self.flushes;
        }
        state
    }

    /// Lets any of the open writes take effect, in any order, and what is
    /// cached reach the store.
    pub fn unfold(&mut self) {
        // With each write, what is over once it takes effect.
        let writes: Vec<(Open, Bits)> = self
            .open
            .iter()
            .map(|write| {
                let over = self.open.iter().filter(|earlier| {
                    earlier.step == write.step || earlier.gave_up.is_some_and(|at| at < write.began)
                });
                (*write, over.fold(0, |bits, write| bits | write.bit))
            })
            .collect();
        let mut possible = std::mem::take(&mut self.possible);
        let mut todo: Vec<Possible> = possible.iter().copied().collect();
        while let Some(state) = todo.pop() {
            let mut reach = |next: Possible| {
                let next = self.in_step(next);
                if possible.insert(next) {
                    todo.push(next);
                }
            };
            for (write, over) in &writes {
                if state.past & write.bit == 0 {
                    let mut next = Possible {
                        value: write.value,
                        past: state.past | over,
                        ..state
                    };
                    let stages = self.sessions.caching(write.session) == Caching::ReadWrite;
                    if !stages {
                        next.stored = write.value;
                    }
                    for read in &self.reads {
                        if read.value == write.value {
                            next.satisfied |= read.bit;
                        }
                    }
                    // Apart from all others the store refuses it; but over what
                    // is staged it is staged first.
                    if !(self.apart && write.through) || stages {
                        reach(next);
                    }
                } else if state.durable & write.bit == 0 && !self.apart {
                    reach(Possible {
                        stored: write.value,
                        durable: state.durable | write.bit,
                        ..state
                    });
                }
            }
            if state.stored != state.value && !self.apart {
                reach(Possible {
                    stored: state.value,
                    ..state
                });
            }
        }
        self.possible = possible;
    }

    pub fn values(&self) -> BTreeSet<u64> {
        self.possible.iter().map(|state| state.value).collect()
    }

    pub fn stored(&self) -> BTreeSet<u64> {
        self.possible.iter().map(|state| state.stored).collect()
    }

    /// Keeps the states in which `holds`, and forgets the request `bit` in them.
    fn settle(
        &mut self,
        bit: Bits,
        holds: impl Fn(&Possible) -> bool,
        wrong: impl Fn(&Self) -> String,
    ) -> Result<(), String> {
        self.unfold();
        let writes = self.open.iter().fold(0, |bits, write| bits | write.bit);
        let open = (self.unanswered | writes) & !bit;
        let kept: HashSet<Possible> = self
            .possible
            .iter()
            .filter(|state| holds(state))
            .map(|state| Possible {
                past: state.past & open,
                durable: state.durable & (open | self.flushes) & !bit,
                satisfied: state.satisfied & !bit,
                ..*state
            })
            .collect();
        if kept.is_empty() {
            return Err(wrong(self));
        }
        self.possible = kept;
        Ok(())
    }

    fn outlived(&self, session: u32) -> bool {
        let rank = |session| self.sessions.ranks.get(&session).copied();
        self.opened
            .is_some_and(|opened| rank(session) < rank(opened))
    }

    pub fn touch(&mut self, touch: &Touch, at: usize, read: &BTreeSet<u64>) -> Result<(), String> {
        match *touch {
            Touch::Write {
                step,
                session,
                value,
                through,
            } => {
                let bit = self.bit(step);
                self.unanswered |= bit;
                if !self.outlived(session) {
                    self.open.push(Open {
                        step,
                        session,
                        value,
                        bit,
                        through,
                        began: at,
                        gave_up: None,
                    });
                }
                Ok(())
            }
            Touch::Written { step } => {
                let bit = self.bit(step);
                let through = self
                    .open
                    .iter()
                    .any(|write| write.step == step && write.through);
                let settled = self.settle(
                    bit,
                    |state| state.past & bit != 0 && (!through || state.durable & bit != 0),
                    |_| format!("write #{step} succeeded after another node had opened"),
                );
                self.open.retain(|write| write.step != step);
                self.unanswered &= !bit;
                settled
            }
            Touch::GivenUp { step } => {
                self.give_up(step, at, read);
                Ok(())
            }
            Touch::Read {
                step,
                session,
                value,
            } => {
                let bit = self.bit(step);
                self.reads.push(Read {
                    step,
                    session,
                    bit,
                    value,
                });
                let seen = |mut state: Possible| {
                    if state.value == value {
                        state.satisfied |= bit;
                    }
                    state
                };
                let possible = std::mem::take(&mut self.possible);
                self.possible = possible.into_iter().map(seen).collect();
                Ok(())
            }
            Touch::Answered { step } => {
                let bit = self.bit(step);
                self.settle(
                    bit,
                    |state| state.satisfied & bit != 0,
                    |register| {
                        let values = register.values();
                        let read = register.reads.iter().find(|read| read.bit == bit);
                        let value = read.map(|read| read.value);
                        format!("read #{step} returned {value:?}; possible were {values:?}")
                    },
                )?;
                self.reads.retain(|read| read.bit != bit);
                Ok(())
            }
            Touch::Flush { step, .. } => {
                self.flushes |= self.bit(step);
                let possible = std::mem::take(&mut self.possible);
                self.possible = possible.into_iter().map(|s| self.in_step(s)).collect();
                Ok(())
            }
            Touch::Flushed { step } => {
                let bit = self.bit(step);
                let settled = self.settle(
                    bit,
                    |state| state.durable & bit != 0,
                    |_| format!("flush #{step} succeeded after another node had opened"),
                );
                self.flushes &= !bit;
                settled
            }
            Touch::Closed { .. } => self.settle(
                0,
                |state| state.stored == state.value,
                |_| "an overtaken volume closed as if it had flushed".into(),
            ),
            Touch::Opened { .. } => unreachable!("an opening is every timeline's"),
        }
    }

    fn give_up(&mut self, step: u32, at: usize, read: &BTreeSet<u64>) {
        self.unanswered &= !self.bit(step);
        let Some(place) = self.open.iter().position(|write| write.step == step) else {
            return;
        };
        // One that nobody ever saw need not have happened.
        if read.contains(&self.open[place].value) {
            self.open[place].gave_up = Some(at);
        } else {
            self.open.remove(place);
        }
    }

    /// Whether the store may have nothing there.
    pub fn may_be_empty(&mut self) -> bool {
        self.unfold();
        self.stored().contains(&0)
    }

    /// Supposes that the store has nothing there; says whether that may be.
    pub fn suppose_empty(&mut self) -> bool {
        let may_be = self.may_be_empty();
        if may_be {
            self.possible.retain(|state| state.stored == 0);
        }
        may_be
    }

    /// A session opened the volume after this loss; those that are `apart` do
    /// not know. If it is `supposed_empty`, the store had nothing there.
    pub fn opened(
        &mut self,
        session: u32,
        (loss, supposed_empty): (Loss, bool),
        apart: &BTreeSet<u32>,
    ) {
        self.unfold();
        if supposed_empty {
            self.suppose_empty();
        }
        let stored = self.stored();
        let lost = |state: &Possible| Possible {
            value: state.stored,
            ..*state
        };
        self.possible = match loss {
            Loss::Nothing => std::mem::take(&mut self.possible),
            Loss::Unflushed => self.possible.iter().map(lost).collect(),
            Loss::Perhaps => {
                let lost = self.possible.iter().map(lost);
                self.possible.iter().copied().chain(lost).collect()
            }
            Loss::Anything => self
                .possible
                .iter()
                .flat_map(|state| stored.iter().map(|value| (*state, *value)))
                .map(|(state, value)| Possible { value, ..state })
                .collect(),
        };
        if !self.outlived(session) {
            self.opened = Some(session);
        }
        let open = std::mem::take(&mut self.open);
        self.open = open
            .into_iter()
            .filter(|write| !self.outlived(write.session))
            .collect();
        // What they are answered is their own timeline's matter.
        self.reads.retain(|read| !apart.contains(&read.session));
    }

    /// From now on this is what `session` alone sees.
    pub fn overtaken(&mut self, session: u32) {
        self.apart = true;
        self.opened = Some(session);
        self.open.retain(|write| write.session == session);
    }
}
