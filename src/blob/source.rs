//! Where an account's credentials come from, so that they can be read again
//! when they were rotated.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::credential::Credential;

/// A place that yields credentials; it can be written into a 0600 record and
/// asked again at any time. `Debug` shows paths, never secrets.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum CredentialSource {
    /// A file that holds the account key in base64.
    KeyFile(PathBuf),
    /// A mounted Secret: files `accountname`, `accountkey`, and optionally
    /// `accountkey2`, `sas`, `endpoint`.
    SecretDir(PathBuf),
    /// An account key that was handed over (from the environment).
    Key(String),
    /// A shared access signature that was handed over.
    Sas(String),
    /// None.
    Anonymous,
}

impl std::fmt::Debug for CredentialSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::KeyFile(path) => write!(f, "KeyFile({})", path.display()),
            Self::SecretDir(path) => write!(f, "SecretDir({})", path.display()),
            Self::Key(_) => f.write_str("Key(..)"),
            Self::Sas(_) => f.write_str("Sas(..)"),
            Self::Anonymous => f.write_str("Anonymous"),
        }
    }
}

/// What a source yielded.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Credentials to try in this order (a second key during a rotation).
    pub credentials: Vec<Credential>,
    /// The account name, where the source names one (`accountname`).
    pub account: Option<String>,
    /// The endpoint, where the source names one (`endpoint`).
    pub endpoint: Option<String>,
}

/// A source that yields no usable credential; names the file, never its content.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct SourceError(pub String);

impl CredentialSource {
    /// Reads the source. Blocking file reads of a few hundred bytes.
    pub fn load(&self) -> Result<Loaded, SourceError> {
        todo!()
    }
}

/// A parsed `AZURE_STORAGE_CONNECTION_STRING`.
#[derive(Clone, Debug, Default)]
pub struct ConnectionString {
    /// `AccountName`.
    pub account: Option<String>,
    /// `AccountKey`.
    pub key: Option<Zeroizing<String>>,
    /// `SharedAccessSignature`.
    pub sas: Option<Zeroizing<String>>,
    /// `BlobEndpoint`, or the one that `DefaultEndpointsProtocol` and
    /// `EndpointSuffix` make; for `UseDevelopmentStorage=true` the emulator's.
    pub endpoint: Option<String>,
}

impl ConnectionString {
    /// Parses it; errors never echo the text.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        todo!()
    }
}
