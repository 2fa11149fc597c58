//! Each safety mechanism is switched off in turn, and the same simulation has
//! to notice. None of the switches is in the engine: what works by what the
//! store is told is undone in the simulated store; what works by requests of
//! one volume sharing its state is undone by dealing them to two volumes that
//! were opened under one lease.

use std::time::Duration;

use crate::check::Event;
use crate::plan::{Action, GiveUp, Io, Opening, Plan, Profile};
use crate::scenarios::{OPEN, OPENING, S, cells, io, sound};
use crate::shrink;
use crate::world::Sabotage;

const WITHIN: u64 = 2000;
/// The same where more has to come together: deaths, and who comes next.
const WITHIN_CACHED: u64 = 6000;

/// Within how many histories data goes wrong; asserts that it does not
/// without the sabotage, and that what shrinking leaves still fails.
///
/// Only a shrunk history counts of which `counts` holds.
fn caught(
    profile: Profile,
    sabotage: Option<Sabotage>,
    twins: bool,
    counts: fn(&[(Duration, Event)]) -> bool,
) {
    // Twins do not hear of each other's writes: with what each believes to be
    // empty they would go wrong by that alone.
    caught_with(profile, sabotage, (twins, !twins), counts);
}

/// As [`caught`]; says too whether volumes learn what holds no pages.
fn caught_with(
    profile: Profile,
    sabotage: Option<Sabotage>,
    (twins, map): (bool, bool),
    counts: fn(&[(Duration, Event)]) -> bool,
) {
    let within = if profile.cached() {
        WITHIN_CACHED
    } else {
        WITHIN
    };
    for seed in 0..within {
        let sound = Plan::draw(profile, seed);
        let plan = Plan {
            twins,
            map,
            ..sound.clone()
        };
        let Some(wrong) = shrink::failure(&plan, sabotage, |_| {}) else {
            continue;
        };
        let data = [
            "returned Some(",
            "after another node",
            "as if it had flushed",
        ];
        // With older entries left in, a file names a block twice.
        let twice = sabotage == Some(Sabotage::Clean) && wrong.contains("one slot a block");
        let data = twice || data.iter().any(|words| wrong.contains(words));
        assert!(
            data,
            "{profile:?} {seed} goes wrong in another way: {wrong}"
        );
        assert_eq!(shrink::failure(&sound, None, |_| {}), None);
        let small = shrink::shrink(&plan, sabotage);
        // What is spoiled for those who know what is empty harms nobody else.
        let spoiled = matches!(sabotage, Some(Sabotage::Ranges | Sabotage::Certain));
        let unknowing = Plan {
            map: false,
            ..small.clone()
        };
        if spoiled && shrink::failure(&unknowing, sabotage, |_| {}).is_some() {
            continue;
        }
        let mut holds = false;
        let still = shrink::failure(&small, sabotage, |outcome| holds = counts(&outcome.events));
        assert!(still.is_some());
        if !holds {
            continue;
        }
        let most = if profile.cached() { 16 } else { 8 };
        assert!(small.steps.len() <= most && small.steps.len() <= plan.steps.len());
        println!(
            "{sabotage:?}, twins: {twins}: caught in history {seed}: {wrong}\n{}",
            shrink::report(&small, sabotage)
        );
        return;
    }
    panic!("{sabotage:?}, twins: {twins}: not noticed in {within} histories of {profile:?}");
}

fn any(_: &[(Duration, Event)]) -> bool {
    true
}

fn nobody_gives_up(events: &[(Duration, Event)]) -> bool {
    let gave_up = |(_, event): &(_, Event)| matches!(event, Event::Ended { .. });
    !events.iter().any(gave_up)
}

/// No request begins before the one before it was answered or given up.
fn one_by_one(events: &[(Duration, Event)]) -> bool {
    let mut under_way = 0;
    events.iter().all(|(_, event)| {
        match event {
            Event::Invoked { .. } => under_way += 1,
            Event::Done { .. } | Event::Ended { .. } => under_way -= 1,
            Event::Opened { .. } | Event::Closed { .. } | Event::Noted { .. } => {}
        }
        under_way <= 1
    })
}

#[test]
fn without_bounds_on_writes_data_is_lost() {
    caught(Profile::Storm, Some(Sabotage::Bound), false, any);
    caught(Profile::OneByOne, Some(Sabotage::Bound), false, any);
}

#[test]
fn without_the_raise_before_a_retry_data_is_lost() {
    caught(Profile::Storm, Some(Sabotage::Raise), false, any);
    caught(Profile::OneByOne, Some(Sabotage::Raise), false, any);
}

#[test]
fn without_lease_checks_the_wrong_node_writes() {
    caught(Profile::Failover, Some(Sabotage::Lease), false, any);
}

/// Nothing fails and nobody gives up here: what is lost is lost for want of
/// the range lock.
#[test]
fn without_the_range_lock_data_is_lost() {
    caught(Profile::Calm, None, true, nobody_gives_up);
}

