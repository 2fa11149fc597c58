//! Plans in words, for people who look at a failure.

use std::fmt;

use dysk::volume::Caching;

use crate::plan::{Action, Cells, GiveUp, Io, Plan, Step};

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
                if opening.caching != Caching::None {
                    write!(f, ", {:?}, {:?}", opening.caching, opening.recover)?;
                }
                *give_up
            }
            Action::Close(give_up) => {
                f.write_str("close")?;
                *give_up
            }
            Action::Abandon => return f.write_str("abandon and close"),
            Action::Drop => return f.write_str("drop the volume"),
            Action::Crash => return f.write_str("cut the power"),
            Action::Kill => return f.write_str("kill the daemon"),
            Action::Restart(opening) => {
                let attempts = opening.attempt_deadline;
                return write!(
                    f,
                    "kill the daemon and start another, attempts {attempts:?}, {:?}, {:?}",
                    opening.caching, opening.recover
                );
            }
            Action::HandOver(heir) => {
                return write!(f, "hand over to another daemon, which {heir:?}");
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
            "{:?} {}: {} pages{}, the store heals at {:?}{}{}",
            self.profile,
            self.seed,
            self.pages,
            if self.vhd { " and a footer" } else { "" },
            self.heal_at,
            if self.twins { ", in twins" } else { "" },
            if self.map { "" } else { ", without a map" }
        )?;
        if self.disk || self.budget.is_some() || self.room.is_some() {
            let place = if self.disk { "a disk" } else { "memory" };
            writeln!(
                f,
                "  staging on {place}, budget {:?}, room {:?}",
                self.budget, self.room
            )?;
        }
        for cut in &self.cuts {
            writeln!(
                f,
                "  node {}: {:?} at point {}",
                cut.node, cut.fall, cut.point
            )?;
            for (after, step) in &cut.then {
                writeln!(f, "    {after:?} later {step}")?;
            }
        }
        for rule in &self.rules {
            writeln!(f, "  trouble {rule}")?;
        }
        for step in &self.steps {
            writeln!(f, "  {step}")?;
        }
        Ok(())
    }
}
