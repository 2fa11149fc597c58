//! `dyskctl staging`: unflushed writes that lie on this node, of volumes that
//! are attached or not. Needs no daemon.

use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::error::CliError;
use super::{Global, Output, output};
use crate::node::api::RUN_DIR;
use crate::volume::{
    Leftover, LeftoverState, StagingInfo, discard_staging, inspect_staging, list_staging,
    restore_staging,
};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show what is there
    List(ListOptions),
    /// Put writes that were kept aside back: the next attach decides about them
    Restore(RestoreOptions),
    /// Drop unflushed writes for good
    Discard(DiscardOptions),
}

#[derive(Debug, Args)]
pub struct ListOptions {
    /// Where to look [default: the daemon's own]
    #[arg(long, value_name = "DIR", default_value_os_t = folder(), hide_default_value = true)]
    staging_dir: PathBuf,
}

#[derive(Debug, Args)]
pub struct RestoreOptions {
    /// The file, as `dyskctl staging list` names it
    path: PathBuf,
}

#[derive(Debug, Args)]
pub struct DiscardOptions {
    /// The file, as `dyskctl staging list` names it
    path: PathBuf,
    /// Yes: what is in it was never written to the store, and will be lost
    #[arg(long)]
    yes: bool,
}

fn folder() -> PathBuf {
    Path::new(RUN_DIR).join("staging")
}

pub fn run(global: &Global, command: Command) -> Result<(), CliError> {
    match command {
        Command::List(options) => list(global, &options.staging_dir),
        Command::Restore(options) => restore(&options.path),
        Command::Discard(options) => discard(&options.path, options.yes),
    }
}

fn list(global: &Global, folder: &Path) -> Result<(), CliError> {
    let found = list_staging(folder)
        .map_err(|error| CliError::failed(format!("{}: {error}", folder.display())))?;
    match global.output {
        Output::Json => output::json(&found),
        Output::Table => {
            let rows: Vec<_> = found.iter().map(row).collect();
            output::table(["Volume", "State", "Unflushed", "Path"], &rows)
        }
    }
}

fn row(file: &Leftover) -> [String; 4] {
    let state = match file.state {
        LeftoverState::InUse => "in use",
        LeftoverState::Waiting => "waiting",
        LeftoverState::Aside => "aside",
        LeftoverState::Damaged => "damaged",
    };
    let told = |tell: fn(&StagingInfo) -> String| file.info.as_ref().map_or("-".into(), tell);
    [
        told(|info| info.volume.clone()),
        state.into(),
        told(|info| info.dirty_bytes.to_string()),
        file.path.display().to_string(),
    ]
}

fn restore(path: &Path) -> Result<(), CliError> {
    if path
        .extension()
        .is_none_or(|extension| extension != "aside")
    {
        return Err(CliError::failed(format!(
            "{} was not set aside: name a file that `dyskctl staging list` shows as aside",
            path.display()
        )));
    }
    let place = restore_staging(path).map_err(|error| failed(path, &error))?;
    output::line(place.display())
}

fn discard(path: &Path, yes: bool) -> Result<(), CliError> {
    let info = match inspect_staging(path) {
        Ok(info) => info,
        // Nothing can be read of it, and nothing else is removed.
        Err(error) if error.kind() == io::ErrorKind::InvalidData && is_damaged(path) => {
            if !yes {
                return Err(CliError::failed(format!(
                    "{} is damaged, and may hold unflushed writes: say --yes to drop them for good",
                    path.display()
                )));
            }
            return std::fs::remove_file(path).map_err(|error| failed(path, &error));
        }
        Err(error) => return Err(failed(path, &error)),
    };
    if info.dirty_bytes > 0 && !yes {
        return Err(CliError::failed(format!(
            "{} holds {} bytes of {} that were never written to the store: say --yes to drop them for good",
            path.display(),
            info.dirty_bytes,
            info.volume
        )));
    }
    discard_staging(path).map_err(|error| failed(path, &error))
}

fn is_damaged(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension == "damaged")
}

fn failed(path: &Path, error: &io::Error) -> CliError {
    let path = path.display();
    CliError::failed(match error.kind() {
        io::ErrorKind::WouldBlock => format!("{path} is in use: detach its volume first"),
        io::ErrorKind::InvalidData => format!("{path} is no staging file"),
        io::ErrorKind::NotFound => format!("{path} is not there: see `dyskctl staging list`"),
        io::ErrorKind::AlreadyExists => format!(
            "{path}: the volume is attached, or other unflushed writes wait for it: detach it, or set those aside first"
        ),
        _ => format!("{path}: {error}"),
    })
}
