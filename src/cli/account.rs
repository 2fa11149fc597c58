//! Which account, with which credentials: options, a mounted Secret, and the
//! environment of the Azure CLI.
//!
//! The first of these that is there is used: `--account-key-file`,
//! `--secret-dir`, AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_KEY,
//! AZURE_STORAGE_SAS_TOKEN.

use std::path::{Path, PathBuf};

use clap::Args;
use zeroize::Zeroizing;

use super::error::CliError;
pub use crate::blob::cloud::{complete, endpoint};
use crate::blob::source::{ConnectionString, CredentialSource};

/// Account options of the commands that name a volume.
#[derive(Debug, Args)]
#[command(next_help_heading = "Account")]
pub struct AccountOptions {
    /// Its blob service [default: https://ACCOUNT.blob.core.windows.net]
    #[arg(long, value_name = "URL", conflicts_with = "realm")]
    pub endpoint: Option<String>,
    /// Another cloud: china, usgov, or the suffix of its blob endpoints
    #[arg(long, value_name = "SUFFIX")]
    pub realm: Option<String>,
    /// File that holds the account key
    #[arg(long, value_name = "FILE", conflicts_with = "secret_dir")]
    pub account_key_file: Option<PathBuf>,
    /// Mounted Secret: a folder with the files accountname and accountkey
    #[arg(long, value_name = "DIR")]
    pub secret_dir: Option<PathBuf>,
    /// PEM file with certificate authorities to trust beside the system's
    #[arg(long, value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
}

/// What the Azure CLI takes from the environment.
#[derive(Default)]
pub struct Environment {
    /// AZURE_STORAGE_ACCOUNT.
    pub account: Option<String>,
    /// AZURE_STORAGE_KEY.
    pub key: Option<Zeroizing<String>>,
    /// AZURE_STORAGE_SAS_TOKEN.
    pub sas: Option<Zeroizing<String>>,
    /// AZURE_STORAGE_CONNECTION_STRING.
    pub connection_string: Option<Zeroizing<String>>,
}

impl Environment {
    /// The process's. Variables that are empty count as not set.
    pub fn of_process() -> Result<Self, CliError> {
        let variable = |name: &str| match std::env::var(name) {
            Ok(value) if !value.trim().is_empty() => Ok(Some(value.trim().to_owned())),
            Ok(_) | Err(std::env::VarError::NotPresent) => Ok(None),
            Err(std::env::VarError::NotUnicode(_)) => Err(CliError::failed(format!(
                "{name} is not utf-8: set it anew"
            ))),
        };
        let secret = |name: &str| Ok::<_, CliError>(variable(name)?.map(Zeroizing::new));
        Ok(Self {
            account: variable("AZURE_STORAGE_ACCOUNT")?,
            key: secret("AZURE_STORAGE_KEY")?,
            sas: secret("AZURE_STORAGE_SAS_TOKEN")?,
            connection_string: secret("AZURE_STORAGE_CONNECTION_STRING")?,
        })
    }
}

/// Credentials, and what came with them.
pub struct Found {
    /// Where they come from, for the daemon too: paths are absolute.
    pub source: CredentialSource,
    /// The account they name.
    pub account: Option<String>,
    /// What named the account, for messages.
    pub named_by: String,
    /// They are this account's and no other's.
    pub bound: bool,
    /// The endpoint they name.
    pub endpoint: Option<String>,
}

/// Looks for credentials.
pub fn find(options: &AccountOptions, environment: &Environment) -> Result<Found, CliError> {
    let by_environment = |source: CredentialSource, bound: bool| Found {
        source,
        account: environment.account.clone(),
        named_by: "AZURE_STORAGE_ACCOUNT".into(),
        bound,
        endpoint: None,
    };
    if let Some(file) = &options.account_key_file {
        let source = CredentialSource::KeyFile(absolute(file)?);
        source.load().map_err(CliError::failed)?;
        return Ok(by_environment(source, false));
    }
    if let Some(dir) = &options.secret_dir {
        let source = CredentialSource::SecretDir(absolute(dir)?);
        let loaded = source.load().map_err(CliError::failed)?;
        return Ok(Found {
            source,
            account: loaded.account,
            named_by: format!("the secret in {}", dir.display()),
            bound: true,
            endpoint: loaded.endpoint,
        });
    }
    if let Some(text) = &environment.connection_string {
        return by_connection_string(text);
    }
    if let Some(key) = &environment.key {
        return Ok(by_environment(CredentialSource::Key(key.to_string()), true));
    }
    if let Some(sas) = &environment.sas {
        let sas = sas.trim_start_matches('?').to_owned();
        return Ok(by_environment(CredentialSource::Sas(sas), true));
    }
    Err(CliError::failed(
        "no credentials: use --account-key-file or --secret-dir, or set AZURE_STORAGE_KEY, \
         AZURE_STORAGE_SAS_TOKEN or AZURE_STORAGE_CONNECTION_STRING",
    ))
}

fn by_connection_string(text: &str) -> Result<Found, CliError> {
    const NAME: &str = "AZURE_STORAGE_CONNECTION_STRING";
    let parsed = ConnectionString::parse(text)
        .map_err(|error| CliError::failed(format!("{NAME}: {error}")))?;
    let source = match (&parsed.key, &parsed.sas) {
        (Some(key), _) => CredentialSource::Key(key.to_string()),
        (None, Some(sas)) => CredentialSource::Sas(sas.trim_start_matches('?').to_owned()),
        (None, None) => {
            return Err(CliError::failed(format!(
                "{NAME} holds neither AccountKey nor SharedAccessSignature: copy it whole"
            )));
        }
    };
    Ok(Found {
        source,
        account: parsed.account,
        named_by: NAME.into(),
        bound: true,
        endpoint: parsed.endpoint,
    })
}

/// The path as the daemon must see it.
pub fn absolute(path: &Path) -> Result<PathBuf, CliError> {
    std::path::absolute(path)
        .map_err(|error| CliError::failed(format!("{}: {error}", path.display())))
}
