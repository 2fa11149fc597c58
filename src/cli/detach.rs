//! `dyskctl detach`.

use std::path::Path;

use clap::Args;

use super::error::CliError;
use super::{Global, Output, output};
use crate::node::client::Client;
use crate::node::name::AttachmentName;

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
        by_device(&client, Path::new(&options.name_or_device)).await?
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

async fn by_device(client: &Client, path: &Path) -> Result<AttachmentName, CliError> {
    let attachments = client.list().await?;
    let real = std::fs::canonicalize(path).ok();
    let is_it = |candidate: &Option<std::path::PathBuf>| {
        let candidate = candidate.as_deref();
        candidate.is_some() && (candidate == Some(path) || candidate == real.as_deref())
    };
    attachments
        .into_iter()
        .find(|a| is_it(&a.device) || a.link.as_deref() == Some(path))
        .map(|a| a.name)
        .ok_or_else(|| {
            CliError::failed(format!(
                "{} is not attached by dyskd: see `dyskctl list`",
                path.display()
            ))
        })
}
