//! One cell over all holders of its volume. A holder that was overtaken does
//! not know it at first: it goes on in a timeline of its own, in which nothing
//! reaches the store.

use std::collections::{BTreeMap, BTreeSet};

use dysk::volume::Caching;

use crate::check::Sessions;
use crate::register::{Register, Touch};

/// The volume's timeline, and those of holders who missed that they were
/// overtaken.
pub struct Timelines<'a> {
    sessions: &'a Sessions,
    volume: Register<'a>,
    overtaken: BTreeMap<u32, Register<'a>>,
    /// All that the volume held since somebody was overtaken, and the store.
    since: BTreeSet<u64>,
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
        for (at, touch) in touches.iter().enumerate() {
            if let Touch::Opened { session, loss } = *touch {
                self.fork(session, &touches[at..]);
                let apart: BTreeSet<u32> = self.overtaken.keys().copied().collect();
                self.volume.opened(session, loss, &apart);
            } else {
                let session = self.session(touch);
                match self.overtaken.get_mut(&session) {
                    None => self.volume.touch(touch, at, &read)?,
                    Some(own) => {
                        let result = own.touch(touch, at, &read);
                        let from_store = match touch {
                            // It missed in its cache.
                            Touch::Answered { step } => own
                                .reads
                                .iter()
                                .any(|read| read.step == *step && self.since.contains(&read.value)),
                            _ => false,
                        };
                        if !from_store {
                            result?;
                        }
                    }
                }
            }
            if !self.overtaken.is_empty() {
                self.volume.unfold();
                self.since.extend(self.volume.values());
                self.since.extend(self.volume.stored());
            }
        }
        Ok(())
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
