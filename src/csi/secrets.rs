//! The Secret of a StorageClass: `accountname`, `accountkey` or `sas`, and
//! `endpoint`. Nothing here is printed or handed on.

use std::collections::HashMap;
use std::fmt::Display;
use std::io::Read;
use std::path::Path;

use tonic::Status;

use super::failure;
use crate::blob::Account;
use crate::node::api::AccountSpec;
use crate::node::{account, secret};

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
    for key in secret::KEYS {
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

/// Makes sure that the Secret, which is that of account `given`, is of `account`,
/// in which `what` lies.
///
/// # Errors
/// INVALID_ARGUMENT: it is another account's.
pub fn are_of(account: &str, given: &str, what: &impl Display) -> Result<(), Status> {
    if given == account {
        return Ok(());
    }
    Err(Status::invalid_argument(format!(
        "{what}: the secret is that of account {given}"
    )))
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
    secret::account(|key| secrets.get(key).map(String::as_str), endpoint, realm)
        .map_err(|error| Status::invalid_argument(format!("secret: {error}")))
}
