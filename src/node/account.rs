//! From an account as a request names it to a handle that can be asked.

use std::time::Duration;

use super::api::{AccountSpec, ErrorCode};
use super::error::NodeError;
use crate::blob::{Account, AccountConfig, PageBlob};

/// Bound on one attempt at a request of control size (lease, properties).
pub const ATTEMPT_DEADLINE: Duration = crate::volume::DEFAULT_ATTEMPT_DEADLINE;
/// Bound on making a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections per volume: the kernel's queue of two connections, 128 each,
/// is deeper than any page blob is fast.
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
    let loaded = spec.credential.0.load().map_err(|e| bad(e.to_string()))?;
    if let Some(owner) = loaded.account.as_deref().filter(|o| *o != spec.name) {
        return Err(bad(format!(
            "the credentials are those of account {owner}, not of {}: name the right secret",
            spec.name
        )));
    }
    let credential = loaded.credentials.into_iter().next().ok_or_else(|| {
        bad(format!(
            "no credentials for account {}: the source is empty",
            spec.name
        ))
    })?;
    Account::new(AccountConfig {
        name: spec.name,
        endpoint: spec.endpoint,
        credential,
        ca_file: spec.ca_file,
        connect_timeout: CONNECT_TIMEOUT,
        max_connections: MAX_CONNECTIONS,
        idle_timeout: IDLE_TIMEOUT,
    })
    .map_err(|error| bad(error.to_string()))
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
