//! Judges a history: is there an order of its writes that explains every read?
//!
//! Each cell is a register. A write that was acknowledged took effect at one
//! moment between its beginning and its end. One that failed or was dropped is
//! *unsettled*: it takes effect once, at any time after it began, or never; but
//! it is dead once a write over it that began later took effect, or once
//! another node has opened the volume. What a read returned was the value at
//! one moment between its beginning and its end.
//!
//! The judge walks the history and keeps every possible state of the register:
//! its value, and which of the writes that may take effect already did.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use crate::plan::{Cells, Io};

/// What happened, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A request began, to the volume that step `session` opened.
    Invoked { step: u32, session: u32, io: Io },
    /// It was answered; for a read, with these values of cells.
    Done { step: u32, values: Vec<(u32, u64)> },
    /// It failed, or its future was dropped.
    Ended { step: u32, why: String },
    /// A volume was opened.
    Opened { session: u32 },
    /// An opening or closing ended otherwise.
    Noted { step: u32, what: String },
}

/// The value that a request leaves in the cells that it changes.
pub fn changes(step: u32, io: Io) -> Option<(Cells, u64)> {
    match io {
        Io::Write(cells, _) => Some((cells, u64::from(step) + 1)),
        Io::Zero(cells, _) => Some((cells, 0)),
        Io::Trim(cells, _) => Some((cells.whole_pages(), 0)),
        Io::Read(_) | Io::Extents(_) | Io::Flush => None,
    }
}

/// One event, as one cell sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Touch {
    Write { step: u32, session: u32, value: u64 },
    Written { step: u32 },
    GivenUp { step: u32 },
    Read { step: u32, value: u64 },
    Answered { step: u32 },
    Opened { session: u32 },
}

/// In which order sessions were granted the lease, and took it up from a dead
/// daemon.
pub type Ranks = BTreeMap<u32, (u32, u32)>;

/// Checks `events` of a disk of `cells` cells that began as zeroes; `rank` tells
/// which of two sessions is the later.
pub fn check(events: &[Event], cells: u32, rank: &Ranks) -> Result<(), String> {
    let mut checked: BTreeSet<Vec<Touch>> = BTreeSet::new();
    for (cell, touches) in touches(events, cells).into_iter().enumerate() {
        if checked.contains(&touches) {
            continue;
        }
        Register::new(rank)
            .follow(&touches)
            .map_err(|wrong| format!("cell {cell} (byte {}): {wrong}", cell * 128))?;
        checked.insert(touches);
    }
    Ok(())
}

fn touches(events: &[Event], cells: u32) -> Vec<Vec<Touch>> {
    let mut begun: BTreeMap<u32, (u32, Io)> = BTreeMap::new();
    let mut answers: BTreeMap<u32, BTreeMap<u32, u64>> = BTreeMap::new();
    for event in events {
        if let Event::Done { step, values } = event {
            answers.insert(*step, values.iter().copied().collect());
        }
    }
    let mut all = vec![Vec::new(); cells as usize];
    for event in events {
        match event {
            Event::Invoked { step, session, io } => {
                begun.insert(*step, (*session, *io));
                if let Some((cells, value)) = changes(*step, *io) {
                    for cell in cells.iter() {
                        all[cell as usize].push(Touch::Write {
                            step: *step,
                            session: *session,
                            value,
                        });
                    }
                } else if let Some(values) = answers.get(step) {
                    for (cell, value) in values {
                        all[*cell as usize].push(Touch::Read {
                            step: *step,
                            value: *value,
                        });
                    }
                }
            }
            Event::Done { step, values } => {
                if let Some((cells, _)) = changes(*step, begun[step].1) {
                    for cell in cells.iter() {
                        all[cell as usize].push(Touch::Written { step: *step });
                    }
                }
                for (cell, _) in values {
                    all[*cell as usize].push(Touch::Answered { step: *step });
                }
            }
            Event::Ended { step, .. } => {
                if let Some((cells, _)) = begun.get(step).and_then(|(_, io)| changes(*step, *io)) {
                    for cell in cells.iter() {
                        all[cell as usize].push(Touch::GivenUp { step: *step });
                    }
                }
            }
            Event::Opened { session } => {
                for touches in &mut all {
                    touches.push(Touch::Opened { session: *session });
                }
            }
            Event::Noted { .. } => {}
        }
    }
    all
}

/// Requests that touch one cell, each a bit by its place among them.
type Bits = u128;

