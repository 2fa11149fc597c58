//! `dyskctl resize`: grows a volume. What is attached on this node its daemon
//! grows, in use or not; what is attached nowhere is grown in the store.

use clap::Args;

use super::account::AccountOptions;
use super::error::{CliError, note};
use super::target::Target;
use super::{Global, Output, here, output};
use crate::node::NodeError;
use crate::node::account::{ATTEMPT_DEADLINE, open_blob};
use crate::node::api::Attachment;
use crate::size::ByteSize;
use crate::volume;

#[derive(Debug, Args)]
pub struct Options {
    /// An attachment's name or device, ACCOUNT/CONTAINER/BLOB, ACCOUNT/BLOB or a blob URL
    #[arg(value_name = "NAME|DEVICE|VOLUME")]
    volume: String,
    /// The disk's new size, such as 64GiB; it never shrinks
    #[arg(long)]
    size: ByteSize,
    #[command(flatten)]
    account: AccountOptions,
}

pub async fn run(global: &Global, options: Options) -> Result<(), CliError> {
    let asked = options.size.0;
    if let Some(attachment) = here::attached(global, &options.volume).await? {
        return attached(global, attachment, asked).await;
    }
    let target = Target::find(&options.volume, None, &options.account)?;
    let (_, blob) = open_blob(&target.account, &target.container, &target.blob).await?;
    let size = volume::grow(&blob, asked, ATTEMPT_DEADLINE)
        .await
        .map_err(NodeError::from)?;
    check(&blob.address().to_string(), size, asked)?;
    match global.output {
        Output::Table => Ok(()),
        Output::Json => output::json(&serde_json::json!({
            "account": target.account.name,
            "container": target.container,
            "blob": target.blob,
            "size": size,
        })),
    }
}

/// Has the daemon do it.
async fn attached(global: &Global, found: Attachment, asked: u64) -> Result<(), CliError> {
    let resized = global.client().resize(&found.name, asked).await?;
    check(
        &resized.name.to_string(),
        resized.size.unwrap_or_default(),
        asked,
    )?;
    if global.output == Output::Json {
        return output::json(&resized);
    }
    if let Some(device) = &resized.device {
        note(&format!(
            "{}: {device} has {size}: grow its filesystem with `resize2fs {device}` (ext4) \
             or `xfs_growfs` and `btrfs filesystem resize max` on where it is mounted",
            resized.name,
            device = device.display(),
            size = ByteSize(asked),
        ));
    }
    Ok(())
}

fn check(object: &str, size: u64, asked: u64) -> Result<(), CliError> {
    if size > asked {
        return Err(CliError::failed(format!(
            "{object}: it has {} already and never shrinks: copy its content to a smaller volume",
            ByteSize(size)
        )));
    }
    Ok(())
}
