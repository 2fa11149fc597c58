//! `dyskctl create --from`: a full copy, made by the store.

use std::io::{IsTerminal, Write};

use super::Global;
use super::error::CliError;
use super::provision::{self, CreateOptions};
use super::target::Target;
use crate::blob::PageBlob;
use crate::blob::vhd::Layout;
use crate::node::NodeError;
use crate::node::account::{ATTEMPT_DEADLINE, open_blob};
use crate::node::api::{Format, NewDisk};
use crate::node::provision::{check_size, with_container};
use crate::size::ByteSize;
use crate::volume::{self, Copied, CopyPlan};

pub async fn run(global: &Global, options: &CreateOptions, from: &str) -> Result<(), CliError> {
    let (from, time) = split_snapshot(from);
    let size = options.size.map(|size| size.0);
    if let Some(size) = size {
        let format = Format::Vhd;
        check_size(NewDisk { size, format })?;
    }
    let source = Target::find(from, None, &options.account)?;
    let target = Target::find(&options.volume, None, &options.account)?;
    if source.account.name != target.account.name {
        return Err(CliError::failed(format!(
            "volume \"{}\" is not in account {}: a copy stays within its account",
            from, target.account.name
        )));
    }
    let (account, new) = open_blob(&target.account, &target.container, &target.blob).await?;
    let mut original = account.page_blob(&source.container, &source.blob);
    if let Some(time) = time {
        original = original.at_snapshot(time);
    }
    let plan = CopyPlan {
        mark: format!("{}@{}", original.address(), time.unwrap_or_default()),
        disk_size: size,
        metadata: Vec::new(),
    };
    let copied = with_container(&account, &target.container, || copy(&original, &new, &plan))
        .await
        .map_err(NodeError::from)?;
    let size = match copied {
        Copied::Now(size) => size,
        Copied::Before(_) => {
            return Err(CliError::failed(format!(
                "{}: there is a blob of this name already: choose another, or delete it first",
                new.address()
            )));
        }
    };
    let disk = volume::inspect(&new, ATTEMPT_DEADLINE)
        .await
        .map_err(NodeError::from)?;
    let format = match disk.layout {
        Layout::Raw => Format::Raw,
        Layout::Vhd | Layout::LegacyVhd => Format::Vhd,
    };
    provision::print(global, &target, Some(NewDisk { size, format }))
}

async fn copy(
    source: &PageBlob,
    new: &PageBlob,
    plan: &CopyPlan,
) -> Result<Copied, crate::volume::OpenError> {
    let mut shown = Progress::new();
    let copied = volume::copy(
        source,
        new,
        plan,
        |done, all| shown.show(done, all),
        ATTEMPT_DEADLINE,
    );
    copied.await
}

/// `VOLUME@TIME`; an `@` that no time follows belongs to the name.
pub fn split_snapshot(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once('@') {
        Some((volume, time)) if time.parse::<jiff::Timestamp>().is_ok() => (volume, Some(time)),
        _ => (text, None),
    }
}

/// Progress on standard error: a line that is written over on a terminal, and
/// one line for each tenth elsewhere.
struct Progress {
    terminal: bool,
    tenth: Option<u64>,
}

impl Progress {
    fn new() -> Self {
        Self {
            terminal: std::io::stderr().is_terminal(),
            tenth: None,
        }
    }

    fn show(&mut self, done: u64, all: u64) {
        let tenth = (done.saturating_mul(10)).checked_div(all).unwrap_or(10);
        let repeated = self.tenth.replace(tenth) == Some(tenth);
        if repeated && !self.terminal {
            return;
        }
        let percent = (done.saturating_mul(100)).checked_div(all).unwrap_or(100);
        let (start, end) = if self.terminal && done < all {
            ("\r", "")
        } else if self.terminal {
            ("\r", "\n")
        } else {
            ("", "\n")
        };
        let mib = |bytes: u64| ByteSize(bytes & !((1 << 20) - 1));
        // With standard error gone there is nobody to tell.
        drop(write!(
            std::io::stderr(),
            "{start}copied {} of {} ({percent}%){end}",
            mib(done),
            mib(all)
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_time_after_an_at_names_a_snapshot() {
        let time = "2026-11-21T05:00:00.1234567Z";
        let text = format!("acct/dysks/a@b.vhd@{time}");
        assert_eq!(split_snapshot(&text), ("acct/dysks/a@b.vhd", Some(time)));
        for plain in ["acct/dysks/a@b.vhd", "acct/dysks/a.vhd"] {
            assert_eq!(split_snapshot(plain), (plain, None));
        }
    }
}
