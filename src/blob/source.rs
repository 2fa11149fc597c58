//! Where an account's credentials come from, so that they can be read again
//! when they were rotated.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::credential::{Credential, SharedKey};

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

impl Loaded {
    /// The credentials, if they are those of `account`.
    ///
    /// # Errors
    /// They name another account; in words.
    pub fn of(self, account: &str) -> Result<Vec<Credential>, String> {
        match self.account.filter(|owner| owner != account) {
            Some(owner) => Err(format!(
                "the credentials are those of account {owner}, not of {account}: name the right secret"
            )),
            None if self.credentials.is_empty() => Err(format!(
                "no credentials for account {account}: the source is empty"
            )),
            None => Ok(self.credentials),
        }
    }

    fn only(credential: Credential) -> Self {
        Self {
            credentials: vec![credential],
            account: None,
            endpoint: None,
        }
    }
}

/// A source that yields no usable credential; names the file, never its content.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct SourceError(pub String);

impl CredentialSource {
    /// Reads the source. Blocking file reads of a few hundred bytes.
    ///
    /// # Errors
    /// [`SourceError`] that names the file and what to do.
    pub fn load(&self) -> Result<Loaded, SourceError> {
        match self {
            Self::KeyFile(path) => {
                let text = demand(path, "put the account key into it")?;
                Ok(Loaded::only(key(&text, &shown(path))?))
            }
            Self::SecretDir(dir) => secret_dir(dir),
            Self::Key(text) => Ok(Loaded::only(key(text, "the key from the environment")?)),
            Self::Sas(text) => Ok(Loaded::only(sas(text, "the sas from the environment")?)),
            Self::Anonymous => Ok(Loaded::only(Credential::Anonymous)),
        }
    }
}

fn secret_dir(dir: &Path) -> Result<Loaded, SourceError> {
    if !dir.is_dir() {
        return Err(SourceError(format!(
            "secret directory {}: not a directory: it must hold the files accountname and accountkey",
            dir.display()
        )));
    }
    let account = demand(
        &dir.join("accountname"),
        "put the storage account's name into it",
    )?;
    let mut credentials = Vec::new();
    for name in ["accountkey", "accountkey2"] {
        let path = dir.join(name);
        if let Some(text) = read(&path)? {
            credentials.push(key(&text, &shown(&path))?);
        }
    }
    let path = dir.join("sas");
    if let Some(text) = read(&path)? {
        credentials.push(sas(&text, &shown(&path))?);
    }
    if credentials.is_empty() {
        return Err(SourceError(format!(
            "secret directory {}: neither accountkey nor sas is there: put the account key into accountkey",
            dir.display()
        )));
    }
    Ok(Loaded {
        credentials,
        account: Some(account.as_str().to_owned()),
        endpoint: read(&dir.join("endpoint"))?.map(|text| text.as_str().to_owned()),
    })
}

fn shown(path: &Path) -> String {
    format!("file {}", path.display())
}

/// A file's trimmed text; `None` when there is no such file.
fn read(path: &Path) -> Result<Option<Zeroizing<String>>, SourceError> {
    let fail = |text: String| SourceError(format!("{}: {text}", shown(path)));
    let text = match std::fs::read_to_string(path) {
        Ok(text) => Zeroizing::new(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            return Err(fail("not text: store it as plain text".into()));
        }
        Err(error) => {
            return Err(fail(format!(
                "cannot read it: {error}: check its path and mode"
            )));
        }
    };
    let trimmed = text.trim_start_matches('\u{feff}').trim();
    if trimmed.is_empty() {
        return Err(fail("it is empty: fill it or remove it".into()));
    }
    Ok(Some(Zeroizing::new(trimmed.to_owned())))
}

/// As [`read`], for a file that must be there.
fn demand(path: &Path, remedy: &str) -> Result<Zeroizing<String>, SourceError> {
    read(path)?.ok_or_else(|| SourceError(format!("{}: it does not exist: {remedy}", shown(path))))
}

fn key(text: &str, origin: &str) -> Result<Credential, SourceError> {
    SharedKey::from_base64(text)
        .map(Credential::SharedKey)
        .map_err(|error| SourceError(format!("{origin}: {error}")))
}

fn sas(text: &str, origin: &str) -> Result<Credential, SourceError> {
    let clean = text.trim().trim_start_matches('?');
    let is_query = clean.is_ascii() && !clean.contains([' ', '\n', '"', '#', '<', '>']);
    let is_signed = clean.split('&').any(|part| part.starts_with("sig="));
    if is_query && is_signed {
        Ok(Credential::sas(clean))
    } else {
        Err(SourceError(format!(
            "{origin}: not a shared access signature: copy it whole, it is a query string with sig= in it"
        )))
    }
}

/// A parsed `AZURE_STORAGE_CONNECTION_STRING`.
#[derive(Clone, Default)]
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

