//! `dyskctl bench`: fio's well-known jobs on a disk, a volume, or a file on a
//! mounted filesystem, and the table that people compare.
//!
//! What is written is taken away again: nothing of a bench is left, however it
//! ends, but an unclean death while it runs on a device or volume.

mod fio;
mod ground;
mod profile;
mod report;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::account::AccountOptions;
use super::error::CliError;
use super::policy::{PolicyOptions, duration};
use super::signals::Signals;
use super::{Global, Output, output};
use crate::size::ByteSize;
use ground::Ground;
use profile::Profile;
use report::Report;

const MIB: u64 = 1 << 20;

#[derive(Debug, Args)]
pub struct Options {
    /// The name of an attachment, a block device, or a volume that is not attached
    #[arg(required_unless_present = "scratch_file")]
    target: Option<String>,
    /// The jobs: kubestr, database or stream
    #[arg(
        long,
        value_enum,
        default_value = "kubestr",
        hide_possible_values = true
    )]
    profile: Profile,
    /// Use a file in DIR, on a mounted filesystem, that is gone afterwards
    #[arg(long, value_name = "DIR")]
    scratch_file: Option<PathBuf>,
    /// How much of the disk is written and read
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    size: ByteSize,
    /// How long each job runs
    #[arg(long, value_name = "DURATION", default_value = "15s", value_parser = runtime)]
    runtime: Duration,
    #[command(flatten)]
    policy: PolicyOptions,
    #[command(flatten)]
    account: AccountOptions,
}

fn runtime(text: &str) -> Result<Duration, String> {
    let runtime = duration(text)?;
    if !(1..=3600).contains(&runtime.as_secs()) {
        return Err("a job runs for 1s to 1h".into());
    }
    Ok(runtime)
}

pub async fn run(global: &Global, options: Options) -> Result<(), CliError> {
    if options.size.0 < MIB {
        return Err(CliError::failed("--size: less than 1MiB tells nothing"));
    }
    fio::check().await?;
    let mut signals = Signals::new()?;
    let ground = Ground::find(global, &options, &mut signals).await?;
    let measured = measure(&ground, &options, &mut signals).await;
    // Also what was interrupted or failed is taken away.
    let cleared = ground.clear().await;
    let report = measured?;
    cleared?;
    match global.output {
        Output::Json => output::json(&report),
        Output::Table => report.print(),
    }
}

async fn measure(
    ground: &Ground,
    options: &Options,
    signals: &mut Signals,
) -> Result<Report, CliError> {
    let on = ground.fio().await?;
    let jobs = options.profile.jobs();
    // What was never written costs no request, and would be measured instead.
    fio::fill(&on, signals).await?;
    let mut rows = Vec::new();
    for (number, job) in jobs.iter().enumerate() {
        let of = format!("{} of {}", number + 1, jobs.len());
        rows.extend(fio::run(&on, job, options.runtime, &of, signals).await?);
    }
    Ok(Report {
        target: ground.name().to_owned(),
        profile: options.profile,
        engine: on.engine.to_owned(),
        direct: on.direct,
        size: on.size,
        jobs: rows,
    })
}
