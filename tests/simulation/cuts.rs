//! Short histories in which the daemon is killed, or its node loses power, at
//! every single point: each attempt at the store, each answer, each change of
//! a staging file, each poll of a request. What follows is another daemon under
//! the same lease, an attach under a new one, or one on another node; and
//! daemons that die again while they recover.

use std::time::Duration;

use dysk::volume::{Caching, Recover};

use crate::driver;
use crate::plan::{Action, CELLS_PER_PAGE, Cells, Cut, GiveUp, Io, Opening, Plan, Step};
use crate::scenarios::{MS, OPENING, S, cells, io, sound, troubles};
use crate::shrink;
use crate::world::{Fall, Sabotage};

/// Three blocks.
const PAGES: u32 = 24;
const ALL: Cells = Cells {
    first: 0,
    count: PAGES * CELLS_PER_PAGE,
};

/// How a node keeps what it caches.
#[derive(Clone, Copy, Debug)]
enum Place {
    Uncached,
    Reads,
    Memory,
    Disk,
    /// Memory for one block.
    Tight,
}

const PLACES: [Place; 5] = [
    Place::Uncached,
    Place::Reads,
    Place::Memory,
    Place::Disk,
    Place::Tight,
];

/// What comes after a daemon's end.
#[derive(Clone, Copy, Debug)]
enum Then {
    /// A daemon that takes its lease up.
    Resume,
    /// An attach on the same node.
    Attach,
    /// An attach on the same node that keeps old writes aside.
    SetAside,
    /// An attach on another node, and one here after it.
    Elsewhere,
}

fn opening(place: Place) -> Opening {
    Opening {
        break_lease: true,
        caching: match place {
            Place::Uncached => Caching::None,
            Place::Reads => Caching::ReadOnly,
            Place::Memory | Place::Disk | Place::Tight => Caching::ReadWrite,
        },
        ..OPENING
    }
}

/// Writes of all kinds, flushes, a time in which old blocks go to the store, a
/// detach and another attach.
fn scene(seed: u64, place: Place) -> Plan {
    let open = Action::Open(opening(place), GiveUp::Never);
    let steps = vec![
        (Duration::ZERO, 0, open),
        (90 * MS, 0, io(Io::Write(cells(0, 40), false))),
        (90 * MS, 0, io(Io::Write(cells(30, 7), false))),
        (91 * MS, 0, io(Io::Flush)),
        (92 * MS, 0, io(Io::Write(cells(8, 8), false))),
        (130 * MS, 0, io(Io::Write(cells(4, 12), false))),
        (131 * MS, 0, io(Io::Write(cells(60, 20), true))),
        (132 * MS, 0, io(Io::Write(cells(64, 8), false))),
        (160 * MS, 0, io(Io::Flush)),
        (190 * MS, 0, io(Io::Trim(cells(8, 24), false))),
        (191 * MS, 0, io(Io::Write(cells(0, 96), false))),
        (192 * MS, 0, io(Io::Zero(cells(20, 30), false))),
        (9 * S, 0, io(Io::Read(ALL))),
        (9 * S, 0, io(Io::Write(cells(3, 50), false))),
        (9 * S + 5 * MS, 0, Action::Close(GiveUp::Never)),
        (9 * S + 90 * MS, 0, open),
        (9 * S + 250 * MS, 0, io(Io::Write(cells(16, 4), false))),
        (9 * S + 251 * MS, 0, io(Io::Flush)),
        (9 * S + 252 * MS, 0, io(Io::Read(ALL))),
    ];
    Plan {
        pages: PAGES,
        disk: matches!(place, Place::Disk),
        budget: matches!(place, Place::Tight).then_some(4096),
        ..Plan::of(seed, steps, Vec::new())
    }
}

