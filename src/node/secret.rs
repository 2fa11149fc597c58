//! A Secret of type `azure/dysk`: which account it opens, and how.

use super::api::{AccountSpec, Secret};
use crate::blob::cloud;
use crate::blob::source::CredentialSource;

/// The keys that are read; of the two account keys the first that is there.
pub const KEYS: [&str; 5] = [
    "accountname",
    "accountkey",
    "accountkey2",
    "sas",
    "endpoint",
];

/// A Secret that opens no account. Names keys, never values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// No account.
    #[error(
        "accountname is missing: name a Secret of type azure/dysk with accountname and accountkey"
    )]
    NoAccount,
    /// No credential.
    #[error("neither accountkey nor sas is there: put the account key into accountkey")]
    NoCredential,
}

/// The account of the Secret whose values `value` gives. An `endpoint` given
/// beside it comes before the Secret's; without one it is that of `realm`.
///
/// # Errors
/// [`SecretError`]: what is missing.
pub fn account<'a>(
    value: impl Fn(&str) -> Option<&'a str>,
    endpoint: Option<&str>,
    realm: Option<&str>,
) -> Result<AccountSpec, SecretError> {
    let value = |key| value(key).map(str::trim).filter(|value| !value.is_empty());
    let name = value("accountname").ok_or(SecretError::NoAccount)?;
    let key = value("accountkey").or_else(|| value("accountkey2"));
    let credential = match (key, value("sas")) {
        (Some(key), _) => CredentialSource::Key(key.to_owned()),
        (None, Some(sas)) => CredentialSource::Sas(sas.to_owned()),
        (None, None) => return Err(SecretError::NoCredential),
    };
    let endpoint = match endpoint.or_else(|| value("endpoint")) {
        Some(url) => cloud::complete(url, name),
        None => cloud::endpoint(name, realm),
    };
    Ok(AccountSpec {
        name: name.to_owned(),
        endpoint,
        credential: Secret(credential),
        ca_file: None,
    })
}
