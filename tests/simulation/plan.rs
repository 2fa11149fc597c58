//! What a simulated history sets out to do: steps on nodes, and times of
//! trouble at the store. A plan follows from its profile and seed, and any part
//! of it can be left out: that is how a failure is shrunk.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::fate::{AttemptKey, Rule, Target};

/// Bytes in a cell, the unit in which contents are followed: smaller than a
/// page, so that read-modify-write is followed too.
pub const CELL: u64 = 128;
pub const CELLS_PER_PAGE: u32 = 4;

/// Consecutive cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cells {
    pub first: u32,
    pub count: u32,
}

impl Cells {
    pub fn offset(self) -> u64 {
        u64::from(self.first) * CELL
    }

    pub fn len(self) -> u64 {
        u64::from(self.count) * CELL
    }

    pub fn iter(self) -> std::ops::Range<u32> {
        self.first..self.first + self.count
    }

    /// Without the cells of pages that are only partly covered.
    pub fn whole_pages(self) -> Self {
        let first = self.first.next_multiple_of(CELLS_PER_PAGE);
        let end = (self.first + self.count) / CELLS_PER_PAGE * CELLS_PER_PAGE;
        Self {
            first,
            count: end.saturating_sub(first),
        }
    }
}

/// One request to an open volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Io {
    Read(Cells),
    Write(Cells, bool),
    Zero(Cells, bool),
    Trim(Cells, bool),
    Extents(Cells),
    Flush,
}

/// When the caller of something loses patience and drops its future.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GiveUp {
    Never,
    /// Right after polling it this often.
    Polls(u32),
    After(Duration),
}

/// How a volume is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opening {
    pub break_lease: bool,
    pub wait: Duration,
    pub attempt_deadline: Duration,
    pub io_deadline: Option<Duration>,
}

/// What a step does to its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Open(Opening, GiveUp),
    Io(Io, GiveUp),
    Close(GiveUp),
    /// Gives up on all I/O, then closes.
    Abandon,
    /// Drops the volume without closing it.
    Drop,
    /// The node is gone, with all it had under way.
    Crash,
    /// The daemon is killed; another takes the volume up under its lease.
    Restart(Opening),
    /// The node stands still, then goes on as if nothing had been.
    Freeze(Duration),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Fixes its fate; what it writes is `id + 1`.
    pub id: u32,
    pub at: Duration,
    pub node: usize,
    pub action: Action,
}

/// What a plan dwells on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// No trouble, much overlap.
    Calm,
    /// One node, a store in trouble.
    Storm,
    /// One node whose callers give up, one after the other.
    Impatient,
    /// Nodes that die, freeze, take over.
    Failover,
    /// All of it.
    Everything,
    /// Whole pages, one request at a time, callers who give up, and trouble for
    /// the keeper alone: to look at what a given-up request leaves behind.
    OneByOne,
}

pub const PROFILES: [Profile; 6] = [
    Profile::Calm,
    Profile::Storm,
    Profile::Impatient,
    Profile::Failover,
    Profile::Everything,
    Profile::OneByOne,
];

#[derive(Clone, Debug)]
pub struct Plan {
    pub profile: Profile,
    pub seed: u64,
    pub pages: u32,
    pub vhd: bool,
    pub lease_first: bool,
    pub steps: Vec<Step>,
    pub rules: Vec<Rule>,
    /// Attempts that no trouble befalls.
    pub spared: BTreeSet<AttemptKey>,
    /// From when on the store is well.
    pub heal_at: Duration,
    /// Each opening is two under one lease, and requests are dealt to them in
    /// turn: what orders the requests of one volume is lost.
    pub twins: bool,
}

pub const NODES: usize = 3;

const MS: Duration = Duration::from_millis(1);
const S: Duration = Duration::from_secs(1);

struct Draw(SmallRng);

impl Draw {
    fn chance(&mut self, percent: u32) -> bool {
        self.0.random_range(0..100) < percent
    }

    fn below(&mut self, end: u32) -> u32 {
        self.0.random_range(0..end)
    }

    fn duration(&mut self, range: std::ops::Range<Duration>) -> Duration {
        self.0.random_range(range)
    }