impl std::fmt::Debug for ConnectionString {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectionString")
            .field("account", &self.account)
            .field("key", &self.key.as_ref().map(|_| ".."))
            .field("sas", &self.sas.as_ref().map(|_| ".."))
            .field("endpoint", &self.endpoint)
            .finish()
    }
}

/// The emulators' account, and its published key.
const DEVELOPMENT_ACCOUNT: &str = "devstoreaccount1";
const DEVELOPMENT_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

impl ConnectionString {
    /// Parses it; errors never echo the text.
    ///
    /// # Errors
    /// [`SourceError`] that names the setting at fault.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        let fail = |text: &str| SourceError(format!("connection string: {text}"));
        let mut parsed = Self::default();
        let mut protocol = None;
        let mut suffix = None;
        let mut development = false;
        let mut proxy = None;
        for part in text.trim().split(';').map(str::trim) {
            if part.is_empty() {
                continue;
            }
            // Keys and signatures hold `=` themselves: only the first one counts.
            let (name, value) = part
                .split_once('=')
                .ok_or_else(|| fail("a setting has no =: write NAME=VALUE;NAME=VALUE"))?;
            let value = value.trim();
            if value.is_empty() {
                // The name may be a part of a mangled secret: it is not shown.
                return Err(fail("a setting has no value: copy it whole"));
            }
            match name.trim().to_ascii_lowercase().as_str() {
                "accountname" => parsed.account = Some(value.to_owned()),
                "accountkey" => parsed.key = Some(Zeroizing::new(value.to_owned())),
                "sharedaccesssignature" => {
                    let value = value.trim_start_matches('?');
                    parsed.sas = Some(Zeroizing::new(value.to_owned()));
                }
                "blobendpoint" => {
                    parsed.endpoint = Some(value.trim_end_matches('/').to_owned());
                }
                "defaultendpointsprotocol" => match value.to_ascii_lowercase().as_str() {
                    word @ ("http" | "https") => protocol = Some(word.to_owned()),
                    _ => return Err(fail("DefaultEndpointsProtocol is neither https nor http")),
                },
                "endpointsuffix" => suffix = Some(value.trim_matches('.').to_owned()),
                "usedevelopmentstorage" => {
                    if !value.eq_ignore_ascii_case("true") {
                        return Err(fail("UseDevelopmentStorage must be true or left out"));
                    }
                    development = true;
                }
                "developmentstorageproxyuri" => proxy = Some(value.trim_end_matches('/')),
                // Settings of other services and of other clients.
                _ => {}
            }
        }
        if development {
            let base = proxy.unwrap_or("http://127.0.0.1");
            parsed
                .account
                .get_or_insert_with(|| DEVELOPMENT_ACCOUNT.to_owned());
            parsed
                .key
                .get_or_insert_with(|| Zeroizing::new(DEVELOPMENT_KEY.to_owned()));
            parsed
                .endpoint
                .get_or_insert_with(|| format!("{base}:10000/{DEVELOPMENT_ACCOUNT}"));
        }
        if parsed.endpoint.is_none()
            && let Some(account) = &parsed.account
        {
            parsed.endpoint = Some(format!(
                "{}://{account}.blob.{}",
                protocol.as_deref().unwrap_or("https"),
                suffix.as_deref().unwrap_or("core.windows.net"),
            ));
        }
        if let Some(key) = &parsed.key {
            SharedKey::from_base64(key).map_err(|error| fail(&error.to_string()))?;
        }
        if parsed.account.is_none() && parsed.endpoint.is_none() {
            return Err(fail(
                "it names neither AccountName nor BlobEndpoint: copy it whole",
            ));
        }
        Ok(parsed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(dir: &tempfile::TempDir, name: &str, text: &[u8]) -> PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path
    }

    #[test]
    fn reads_a_secret_directory() {
        let dir = tempfile::tempdir().expect("a directory");
        write(&dir, "accountname", b" acct\n");
        write(&dir, "accountkey", b"a2V5\n");
        let source = CredentialSource::SecretDir(dir.path().to_owned());
        let loaded = source.load().expect("one key");
        assert_eq!(loaded.account.as_deref(), Some("acct"));
        assert_eq!(loaded.credentials.len(), 1);
        assert_eq!(loaded.endpoint, None);
        write(&dir, "accountkey2", b"a2V5Mg==");
        write(&dir, "sas", b"?sv=1&sig=x\n");
        write(&dir, "endpoint", b"http://127.0.0.1:10000/acct\n");
        let loaded = source.load().expect("all of it");
        assert!(matches!(
            loaded.credentials.as_slice(),
            [
                Credential::SharedKey(_),
                Credential::SharedKey(_),
                Credential::Sas(_)
            ]
        ));
        assert_eq!(
            loaded.endpoint.as_deref(),
            Some("http://127.0.0.1:10000/acct")
        );
    }

