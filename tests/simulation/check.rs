//! Judges a history: is there an order of its writes that explains every read,
//! and what was left after each death?
//!
//! Here a history becomes what each cell saw of it; [`crate::timelines`] judges
//! one cell.

use std::collections::{BTreeMap, BTreeSet};

use dysk::volume::Caching;

use crate::plan::{Cells, Io};
use crate::register::Touch;
use crate::timelines::Timelines;

/// What may have become of unflushed writes when a volume is opened anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Loss {
    /// They are there.
    Nothing,
    /// They are there, or gone.
    Perhaps,
    /// They are gone: what is left is what the store has.
    Unflushed,
    /// Of each cell there is what the store has, or anything newer.
    Anything,
}

/// What happened, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A request began, to the volume that step `session` opened.
    Invoked { step: u32, session: u32, io: Io },
    /// It was answered; for a read, with these values of cells.
    Done { step: u32, values: Vec<(u32, u64)> },
    /// It failed, or its future was dropped.
    Ended { step: u32, why: String },
    /// A volume was opened: whoever reads from now on sees what is left after
    /// this loss.
    Opened { session: u32, loss: Loss },
    /// A volume was closed in good order: everything is in the store.
    Closed { session: u32 },
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

/// A session's place: when it was granted the lease, and how many daemons had
/// it before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    pub granted: u32,
    pub daemons: u32,
}

/// What is known of sessions.
#[derive(Clone, Debug, Default)]
pub struct Sessions {
    /// In which order they were granted the lease.
    pub ranks: BTreeMap<u32, Rank>,
    /// Their caching, where there is any.
    pub caching: BTreeMap<u32, Caching>,
    /// Reads, and trims without FUA, that began while their holder's lease had
    /// not run out, whoever had taken it: where it knew of nothing it need not
    /// have asked.
    pub unasking: BTreeSet<u32>,
}

impl Sessions {
    pub fn caching(&self, session: u32) -> Caching {
        self.caching.get(&session).copied().unwrap_or_default()
    }

    /// A write is in the store before it is acknowledged.
    fn through(&self, session: u32, io: Io) -> bool {
        let fua = match io {
            // A trim too may be undone by what a disk still has of older writes.
            Io::Write(_, fua) | Io::Zero(_, fua) | Io::Trim(_, fua) => fua,
            _ => true,
        };
        fua || self.caching(session) != Caching::ReadWrite
    }
}

/// Checks `events` of a disk of `cells` cells that began as zeroes.
pub fn check(events: &[Event], cells: u32, sessions: &Sessions) -> Result<(), String> {
    let mut checked: BTreeSet<Vec<Touch>> = BTreeSet::new();
    for (cell, touches) in touches(events, cells, sessions).into_iter().enumerate() {
        if checked.contains(&touches) {
            continue;
        }
        Timelines::new(sessions)
            .follow(&touches)
            .map_err(|wrong| format!("cell {cell} (byte {}): {wrong}", cell * 128))?;
        checked.insert(touches);
    }
    Ok(())
}

