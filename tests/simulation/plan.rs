//! What a simulated history sets out to do: steps on nodes, and times of
//! trouble at the store. A plan follows from its profile and seed, and any part
//! of it can be left out: that is how a failure is shrunk.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use dysk::volume::{Caching, Recover};

use crate::fate::{AttemptKey, Rule, Target};
use crate::world::Fall;

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
    pub caching: Caching,
    /// What to do with unflushed writes that are found.
    pub recover: Recover,
}

/// What becomes of the daemon to which a volume is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heir {
    Succeeds,
    /// It opens the volume and gives it back.
    GivesUp,
    /// It dies after its opening was polled this often, or once it is open.
    Dies(u32),
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
    /// The node loses power, with all it had under way.
    Crash,
    /// The daemon is killed; nobody takes its lease up.
    Kill,
    /// The daemon is killed; another takes the volume up under its lease.
    Restart(Opening),
    /// The daemon hands the volume over to another under its lease.
    HandOver(Heir),
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

/// The death of a daemon at a given point of what its node does: an attempt
/// at the store, the answer to one, a change of a file, a poll of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    pub node: usize,
    /// The how-manieth point.
    pub point: u32,
    pub fall: Fall,
    /// What follows it, and after which time.
    pub then: Vec<(Duration, Step)>,
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
    /// One node that stages writes: flushes, daemons that die, power cuts.
    Staged,
    /// The same without trouble at the store.
    StagedCalm,
    /// One node that caches reads, and a store in trouble.
    ReadCached,
    /// Nodes that cache and take over from each other.
    StagedFailover,
}

impl Profile {
    /// Nodes cache in it.
    pub fn cached(self) -> bool {
        matches!(
            self,
            Self::Staged | Self::StagedCalm | Self::ReadCached | Self::StagedFailover
        )
    }
}

