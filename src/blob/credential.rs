//! What authorises requests. Nothing here prints a secret.

use zeroize::Zeroizing;

/// How requests to an account are authorised.
#[derive(Clone)]
pub enum Credential {
    /// Shared Key: the account key, decoded.
    SharedKey(SharedKey),
    /// A shared access signature: the query string without its `?`.
    Sas(Zeroizing<String>),
    /// None (public containers).
    Anonymous,
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::SharedKey(_) => "SharedKey(..)",
            Self::Sas(_) => "Sas(..)",
            Self::Anonymous => "Anonymous",
        })
    }
}

/// An account key that was decoded and keyed once; a signature clones the
/// HMAC state.
#[derive(Clone)]
pub struct SharedKey {
    // the keyed HMAC-SHA256 state
}

/// An account key that is no base64.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the account key is not base64: copy it whole, it is 88 characters and ends in ==")]
pub struct KeyError;

impl SharedKey {
    /// Takes the key as the portal shows it (base64; surrounding blanks are ignored).
    pub fn from_base64(text: &str) -> Result<Self, KeyError> {
        todo!()
    }

    /// HMAC-SHA256 of `text` in base64.
    #[must_use]
    pub fn sign(&self, text: &str) -> String {
        todo!()
    }
}
