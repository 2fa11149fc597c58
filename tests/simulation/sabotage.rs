//! Each safety mechanism is switched off in turn, and the same simulation has
//! to notice. None of the switches is in the engine: what works by what the
//! store is told is undone in the simulated store; what works by requests of
//! one volume sharing its state is undone by dealing them to two volumes that
//! were opened under one lease.

use std::time::Duration;

use crate::check::Event;
use crate::plan::{Plan, Profile};
use crate::shrink;
use crate::world::Sabotage;

const WITHIN: u64 = 2000;

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
    for seed in 0..WITHIN {
        let sound = Plan::draw(profile, seed);
        let plan = Plan {
            twins,
            ..sound.clone()
        };
        let Some(wrong) = shrink::failure(&plan, sabotage, |_| {}) else {
            continue;
        };
        let data = wrong.contains("returned Some(") || wrong.contains("after another node");
        assert!(
            data,
            "{profile:?} {seed} goes wrong in another way: {wrong}"
        );
        assert_eq!(shrink::failure(&sound, None, |_| {}), None);
        let small = shrink::shrink(&plan, sabotage);
        let mut holds = false;
        let still = shrink::failure(&small, sabotage, |outcome| holds = counts(&outcome.events));
        assert!(still.is_some());
        if !holds {
            continue;
        }
        assert!(small.steps.len() <= 8 && small.steps.len() <= plan.steps.len());
        println!(
            "{sabotage:?}, twins: {twins}: caught in history {seed}: {wrong}\n{}",
            shrink::report(&small, sabotage)
        );
        return;
    }
    panic!("{sabotage:?}, twins: {twins}: not noticed in {WITHIN} histories of {profile:?}");
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