/// Requests come one by one here: what comes back is there for want of the
/// debt that a given-up write leaves.
#[test]
fn without_the_debt_of_given_up_writes_data_is_lost() {
    caught(Profile::OneByOne, None, true, one_by_one);
}

#[test]
fn without_bounds_on_writes_staged_data_is_lost() {
    caught(Profile::Staged, Some(Sabotage::Bound), false, any);
}

#[test]
fn without_the_raise_before_a_retry_staged_data_is_lost() {
    caught(Profile::Staged, Some(Sabotage::Raise), false, any);
}

/// The dirty data of a holder that was overtaken gets in.
#[test]
fn without_lease_checks_the_wrong_node_writes_back() {
    caught(Profile::StagedFailover, Some(Sabotage::Lease), false, any);
}

#[test]
fn without_an_order_of_write_backs_data_is_lost() {
    caught(Profile::StagedCalm, Some(Sabotage::Order), false, any);
}

#[test]
fn without_flushes_flushed_data_is_lost() {
    caught(Profile::StagedCalm, Some(Sabotage::Flush), false, any);
}

#[test]
fn without_fua_data_is_lost() {
    caught(Profile::StagedCalm, Some(Sabotage::Fua), false, any);
}

/// A node takes up what it staged before another node held the volume.
#[test]
fn without_the_epoch_of_staging_files_old_data_comes_back() {
    caught(Profile::StagedFailover, Some(Sabotage::Epoch), false, any);
}

/// What a disk kept of a file over a power cut is taken for whole.
#[test]
fn without_the_boot_of_staging_files_torn_data_comes_back() {
    caught(Profile::StagedCalm, Some(Sabotage::Boot), false, any);
}

/// The old daemon takes entries out of the file that are its heir's by now. It
/// lives, so its end gives the lease back; an heir that learns what is empty has
/// the lease confirmed first, hears of that at once and writes nothing more.
#[test]
fn without_letting_go_an_heirs_data_is_lost() {
    let let_go = Some(Sabotage::LetGo);
    caught_with(Profile::StagedCalm, let_go, (false, false), any);
}

#[test]
fn without_table_entries_acknowledged_data_is_lost() {
    caught(Profile::StagedCalm, Some(Sabotage::Commit), false, any);
}

#[test]
fn without_taking_entries_out_old_data_comes_back() {
    caught(Profile::StagedCalm, Some(Sabotage::Clean), false, any);
}

#[test]
fn without_syncing_staging_files_old_data_comes_back() {
    caught(Profile::StagedCalm, Some(Sabotage::Sync), false, any);
}

/// Whether nobody asks for what `of` says.
fn nobody_asks(events: &[(Duration, Event)], of: fn(&Io) -> bool) -> bool {
    let asks = |(_, event): &(_, Event)| match event {
        // The judge reads in the end.
        Event::Invoked { step, io, .. } => *step < u32::MAX - 9 && of(io),
        _ => false,
    };
    !events.iter().any(asks)
}

#[test]
fn when_what_is_written_is_taken_for_empty_data_is_lost() {
    for profile in [Profile::Failover, Profile::Staged] {
        caught(profile, Some(Sabotage::Ranges), false, any);
    }
}

/// Whoever believes what it knew to be empty past the end of its lease reads
/// over what the new holder has written.
#[test]
fn without_an_end_to_certainty_an_overtaken_holder_reads_what_is_not_so() {
    let taking = Action::Open(
        Opening {
            break_lease: true,
            ..OPENING
        },
        GiveUp::Never,
    );
    let scene = |read_at| {
        let steps = vec![
            (Duration::ZERO, 0, OPEN),
            (S, 1, taking),
            (2 * S, 1, io(Io::Write(cells(0, 8), false))),
            (read_at, 0, io(Io::Read(cells(0, 8)))),
        ];
        Plan::of(0, steps, Vec::new())
    };
    sound(&scene(70 * S));
    let wrong = |read_at| shrink::failure(&scene(read_at), Some(Sabotage::Certain), |_| {});
    assert_eq!(wrong(40 * S), None, "it cannot know better");
    let wrong = wrong(70 * S).expect("it reads what was so before");
    assert!(wrong.contains("returned Some(0)"), "{wrong}");
}

/// Zeroes that need not be sent are acknowledged by a node that lost the disk.
#[test]
fn without_confirming_the_lease_the_wrong_node_zeroes() {
    let counts = |events: &[_]| nobody_asks(events, |io| matches!(io, Io::Read(_)));
    caught(Profile::Failover, Some(Sabotage::Certain), false, counts);
}

/// Requests come one by one and nobody gives up: each twin only misses what the
/// other one writes to where it knows of nothing.
#[test]
fn without_hearing_of_writes_empty_stays_empty_and_data_is_lost() {
    let counts = |events: &[_]| one_by_one(events) && nobody_gives_up(events);
    caught_with(Profile::OneByOne, None, (true, true), counts);
}
