//! What becomes of an attempt at the store: when it executes, if it does, and
//! what its sender hears.
//!
//! A fate follows from the seed, from who makes the attempt and how many it
//! made before; leaving other steps out of a plan does not change it.

use std::fmt;
use std::time::Duration;

use dysk::blob::Failure;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

const MS: Duration = Duration::from_millis(1);
const S: Duration = Duration::from_secs(1);

/// Who makes attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Actor {
    /// The future of a step of the plan.
    Step(u32),
    /// A task in the background of the volume that this step opened.
    Background(u32),
    /// The keeper of the volume that this step opened.
    Keeper(u32),
    /// The judge at the end.
    Judge,
}

/// One attempt: who, and the how-manieth.
pub type AttemptKey = (Actor, u32);

/// A kind of trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// 503 or 429.
    Throttle,
    /// 500, 502 or 504, executed at once, late or never.
    ServerError,
    /// Not reached at all.
    Unreachable,
    /// Reset, executed at once, late or never.
    Reset,
    /// No answer, executed at once, late or never.
    Silence,
    /// Executed, and the answer makes no sense.
    Garbled,
    /// Slow: 100 ms to 30 s.
    Slow,
}

const TROUBLES: [Trouble; 7] = [
    Trouble::Throttle,
    Trouble::ServerError,
    Trouble::Unreachable,
    Trouble::Reset,
    Trouble::Silence,
    Trouble::Garbled,
    Trouble::Slow,
];

/// Whose attempts a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    All,
    Keepers,
    Data,
    Node(usize),
}

/// A time of trouble.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub from: Duration,
    pub to: Duration,
    pub target: Target,
    pub percent: u32,
    /// `None`: any.
    pub trouble: Option<Trouble>,
}

impl Rule {
    pub fn draw(rng: &mut SmallRng, end: Duration, nodes: usize) -> Self {
        let end = end.max(MS);
        let from = rng.random_range(Duration::ZERO..end);
        let to = from + rng.random_range(Duration::ZERO..end.max(S));
        let target = match rng.random_range(0..10) {
            0..5 => Target::All,
            5 | 6 => Target::Keepers,
            7 | 8 => Target::Data,
            _ => Target::Node(rng.random_range(0..nodes)),
        };
        Self {
            from,
            to: to.min(end),
            target,
            percent: [5, 15, 30, 60, 100][rng.random_range(0..5)],
            trouble: rng
                .random_bool(0.6)
                .then(|| TROUBLES[rng.random_range(0..TROUBLES.len())]),
        }
    }

    fn strikes(&self, actor: Actor, node: usize, now: Duration) -> bool {
        let target = match self.target {
            Target::All => true,
            Target::Keepers => matches!(actor, Actor::Keeper(_)),
            Target::Data => !matches!(actor, Actor::Keeper(_)),
            Target::Node(only) => node == only,
        };
        target && self.from <= now && now < self.to && actor != Actor::Judge
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} to {:?}, {} % of {:?}: ",
            self.from, self.to, self.percent, self.target
        )?;
        match self.trouble {
            Some(trouble) => write!(f, "{trouble:?}"),
            None => f.write_str("any"),
        }
    }
}

/// What the sender hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// What execution gave.
    Truth,
    /// As the truth, but garbled where it was a success.
    Garbled,
    /// This, and `Retry-After`.
    Failure(Failure, Option<Duration>),
    /// Nothing; whether the request was written.
    Silence(bool),
}

/// What becomes of one attempt; times count from its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fate {
    /// When it executes.
    pub executes: Option<Duration>,
    /// When the answer arrives.
    pub answers: Duration,
    pub answer: Answer,
    pub trouble: bool,
    /// What happens when its sender goes away before it executed.
    pub orphaned: Orphaned,
    /// Into how many pieces a read's answer falls.
    pub pieces: usize,
}

/// What becomes of a request whose sender went away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Orphaned {
    Cancelled,
    InTime,
    Late(Duration),
}