/// One possible state of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Possible {
    value: u64,
    /// Open writes that took effect, or cannot any more.
    past: Bits,
    /// Open reads that saw what they will return.
    satisfied: Bits,
}

#[derive(Clone, Copy, Debug)]
struct Open {
    step: u32,
    session: u32,
    value: u64,
    bit: Bits,
    began: usize,
    gave_up: Option<usize>,
}

struct Register<'a> {
    rank: &'a Ranks,
    /// The latest holder that has opened.
    opened: Option<u32>,
    bits: BTreeMap<u32, Bits>,
    /// Writes that may take effect yet.
    open: Vec<Open>,
    /// Writes that were neither answered nor given up.
    unanswered: Bits,
    reads: Vec<(Bits, u64)>,
    possible: HashSet<Possible>,
}

impl<'a> Register<'a> {
    fn new(rank: &'a Ranks) -> Self {
        Self {
            rank,
            opened: None,
            bits: BTreeMap::new(),
            open: Vec::new(),
            unanswered: 0,
            reads: Vec::new(),
            possible: HashSet::from([Possible {
                value: 0,
                past: 0,
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

    /// Lets any of the open writes take effect, in any order.
    fn unfold(&mut self) {
        // With each write, what is over once it takes effect.
        let writes: Vec<(Bits, u64, Bits)> = self
            .open
            .iter()
            .map(|write| {
                let over = self.open.iter().filter(|earlier| {
                    earlier.step == write.step || earlier.gave_up.is_some_and(|at| at < write.began)
                });
                let over = over.fold(0, |bits, write| bits | write.bit);
                (write.bit, write.value, over)
            })
            .collect();
        let mut todo: Vec<Possible> = self.possible.iter().copied().collect();
        while let Some(state) = todo.pop() {
            for (bit, value, over) in &writes {
                if state.past & bit != 0 {
                    continue;
                }
                let mut next = Possible {
                    value: *value,
                    past: state.past | over,
                    ..state
                };
                for (read, wanted) in &self.reads {
                    if wanted == value {
                        next.satisfied |= read;
                    }
                }
                if self.possible.insert(next) {
                    todo.push(next);
                }
            }
        }
    }

    fn values(&self) -> BTreeSet<u64> {
        self.possible.iter().map(|state| state.value).collect()
    }

    /// Keeps the states in which `holds`, and forgets the request `bit` in them.
    fn settle(
        &mut self,
        bit: Bits,
        holds: impl Fn(&Possible) -> bool,
        wrong: impl Fn(&Self) -> String,
    ) -> Result<(), String> {
        self.unfold();
        let open = self
            .open
            .iter()
            .fold(self.unanswered, |bits, write| bits | write.bit);
        let kept: HashSet<Possible> = self
            .possible
            .iter()
            .filter(|state| holds(state))
            .map(|state| Possible {
                value: state.value,
                past: state.past & open & !bit,
                satisfied: state.satisfied & !bit,
            })
            .collect();
        if kept.is_empty() {
            return Err(wrong(self));
        }
        self.possible = kept;
        Ok(())
    }

    fn outlived(&self, session: u32) -> bool {
        let rank = |session| self.rank.get(&session).copied();
        self.opened
            .is_some_and(|opened| rank(session) < rank(opened))
    }

    fn follow(&mut self, touches: &[Touch]) -> Result<(), String> {
        let read: BTreeSet<u64> = touches
            .iter()
            .filter_map(|touch| match touch {
                Touch::Read { value, .. } => Some(*value),
                _ => None,
            })
            .collect();
        for (at, touch) in touches.iter().enumerate() {
            match *touch {
                Touch::Write {
                    step,
                    session,
                    value,
                } => {
                    let bit = self.bit(step);
                    self.unanswered |= bit;
                    if !self.outlived(session) {
                        self.open.push(Open {
                            step,
                            session,
                            value,
                            bit,
                            began: at,
                            gave_up: None,
                        });
                    }
                }
                Touch::Written { step } => {
                    let bit = self.bit(step);
                    self.settle(
                        bit,
                        |state| state.past & bit != 0,
                        |_| format!("write #{step} succeeded after another node had opened"),
                    )?;
                    self.open.retain(|write| write.step != step);
                    self.unanswered &= !bit;
                }
                Touch::GivenUp { step } => self.give_up(step, at, &read),
                Touch::Read { step, value } => {
                    let bit = self.bit(step);
                    self.reads.push((bit, value));
                    let seen = |mut state: Possible| {
                        if state.value == value {
                            state.satisfied |= bit;
                        }
                        state
                    };
                    let possible = std::mem::take(&mut self.possible);
                    self.possible = possible.into_iter().map(seen).collect();
                }
                Touch::Answered { step } => {
                    let bit = self.bit(step);
                    self.settle(
                        bit,
                        |state| state.satisfied & bit != 0,
                        |register| {
                            let values = register.values();
                            let read = register.reads.iter().find(|read| read.0 == bit);
                            let value = read.map(|read| read.1);
                            format!("read #{step} returned {value:?}; possible were {values:?}")
                        },
                    )?;
                    self.reads.retain(|read| read.0 != bit);
                }
                Touch::Opened { session } => {
                    self.unfold();
                    if !self.outlived(session) {
                        self.opened = Some(session);
                    }
                    let open = std::mem::take(&mut self.open);
                    self.open = open
                        .into_iter()
                        .filter(|write| !self.outlived(write.session))
                        .collect();
                }
            }
        }
        Ok(())
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::CELLS_PER_PAGE;

    const PAGE: Cells = Cells {
        first: 0,
        count: CELLS_PER_PAGE,
    };

    fn begin(step: u32, session: u32, io: Io) -> Event {
        Event::Invoked { step, session, io }
    }

    fn write(step: u32) -> Event {
        begin(step, 0, Io::Write(PAGE, false))
    }

    fn done(step: u32) -> Event {
        let values = Vec::new();
        Event::Done { step, values }
    }

    fn dropped(step: u32) -> Event {
        let why = "dropped".into();
        Event::Ended { step, why }
    }

    fn read(step: u32, value: u64) -> [Event; 2] {
        let values = PAGE.iter().map(|cell| (cell, value)).collect();
        [begin(step, 0, Io::Read(PAGE)), Event::Done { step, values }]
    }

    fn verdict(parts: &[&[Event]]) -> Result<(), String> {
        let rank = Ranks::from([(0, (0, 0)), (50, (1, 0))]);
        check(&parts.concat(), CELLS_PER_PAGE, &rank)
    }

    #[test]
    fn an_acknowledged_write_is_seen_and_stays() {
        let both = [write(1), done(1), write(2), done(2)];
        assert!(verdict(&[&both, &read(3, 3)]).is_ok());
        assert!(verdict(&[&both, &read(3, 2)]).is_err(), "undone");
        assert!(verdict(&[&both, &read(3, 0)]).is_err(), "lost");
        assert!(verdict(&[&both, &read(3, 9)]).is_err(), "invented");
    }

    #[test]
    fn concurrent_writes_settle_on_one_order() {
        let both = [write(1), write(2), done(2), done(1)];
        for last in [2, 3] {
            assert!(verdict(&[&both, &read(3, last), &read(4, last)]).is_ok());
            assert!(verdict(&[&both, &read(3, last), &read(4, 5 - last)]).is_err());
        }
        let between = [&both[..3], &read(3, 3)[..], &both[3..]].concat();
        assert!(verdict(&[&between, &read(4, 2)]).is_ok(), "1 came after 3");
    }

    #[test]
    fn an_unsettled_write_appears_once_late_or_never() {
        let unsettled = [write(1), done(1), write(2), dropped(2)];
        assert!(verdict(&[&unsettled, &read(3, 2), &read(4, 3), &read(5, 3)]).is_ok());
        assert!(verdict(&[&unsettled, &read(3, 2), &read(4, 2)]).is_ok());
        assert!(verdict(&[&unsettled, &read(3, 3), &read(4, 2)]).is_err());
        let over = [write(6), done(6)];
        assert!(verdict(&[&unsettled, &over, &read(7, 7)]).is_ok());
        assert!(verdict(&[&unsettled, &over, &read(7, 3)]).is_err());
    }

    #[test]
    fn nothing_of_an_older_session_happens_after_an_opening() {
        let opened = [Event::Opened { session: 50 }];
        assert!(verdict(&[&[write(1)], &opened, &[done(1)], &read(2, 2)]).is_ok());
        assert!(verdict(&[&opened, &[write(1), done(1)]]).is_err());
        let late = [write(1), dropped(1)];
        assert!(verdict(&[&late, &opened, &read(2, 0), &read(3, 2)]).is_err());
        assert!(verdict(&[&late, &opened, &read(2, 2), &read(3, 2)]).is_ok());
    }
}