    fn cells(&mut self, pages: u32, unaligned: u32) -> Cells {
        if self.chance(unaligned) {
            let first = self.below(pages * CELLS_PER_PAGE - 1);
            let most = (pages * CELLS_PER_PAGE - first).min(10);
            let count = 1 + self.below(most);
            return Cells { first, count };
        }
        let page = self.below(pages);
        let count = 1 + self.below((pages - page).min(4));
        Cells {
            first: page * CELLS_PER_PAGE,
            count: count * CELLS_PER_PAGE,
        }
    }

    fn io(&mut self, pages: u32, unaligned: u32) -> Io {
        let cells = self.cells(pages, unaligned);
        let fua = self.chance(20);
        match self.below(100) {
            0..40 => Io::Read(cells),
            40..78 => Io::Write(cells, fua),
            78..84 => Io::Zero(cells, fua),
            84..90 => Io::Trim(cells, fua),
            90..93 => Io::Extents(cells),
            _ => Io::Flush,
        }
    }

    fn give_up(&mut self, percent: u32) -> GiveUp {
        if !self.chance(percent) {
            GiveUp::Never
        } else if self.chance(80) {
            // Most requests take two polls when nothing befalls them.
            let most = 1 + self.below(8);
            GiveUp::Polls(1 + self.below(most))
        } else {
            GiveUp::After(self.duration(MS..2 * S))
        }
    }

    fn opening(&mut self, profile: Profile) -> Opening {
        let wary = matches!(profile, Profile::Failover | Profile::Everything);
        let deadline = matches!(profile, Profile::Impatient | Profile::Everything);
        let wait = if self.chance(50) { 80 * S } else { 2 * S };
        Opening {
            break_lease: wary && self.chance(40),
            wait,
            attempt_deadline: self.duration(S..10 * S),
            io_deadline: (deadline && self.chance(30)).then(|| self.duration(200 * MS..20 * S)),
        }
    }

    fn action(&mut self, profile: Profile, pages: u32, unaligned: u32) -> Action {
        let (upheaval, impatience) = match profile {
            Profile::Calm | Profile::Storm => (0, 0),
            Profile::Impatient => (3, 30),
            Profile::OneByOne => (0, 30),
            Profile::Failover => (18, 3),
            Profile::Everything => (10, 12),
        };
        if !self.chance(upheaval) {
            return Action::Io(self.io(pages, unaligned), self.give_up(impatience));
        }
        match self.below(100) {
            0..15 => Action::Close(self.give_up(impatience)),
            15..25 => Action::Abandon,
            25..32 => Action::Drop,
            32..50 if profile != Profile::Impatient => Action::Crash,
            65..80 => Action::Restart(self.opening(profile)),
            50..65 if profile != Profile::Impatient => {
                Action::Freeze(self.duration(100 * MS..100 * S))
            }
            _ => Action::Open(self.opening(profile), self.give_up(impatience)),
        }
    }
}

impl Plan {
    /// A plan of these steps on a disk of four pages.
    pub fn of(seed: u64, steps: Vec<(Duration, usize, Action)>, rules: Vec<Rule>) -> Self {
        let steps = steps.into_iter().zip(0..);
        let steps = steps.map(|((at, node, action), id)| Step {
            id,
            at,
            node,
            action,
        });
        let heal_at = rules.iter().map(|rule| rule.to).max();
        Self {
            profile: Profile::Everything,
            seed,
            pages: 4,
            vhd: false,
            lease_first: true,
            steps: steps.collect(),
            rules,
            spared: BTreeSet::new(),
            heal_at: heal_at.unwrap_or_default(),
            twins: false,
        }
    }

