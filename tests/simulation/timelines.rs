//! One cell over all holders of its volume. A holder that was overtaken does
//! not know it at first: it goes on in a timeline of its own, in which nothing
//! reaches the store.

use std::collections::{BTreeMap, BTreeSet};

use dysk::volume::Caching;

use crate::check::{Loss, Sessions};
use crate::register::{Register, Touch};

/// The volume's timeline, and those of holders who missed that they were
/// overtaken.
#[derive(Clone)]
pub struct Timelines<'a> {
    sessions: &'a Sessions,
    volume: Register<'a>,
    overtaken: BTreeMap<u32, Register<'a>>,
    /// All that the volume held since somebody was overtaken, and the store.
    since: BTreeSet<u64>,
    /// Holders that cache nothing and were overtaken.
    late: BTreeSet<u32>,
    /// Those of them that are supposed here to have known that the cell was
    /// empty in the store.
    believing: BTreeSet<u32>,
    /// Reads and trims of theirs that need not have asked.
    unasked: BTreeSet<u32>,
    /// Who makes each request.
    owner: BTreeMap<u32, u32>,
}

impl<'a> Timelines<'a> {
    pub fn new(sessions: &'a Sessions) -> Self {
        Self {
            sessions,
            volume: Register::new(sessions),
            overtaken: BTreeMap::new(),
            since: BTreeSet::new(),
            late: BTreeSet::new(),
            believing: BTreeSet::new(),
            unasked: BTreeSet::new(),
            owner: BTreeMap::new(),
        }
    }

    /// Judges what one cell saw.
    pub fn follow(&mut self, touches: &[Touch]) -> Result<(), String> {
        let read: BTreeSet<u64> = touches
            .iter()
            .filter_map(|touch| match touch {
                Touch::Read { value, .. } => Some(*value),
                _ => None,
            })
            .collect();
        // What an overtaken holder knew is not to be seen: it knew nothing, and
        // saw the volume; or it knew that the cell was empty, which then was so.
        let mut others: Vec<(Self, usize)> = Vec::new();
        let mut at = 0;
        let mut first = None;
        while let Some(touch) = touches.get(at) {
            if let Touch::Opened { session, loss } = *touch {
                self.fork(session, &touches[at..]);
                for mut other in self.suppositions(session, &touches[at..]) {
                    other.open(session, (loss, true));
                    other.look();
                    others.push((other, at + 1));
                }
                self.open(session, (loss, false));
            } else if let Err(wrong) = self.touch(touch, at, &read) {
                // The first is what went wrong if nothing is supposed.
                let wrong = first.get_or_insert(wrong);
                let Some((other, from)) = others.pop() else {
                    return Err(wrong.clone());
                };
                (*self, at) = (other, from);
                continue;
            }
            self.look();
            at += 1;
        }
        Ok(())
    }

    /// `session` has opened, after this loss; whether the cell is supposed to
    /// have been empty then.
    fn open(&mut self, session: u32, loss: (Loss, bool)) {
        let apart: BTreeSet<u32> = self.overtaken.keys().copied().collect();
        self.volume.opened(session, loss, &apart);
    }

    fn touch(&mut self, touch: &Touch, at: usize, read: &BTreeSet<u64>) -> Result<(), String> {
        if self.is_unasked(touch) {
            return Ok(());
        }
        let session = self.session(touch);
        let Some(own) = self.overtaken.get_mut(&session) else {
            return self.volume.touch(touch, at, read);
        };
        let result = own.touch(touch, at, read);
        let from_store = match touch {
            // It missed in its cache.
            Touch::Answered { step } => own
                .reads
                .iter()
                .any(|read| read.step == *step && self.since.contains(&read.value)),
            _ => false,
        };
        if from_store { Ok(()) } else { result }
    }

    /// Takes note of what the volume may hold.
    fn look(&mut self) {
        if !self.overtaken.is_empty() {
            self.volume.unfold();
            self.since.extend(self.volume.values());
            self.since.extend(self.volume.stored());
        }
    }

