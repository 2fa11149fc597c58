//! A storage account as a client sees it: endpoint, credential, connections.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::credential::Credential;
use super::page_blob::{Attempt, PageBlob};
use super::types::*;

/// What is needed to talk to one account.
#[derive(Clone, Debug)]
pub struct AccountConfig {
    /// Account name.
    pub name: String,
    /// Base URL: `https://NAME.blob.core.windows.net`, or path style such as
    /// `http://127.0.0.1:10000/devstoreaccount1`.
    pub endpoint: String,
    /// How requests are authorised.
    pub credential: Credential,
    /// PEM file with certificate authorities to trust beside the system's.
    pub ca_file: Option<PathBuf>,
    /// Bound on making a connection, TLS handshake included.
    pub connect_timeout: Duration,
    /// Most connections that may be open at once for one [`Account`] handle family.
    pub max_connections: usize,
    /// An idle connection older than this is closed rather than reused.
    pub idle_timeout: Duration,
}

/// A handle on one account and its connection pool; cheap to clone.
///
/// [`Account::isolated`] gives a handle with a pool of its own, for work (such
/// as lease renewal) that must not queue behind data.
#[derive(Clone)]
pub struct Account(Arc<AccountInner>);

struct AccountInner {}

impl std::fmt::Debug for Account {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        todo!()
    }
}

/// A configuration that cannot work: bad URL, unreadable CA file.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConfigError {
    /// The endpoint is no usable URL.
    #[error("endpoint \"{endpoint}\": {reason}")]
    Endpoint {
        /// As given.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The CA file cannot be used.
    #[error("ca file {path}: {reason}", path = path.display())]
    CaFile {
        /// As given.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl Account {
    /// Checks the configuration; makes no connection yet.
    pub fn new(config: AccountConfig) -> Result<Self, ConfigError> {
        todo!()
    }

    /// The account's name.
    #[must_use]
    pub fn name(&self) -> &str {
        todo!()
    }

    /// A handle to the same account that shares credentials but no connections.
    #[must_use]
    pub fn isolated(&self, max_connections: usize) -> Self {
        todo!()
    }

    /// Replaces the credential for this handle and all its clones and
    /// isolated siblings; requests under way keep the old one.
    pub fn set_credential(&self, credential: Credential) {
        todo!()
    }

    /// A handle on the page blob `blob` in `container`; asks nothing.
    #[must_use]
    pub fn page_blob(&self, container: &str, blob: &str) -> PageBlob {
        todo!()
    }

    /// Create Container.
    pub async fn create_container(&self, container: &str, deadline: Duration) -> Attempt<()> {
        todo!()
    }

    /// Delete Container.
    pub async fn delete_container(&self, container: &str, deadline: Duration) -> Attempt<()> {
        todo!()
    }

    /// Get Container Properties: is it there?
    pub async fn container_exists(&self, container: &str, deadline: Duration) -> Attempt<bool> {
        todo!()
    }

    /// List Blobs: one page, with snapshots when `snapshots`; the marker of the next page.
    pub async fn list_blobs(
        &self,
        container: &str,
        prefix: &str,
        snapshots: bool,
        marker: Option<&str>,
        deadline: Duration,
    ) -> Attempt<(Vec<ListedBlob>, Option<String>)> {
        todo!()
    }
}
