//! The Secret of a StorageClass: `accountname`, `accountkey` or `sas`, and
//! `endpoint`. Nothing here is printed or handed on.

use std::collections::HashMap;

use tonic::Status;

use super::failure;
use crate::blob::Account;
use crate::blob::cloud;
use crate::blob::source::CredentialSource;
use crate::node::account;
use crate::node::api::{AccountSpec, Secret};

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
    let spec = AccountSpec {
        name: name.to_owned(),
        endpoint: endpoint.map_or_else(
            || cloud::endpoint(name, realm),
            |url| cloud::complete(url, name),
        ),
        credential: Secret(credential),
        ca_file: None,
    };
    account::open(&spec)
        .await
        .map_err(|error| failure::of_account(&error))
}
