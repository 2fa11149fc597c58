//! `dyskctl snapshot create|list|delete`.
//!
//! Of a volume attached on this node the daemon takes it, with everything that
//! was acknowledged before. Of one in use elsewhere it holds what a power cut
//! at that moment would leave.

use clap::{Args, Subcommand};

use super::account::AccountOptions;
use super::copy::split_snapshot;
use super::error::CliError;
use super::target::Target;
use super::{Global, Output, here, output};
use crate::blob::PageBlob;
use crate::node::NodeError;
use crate::node::account::{ATTEMPT_DEADLINE, open_blob};
use crate::node::api::SnapshotTaken;
use crate::size::ByteSize;
use crate::volume::{self, Snapshot};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Take a snapshot and print VOLUME@TIME; one of that name is found, not taken again
    Create(CreateOptions),
    /// Show a volume's snapshots, oldest first
    List(ListOptions),
    /// Delete the snapshot VOLUME@TIME
    Delete(DeleteOptions),
}

#[derive(Debug, Args)]
pub struct CreateOptions {
    /// An attachment's name or device, ACCOUNT/CONTAINER/BLOB, ACCOUNT/BLOB or a blob URL
    #[arg(value_name = "NAME|DEVICE|VOLUME")]
    volume: String,
    /// Its name
    #[arg(long)]
    name: String,
    #[command(flatten)]
    account: AccountOptions,
}

#[derive(Debug, Args)]
pub struct ListOptions {
    /// ACCOUNT/CONTAINER/BLOB, ACCOUNT/BLOB or a blob URL
    volume: String,
    #[command(flatten)]
    account: AccountOptions,
}

#[derive(Debug, Args)]
pub struct DeleteOptions {
    /// VOLUME@TIME, as `snapshot list` shows it
    snapshot: String,
    #[command(flatten)]
    account: AccountOptions,
}

fn shown(blob: &PageBlob, snapshot: Snapshot) -> SnapshotTaken {
    SnapshotTaken::new(&blob.address().to_string(), snapshot)
}

async fn find(volume: &str, account: &AccountOptions) -> Result<PageBlob, CliError> {
    let target = Target::find(volume, None, account)?;
    let (_, blob) = open_blob(&target.account, &target.container, &target.blob).await?;
    Ok(blob)
}

pub async fn run(global: &Global, command: Command) -> Result<(), CliError> {
    match command {
        Command::Create(options) => create(global, options).await,
        Command::List(options) => list(global, options).await,
        Command::Delete(options) => delete(options).await,
    }
}

async fn create(global: &Global, options: CreateOptions) -> Result<(), CliError> {
    let shown = match here::attached(global, &options.volume).await? {
        Some(attachment) => {
            let client = global.client();
            client.snapshot(&attachment.name, &options.name).await?
        }
        None => {
            let blob = find(&options.volume, &options.account).await?;
            let taken = volume::create_snapshot(&blob, &options.name, ATTEMPT_DEADLINE)
                .await
                .map_err(NodeError::from)?;
            shown(&blob, taken)
        }
    };
    match global.output {
        Output::Table => output::line(shown.snapshot),
        Output::Json => output::json(&shown),
    }
}

async fn list(global: &Global, options: ListOptions) -> Result<(), CliError> {
    let blob = find(&options.volume, &options.account).await?;
    // A listing of nothing would not tell a wrong name from an empty list.
    volume::inspect(&blob, ATTEMPT_DEADLINE)
        .await
        .map_err(NodeError::from)?;
    let found = volume::list_snapshots(&blob, ATTEMPT_DEADLINE)
        .await
        .map_err(NodeError::from)?;
    let found: Vec<SnapshotTaken> = found.into_iter().map(|one| shown(&blob, one)).collect();
    if global.output == Output::Json {
        return output::json(&found);
    }
    let rows: Vec<[String; 4]> = found
        .into_iter()
        .map(|one| {
            let name = one.name.unwrap_or_else(|| "-".into());
            let size = ByteSize(one.blob_size & !((1 << 20) - 1)).to_string();
            [name, one.time, size, one.snapshot]
        })
        .collect();
    output::table(["NAME", "TIME", "SIZE", "SNAPSHOT"], &rows)
}

async fn delete(options: DeleteOptions) -> Result<(), CliError> {
    let (volume, Some(time)) = split_snapshot(&options.snapshot) else {
        return Err(CliError::failed(format!(
            "snapshot \"{}\" names no time: write VOLUME@TIME as snapshot list shows it",
            options.snapshot.split('?').next().unwrap_or_default()
        )));
    };
    let blob = find(volume, &options.account).await?;
    volume::delete_snapshot(&blob, time, ATTEMPT_DEADLINE)
        .await
        .map_err(|error| NodeError::from(error).into())
}
