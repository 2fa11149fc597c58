//! A storage account as a client sees it: endpoint, credential, connections.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper::Method;
use tokio::time::{Instant, timeout};

use super::answer::Answer;
use super::attempt::{Expect, execute};
use super::connect::Connector;
use super::credential::Credential;
use super::endpoint::{Endpoint, Target};
use super::error::Advice;
use super::keyring::{Keyring, Pick};
use super::page_blob::{Attempt, PageBlob};
use super::pool::Pool;
use super::request::Request;
use super::source::CredentialSource;
use super::types::*;
use super::{tls, xml};

/// The longest listing that is read, in bytes (5,000 blobs take a few MiB).
const LISTING: u64 = 64 << 20;

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
pub struct Account(pub(super) Arc<AccountInner>);

/// One handle family: what all handles share, and this one's connections.
pub(super) struct AccountInner {
    pub(super) shared: Arc<Shared>,
    pub(super) pool: Pool,
}

/// What isolated siblings share.
pub(super) struct Shared {
    name: String,
    pub(super) connector: Connector,
    pub(super) keyring: Arc<Keyring>,
}

impl std::fmt::Debug for Account {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shared = &self.0.shared;
        f.debug_struct("Account")
            .field("name", &shared.name)
            .field("endpoint", &shared.connector.endpoint.base)
            .field("credential", &shared.keyring.current())
            .finish_non_exhaustive()
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
    ///
    /// # Errors
    /// [`ConfigError`], for what no request could ever work with.
    pub fn new(config: AccountConfig) -> Result<Self, ConfigError> {
        let endpoint =
            Endpoint::parse(&config.endpoint).map_err(|reason| ConfigError::Endpoint {
                // A query may hold a signature.
                endpoint: config
                    .endpoint
                    .split(['?', '#'])
                    .next()
                    .unwrap_or_default()
                    .to_owned(),
                reason,
            })?;
        // A CA file that cannot be read is refused even where it is not needed.
        let tls = if endpoint.tls || config.ca_file.is_some() {
            Some(tls::client_config(
                &endpoint.base,
                config.ca_file.as_deref(),
            )?)
        } else {
            None
        };
        let connector = Connector {
            tls: tls.filter(|_| endpoint.tls),
            endpoint,
            timeout: config.connect_timeout,
        };
        Ok(Self(Arc::new(AccountInner {
            shared: Arc::new(Shared {
                keyring: Arc::new(Keyring::new(&config.name, config.credential)),
                name: config.name,
                connector,
            }),
            pool: Pool::new(config.max_connections, config.idle_timeout),
        })))
    }

