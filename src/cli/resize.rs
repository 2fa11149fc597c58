//! `dyskctl resize`: grows a volume that is not attached.

use clap::Args;

use super::account::AccountOptions;
use super::error::CliError;
use super::target::Target;
use super::{Global, Output, output};
use crate::node::NodeError;
use crate::node::account::{ATTEMPT_DEADLINE, open_blob};
use crate::size::ByteSize;
use crate::volume;

#[derive(Debug, Args)]
pub struct Options {
    /// ACCOUNT/CONTAINER/BLOB, ACCOUNT/BLOB or a blob URL
    volume: String,
    /// The disk's new size, such as 64GiB; it never shrinks
    #[arg(long)]
    size: ByteSize,
    #[command(flatten)]
    account: AccountOptions,
}

pub async fn run(global: &Global, options: Options) -> Result<(), CliError> {
    let target = Target::find(&options.volume, None, &options.account)?;
    let (_, blob) = open_blob(&target.account, &target.container, &target.blob).await?;
    let asked = options.size.0;
    let size = volume::grow(&blob, asked, ATTEMPT_DEADLINE)
        .await
        .map_err(NodeError::from)?;
    if size > asked {
        return Err(CliError::failed(format!(
            "{}: it has {} already and never shrinks: copy its content to a smaller volume",
            blob.address(),
            ByteSize(size)
        )));
    }
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
