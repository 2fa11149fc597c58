//! The Secret of a StorageClass: `accountname`, `accountkey` or `sas`, and
//! `endpoint`. Nothing here is printed or handed on.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;

use tonic::Status;

use super::failure;
use crate::blob::Account;
use crate::blob::cloud;
use crate::blob::source::CredentialSource;
use crate::node::account;
use crate::node::api::{AccountSpec, Secret};

/// The largest file of a Secret.
const LARGEST_VALUE: u64 = 64 << 10;

/// Reads a Secret that is mounted as a folder, one file for each key; again at
/// each call, so that a rotated one is used at once. Blocks.
///
/// # Errors
/// FAILED_PRECONDITION names the folder, never what is in it.
pub fn read(folder: &Path) -> Result<HashMap<String, String>, Status> {
    let unreadable = |error: std::io::Error| {
        Status::failed_precondition(format!(
            "default secret {}: {error}: mount a Secret of type azure/dysk there",
            folder.display()
        ))
    };
    let mut values = HashMap::new();
    for key in [
        "accountname",
        "accountkey",
        "accountkey2",
        "sas",
        "endpoint",
    ] {
        let file = match std::fs::File::open(folder.join(key)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            other => other.map_err(unreadable)?,
        };
        let mut value = String::new();
        let mut bounded = file.take(LARGEST_VALUE);
        bounded.read_to_string(&mut value).map_err(unreadable)?;
        values.insert(key.to_owned(), value);
    }
    Ok(values)
}

/// Opens the account of `secrets`. An `endpoint` of the StorageClass comes
/// before the Secret's.
///
/// # Errors
/// INVALID_ARGUMENT names the key that is missing or wrong, never its value.
pub async fn open(
    secrets: &HashMap<String, String>,
    endpoint: Option<&str>,
    realm: Option<&str>,
) -> Result<Account, Status> {
    account::open(&spec(secrets, endpoint, realm)?)
        .await
        .map_err(|error| failure::of_account(&error))
}

/// The account of `secrets`, as the daemon is told it.
///
/// # Errors
/// As [`open`].
pub fn spec(
    secrets: &HashMap<String, String>,
    endpoint: Option<&str>,
    realm: Option<&str>,
) -> Result<AccountSpec, Status> {
    let value = |key: &str| {
        let value = secrets.get(key).map(|value| value.trim());
        value.filter(|value| !value.is_empty())
    };
    let name = value("accountname").ok_or_else(|| {
        Status::invalid_argument(
            "secret: accountname is missing: name a Secret of type azure/dysk \
             with accountname and accountkey",
        )
    })?;
    let keys = ["accountkey", "accountkey2"];
    let credential = match (keys.iter().find_map(|key| value(key)), value("sas")) {
        (Some(key), _) => CredentialSource::Key(key.to_owned()),
        (None, Some(sas)) => CredentialSource::Sas(sas.to_owned()),
        (None, None) => {
            return Err(Status::invalid_argument(
                "secret: neither accountkey nor sas is there: put the account key into accountkey",
            ));
        }
    };
    let endpoint = endpoint.or_else(|| value("endpoint"));
    Ok(AccountSpec {
        name: name.to_owned(),
        endpoint: endpoint.map_or_else(
            || cloud::endpoint(name, realm),
            |url| cloud::complete(url, name),
        ),
        credential: Secret(credential),
        ca_file: None,
    })
}
