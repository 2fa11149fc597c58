//! The text by which a person names a volume: `ACCOUNT/CONTAINER/BLOB` or a
//! blob URL.

/// A volume as it was named; parts that were left out are `None`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeRef {
    /// The account, when named.
    pub account: Option<String>,
    /// The container, when named (the default is [`DEFAULT_CONTAINER`]).
    pub container: Option<String>,
    /// The blob, when named.
    pub blob: Option<String>,
    /// The endpoint of a URL: scheme, host, port and, for path-style URLs, the
    /// account's path segment.
    pub endpoint: Option<String>,
}

/// The container used when none is named.
pub const DEFAULT_CONTAINER: &str = "dysks";

/// A text that names no volume.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("volume \"{text}\": {reason}; write ACCOUNT/CONTAINER/BLOB or a blob URL")]
pub struct VolumeRefError {
    /// As given, without a URL's query (it may hold a signature).
    pub text: String,
    /// What is wrong with it.
    pub reason: String,
}

impl VolumeRef {
    /// Parses `ACCOUNT/CONTAINER/BLOB`, `ACCOUNT/BLOB` (default container), a
    /// single word (returned as `account`; the caller decides whether it is
    /// the account or the blob), or a URL in host style
    /// (`https://ACCOUNT.blob.../CONTAINER/BLOB`) or path style (an IP address,
    /// `localhost` or a host without a dot: `http://127.0.0.1:10000/ACCOUNT/CONTAINER/BLOB`).
    /// Container and account names are checked against Azure's rules.
    pub fn parse(text: &str) -> Result<Self, VolumeRefError> {
        todo!()
    }
}
