//! `dyskctl create` and `dyskctl delete`: blobs, without the daemon.

use clap::Args;
use serde::Serialize;

use super::account::AccountOptions;
use super::error::CliError;
use super::target::Target;
use super::{FormatArg, Global, Output, copy, output};
use crate::blob::DeleteSnapshots;
use crate::node::account::{ATTEMPT_DEADLINE, open_blob};
use crate::node::api::{Format, NewDisk};
use crate::node::{NodeError, provision};
use crate::size::ByteSize;
use crate::volume;

#[derive(Debug, Args)]
pub struct CreateOptions {
    /// ACCOUNT/CONTAINER/BLOB, ACCOUNT/BLOB or a blob URL
    pub(super) volume: String,
    /// The disk's size, such as 32GiB: a multiple of 512 bytes, up to 8TiB
    #[arg(long, required_unless_present = "from")]
    pub(super) size: Option<ByteSize>,
    /// The disk's format
    #[arg(long, value_enum, default_value = "vhd", conflicts_with = "from")]
    format: FormatArg,
    /// Copy this volume of the same account, or VOLUME@TIME, its snapshot
    #[arg(long, value_name = "VOLUME")]
    from: Option<String>,
    #[command(flatten)]
    pub(super) account: AccountOptions,
}

#[derive(Debug, Args)]
pub struct DeleteOptions {
    /// ACCOUNT/CONTAINER/BLOB, ACCOUNT/BLOB or a blob URL
    volume: String,
    #[command(flatten)]
    account: AccountOptions,
}

/// What `-o json` says of a volume that was created or deleted.
#[derive(Serialize)]
struct Volume<'a> {
    account: &'a str,
    container: &'a str,
    blob: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<Format>,
}

pub(super) fn print(
    global: &Global,
    target: &Target,
    disk: Option<NewDisk>,
) -> Result<(), CliError> {
    if global.output == Output::Table {
        return Ok(());
    }
    output::json(&Volume {
        account: &target.account.name,
        container: &target.container,
        blob: &target.blob,
        size: disk.map(|disk| disk.size),
        format: disk.map(|disk| disk.format),
    })
}

pub async fn create(global: &Global, options: CreateOptions) -> Result<(), CliError> {
    if let Some(from) = &options.from {
        return copy::run(global, &options, from).await;
    }
    let Some(size) = options.size else {
        return Err(CliError::failed("no size: use --size"));
    };
    let disk = NewDisk {
        size: size.0,
        format: options.format.into(),
    };
    provision::check_size(disk)?;
    let target = Target::find(&options.volume, None, &options.account)?;
    let (account, blob) = open_blob(&target.account, &target.container, &target.blob).await?;
    provision::create(&account, &blob, disk).await?;
    tracing::info!(volume = %blob.address(), size = %size, "created");
    print(global, &target, Some(disk))
}

pub async fn delete(global: &Global, options: DeleteOptions) -> Result<(), CliError> {
    let target = Target::find(&options.volume, None, &options.account)?;
    let (_, blob) = open_blob(&target.account, &target.container, &target.blob).await?;
    volume::delete(&blob, DeleteSnapshots::Include, ATTEMPT_DEADLINE)
        .await
        .map_err(NodeError::from)?;
    tracing::info!(volume = %blob.address(), "deleted");
    print(global, &target, None)
}
