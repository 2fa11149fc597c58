//! `dyskctl detach`.

use std::path::Path;

use clap::Args;

use super::error::CliError;
use super::{Global, Output, here, output};

#[derive(Debug, Args)]
pub struct Options {
    /// The attachment's name, its device, or its link
    #[arg(value_name = "NAME|DEVICE")]
    name_or_device: String,
    /// Detach though it is in use (its users get I/O errors) or the store does not answer
    #[arg(long)]
    force: bool,
}

pub async fn run(global: &Global, options: Options) -> Result<(), CliError> {
    let client = global.client();
    let name = if options.name_or_device.starts_with('/') {
        let path = Path::new(&options.name_or_device);
        here::by_device(client.list().await?, path)?.name
    } else {
        options.name_or_device.parse()?
    };
    let detached = client.detach(&name, options.force).await?;
    for warning in &detached.warnings {
        tracing::warn!(%name, "{warning}");
    }
    match global.output {
        Output::Json => output::json(&detached),
        Output::Table => Ok(()),
    }
}
