//! What authorises requests. Nothing here prints a secret.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
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

impl Credential {
    /// A shared access signature as people paste it, with or without its `?`.
    #[must_use]
    pub fn sas(text: &str) -> Self {
        let text = text.trim();
        Self::Sas(Zeroizing::new(
            text.strip_prefix('?').unwrap_or(text).to_owned(),
        ))
    }
}

impl Credential {
    /// Is it the same secret?
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            // Two keys that sign alike are one.
            (Self::SharedKey(mine), Self::SharedKey(theirs)) => mine.sign("") == theirs.sign(""),
            (Self::Sas(mine), Self::Sas(theirs)) => mine == theirs,
            (Self::Anonymous, Self::Anonymous) => true,
            _ => false,
        }
    }
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
    keyed: Hmac<Sha256>,
}

impl std::fmt::Debug for SharedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SharedKey(..)")
    }
}

/// An account key that is no base64.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the account key is not base64: copy it whole, it is 88 characters and ends in ==")]
pub struct KeyError;

impl SharedKey {
    /// Takes the key as the portal shows it (base64; surrounding blanks are ignored).
    ///
    /// # Errors
    /// [`KeyError`] when it is empty or no base64.
    pub fn from_base64(text: &str) -> Result<Self, KeyError> {
        let key = Zeroizing::new(STANDARD.decode(text.trim()).map_err(|_| KeyError)?);
        if key.is_empty() {
            return Err(KeyError);
        }
        let keyed = Hmac::new_from_slice(&key).map_err(|_| KeyError)?;
        Ok(Self { keyed })
    }

    /// HMAC-SHA256 of `text` in base64.
    #[must_use]
    pub fn sign(&self, text: &str) -> String {
        let mut hmac = self.keyed.clone();
        hmac.update(text.as_bytes());
        STANDARD.encode(hmac.finalize().into_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_as_rfc_4231_does() {
        // Test case 2: key "Jefe", data "what do ya want for nothing?".
        let key = SharedKey::from_base64(" SmVmZQ==\n").expect("a key");
        assert_eq!(
            key.sign("what do ya want for nothing?"),
            "W9zBRr9gdU5qBCQmCJV1x1oAPwidJzmDnexYuWTsOEM="
        );
    }

    #[test]
    fn refuses_what_is_no_key_and_prints_none() {
        for text in ["", "  ", "no base64!", "abc"] {
            assert_eq!(
                SharedKey::from_base64(text).err(),
                Some(KeyError),
                "{text:?}"
            );
        }
        let credential = Credential::sas("?sv=1&sig=hidden");
        assert_eq!(format!("{credential:?}"), "Sas(..)");
        let Credential::Sas(text) = credential else {
            panic!("a signature")
        };
        assert_eq!(text.as_str(), "sv=1&sig=hidden");
    }
}
