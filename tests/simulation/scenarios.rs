//! Single scenes, with every point at which they can be cut short: a request,
//! an opening or a closing whose future is dropped after each of its polls, a
//! node that dies at each millisecond.

use std::sync::Arc;
use std::time::Duration;

use dysk::blob::LeaseId;
use dysk::volume::{Caching, OpenOptions, Recover, Volume};
use tokio::runtime::Handle;

use crate::check::Event;
use crate::driver;
use crate::ending;
use crate::fate::{Rule, Target, Trouble};
use crate::plan::{Action, Cells, GiveUp, Heir, Io, Opening, Plan, Profile};
use crate::shrink;
use crate::store::SimStore;
use crate::world::{Sabotage, World};

pub const MS: Duration = Duration::from_millis(1);
pub const S: Duration = Duration::from_secs(1);

pub const OPENING: Opening = Opening {
    break_lease: false,
    wait: Duration::from_secs(80),
    attempt_deadline: Duration::from_secs(3),
    io_deadline: None,
    caching: Caching::None,
    recover: Recover::Replay,
};
pub const OPEN: Action = Action::Open(OPENING, GiveUp::Never);

pub fn io(io: Io) -> Action {
    Action::Io(io, GiveUp::Never)
}

pub fn cells(first: u32, count: u32) -> Cells {
    Cells { first, count }
}

/// The troubles of a scene from `from` on: none, or one kind all the time.
pub fn troubles(from: Duration) -> Vec<Vec<Rule>> {
    let kinds = [
        Trouble::Throttle,
        Trouble::ServerError,
        Trouble::Unreachable,
        Trouble::Reset,
        Trouble::Silence,
        Trouble::Garbled,
        Trouble::Slow,
    ];
    let rules = kinds.map(|trouble| {
        vec![Rule {
            from,
            to: from + 5 * S,
            target: Target::All,
            percent: 60,
            trouble: Some(trouble),
        }]
    });
    [vec![Vec::new()], rules.to_vec()].concat()
}

pub fn sound(plan: &Plan) -> Vec<Event> {
    let mut events = Vec::new();
    let wrong = shrink::failure(plan, None, |outcome| {
        events = outcome
            .events
            .iter()
            .map(|(_, event)| event.clone())
            .collect();
    });
    if wrong.is_some() {
        panic!("{}", shrink::report(plan, None));
    }
    events
}

/// Runs `scene(give_up)` with its future dropped after the first poll, the
/// second and so on, until there are no more; answers how often that was.
fn at_every_await(cut: u32, scene: impl Fn(GiveUp) -> Plan) -> u32 {
    for polls in 1.. {
        let events = sound(&scene(GiveUp::Polls(polls)));
        let dropped = events.iter().any(
            |event| matches!(event, Event::Ended { step, why } if *step == cut && why == "dropped"),
        );
        if !dropped {
            return polls - 1;
        }
    }
    unreachable!("a future is ready some time")
}

#[test]
fn a_request_dropped_at_any_await_is_never_half_remembered() {
    let mut cuts = 0;
    for (seed, first) in (0..10).flat_map(|seed| {
        [
            Io::Write(cells(0, 8), false),
            Io::Write(cells(5, 2), false),
            Io::Write(cells(2, 9), true),
            Io::Zero(cells(3, 6), false),
            Io::Trim(cells(4, 4), false),
        ]
        .map(|first| (seed, first))
    }) {
        for rules in troubles(40 * MS) {
            cuts += at_every_await(2, |give_up| {
                let mut steps = vec![
                    (Duration::ZERO, 0, OPEN),
                    (30 * MS, 0, io(Io::Write(cells(0, 16), false))),
                    (60 * MS, 0, Action::Io(first, give_up)),
                    (60 * MS, 0, io(Io::Write(cells(0, 5), false))),
                    (61 * MS, 0, io(Io::Write(cells(7, 3), false))),
                ];
                for at in 0..8 {
                    steps.push(((64 + 4 * at) * MS, 0, io(Io::Read(cells(0, 12)))));
                }
                Plan::of(seed, steps, rules.clone())
            });
        }
    }
    assert!(cuts > 2000, "{cuts} cuts");
    println!("{cuts} cuts");
}