pub const PROFILES: [Profile; 10] = [
    Profile::Calm,
    Profile::Storm,
    Profile::Impatient,
    Profile::Failover,
    Profile::Everything,
    Profile::OneByOne,
    Profile::Staged,
    Profile::StagedCalm,
    Profile::ReadCached,
    Profile::StagedFailover,
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
    /// Volumes learn what holds no pages.
    pub map: bool,
    /// Staging folders are on disks, and outlive a power cut.
    pub disk: bool,
    /// Bytes that a volume may cache, if bounded.
    pub budget: Option<u64>,
    /// Bytes that a staging file system has besides tables, if bounded.
    pub room: Option<u64>,
    pub cuts: Vec<Cut>,
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

    /// As [`Draw::io`], with more flushes and less that goes to the store.
    fn cached_io(&mut self, pages: u32, unaligned: u32) -> Io {
        let io = self.io(pages, unaligned);
        let staged = self.chance(60);
        match io {
            Io::Write(cells, _) if staged => Io::Write(cells, false),
            Io::Read(_) | Io::Extents(_) if self.chance(15) => Io::Flush,
            other => other,
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
        let wary = matches!(
            profile,
            Profile::Failover | Profile::Everything | Profile::StagedFailover
        ) || matches!(profile, Profile::Staged | Profile::StagedCalm);
        let deadline = matches!(
            profile,
            Profile::Impatient | Profile::Everything | Profile::StagedFailover
        );
        let wait = if self.chance(50) { 80 * S } else { 2 * S };
        Opening {
            break_lease: wary && self.chance(40),
            wait,
            attempt_deadline: self.duration(S..10 * S),
            io_deadline: (deadline && self.chance(30)).then(|| self.duration(200 * MS..20 * S)),
            caching: match profile {
                Profile::Staged | Profile::StagedCalm => Caching::ReadWrite,
                Profile::ReadCached => Caching::ReadOnly,
                Profile::StagedFailover => match self.below(10) {
                    0..7 => Caching::ReadWrite,
                    7 | 8 => Caching::ReadOnly,
                    _ => Caching::None,
                },
                _ => Caching::None,
            },
            recover: match profile {
                Profile::Staged | Profile::StagedFailover => match self.below(10) {
                    0..8 => Recover::Replay,
                    8 => Recover::SetAside,
                    _ => Recover::Discard,
                },
                _ => Recover::Replay,
            },
        }
    }

    fn heir(&mut self) -> Heir {
        match self.below(10) {
            0..5 => Heir::Succeeds,
            5 | 6 => Heir::GivesUp,
            _ => Heir::Dies(self.below(24)),
        }
    }

    fn action(&mut self, profile: Profile, pages: u32, unaligned: u32) -> Action {
        let (upheaval, impatience) = match profile {
            Profile::Calm | Profile::Storm => (0, 0),
            Profile::Impatient => (3, 30),
            Profile::OneByOne => (0, 30),
            Profile::Failover => (18, 3),
            Profile::Everything => (10, 12),
            Profile::Staged | Profile::ReadCached => (12, 5),
            Profile::StagedCalm => (10, 0),
            Profile::StagedFailover => (18, 5),
        };
        if profile.cached() {
            if !self.chance(upheaval) {
                return Action::Io(self.cached_io(pages, unaligned), self.give_up(impatience));
            }
            return match self.below(100) {
                0..14 => Action::Close(self.give_up(impatience)),
                14..18 if profile != Profile::StagedCalm => Action::Abandon,
                18..22 if profile != Profile::StagedCalm => Action::Drop,
                22..42 => Action::Crash,
                42..60 => Action::Kill,
                60..74 => Action::Restart(self.opening(profile)),
                74..85 => Action::HandOver(self.heir()),
                85..94 if profile == Profile::StagedFailover => {
                    Action::Freeze(self.duration(100 * MS..100 * S))
                }
                _ => Action::Open(self.opening(profile), self.give_up(impatience)),
            };
        }
        if !self.chance(upheaval) {
            return Action::Io(self.io(pages, unaligned), self.give_up(impatience));
        }
        match self.below(100) {
            0..15 => Action::Close(self.give_up(impatience)),
            15..25 => Action::Abandon,
            25..32 => Action::Drop,
            32..50 if profile != Profile::Impatient => Action::Crash,
            65..73 => Action::Restart(self.opening(profile)),
            73..80 => Action::HandOver(self.heir()),
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
            map: true,
            disk: false,
            budget: None,
            room: None,
            cuts: Vec::new(),
        }
    }

    /// The plan of one history.
    pub fn draw(profile: Profile, seed: u64) -> Self {
        let mut draw = Draw(SmallRng::seed_from_u64(seed));
        let pages = match profile.cached() && draw.chance(30) {
            true => 8 + draw.below(24),
            false => 2 + draw.below(8),
        };
        let unaligned = match profile {
            Profile::OneByOne => 0,
            _ => [0, 30, 70][draw.below(3) as usize],
        };
        let nodes = match profile {
            Profile::Failover | Profile::StagedFailover => 2 + draw.below(2) as usize,
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
                _ if matches!(profile, Profile::Calm | Profile::StagedCalm) => Duration::ZERO,
                _ => draw.duration(3 * S..40 * S),
            };
            let node = draw.below(u32::try_from(nodes).expect("few")) as usize;
            // Cached nodes seldom stay without a volume.
            let over = steps.last().is_some_and(|last| {
                matches!(last.action, Action::Close(_) | Action::Crash | Action::Kill)
            });
            let (node, action) = match steps.last() {
                Some(last) if profile.cached() && over && draw.chance(75) => {
                    let opening = draw.opening(profile);
                    (last.node, Action::Open(opening, GiveUp::Never))
                }
                _ => (node, draw.action(profile, pages, unaligned)),
            };
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
        } else if matches!(profile, Profile::Calm | Profile::StagedCalm) {
            Vec::new()
        } else {
            let count = 1 + draw.below(5);
            (0..count)
                .map(|_| Rule::draw(&mut draw.0, heal_at, nodes))
                .collect()
        };
        let (vhd, lease_first) = (draw.chance(30), draw.chance(50));
        let cached = profile.cached();
        Self {
            profile,
            seed,
            pages,
            vhd,
            lease_first,
            steps,
            rules,
            spared: BTreeSet::new(),
            heal_at,
            twins: false,
            map: true,
            disk: cached && draw.chance(50),
            budget: (cached && draw.chance(30)).then(|| u64::from(draw.below(4)) * 4096),
            room: (cached && draw.chance(10)).then(|| u64::from(draw.below(3)) * 4096),
            cuts: Vec::new(),
        }
    }

    /// Cells of the disk.
    pub fn cells(&self) -> u32 {
        self.pages * CELLS_PER_PAGE
    }
}
