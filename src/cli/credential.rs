//! `dyskctl credential`: other credentials for what is attached.

use std::path::PathBuf;

use clap::Args;

use super::account::{self, AccountOptions, Environment};
use super::error::CliError;
use super::{Global, Output, output};
use crate::node::api::{CredentialChange, Secret};
use crate::node::name::AttachmentName;

#[derive(Debug, Args)]
pub struct Options {
    /// The attachment's name
    name: AttachmentName,
    /// File that holds the account key
    #[arg(long, value_name = "FILE", conflicts_with = "secret_dir")]
    account_key_file: Option<PathBuf>,
    /// Mounted Secret: a folder with the files accountname and accountkey
    #[arg(long, value_name = "DIR")]
    secret_dir: Option<PathBuf>,
}

pub async fn run(global: &Global, options: Options) -> Result<(), CliError> {
    let client = global.client();
    let attachment = client.status(&options.name).await?;
    let account = AccountOptions {
        endpoint: None,
        realm: None,
        account_key_file: options.account_key_file,
        secret_dir: options.secret_dir,
        ca_file: None,
    };
    let found = account::find(&account, &Environment::of_process()?)?;
    if found.bound
        && let Some(owner) = found
            .account
            .as_deref()
            .filter(|o| *o != attachment.account)
    {
        return Err(CliError::failed(format!(
            "{} names account {owner}, but {} is on account {}: name the right credentials",
            found.named_by, attachment.name, attachment.account
        )));
    }
    let change = CredentialChange {
        credential: Secret(found.source),
    };
    let attachment = client.replace_credential(&options.name, &change).await?;
    match global.output {
        Output::Json => output::json(&attachment),
        Output::Table => Ok(()),
    }
}