/// On a disk a section of the cache's work runs on though its request is gone.
/// What it began has to end, or later requests for parts of the same pages go
/// round for ever.
#[test]
fn a_cached_request_dropped_at_any_await_leaves_nothing_begun() {
    let mut cuts = 0;
    for (seed, first) in (0..4).flat_map(|seed| {
        [
            Io::Write(cells(0, 8), true),
            Io::Write(cells(5, 2), false),
            Io::Write(cells(2, 9), true),
            Io::Read(cells(2, 9)),
            Io::Trim(cells(4, 8), false),
            Io::Flush,
        ]
        .map(|first| (seed, first))
    }) {
        for (disk, budget) in [(true, None), (true, Some(0)), (false, None)] {
            cuts += at_every_await(2, |give_up| {
                let opening = Opening {
                    caching: Caching::ReadWrite,
                    ..OPENING
                };
                let steps = vec![
                    (Duration::ZERO, 0, Action::Open(opening, GiveUp::Never)),
                    (90 * MS, 0, io(Io::Write(cells(0, 16), false))),
                    (120 * MS, 0, Action::Io(first, give_up)),
                    (120 * MS, 0, io(Io::Write(cells(1, 5), false))),
                    (160 * MS, 0, io(Io::Write(cells(7, 3), false))),
                    (161 * MS, 0, io(Io::Read(cells(0, 16)))),
                    (162 * MS, 0, io(Io::Flush)),
                    (170 * MS, 0, io(Io::Write(cells(2, 3), false))),
                    (171 * MS, 0, io(Io::Read(cells(0, 16)))),
                ];
                let plan = Plan::of(seed, steps, Vec::new());
                Plan {
                    disk,
                    budget,
                    ..plan
                }
            });
        }
    }
    assert!(cuts > 200, "{cuts} cuts");
    println!("{cuts} cuts");
}

#[test]
fn an_opening_dropped_at_any_await_leaves_no_lease() {
    let mut cuts = 0;
    for (seed, break_lease) in (0..5).flat_map(|seed| [(seed, false), (seed, true)]) {
        for rules in troubles(Duration::ZERO) {
            cuts += at_every_await(2, |give_up| {
                let opening = Opening {
                    break_lease,
                    ..OPENING
                };
                let steps = vec![
                    (Duration::ZERO, 0, OPEN),
                    (25 * MS, 0, io(Io::Write(cells(0, 8), false))),
                    (50 * MS, 1, Action::Open(opening, give_up)),
                    (55 * MS, 0, Action::Close(GiveUp::Never)),
                    (6 * S, 2, OPEN),
                    (7 * S, 2, io(Io::Write(cells(2, 8), false))),
                ];
                Plan::of(seed, steps, rules.clone())
            });
        }
    }
    assert!(cuts > 1000, "{cuts} cuts");
    println!("{cuts} cuts");
}

#[test]
fn a_closing_dropped_at_any_await_leaves_no_lease() {
    let mut cuts = 0;
    for seed in 0..30 {
        for rules in troubles(40 * MS) {
            cuts += at_every_await(2, |give_up| {
                let steps = vec![
                    (Duration::ZERO, 0, OPEN),
                    (45 * MS, 0, io(Io::Write(cells(0, 8), false))),
                    (50 * MS, 0, Action::Close(give_up)),
                    (80 * MS, 0, OPEN),
                    (10 * S, 0, io(Io::Write(cells(2, 8), false))),
                ];
                Plan::of(seed, steps, rules.clone())
            });
        }
    }
    assert!(cuts > 300, "{cuts} cuts");
    println!("{cuts} cuts");
}