/// A generator that follows from the seed and these words.
pub fn generator(seed: u64, words: [u64; 3]) -> SmallRng {
    let mut state = seed;
    for word in words {
        // SplitMix64's finaliser.
        state = (state ^ word).wrapping_add(0x9E37_79B9_7F4A_7C15);
        state = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        state = (state ^ (state >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        state ^= state >> 31;
    }
    SmallRng::seed_from_u64(state)
}

fn lateness(rng: &mut SmallRng) -> Duration {
    let range = match rng.random_range(0..10) {
        0..5 => 20 * MS..2 * S,
        5..9 => 2 * S..30 * S,
        _ => 30 * S..90 * S,
    };
    rng.random_range(range)
}

impl Fate {
    /// Draws the fate of the attempt `key` by `node`, under `rules`.
    pub fn draw(
        seed: u64,
        key: AttemptKey,
        node: usize,
        rules: &[Rule],
        spared: bool,
        now: Duration,
    ) -> Self {
        let (class, id) = match key.0 {
            Actor::Step(id) => (0, id),
            Actor::Background(id) => (1, id),
            Actor::Keeper(id) => (2, id),
            Actor::Judge => (3, 0),
        };
        let mut rng = generator(seed, [class, id.into(), key.1.into()]);
        let there = rng.random_range(MS / 2..8 * MS);
        let back = rng.random_range(MS / 2..8 * MS);
        let orphaned = match rng.random_range(0..3) {
            0 => Orphaned::Cancelled,
            1 => Orphaned::InTime,
            _ => Orphaned::Late(lateness(&mut rng)),
        };
        let mut fate = Self {
            executes: Some(there),
            answers: there + back,
            answer: Answer::Truth,
            trouble: false,
            orphaned,
            pieces: rng.random_range(1..4),
        };
        for rule in rules {
            let struck = rng.random_range(0..100) < rule.percent;
            if struck && !spared && rule.strikes(key.0, node, now) {
                let trouble = rule
                    .trouble
                    .unwrap_or_else(|| TROUBLES[rng.random_range(0..TROUBLES.len())]);
                fate.befall(trouble, &mut rng);
                break;
            }
        }
        fate
    }

    fn befall(&mut self, trouble: Trouble, rng: &mut SmallRng) {
        self.trouble = true;
        let status = |status, code: &str| Failure::Status {
            status,
            code: code.into(),
        };
        match trouble {
            Trouble::Throttle => {
                self.executes = None;
                let failure = if rng.random_bool(0.7) {
                    status(503, "ServerBusy")
                } else {
                    status(429, "")
                };
                let asked = rng
                    .random_bool(0.3)
                    .then(|| rng.random_range(Duration::ZERO..5 * S));
                self.answer = Answer::Failure(failure, asked);
            }
            Trouble::Unreachable => {
                self.executes = None;
                self.answer = match rng.random_range(0..4) {
                    0 => Answer::Failure(Failure::Dns, None),
                    1 => Answer::Failure(Failure::Connect, None),
                    2 => Answer::Silence(false),
                    _ => Answer::Failure(Failure::Broken { written: false }, None),
                };
            }
            Trouble::ServerError | Trouble::Reset | Trouble::Silence => {
                self.executes = match rng.random_range(0..10) {
                    0..3 => None,
                    3..6 => self.executes,
                    _ => Some(self.answers + lateness(rng)),
                };
                self.answer = match trouble {
                    Trouble::ServerError => {
                        let failure = match rng.random_range(0..4) {
                            0 => status(500, "OperationTimedOut"),
                            1 => status(502, ""),
                            2 => status(504, ""),
                            _ => status(500, "InternalError"),
                        };
                        Answer::Failure(failure, None)
                    }
                    Trouble::Reset => Answer::Failure(Failure::Broken { written: true }, None),
                    _ => Answer::Silence(true),
                };
            }
            Trouble::Garbled => self.answer = Answer::Garbled,
            Trouble::Slow => {
                let delay = rng.random_range(100 * MS..30 * S);
                if rng.random_bool(0.5) {
                    self.executes = Some(delay);
                }
                self.answers += delay;
            }
        }
    }
}