/// Steps that follow a cut, numbered from `id`.
fn following(place: Place, then: Then, id: u32) -> Vec<(Duration, Step)> {
    let opened = opening(place);
    let attach = |recover| {
        let opening = Opening { recover, ..opened };
        Action::Open(opening, GiveUp::Never)
    };
    let mut steps = match then {
        Then::Resume => vec![(10 * MS, 0, Action::Restart(opened))],
        Then::Attach => vec![(10 * MS, 0, attach(Recover::Replay))],
        Then::SetAside => vec![(10 * MS, 0, attach(Recover::SetAside))],
        Then::Elsewhere => vec![
            (10 * MS, 1, attach(Recover::Replay)),
            (200 * MS, 1, io(Io::Read(ALL))),
            (201 * MS, 1, io(Io::Write(cells(2, 33), false))),
            (300 * MS, 1, Action::Close(GiveUp::Never)),
            (500 * MS, 0, attach(Recover::Replay)),
        ],
    };
    for (after, request) in [
        (700, Io::Read(ALL)),
        (701, Io::Write(cells(12, 9), false)),
        (702, Io::Read(ALL)),
        (703, Io::Flush),
        (750, Io::Read(ALL)),
    ] {
        steps.push((after * MS, 0, io(request)));
    }
    steps
        .into_iter()
        .zip(id..)
        .map(|((after, node, action), id)| {
            let at = Duration::ZERO;
            let step = Step {
                id,
                at,
                node,
                action,
            };
            (after, step)
        })
        .collect()
}

fn points(plan: &Plan) -> u32 {
    driver::run(plan, None, false).points[0]
}

/// Cuts `plan` at each of its points.
fn at_every_point(plan: &Plan, place: Place, mut look: impl FnMut(&Plan)) {
    for point in 1..=points(plan) {
        for (fall, then) in [
            (Fall::Kill, Then::Resume),
            (Fall::Kill, Then::Attach),
            (Fall::Kill, Then::SetAside),
            (Fall::Kill, Then::Elsewhere),
            (Fall::PowerCut, Then::Attach),
            (Fall::PowerCut, Then::Elsewhere),
        ] {
            let then = following(place, then, 1000);
            look(&Plan {
                cuts: vec![Cut {
                    node: 0,
                    point,
                    fall,
                    then,
                }],
                ..plan.clone()
            });
        }
    }
}

#[test]
fn a_daemon_may_die_at_any_point() {
    let mut count = 0;
    for place in PLACES {
        let plan = scene(1, place);
        assert!(points(&plan) > 60, "{place:?}: {}", points(&plan));
        at_every_point(&plan, place, |plan| {
            sound(plan);
            count += 1;
        });
    }
    println!("{count} deaths");
}

#[test]
fn a_daemon_may_die_at_any_point_of_trouble() {
    let mut count = 0;
    for (seed, rules) in (0..).zip(troubles(80 * MS)).skip(1) {
        for place in [Place::Memory, Place::Disk] {
            let heal_at = rules[0].to;
            let plan = Plan {
                rules: rules.clone(),
                heal_at,
                ..scene(seed, place)
            };
            at_every_point(&plan, place, |plan| {
                // Each second one, for time's sake: seeds differ by trouble.
                if plan.cuts[0].point % 2 == u32::from(seed % 2 == 0) {
                    sound(plan);
                    count += 1;
                }
            });
        }
    }
    println!("{count} deaths in trouble");
}

/// The second daemon dies too, at every point of its recovery, and a third has
/// to cope with what both left.
#[test]
fn a_daemon_may_die_again_while_it_recovers() {
    let mut count = 0;
    for place in [Place::Memory, Place::Disk] {
        let plan = scene(2, place);
        let all = points(&plan);
        for point in (5..all).step_by(7) {
            for (first, then) in [
                (Fall::Kill, Then::Resume),
                (Fall::Kill, Then::Attach),
                (Fall::PowerCut, Then::Attach),
            ] {
                for (more, fall) in
                    (1..24).flat_map(|more| [(more, Fall::Kill), (more, Fall::PowerCut)])
                {
                    let cut = |point, fall, then| Cut {
                        node: 0,
                        point,
                        fall,
                        then,
                    };
                    let again = match then {
                        Then::Resume if fall == Fall::Kill => Then::Resume,
                        _ => Then::Attach,
                    };
                    let plan = Plan {
                        cuts: vec![
                            cut(point, first, following(place, then, 1000)),
                            cut(point + more, fall, following(place, again, 2000)),
                        ],
                        ..plan.clone()
                    };
                    sound(&plan);
                    count += 1;
                }
            }
        }
    }
    println!("{count} deaths while recovering");
}

/// These histories are worth something: without what a killed daemon has in
/// its file, they fail.
#[test]
fn deaths_are_noticed() {
    let mut failed = 0;
    at_every_point(&scene(1, Place::Memory), Place::Memory, |plan| {
        failed += u32::from(shrink::failure(plan, Some(Sabotage::Commit), |_| {}).is_some());
    });
    assert!(failed > 20, "{failed} failed");
}
