//! `dyskctl attach`.

use std::path::Path;

use clap::Args;

use super::account::AccountOptions;
use super::error::{CliError, note};
use super::policy::{PolicyOptions, waits_for};
use super::target::Target;
use super::{FormatArg, Global, Output, output};
use crate::node::api::{AttachRequest, Attachment, CONNECTIONS, MAX_CONNECTIONS, NewDisk, Stage};
use crate::node::name::AttachmentName;
use crate::node::{dysktab, provision};
use crate::size::ByteSize;

#[derive(Debug, Args)]
pub struct Options {
    /// ACCOUNT/CONTAINER/BLOB, ACCOUNT/BLOB, a blob URL, or ACCOUNT with --name
    #[arg(required_unless_present = "all")]
    volume: Option<String>,
    /// Attach everything in /etc/dysk/dysktab that is not attached yet
    #[arg(long, conflicts_with_all = ["volume", "name", "create", "read_only", "connections", "break_lease"])]
    all: bool,
    /// Name of the attachment and of its link in /dev/dysk [default: BLOB]
    #[arg(long)]
    name: Option<AttachmentName>,
    /// Make the blob first (and its container); it must not exist
    #[arg(long, requires = "size", conflicts_with = "read_only")]
    create: bool,
    /// The new disk's size, such as 32GiB: a multiple of 512 bytes, up to 8TiB
    #[arg(long, requires = "create")]
    size: Option<ByteSize>,
    /// The new disk's format
    #[arg(long, value_enum, requires = "create", default_value = "vhd")]
    format: FormatArg,
    /// Refuse writes, and take no lease
    #[arg(long)]
    read_only: bool,
    #[arg(long, value_name = "N",
          help = format!("Connections to the kernel [default: {CONNECTIONS}]"),
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_CONNECTIONS)))]
    connections: Option<u16>,
    /// Take the volume from whoever holds its lease; their writes will fail
    #[arg(long, conflicts_with = "read_only")]
    break_lease: bool,
    #[command(flatten)]
    policy: PolicyOptions,
    #[command(flatten)]
    account: AccountOptions,
}

pub async fn run(global: &Global, options: Options) -> Result<(), CliError> {
    if options.all {
        return all(global).await;
    }
    let request = request(options)?;
    let attachment = attach(global, &request).await?;
    print(global, &attachment)
}

/// Attaches the lines of the table; one that fails keeps no other from it.
async fn all(global: &Global) -> Result<(), CliError> {
    let (requests, errors) = dysktab::read(Path::new(dysktab::PATH));
    let mut failures: Vec<_> = errors.iter().map(ToString::to_string).collect();
    for request in &requests {
        let secret = dysktab::check_secrecy(&request.account.credential.0);
        let attached = match secret {
            Ok(()) => attach(global, request).await,
            Err(reason) => Err(CliError::failed(reason)),
        };
        match attached {
            Ok(attachment) => print(global, &attachment)?,
            Err(error) if error.is_interrupt() => return Err(error),
            Err(error) => failures.push(format!("{}: {error}", request.name)),
        }
    }
    match failures.is_empty() {
        true => Ok(()),
        false => Err(CliError::failed(failures.join("; "))),
    }
}

async fn attach(global: &Global, request: &AttachRequest) -> Result<Attachment, CliError> {
    let mut told = false;
    let client = global.client();
    let attach = client.attach(request, |stage| {
        tracing::info!(name = %request.name, "{stage}");
        if stage == Stage::Waiting && !std::mem::replace(&mut told, true) {
            note(&waits_for(&request.volume(), &request.policy));
        }
    });
    tokio::select! {
        attached = attach => Ok(attached?),
        // Hanging up is what tells the daemon to undo it.
        signal = tokio::signal::ctrl_c() => {
            signal.map_err(|error| CliError::failed(format!("cannot wait for ctrl-c: {error}")))?;
            Err(CliError::interrupted(format!(
                "interrupted: the attach of {} is being undone",
                request.name
            )))
        }
    }
}

fn request(options: Options) -> Result<AttachRequest, CliError> {
    let policy = options.policy.policy()?;
    let create = options.size.map(|size| NewDisk {
        size: size.0,
        format: options.format.into(),
    });
    create.map_or(Ok(()), provision::check_size)?;
    let volume = options.volume.unwrap_or_default();
    let target = Target::find(&volume, options.name.as_ref(), &options.account)?;
    let name = match options.name {
        Some(name) => name,
        None => AttachmentName::of_blob(&target.blob)
            .map_err(|error| CliError::failed(format!("{error}: choose one with --name")))?,
    };
    Ok(AttachRequest {
        name,
        account: target.account,
        container: target.container,
        blob: target.blob,
        read_only: options.read_only,
        policy,
        connections: options.connections,
        break_lease: options.break_lease,
        recover: options.policy.recover(),
        create,
        reuse: false,
        holder: None,
        follow_settings: false,
    })
}

fn print(global: &Global, attachment: &Attachment) -> Result<(), CliError> {
    match (global.output, &attachment.device) {
        (Output::Json, _) => output::json(attachment),
        (Output::Table, Some(device)) => output::line(device.display()),
        (Output::Table, None) => Err(CliError::failed(format!(
            "{} is attached, but dyskd names no device: see `dyskctl status {}`",
            attachment.name, attachment.name
        ))),
    }
}