    /// The beginning of a read that found the cell empty, or of a trim, which need
    /// not have asked if it was known to be: its step and its session.
    fn needs_no_asking(&self, touch: &Touch) -> Option<(u32, u32)> {
        match *touch {
            Touch::Read {
                step,
                session,
                value: 0,
            }
            | Touch::Write {
                step,
                session,
                value: 0,
                ..
            } if self.sessions.unasking.contains(&step) => Some((step, session)),
            _ => None,
        }
    }

    /// A read that found empty what its holder knew to be empty when it was
    /// overtaken, a trim of that, or the end of one.
    fn is_unasked(&mut self, touch: &Touch) -> bool {
        if let Some((step, session)) = self.needs_no_asking(touch)
            && self.believing.contains(&session)
        {
            return self.unasked.insert(step);
        }
        match *touch {
            // Likewise where it goes on by itself. What it stages it changes.
            Touch::Write {
                step,
                session,
                value: 0,
                ..
            } if self.sessions.unasking.contains(&step)
                && self.sessions.caching(session) != Caching::ReadWrite =>
            {
                let own = self.overtaken.get_mut(&session);
                own.is_some_and(Register::suppose_empty) && self.unasked.insert(step)
            }
            Touch::Answered { step } | Touch::Written { step } | Touch::GivenUp { step } => {
                self.unasked.contains(&step)
            }
            _ => false,
        }
    }

    /// What else may be so now that `opened` has overtaken holders that cache
    /// nothing: for some of them the cell is known to be empty. Only those
    /// matter that read it so, or trim it, without need to ask.
    fn suppositions(&mut self, opened: u32, rest: &[Touch]) -> Vec<Self> {
        let ranks = &self.sessions.ranks;
        let granted = |session: &u32| ranks.get(session).map(|rank| rank.granted);
        let unasking = rest.iter().filter_map(|touch| self.needs_no_asking(touch));
        let late: BTreeSet<u32> = unasking
            .map(|(_, session)| session)
            .filter(|session| {
                granted(session) < granted(&opened)
                    && !self.overtaken.contains_key(session)
                    && !self.late.contains(session)
            })
            .collect();
        self.late.extend(&late);
        let mut others: Vec<Self> = Vec::new();
        if late.is_empty() || !self.volume.may_be_empty() {
            return others;
        }
        for session in late {
            let mut with = [&[self.clone()][..], &others].concat();
            for other in &mut with {
                other.believing.insert(session);
            }
            others.extend(with);
        }
        others
    }

    fn session(&mut self, touch: &Touch) -> u32 {
        match *touch {
            Touch::Write { step, session, .. }
            | Touch::Read { step, session, .. }
            | Touch::Flush { step, session } => {
                self.owner.insert(step, session);
                session
            }
            Touch::Written { step }
            | Touch::GivenUp { step }
            | Touch::Answered { step }
            | Touch::Flushed { step } => self.owner[&step],
            Touch::Opened { session, .. } | Touch::Closed { session } => session,
        }
    }

    /// Gives holders who go on though `opened` has opened a timeline each.
    fn fork(&mut self, opened: u32, rest: &[Touch]) {
        let mut forks = BTreeSet::new();
        for touch in rest {
            let session = match touch {
                Touch::Opened { .. } | Touch::Closed { .. } => continue,
                Touch::Write { session, .. }
                | Touch::Read { session, .. }
                | Touch::Flush { session, .. } => *session,
                Touch::Written { step }
                | Touch::GivenUp { step }
                | Touch::Answered { step }
                | Touch::Flushed { step } => match self.owner.get(step) {
                    Some(session) => *session,
                    None => continue,
                },
            };
            let ranks = &self.sessions.ranks;
            // One that caches nothing sees the volume, unless its new holder
            // keeps that to itself.
            let apart = self.sessions.caching(session) != Caching::None
                || self.sessions.caching(opened) == Caching::ReadWrite;
            let overtaken = ranks.get(&session) < ranks.get(&opened)
                && apart
                && !self.overtaken.contains_key(&session);
            if overtaken && session != opened {
                forks.insert(session);
            }
        }
        for session in forks {
            self.volume.unfold();
            let mut own = self.volume.clone();
            own.overtaken(session);
            self.overtaken.insert(session, own);
        }
    }
}