#[test]
fn a_node_may_die_or_freeze_at_any_moment_of_a_take_over() {
    for seed in 0..4 {
        for (rules, fall) in troubles(Duration::ZERO)
            .into_iter()
            .flat_map(|rules| [Action::Crash, Action::Freeze(70 * S)].map(|f| (rules.clone(), f)))
        {
            for at in (0..80).step_by(2) {
                let opening = Opening {
                    break_lease: true,
                    ..OPENING
                };
                let mut steps = vec![
                    (Duration::ZERO, 0, OPEN),
                    (20 * MS, 0, io(Io::Write(cells(0, 8), false))),
                    (25 * MS, 0, io(Io::Write(cells(3, 7), false))),
                    (at * MS, 0, fall),
                    (40 * MS, 1, Action::Open(opening, GiveUp::Never)),
                    (71 * S, 0, io(Io::Write(cells(0, 16), false))),
                    (71 * S, 1, io(Io::Read(cells(0, 16)))),
                    (71 * S, 1, io(Io::Write(cells(2, 9), false))),
                    (72 * S, 1, io(Io::Read(cells(0, 16)))),
                    // By now it knows that it was fenced: nothing may succeed.
                    (90 * S, 0, io(Io::Read(cells(0, 16)))),
                    (90 * S, 0, io(Io::Trim(cells(1, 2), false))),
                    (90 * S, 0, io(Io::Flush)),
                ];
                steps.sort_by_key(|(at, ..)| *at);
                sound(&Plan::of(seed, steps, rules.clone()));
            }
        }
    }
}

/// An acquire that comes after its holder lost the lease brings the lease back
/// to a node that may not know of the loss yet.
#[test]
fn a_late_acquire_gives_no_lost_disk_back() {
    let (mut late, mut lost) = (0, 0);
    for seed in 0..400 {
        // An acquire gets no answer now and then; its repetition succeeds.
        let silence = Rule {
            from: Duration::ZERO,
            to: 4 * S,
            target: Target::Data,
            percent: 50,
            trouble: Some(Trouble::Silence),
        };
        let hurried = Opening {
            attempt_deadline: S,
            ..OPENING
        };
        let break_lease = Opening {
            break_lease: true,
            ..OPENING
        };
        let steps = vec![
            (Duration::ZERO, 0, Action::Open(hurried, GiveUp::Never)),
            (7 * S, 0, io(Io::Write(cells(0, 8), false))),
            (8 * S, 0, Action::Freeze(60 * S)),
            (9 * S, 1, Action::Open(break_lease, GiveUp::Never)),
            (10 * S, 1, io(Io::Write(cells(0, 8), false))),
            (11 * S, 1, Action::Close(GiveUp::Never)),
            (70 * S, 0, io(Io::Write(cells(4, 8), false))),
        ];
        let plan = Plan::of(seed, steps, vec![silence]);
        sound(&plan);
        let trace = driver::run(&plan, None, true).trace;
        let unconditional = shrink::failure(&plan, Some(Sabotage::AcquireConditions), |_| {});
        lost += u32::from(unconditional.is_some_and(|wrong| wrong.contains("another node")));
        late += u32::from(
            trace
                .iter()
                .any(|line| line.contains("acquire lease executes late")),
        );
    }
    assert!(late > 40, "{late} late acquires");
    assert!(lost > 0, "the conditions of acquires make no difference");
}

/// The writes of a killed daemon carry the lease that its successor holds, and
/// bounds ahead of the blob's number.
#[test]
fn nothing_of_a_killed_daemon_happens_after_its_successor_is_there() {
    let rule = |target, percent, trouble| Rule {
        from: 30 * MS,
        to: 210 * MS,
        target,
        percent,
        trouble: Some(trouble),
    };
    for seed in 0..1000 {
        let rules = vec![
            rule(Target::Keepers, 100, Trouble::Unreachable),
            rule(Target::Data, 60, Trouble::Reset),
        ];
        let steps = vec![
            (Duration::ZERO, 0, OPEN),
            (50 * MS, 0, io(Io::Write(cells(0, 4), false))),
            (120 * MS, 0, io(Io::Write(cells(4, 4), false))),
            (125 * MS, 0, io(Io::Write(cells(8, 4), false))),
            (200 * MS, 0, Action::Restart(OPENING)),
            (260 * MS, 0, io(Io::Write(cells(0, 16), false))),
            (400 * MS, 0, io(Io::Read(cells(0, 16)))),
        ];
        sound(&Plan::of(seed, steps, rules));
    }
}