    /// The account's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.shared.name
    }

    /// The base URL, without a final slash and without secrets.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.0.shared.connector.endpoint.base
    }

    /// A handle to the same account that shares credentials but no connections.
    #[must_use]
    pub fn isolated(&self, max_connections: usize) -> Self {
        Self(Arc::new(AccountInner {
            shared: self.0.shared.clone(),
            pool: Pool::new(max_connections, self.0.pool.idle_timeout()),
        }))
    }

    /// Replaces the credential for this handle and all its clones and
    /// isolated siblings; requests under way keep the old one.
    pub fn set_credential(&self, credential: Credential) {
        self.0.shared.keyring.replace(vec![credential], None);
    }

    /// As [`Account::set_credential`], with all that `source` yielded (not
    /// nothing); it is asked again when the store refuses them.
    pub fn set_credentials(&self, credentials: Vec<Credential>, source: CredentialSource) {
        self.0.shared.keyring.replace(credentials, Some(source));
    }

    /// A handle on the page blob `blob` in `container`; asks nothing.
    #[must_use]
    pub fn page_blob(&self, container: &str, blob: &str) -> PageBlob {
        PageBlob {
            account: self.clone(),
            target: self.target(container, blob),
            snapshot: None,
            tier: None,
        }
    }

    /// `scheme://host:port`, which a target's path follows.
    pub(super) fn origin(&self) -> String {
        self.0.shared.connector.endpoint.origin()
    }

    fn target(&self, container: &str, blob: &str) -> Arc<Target> {
        let address = BlobAddress::new(self.name(), container, blob);
        Arc::new(Target::new(&self.0.shared.connector.endpoint, address))
    }

    /// Makes one attempt at `request`: with another credential when the store
    /// refused the signature, for then it has not looked at the request itself.
    /// `deadline` bounds it all.
    pub(super) async fn execute(
        &self,
        request: &Request,
        expect: Expect,
        deadline: Duration,
    ) -> Attempt<Answer> {
        let (began, keyring) = (Instant::now(), &self.0.shared.keyring);
        loop {
            let credential = match keyring.pick() {
                Pick::Credential(credential) => credential,
                Pick::Refused(refusal) => {
                    let mut error = request.error(refusal.failure, refusal.detail);
                    error.retry_after = refusal.retry_after;
                    return Err(error);
                }
            };
            let left = deadline.saturating_sub(began.elapsed());
            let attempt = execute(&self.0, &credential, request, expect, left).await;
            let mut error = match attempt {
                Err(error) if error.advice() == Advice::Reauthenticate && !error.clock => error,
                settled => {
                    let let_in = settled
                        .as_ref()
                        .map_or_else(|e| e.status().is_some(), |_| true);
                    if let_in && !keyring.is_calm() {
                        keyring.accepted(&credential);
                    }
                    return settled;
                }
            };
            let left = deadline.saturating_sub(began.elapsed());
            match timeout(left, keyring.refused(&credential, &error)).await {
                Ok(true) => {}
                Ok(false) | Err(_) => {
                    if let Pick::Refused(refusal) = keyring.pick() {
                        error.detail = refusal.detail;
                    }
                    return Err(error);
                }
            }
        }
    }

    fn container_request(
        &self,
        method: Method,
        operation: &'static str,
        container: &str,
    ) -> Request {
        Request::new(method, operation, &self.target(container, "")).query("restype", "container")
    }

    /// Create Container.
    ///
    /// # Errors
    /// 409 `ContainerAlreadyExists`, or as any request.
    pub async fn create_container(&self, container: &str, deadline: Duration) -> Attempt<()> {
        let request = self.container_request(Method::PUT, "create container", container);
        self.execute(&request, Expect::Nothing, deadline).await?;
        Ok(())
    }

    /// Delete Container.
    ///
    /// # Errors
    /// 404 `ContainerNotFound`, or as any request.
    pub async fn delete_container(&self, container: &str, deadline: Duration) -> Attempt<()> {
        let request = self.container_request(Method::DELETE, "delete container", container);
        self.execute(&request, Expect::Nothing, deadline).await?;
        Ok(())
    }

    /// Get Container Properties: is it there?
    ///
    /// # Errors
    /// As any request; 404 `ContainerNotFound` is `false` rather than an error.
    pub async fn container_exists(&self, container: &str, deadline: Duration) -> Attempt<bool> {
        let request = self.container_request(Method::HEAD, "get container properties", container);
        match self.execute(&request, Expect::Nothing, deadline).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// List Blobs: one page, with snapshots when `snapshots`; the marker of the next page.
    ///
    /// # Errors
    /// As any request.
    pub async fn list_blobs(
        &self,
        container: &str,
        prefix: &str,
        snapshots: bool,
        marker: Option<&str>,
        deadline: Duration,
    ) -> Attempt<(Vec<ListedBlob>, Option<String>)> {
        let include = if snapshots {
            "metadata,snapshots"
        } else {
            "metadata"
        };
        let request = self
            .container_request(Method::GET, "list blobs", container)
            .query("comp", "list")
            .query("include", include)
            .query_if("prefix", Some(prefix).filter(|prefix| !prefix.is_empty()))
            .query_if("marker", marker);
        let answer = self
            .execute(&request, Expect::UpTo(LISTING), deadline)
            .await?;
        xml::blob_list(&answer.body()).map_err(|reason| request.bad_answer(reason))
    }
}
