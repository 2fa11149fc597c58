//! From an account as a request names it to a handle that can be asked.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::api::{AccountSpec, ErrorCode};
use super::error::NodeError;
use crate::blob::{Account, AccountConfig, Credential, PageBlob};
use crate::volume::AccountPace;

/// Bound on one attempt at a request of control size (lease, properties).
pub const ATTEMPT_DEADLINE: Duration = crate::volume::DEFAULT_ATTEMPT_DEADLINE;
/// Bound on making a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections per volume: as many as requests that the kernel has under way on
/// a connection, which is deeper than any page blob is fast.
const MAX_CONNECTIONS: usize = 128;
/// Shorter than the idle timeouts of the service's front ends and of the
/// load balancers on the way.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Reads the credentials and makes a handle; makes no connection. Each
/// volume has a handle, and so connections, of its own.
///
/// # Errors
/// [`ErrorCode::BadAccount`] names the file or URL that cannot be used.
pub async fn open(spec: &AccountSpec) -> Result<Account, NodeError> {
    let spec = spec.clone();
    tokio::task::spawn_blocking(move || open_blocking(spec))
        .await
        .map_err(|error| NodeError::internal(format!("cannot read credentials: {error}")))?
}

fn open_blocking(spec: AccountSpec) -> Result<Account, NodeError> {
    let bad = |text: String| NodeError::new(ErrorCode::BadAccount, text);
    let credentials = load(&spec)?;
    let account = Account::new(AccountConfig {
        name: spec.name,
        endpoint: spec.endpoint,
        credential: Credential::Anonymous,
        ca_file: spec.ca_file,
        connect_timeout: CONNECT_TIMEOUT,
        max_connections: MAX_CONNECTIONS,
        idle_timeout: IDLE_TIMEOUT,
    })
    .map_err(|error| bad(error.to_string()))?;
    account.set_credentials(credentials, spec.credential.0);
    Ok(account)
}

fn load(spec: &AccountSpec) -> Result<Vec<Credential>, NodeError> {
    let bad = |text: String| NodeError::new(ErrorCode::BadAccount, text);
    let loaded = spec.credential.0.load().map_err(|e| bad(e.to_string()))?;
    loaded.of(&spec.name).map_err(bad)
}

/// Has `account`, that of `spec`, use what its credential source holds now.
///
/// # Errors
/// As [`open`]; the old credentials then stay.
pub async fn replace_credential(account: &Account, spec: &AccountSpec) -> Result<(), NodeError> {
    let (name, source) = (spec.clone(), spec.credential.0.clone());
    let credentials = tokio::task::spawn_blocking(move || load(&name))
        .await
        .map_err(|error| NodeError::internal(format!("cannot read credentials: {error}")))??;
    account.set_credentials(credentials, source);
    Ok(())
}

/// What all volumes of this process on the account of `spec` share, because
/// its limits are theirs together.
#[must_use]
pub fn pace(spec: &AccountSpec) -> AccountPace {
    static PACES: Mutex<BTreeMap<(String, String), AccountPace>> = Mutex::new(BTreeMap::new());
    let endpoint = spec.endpoint.trim_end_matches('/').to_ascii_lowercase();
    let mut paces = PACES.lock().unwrap_or_else(PoisonError::into_inner);
    // As many as accounts were used, each of a few hundred bytes.
    let pace = paces.entry((endpoint, spec.name.clone())).or_default();
    pace.clone()
}

/// [`open`] and the handle on one blob.
///
/// # Errors
/// As [`open`].
pub async fn open_blob(
    spec: &AccountSpec,
    container: &str,
    blob: &str,
) -> Result<(Account, PageBlob), NodeError> {
    let account = open(spec).await?;
    let blob = account.page_blob(container, blob);
    Ok((account, blob))
}
