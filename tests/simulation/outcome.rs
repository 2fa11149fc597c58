//! What came of a history.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::check::Event;
use crate::fate::AttemptKey;
use crate::plan::NODES;

/// What came of a history.
#[derive(Debug)]
pub struct Outcome {
    /// What is wrong, if anything.
    pub failure: Option<String>,
    pub events: Vec<(Duration, Event)>,
    pub trace: Vec<String>,
    /// Attempts that met with trouble.
    pub troubled: BTreeSet<AttemptKey>,
    pub tally: Tally,
    /// How many moments each node had in which it could have died.
    pub points: [u32; NODES + 1],
}

/// What happened in histories, to see that they are worth something.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub requests: u64,
    pub unsettled: u64,
    pub openings: u64,
    pub fenced: u64,
    pub troubled: u64,
    pub late: u64,
    /// Openings that found all unflushed writes of a staging predecessor.
    pub inherited: u64,
    /// Openings that need not find them.
    pub bereft: u64,
    /// Volumes that were handed over, and those that came back instead.
    pub handed_over: u64,
    pub taken_back: u64,
}

impl Tally {
    pub fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.unsettled += other.unsettled;
        self.openings += other.openings;
        self.fenced += other.fenced;
        self.troubled += other.troubled;
        self.late += other.late;
        self.inherited += other.inherited;
        self.bereft += other.bereft;
        self.handed_over += other.handed_over;
        self.taken_back += other.taken_back;
    }
}

/// `text` without the time in the name of what was set aside: that is the wall
/// clock's, which no seed decides.
pub fn timeless(text: &str) -> String {
    let parts: Vec<&str> = text.split(".aside").collect();
    let timeless = |part: &&str| {
        part.trim_end_matches(|c: char| c.is_ascii_digit())
            .to_owned()
    };
    let (last, named) = parts.split_last().expect("at least one");
    let named: Vec<String> = named.iter().map(timeless).collect();
    [&named[..], &[(*last).to_owned()]].concat().join("*.aside")
}
