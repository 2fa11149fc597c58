//! `dyskctl attach`.

use clap::Args;

use super::account::AccountOptions;
use super::error::{CliError, note};
use super::policy::PolicyOptions;
use super::target::Target;
use super::{FormatArg, Global, Output, output};
use crate::node::api::{AttachRequest, Attachment, MAX_CONNECTIONS, NewDisk, Stage};
use crate::node::name::AttachmentName;
use crate::node::provision;
use crate::size::ByteSize;

#[derive(Debug, Args)]
pub struct Options {
    /// ACCOUNT/CONTAINER/BLOB, ACCOUNT/BLOB, a blob URL, or ACCOUNT with --name
    volume: String,
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
    /// Connections to the kernel [default: 2]
    #[arg(long, value_name = "N",
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
    let (request, waits) = request(options)?;
    let client = global.client();
    let mut told = false;
    let attach = client.attach(&request, |stage| {
        tracing::info!(name = %request.name, "{stage}");
        if stage == Stage::Waiting && !std::mem::replace(&mut told, true) {
            note(&waits);
        }
    });
    let attachment = tokio::select! {
        attached = attach => attached?,
        // Hanging up is what tells the daemon to undo it.
        signal = tokio::signal::ctrl_c() => {
            signal.map_err(|error| CliError::failed(format!("cannot wait for ctrl-c: {error}")))?;
            return Err(CliError::interrupted(format!(
                "interrupted: the attach of {} is being undone",
                request.name
            )));
        }
    };
    print(global, &attachment)
}

/// The request, and what to say should it wait for a lease.
fn request(options: Options) -> Result<(AttachRequest, String), CliError> {
    let policy = options.policy.policy()?;
    let create = options.size.map(|size| NewDisk {
        size: size.0,
        format: options.format.into(),
    });
    create.map_or(Ok(()), provision::check_size)?;
    let target = Target::find(&options.volume, options.name.as_ref(), &options.account)?;
    let name = match options.name {
        Some(name) => name,
        None => AttachmentName::of_blob(&target.blob)
            .map_err(|error| CliError::failed(format!("{error}: choose one with --name")))?,
    };
    let request = AttachRequest {
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
    };
    let waits = options.policy.waits_for(&request.volume());
    Ok((request, waits))
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