    /// The plan of one history.
    pub fn draw(profile: Profile, seed: u64) -> Self {
        let mut draw = Draw(SmallRng::seed_from_u64(seed));
        let pages = 2 + draw.below(8);
        let unaligned = match profile {
            Profile::OneByOne => 0,
            _ => [0, 30, 70][draw.below(3) as usize],
        };
        let nodes = match profile {
            Profile::Failover => 2 + draw.below(2) as usize,
            Profile::Everything => 1 + draw.below(3) as usize,
            _ => 1,
        };
        let count = 10 + draw.below(50);
        let mut at = Duration::ZERO;
        let mut steps = vec![Step {
            id: 0,
            at,
            node: 0,
            action: Action::Open(draw.opening(profile), GiveUp::Never),
        }];
        for id in 1..count {
            at += match draw.below(100) {
                // Longer than any request takes that nothing befalls.
                _ if profile == Profile::OneByOne => draw.duration(50 * MS..100 * MS),
                0..50 => Duration::ZERO,
                50..85 => draw.duration(MS..30 * MS),
                85..97 => draw.duration(30 * MS..3 * S),
                _ if profile == Profile::Calm => Duration::ZERO,
                _ => draw.duration(3 * S..40 * S),
            };
            let node = draw.below(u32::try_from(nodes).expect("few")) as usize;
            let action = draw.action(profile, pages, unaligned);
            steps.push(Step {
                id,
                at,
                node,
                action,
            });
        }
        let heal_at = match profile {
            Profile::OneByOne => at,
            _ => at + draw.duration(Duration::ZERO..20 * S),
        };
        let rules = if profile == Profile::OneByOne {
            let mut rule = Rule::draw(&mut draw.0, heal_at, nodes);
            rule.target = Target::Keepers;
            rule.percent = 100;
            vec![rule]
        } else if profile == Profile::Calm {
            Vec::new()
        } else {
            let count = 1 + draw.below(5);
            (0..count)
                .map(|_| Rule::draw(&mut draw.0, heal_at, nodes))
                .collect()
        };
        Self {
            profile,
            seed,
            pages,
            vhd: draw.chance(30),
            lease_first: draw.chance(50),
            steps,
            rules,
            spared: BTreeSet::new(),
            heal_at,
            twins: false,
        }
    }

    /// Cells of the disk.
    pub fn cells(&self) -> u32 {
        self.pages * CELLS_PER_PAGE
    }
}

impl fmt::Display for Cells {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.offset(), self.len())
    }
}

impl fmt::Display for Io {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, cells, fua) = match self {
            Self::Read(cells) => ("read", cells, &false),
            Self::Write(cells, fua) => ("write", cells, fua),
            Self::Zero(cells, fua) => ("write zeroes", cells, fua),
            Self::Trim(cells, fua) => ("trim", cells, fua),
            Self::Extents(cells) => ("extents", cells, &false),
            Self::Flush => return f.write_str("flush"),
        };
        write!(f, "{name} {cells}{}", if *fua { " fua" } else { "" })
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = self.at.as_secs_f64();
        write!(f, "{at:>10.6} #{:<3} node {}: ", self.id, self.node)?;
        let give_up = match &self.action {
            Action::Io(io, give_up) => {
                write!(f, "{io}")?;
                *give_up
            }
            Action::Open(opening, give_up) => {
                write!(
                    f,
                    "open, attempts {:?}, waiting {:?}{}{}",
                    opening.attempt_deadline,
                    opening.wait,
                    opening
                        .io_deadline
                        .map(|d| format!(", i/o deadline {d:?}"))
                        .unwrap_or_default(),
                    if opening.break_lease {
                        ", breaking the lease"
                    } else {
                        ""
                    }
                )?;
                *give_up
            }
            Action::Close(give_up) => {
                f.write_str("close")?;
                *give_up
            }
            Action::Abandon => return f.write_str("abandon and close"),
            Action::Drop => return f.write_str("drop the volume"),
            Action::Crash => return f.write_str("crash"),
            Action::Restart(opening) => {
                let attempts = opening.attempt_deadline;
                return write!(
                    f,
                    "kill the daemon and start another, attempts {attempts:?}"
                );
            }
            Action::Freeze(time) => return write!(f, "freeze for {time:?}"),
        };
        match give_up {
            GiveUp::Never => Ok(()),
            GiveUp::Polls(n) => write!(f, ", dropped after {n} polls"),
            GiveUp::After(time) => write!(f, ", dropped after {time:?}"),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:?} {}: {} pages{}, the store heals at {:?}{}",
            self.profile,
            self.seed,
            self.pages,
            if self.vhd { " and a footer" } else { "" },
            self.heal_at,
            if self.twins { ", in twins" } else { "" }
        )?;
        for rule in &self.rules {
            writeln!(f, "  trouble {rule}")?;
        }
        for step in &self.steps {
            writeln!(f, "  {step}")?;
        }
        Ok(())
    }
}