fn touches(events: &[Event], cells: u32, sessions: &Sessions) -> Vec<Vec<Touch>> {
    let mut begun: BTreeMap<u32, (u32, Io)> = BTreeMap::new();
    let mut answers: BTreeMap<u32, BTreeMap<u32, u64>> = BTreeMap::new();
    for event in events {
        if let Event::Done { step, values } = event {
            answers.insert(*step, values.iter().copied().collect());
        }
    }
    let mut all = vec![Vec::new(); cells as usize];
    let everywhere = |all: &mut Vec<Vec<Touch>>, touch: Touch| {
        all.iter_mut().for_each(|touches| touches.push(touch));
    };
    for event in events {
        match event {
            Event::Invoked { step, session, io } => {
                let (step, session) = (*step, *session);
                begun.insert(step, (session, *io));
                if let Some((cells, value)) = changes(step, *io) {
                    let through = sessions.through(session, *io);
                    for cell in cells.iter() {
                        all[cell as usize].push(Touch::Write {
                            step,
                            session,
                            value,
                            through,
                        });
                    }
                } else if let Some(values) = answers.get(&step) {
                    for (cell, value) in values {
                        all[*cell as usize].push(Touch::Read {
                            step,
                            session,
                            value: *value,
                        });
                    }
                    // One that failed promises nothing.
                    if *io == Io::Flush && sessions.caching(session) == Caching::ReadWrite {
                        everywhere(&mut all, Touch::Flush { step, session });
                    }
                }
            }
            Event::Done { step, values } => {
                let (session, io) = begun[step];
                if let Some((cells, _)) = changes(*step, io) {
                    for cell in cells.iter() {
                        all[cell as usize].push(Touch::Written { step: *step });
                    }
                }
                for (cell, _) in values {
                    all[*cell as usize].push(Touch::Answered { step: *step });
                }
                if io == Io::Flush && sessions.caching(session) == Caching::ReadWrite {
                    everywhere(&mut all, Touch::Flushed { step: *step });
                }
            }
            Event::Ended { step, .. } => {
                if let Some((cells, _)) = begun.get(step).and_then(|(_, io)| changes(*step, *io)) {
                    for cell in cells.iter() {
                        all[cell as usize].push(Touch::GivenUp { step: *step });
                    }
                }
            }
            Event::Opened { session, loss } => {
                let (session, loss) = (*session, *loss);
                everywhere(&mut all, Touch::Opened { session, loss });
            }
            Event::Closed { session } => {
                let session = *session;
                everywhere(&mut all, Touch::Closed { session });
            }
            Event::Noted { .. } => {}
        }
    }
    all
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

    fn opened(session: u32, loss: Loss) -> Event {
        Event::Opened { session, loss }
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
        let rank = |granted| Rank {
            granted,
            daemons: 0,
        };
        let sessions = Sessions {
            ranks: [0, 1, 2]
                .map(|session| (session, rank(0)))
                .into_iter()
                .chain([50, 51].map(|session| (session, rank(1))))
                .collect(),
            caching: [
                (1, Caching::ReadWrite),
                (2, Caching::ReadOnly),
                (51, Caching::ReadWrite),
            ]
            .into(),
            unasking: (0..50).collect(),
        };
        check(&parts.concat(), CELLS_PER_PAGE, &sessions)
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
        let opened = [opened(50, Loss::Unflushed)];
        assert!(verdict(&[&[write(1)], &opened, &[done(1)], &read(2, 2)]).is_ok());
        assert!(verdict(&[&opened, &[write(1), done(1)]]).is_err());
        let late = [write(1), dropped(1)];
        assert!(verdict(&[&late, &opened, &read(2, 0), &read(3, 2)]).is_err());
        assert!(verdict(&[&late, &opened, &read(2, 2), &read(3, 2)]).is_ok());
    }

    /// A write that may wait in the cache, acknowledged.
    fn staged(step: u32) -> [Event; 2] {
        [begin(step, 1, Io::Write(PAGE, false)), done(step)]
    }

    fn flush(step: u32) -> [Event; 2] {
        [begin(step, 1, Io::Flush), done(step)]
    }

    #[test]
    fn what_was_flushed_outlives_a_loss_and_the_rest_may_go() {
        let lost = [opened(50, Loss::Unflushed)];
        for (left, fine) in [(2, true), (3, true), (4, true), (0, false)] {
            let history: [&[Event]; 5] = [
                &staged(1),
                &flush(10),
                &staged(2),
                &[staged(3), read(11, 4)].concat(),
                &[&lost[..], &read(20, left)].concat(),
            ];
            assert_eq!(verdict(&history).is_ok(), fine, "{left}");
        }
        let kept = [opened(1, Loss::Nothing)];
        assert!(verdict(&[&staged(1), &kept, &read(20, 2)]).is_ok());
        assert!(verdict(&[&staged(1), &kept, &read(20, 0)]).is_err());
        let once = [&staged(1)[..], &lost, &read(20, 0)].concat();
        assert!(verdict(&[&once, &read(21, 2)]).is_err(), "it comes back");
    }

    #[test]
    fn a_write_with_fua_outlives_a_loss() {
        let fua = [begin(1, 1, Io::Write(PAGE, true)), done(1)];
        let lost = [opened(50, Loss::Anything)];
        assert!(verdict(&[&fua, &lost, &read(20, 2)]).is_ok());
        assert!(verdict(&[&fua, &lost, &read(20, 0)]).is_err());
        let over = [
            begin(4, 1, Io::Flush),
            fua[0].clone(),
            fua[1].clone(),
            done(4),
        ];
        assert!(verdict(&[&staged(2), &over, &lost, &read(20, 0)]).is_err());
    }

    #[test]
    fn a_holder_that_was_overtaken_may_believe_empty_what_was_empty() {
        let theirs = [begin(30, 50, Io::Write(PAGE, false)), done(30)];
        let seen_at = |step, before: &[Event], seen| {
            let late = read(step, seen);
            verdict(&[before, &[opened(50, Loss::Nothing)], &theirs, &late])
        };
        let seen = |before: &[Event], seen| seen_at(20, before, seen);
        let mine = [write(1), done(1)];
        assert!(seen(&[], 31).is_ok(), "it asked");
        assert!(seen(&[], 0).is_ok(), "it never wrote there");
        assert!(seen(&mine, 31).is_ok(), "it asked");
        assert!(seen(&mine, 0).is_err(), "it wrote there");
        assert!(seen(&mine, 2).is_err(), "it caches nothing");
        assert!(seen_at(60, &[], 31).is_ok(), "it asked");
        assert!(seen_at(60, &[], 0).is_err(), "its lease had run out");
        let trim = [begin(2, 0, Io::Trim(PAGE, false)), done(2)];
        let cleared = [&mine[..], &trim].concat();
        assert!(seen(&cleared, 0).is_ok(), "it cleared it");
        let again = [&cleared[..], &[write(3), done(3)]].concat();
        assert!(seen(&again, 0).is_err(), "and wrote again");

        // Sessions 0 and 2 do not stage; 50 leaves the volume to others, 51 not.
        for (mine, taken_by) in [(0, 50), (0, 51), (2, 50)] {
            let trimmed_at = |step, before: &[Event]| {
                let opened = [opened(taken_by, Loss::Nothing)];
                let theirs = [begin(70, taken_by, Io::Write(PAGE, false)), done(70)];
                let trim = [begin(step, mine, Io::Trim(PAGE, false)), done(step)];
                verdict(&[before, &opened, &theirs, &trim])
            };
            let wrote = [begin(1, mine, Io::Write(PAGE, false)), done(1)];
            assert!(trimmed_at(20, &[]).is_ok(), "what it never wrote");
            assert!(trimmed_at(20, &wrote).is_err(), "what it wrote");
            assert!(trimmed_at(60, &[]).is_err(), "after its lease's end");
        }
    }

    #[test]
    fn what_was_believed_empty_when_a_holder_was_overtaken_was_empty() {
        let late = [write(1), dropped(1)];
        let opened = [opened(50, Loss::Nothing)];
        let theirs = [begin(30, 50, Io::Read(PAGE))];
        let seen = |value| {
            let values = PAGE.iter().map(|cell| (cell, value)).collect();
            Event::Done { step: 30, values }
        };
        for (value, fine) in [(0, true), (2, false)] {
            let theirs = [&theirs[..], &[seen(value)]].concat();
            let history: [&[Event]; 4] = [&late, &opened, &read(20, 0), &theirs];
            assert_eq!(verdict(&history).is_ok(), fine, "{value}");
        }
    }

    #[test]
    fn a_holder_that_was_overtaken_sees_its_own_writes_and_flushes_none() {
        let lost = [opened(50, Loss::Unflushed)];
        let mine = |step, value| {
            let values = PAGE.iter().map(|cell| (cell, value)).collect();
            [begin(step, 1, Io::Read(PAGE)), Event::Done { step, values }]
        };
        let before = [&staged(1)[..], &staged(5), &flush(6)].concat();
        let overtaken = [&before[..], &lost, &staged(2)].concat();
        assert!(verdict(&[&overtaken, &mine(20, 3)]).is_ok());
        assert!(verdict(&[&overtaken, &mine(20, 2)]).is_err());
        assert!(verdict(&[&overtaken, &flush(20)]).is_err());
        let theirs = [
            begin(30, 50, Io::Read(PAGE)),
            Event::Done {
                step: 30,
                values: PAGE.iter().map(|cell| (cell, 3)).collect(),
            },
        ];
        assert!(verdict(&[&overtaken, &theirs]).is_err(), "it got in");
    }
}