/// A node that stood still until its lease had run out goes on where it was. It
/// does not know of its loss yet, but that it cannot be sure of what is empty.
#[test]
fn a_node_that_stood_still_believes_nothing() {
    for seed in 0..200 {
        let mut steps = vec![
            (Duration::ZERO, 0, OPEN),
            (S, 0, Action::Freeze(80 * S)),
            (2 * S, 1, OPEN),
            (70 * S, 1, io(Io::Write(cells(0, 8), false))),
        ];
        for at in 0..8 {
            steps.push((81 * S + at * 2 * MS, 0, io(Io::Read(cells(0, 12)))));
        }
        let events = sound(&Plan::of(seed, steps, Vec::new()));
        let answered = |event: &Event| matches!(event, Event::Done { step: 4.., values } if values.len() == 12);
        assert!(events.iter().any(answered), "all were fenced");
    }
}

/// A write that was given up may come until the number is raised: until then
/// nobody learns that there is nothing where it goes.
#[test]
fn nothing_is_learned_while_a_write_may_come_late() {
    let rule = |target, (from, to), percent, trouble| Rule {
        from,
        to,
        target,
        percent,
        trouble: Some(trouble),
    };
    for seed in 0..1000 {
        let rules = vec![
            rule(Target::Keepers, (40 * MS, 8 * S), 100, Trouble::Unreachable),
            rule(Target::Data, (30 * MS, 400 * MS), 70, Trouble::Reset),
        ];
        let write = Action::Io(Io::Write(cells(0, 4), false), GiveUp::After(300 * MS));
        let steps = vec![
            (Duration::ZERO, 0, OPEN),
            (80 * MS, 0, write),
            (12 * S, 0, io(Io::Trim(cells(0, 4), false))),
            (13 * S, 0, io(Io::Read(cells(0, 4)))),
        ];
        sound(&Plan::of(seed, steps, rules));
    }
}

/// An heir that finds the volume taken sets the unflushed writes aside. The old
/// daemon goes on without them, and may answer no flush.
#[test]
fn what_a_fenced_heir_set_aside_is_not_flushed() {
    let cached = Opening {
        caching: Caching::ReadWrite,
        ..OPENING
    };
    let taking = Opening {
        break_lease: true,
        ..OPENING
    };
    let steps = vec![
        (Duration::ZERO, 0, Action::Open(cached, GiveUp::Never)),
        (S, 0, io(Io::Write(cells(0, 4), false))),
        (S + MS, 1, Action::Open(taking, GiveUp::Never)),
        (S + 200 * MS, 0, Action::HandOver(Heir::Succeeds)),
        (S + 400 * MS, 0, io(Io::Flush)),
    ];
    let plan = Plan::of(0, steps, Vec::new());
    sound(&plan);
    let outcome = driver::run(&plan, None, false);
    assert_eq!((outcome.tally.openings, outcome.tally.taken_back), (2, 1));
    let flushed = |(_, event): &(Duration, Event)| matches!(event, Event::Done { step: 4, .. });
    let refused = |(_, event): &(Duration, Event)| matches!(event, Event::Ended { step: 4, .. });
    assert!(outcome.events.iter().any(refused));
    assert!(!outcome.events.iter().any(flushed));
}

#[test]
fn a_dropped_volume_leaves_no_task_behind() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let plan = Plan::draw(Profile::Calm, 0);
        let blob = ending::blob(&plan);
        let world = World::new(Arc::new(plan), blob, None, false);
        let world = Arc::new(std::sync::Mutex::new(world));
        let mut options = OpenOptions::new(LeaseId::from_text("0"));
        options.keeper = Some(Handle::current());
        let store = SimStore::new(&world, 0, 0);
        let volume = Volume::open(store, options).await.unwrap();
        let open = Handle::current().metrics().num_alive_tasks();
        drop(volume);
        // No time passes while a task is never at rest.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        // Before, the keeper and who learns what is empty; then the release of
        // the lease and its request in their place.
        assert_eq!(
            (open, Handle::current().metrics().num_alive_tasks()),
            (2, 2)
        );
    });
}
