//! From the VOLUME argument and the account options to one blob of one
//! account.

use super::account::{self, AccountOptions, Environment, Found};
use super::error::CliError;
use crate::blob::reference::{DEFAULT_CONTAINER, VolumeRef};
use crate::node::api::{AccountSpec, Secret};
use crate::node::name::AttachmentName;

/// A volume, found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its account.
    pub account: AccountSpec,
    /// Its container.
    pub container: String,
    /// Its blob.
    pub blob: String,
}

impl Target {
    /// Finds the volume that `text` names.
    ///
    /// A single word is the account when `name` says what the blob is
    /// (`NAME.vhd`), and otherwise the blob, in the account that the
    /// credentials or the environment name.
    pub fn find(
        text: &str,
        name: Option<&AttachmentName>,
        options: &AccountOptions,
    ) -> Result<Self, CliError> {
        Self::find_in(text, name, options, &Environment::of_process()?)
    }

    fn find_in(
        text: &str,
        name: Option<&AttachmentName>,
        options: &AccountOptions,
        environment: &Environment,
    ) -> Result<Self, CliError> {
        let found = account::find(options, environment)?;
        let named = parse(text, name, &found)?;
        let (Some(account), Some(blob)) = (named.account, named.blob) else {
            return Err(CliError::failed(format!(
                "volume \"{}\" names no blob: write ACCOUNT/CONTAINER/BLOB or a blob URL",
                without_query(text)
            )));
        };
        if let Some(owner) = found.account.as_ref().filter(|owner| **owner != account)
            && found.bound
        {
            return Err(CliError::failed(format!(
                "volume \"{}\" is in account {account}, but {} names {owner}: \
                 use the credentials of {account}",
                without_query(text),
                found.named_by
            )));
        }
        if options.endpoint.is_some() && named.endpoint.is_some() {
            return Err(CliError::failed(
                "--endpoint cannot be used with a blob URL: the URL names the endpoint",
            ));
        }
        let given = options.endpoint.clone().or(named.endpoint);
        let given = match options.realm {
            Some(_) => given,
            None => given.or(found.endpoint),
        };
        let endpoint = given.map_or_else(
            || account::endpoint(&account, options.realm.as_deref()),
            |url| account::complete(&url, &account),
        );
        let ca_file = options.ca_file.as_deref().map(account::absolute);
        Ok(Self {
            account: AccountSpec {
                name: account,
                endpoint,
                credential: Secret(found.source),
                ca_file: ca_file.transpose()?,
            },
            container: named.container.unwrap_or_else(|| DEFAULT_CONTAINER.into()),
            blob,
        })
    }
}

/// The reference with account and blob filled in where they can be known.
fn parse(text: &str, name: Option<&AttachmentName>, found: &Found) -> Result<VolumeRef, CliError> {
    let whole = if text.contains('/') {
        text.to_owned()
    } else {
        match (name, &found.account) {
            (Some(name), _) => format!("{text}/{DEFAULT_CONTAINER}/{name}.vhd"),
            (None, Some(account)) => format!("{account}/{DEFAULT_CONTAINER}/{text}"),
            (None, None) => {
                return Err(CliError::failed(format!(
                    "volume \"{text}\" names no account: write ACCOUNT/CONTAINER/BLOB, \
                     or set AZURE_STORAGE_ACCOUNT"
                )));
            }
        }
    };
    let mut named = VolumeRef::parse(&whole).map_err(CliError::failed)?;
    if named.account.is_none() {
        named.account.clone_from(&found.account);
    }
    if named.blob.is_none() {
        named.blob = name.map(|name| format!("{name}.vhd"));
    }
    Ok(named)
}

/// A URL's query may hold a signature.
fn without_query(text: &str) -> &str {
    text.split('?').next().unwrap_or(text)
}