    #[test]
    fn names_the_file_that_is_wrong_and_never_its_content() {
        let dir = tempfile::tempdir().expect("a directory");
        let load_dir = || CredentialSource::SecretDir(dir.path().to_owned()).load();
        let check = |result: Result<Loaded, SourceError>, words: &[&str]| {
            let text = result.expect_err("unusable").to_string();
            for word in words {
                assert!(text.contains(word), "{word}: {text}");
            }
            assert!(!text.contains("s3cret"), "{text}");
        };
        check(load_dir(), &["accountname", "does not exist"]);
        write(&dir, "accountname", b"\n");
        check(load_dir(), &["accountname", "empty"]);
        write(&dir, "accountname", b"acct");
        check(load_dir(), &["neither accountkey nor sas"]);
        let path = write(&dir, "accountkey", b"not base64 s3cret!");
        check(load_dir(), &["accountkey", "not base64"]);
        check(
            CredentialSource::KeyFile(path).load(),
            &["accountkey", "not base64"],
        );
        write(&dir, "accountkey", b"\xff\xfe");
        check(load_dir(), &["accountkey", "not text"]);
        write(&dir, "accountkey", b"a2V5");
        write(&dir, "sas", b"s3cret");
        check(load_dir(), &["sas", "sig="]);
        check(
            CredentialSource::KeyFile(dir.path().join("nowhere")).load(),
            &["nowhere", "does not exist"],
        );
        check(
            CredentialSource::KeyFile(dir.path().to_owned()).load(),
            &["cannot read it"],
        );
        check(
            CredentialSource::SecretDir(dir.path().join("nowhere")).load(),
            &["not a directory"],
        );
        check(
            CredentialSource::Key("s3cret!".into()).load(),
            &["environment"],
        );
    }

    #[test]
    fn survives_a_record() {
        let source = CredentialSource::SecretDir("/etc/dysk/secret".into());
        let text = serde_json::to_string(&source).expect("json");
        assert_eq!(text, r#"{"secret-dir":"/etc/dysk/secret"}"#);
        let back: CredentialSource = serde_json::from_str(&text).expect("json");
        assert_eq!(format!("{back:?}"), "SecretDir(/etc/dysk/secret)");
        assert_eq!(
            format!("{:?}", CredentialSource::Key("s3cret".into())),
            "Key(..)"
        );
    }

    #[test]
    fn parses_connection_strings() {
        let parsed = ConnectionString::parse(
            "DefaultEndpointsProtocol=https;AccountName=acct;AccountKey=a2V5Cg==;EndpointSuffix=core.chinacloudapi.cn",
        )
        .expect("the portal's");
        assert_eq!(parsed.account.as_deref(), Some("acct"));
        assert_eq!(
            parsed.key.as_ref().map(|key| key.as_str()),
            Some("a2V5Cg==")
        );
        assert_eq!(
            parsed.endpoint.as_deref(),
            Some("https://acct.blob.core.chinacloudapi.cn")
        );
        assert!(!format!("{parsed:?}").contains("a2V5"));

        let parsed = ConnectionString::parse(
            "BlobEndpoint=http://127.0.0.1:10000/acct/;SharedAccessSignature=?sv=1&sig=a%3D",
        )
        .expect("with a sas");
        assert_eq!(
            parsed.sas.as_ref().map(|sas| sas.as_str()),
            Some("sv=1&sig=a%3D")
        );
        assert_eq!(
            parsed.endpoint.as_deref(),
            Some("http://127.0.0.1:10000/acct")
        );

        let parsed = ConnectionString::parse("UseDevelopmentStorage=true;").expect("development");
        assert_eq!(parsed.account.as_deref(), Some(DEVELOPMENT_ACCOUNT));
        assert_eq!(
            parsed.endpoint.as_deref(),
            Some("http://127.0.0.1:10000/devstoreaccount1")
        );
    }

    #[test]
    fn refuses_connection_strings_without_echoing_them() {
        for (text, words) in [
            ("", "neither AccountName"),
            ("s3cret", "no ="),
            ("AccountName=;AccountKey=s3cret", "no value"),
            ("AccountName=acct;AccountKey=s3cret!", "not base64"),
            (
                "AccountName=acct;DefaultEndpointsProtocol=s3cret",
                "neither https",
            ),
            ("UseDevelopmentStorage=s3cret", "must be true"),
        ] {
            let error = ConnectionString::parse(text).expect_err(text).to_string();
            assert!(
                error.contains(words) && !error.contains("s3cret"),
                "{error}"
            );
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in "((AccountName|AccountKey|BlobEndpoint|UseDevelopmentStorage|x)?=?.{0,9};?){0,6}") {
            let _parsed = ConnectionString::parse(&text).is_ok();
        }
    }
}
