//! Makes a failing plan smaller: leaves out steps, times of trouble and single
//! troubles for as long as it still fails.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::driver;
use crate::outcome::Outcome;
use crate::plan::{Action, GiveUp, Plan};
use crate::world::Sabotage;

/// What is wrong with a plan's history: also what panics. Shows the outcome
/// to `see`.
pub fn failure(
    plan: &Plan,
    sabotage: Option<Sabotage>,
    see: impl FnOnce(&Outcome),
) -> Option<String> {
    match catch_unwind(AssertUnwindSafe(|| driver::run(plan, sabotage, false))) {
        Ok(outcome) => {
            see(&outcome);
            outcome.failure
        }
        Err(panic) => Some(panic_text(&*panic)),
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panicked: {}", text.unwrap_or("?"))
}

/// The smallest failing plan that leaving things out leads to.
pub fn shrink(plan: &Plan, sabotage: Option<Sabotage>) -> Plan {
    let fails = |plan: &Plan| failure(plan, sabotage, |_| {}).is_some();
    let mut best = plan.clone();
    loop {
        let before = size(&best);
        best = without(best, |plan| &mut plan.steps, &fails);
        best = without(best, |plan| &mut plan.rules, &fails);
        best = without(best, |plan| &mut plan.cuts, &fails);
        best = patient(best, &fails);
        best = spare(best, sabotage, &fails);
        if size(&best) == before {
            return best;
        }
    }
}

fn size(plan: &Plan) -> (usize, usize, usize) {
    (plan.steps.len(), plan.rules.len(), plan.spared.len())
}

/// Leaves out runs of items, long ones first.
fn without<T: Clone>(
    mut plan: Plan,
    items: impl Fn(&mut Plan) -> &mut Vec<T>,
    fails: &dyn Fn(&Plan) -> bool,
) -> Plan {
    let mut run = items(&mut plan).len().div_ceil(2);
    while run > 0 {
        let mut at = 0;
        while at < items(&mut plan).len() {
            let mut smaller = plan.clone();
            let list = items(&mut smaller);
            let end = list.len().min(at + run);
            list.drain(at..end);
            if fails(&smaller) {
                plan = smaller;
            } else {
                at += run;
            }
        }
        run /= 2;
    }
    plan
}

/// Lets callers wait who gave up.
fn patient(mut plan: Plan, fails: &dyn Fn(&Plan) -> bool) -> Plan {
    for at in 0..plan.steps.len() {
        let mut calmer = plan.clone();
        match &mut calmer.steps[at].action {
            Action::Open(_, give_up) | Action::Io(_, give_up) | Action::Close(give_up)
                if *give_up != GiveUp::Never =>
            {
                *give_up = GiveUp::Never;
            }
            _ => continue,
        }
        if fails(&calmer) {
            plan = calmer;
        }
    }
    plan
}

/// Spares attempts their troubles, one by one.
fn spare(mut plan: Plan, sabotage: Option<Sabotage>, fails: &dyn Fn(&Plan) -> bool) -> Plan {
    let run = || driver::run(&plan, sabotage, false).troubled;
    let Ok(troubled) = catch_unwind(AssertUnwindSafe(run)) else {
        return plan;
    };
    for key in troubled {
        let mut calmer = plan.clone();
        calmer.spared.insert(key);
        if fails(&calmer) {
            plan = calmer;
        }
    }
    plan
}

/// All that a person needs to see of a failure.
pub fn report(plan: &Plan, sabotage: Option<Sabotage>) -> String {
    let small = shrink(plan, sabotage);
    let run = || driver::run(&small, sabotage, true);
    let (wrong, trace) = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(outcome) => (outcome.failure, outcome.trace),
        Err(panic) => (Some(panic_text(&*panic)), Vec::new()),
    };
    let whole = failure(plan, sabotage, |_| {}).unwrap_or_default();
    let replay = if sabotage.is_some() || plan.twins {
        "this one only fails when sabotaged".to_owned()
    } else {
        format!(
            "replay a drawn plan: DYSK_SIM_PROFILE={:?} DYSK_SIM_SEED={} \
             cargo test --test simulation no_write -- --nocapture",
            plan.profile, plan.seed
        )
    };
    format!(
        "{}\nbefore shrinking: {whole}\nwhat is left:\n{small}what happens then:\n  {}\n{replay}",
        wrong.unwrap_or_default(),
        trace.join("\n  "),
    )
}
