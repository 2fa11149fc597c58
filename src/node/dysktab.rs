//! `/etc/dysk/dysktab`: the volumes that a node attaches at boot, a line each,
//! in the spirit of fstab and crypttab.
//!
//! ```text
//! # NAME  VOLUME                        CREDENTIALS                   OPTIONS
//! data    myaccount/dysks/data.vhd      key-file=/etc/dysk/data.key   caching=read-write
//! logs    https://host/account/c/b.vhd  secret-dir=/etc/dysk/secret   ro,connections=4
//! ```
//!
//! Fields are separated by blanks; `#` begins a comment line. Secrets are
//! named by their path alone, and refused when everybody can read them: a disk
//! that comes by itself at each boot would otherwise be everybody's for good.

use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::api::{AccountSpec, AttachRequest, ErrorCode, MAX_CONNECTIONS, Secret};
use super::error::NodeError;
use super::name::AttachmentName;
use super::policy::Policy;
use super::registry::{Admission, Registry};
use crate::blob::Checksum;
use crate::blob::reference::{DEFAULT_CONTAINER, VolumeRef};
use crate::blob::retry::Backoff;
use crate::blob::source::CredentialSource;
use crate::size::ByteSize;
use crate::volume::Caching;

/// Where it is.
pub const PATH: &str = "/etc/dysk/dysktab";

/// Between two attempts at a line.
const PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// A line that cannot be used, or a table that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct TabError {
    /// The table.
    pub path: PathBuf,
    /// The line, from 1; none for the table as a whole.
    pub line: Option<usize>,
    /// What is wrong and what to do.
    pub reason: String,
}

impl fmt::Display for TabError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some(line) = self.line {
            write!(f, " line {line}")?;
        }
        write!(f, ": {}", self.reason)
    }
}

/// Reads the table: what can be attached, and what is wrong with the other
/// lines. A table that is not there is empty. Blocks.
#[must_use]
pub fn read(path: &Path) -> (Vec<AttachRequest>, Vec<TabError>) {
    match std::fs::read_to_string(path) {
        Ok(text) => parse(path, &text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => (Vec::new(), Vec::new()),
        Err(error) => {
            let reason = format!("cannot be read: {error}: make it a text file that root can read");
            let whole = TabError {
                path: path.to_owned(),
                line: None,
                reason,
            };
            (Vec::new(), vec![whole])
        }
    }
}

fn parse(path: &Path, text: &str) -> (Vec<AttachRequest>, Vec<TabError>) {
    let (mut requests, mut errors) = (Vec::<AttachRequest>::new(), Vec::new());
    for (number, line) in text.lines().enumerate() {
        let fields: Vec<_> = line.split_whitespace().collect();
        if fields.first().is_none_or(|first| first.starts_with('#')) {
            continue;
        }
        let parsed = request(&fields).and_then(|request| {
            match requests.iter().find(|other| other.name == request.name) {
                Some(_) => Err(format!(
                    "the name {} was used before: choose another",
                    request.name
                )),
                None => Ok(request),
            }
        });
        match parsed {
            Ok(request) => requests.push(request),
            Err(reason) => errors.push(TabError {
                path: path.to_owned(),
                line: Some(number + 1),
                reason,
            }),
        }
    }
    (requests, errors)
}

fn request(fields: &[&str]) -> Result<AttachRequest, String> {
    let (name, volume, credential, options) = match *fields {
        [name, volume, credential] => (name, volume, credential, ""),
        [name, volume, credential, options] => (name, volume, credential, options),
        _ => {
            return Err(format!(
                "{} fields instead of 3 or 4: write NAME VOLUME key-file=PATH|secret-dir=PATH [OPTIONS]",
                fields.len()
            ));
        }
    };
    let name: AttachmentName = name.parse().map_err(|error| format!("{error}"))?;
    let named = VolumeRef::parse(volume).map_err(|error| error.to_string())?;
    let (Some(account), Some(blob)) = (named.account, named.blob) else {
        return Err(
            "the volume names no account or no blob: write ACCOUNT/CONTAINER/BLOB or a blob URL"
                .into(),
        );
    };
    let mut request = AttachRequest {
        name,
        account: AccountSpec {
            endpoint: named
                .endpoint
                .unwrap_or_else(|| format!("https://{account}.blob.core.windows.net")),
            name: account,
            credential: Secret(source(credential)?),
            ca_file: None,
        },
        container: named.container.unwrap_or_else(|| DEFAULT_CONTAINER.into()),
        blob,
        read_only: false,
        policy: Policy::default(),
        connections: None,
        break_lease: false,
        recover: crate::volume::Recover::default(),
        create: None,
        reuse: true,
        holder: None,
        follow_settings: false,
    };
    for option in options.split(',').filter(|option| !option.is_empty()) {
        set(&mut request, option)?;
    }
    request.policy.check()?;
    Ok(request)
}

fn source(text: &str) -> Result<CredentialSource, String> {
    let remedy = "write key-file=PATH or secret-dir=PATH";
    match text.split_once('=') {
        Some(("key-file", path)) => Ok(CredentialSource::KeyFile(absolute(path)?)),
        Some(("secret-dir", path)) => Ok(CredentialSource::SecretDir(absolute(path)?)),
        // It may be a secret: not repeated.
        _ => Err(format!("the third field names no credentials: {remedy}")),
    }
}

fn absolute(path: &str) -> Result<PathBuf, String> {
    match Path::new(path) {
        path if path.is_absolute() => Ok(path.to_owned()),
        _ => Err(format!("\"{path}\" is no absolute path: begin it with /")),
    }
}

fn set(request: &mut AttachRequest, option: &str) -> Result<(), String> {
    let (key, value) = match option.split_once('=') {
        Some((key, value)) => (key, Some(value)),
        None => (option, None),
    };
    let policy = &mut request.policy;
    match (key, value) {
        ("defaults" | "rw", None) => {}
        ("ro", None) => request.read_only = true,
        ("caching", Some("none")) => policy.caching = Caching::None,
        ("caching", Some("read-only")) => policy.caching = Caching::ReadOnly,
        ("caching", Some("read-write")) => policy.caching = Caching::ReadWrite,
        ("integrity", Some("off")) => policy.integrity = Checksum::Off,
        ("integrity", Some("md5")) => policy.integrity = Checksum::Md5,
        ("integrity", Some("crc64")) => policy.integrity = Checksum::Crc64,
        ("staging-dir", Some(path)) => policy.staging_dir = Some(absolute(path)?),
        ("ca-file", Some(path)) => request.account.ca_file = Some(absolute(path)?),
        ("endpoint", Some(url)) => request.account.endpoint = url.trim_end_matches('/').to_owned(),
        ("cache-size", Some(size)) => {
            let size: ByteSize = size.parse().map_err(|error| format!("{key}: {error}"))?;
            policy.cache_size = Some(size.0);
        }
        ("iops", Some(text)) => {
            let number = text
                .parse()
                .map_err(|_| format!("iops={text} is no number"))?;
            policy.limits.iops = Some(number);
        }
        ("bandwidth", Some(size)) => {
            let size: ByteSize = size.parse().map_err(|error| format!("{key}: {error}"))?;
            policy.limits.bandwidth = Some(size.0);
        }
        ("io-deadline", Some(text)) => policy.io_deadline_ms = Some(millis(key, text)?),
        ("wait", Some(text)) => policy.wait_ms = millis(key, text)?,
        ("connections", Some(text)) => {
            let count = text
                .parse()
                .ok()
                .filter(|n| (1..=MAX_CONNECTIONS).contains(n));
            request.connections = Some(count.ok_or_else(|| {
                format!("connections={text} is not possible: take 1 to {MAX_CONNECTIONS}")
            })?);
        }
        _ => {
            return Err(format!(
                "option \"{option}\" is not known or has a wrong value: take ro, caching=none|read-only|read-write, \
                 staging-dir=, cache-size=, io-deadline=, wait=, integrity=off|md5|crc64, connections=, endpoint=, ca-file="
            ));
        }
    }
    Ok(())
}

fn millis(key: &str, text: &str) -> Result<u64, String> {
    let wrong = || format!("{key}={text} is no duration: write something like 500ms, 30s or 5m");
    let span: jiff::SignedDuration = text.parse().map_err(|_| wrong())?;
    let span = Duration::try_from(span).map_err(|_| wrong())?;
    u64::try_from(span.as_nanos().div_ceil(1_000_000)).map_err(|_| wrong())
}

/// Refuses secrets that everybody can read. Blocks.
///
/// # Errors
/// Names the file and the remedy. A file that is not there is no error here.
pub fn check_secrecy(source: &CredentialSource) -> Result<(), String> {
    let open = |path: &Path| {
        std::fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o004 != 0)
    };
    let refuse = |path: &Path| {
        let path = path.display();
        Err(format!(
            "{path} can be read by everybody: run `chmod 600 {path}`"
        ))
    };
    match source {
        CredentialSource::KeyFile(path) if open(path) => refuse(path),
        CredentialSource::SecretDir(dir) => {
            let shut =
                std::fs::metadata(dir).is_ok_and(|meta| meta.permissions().mode() & 0o001 == 0);
            let mut files = ["accountkey", "accountkey2", "sas"]
                .map(|name| dir.join(name))
                .into_iter();
            match files.find(|file| !shut && open(file)) {
                Some(file) => refuse(&file),
                None => Ok(()),
            }
        }
        _ => Ok(()),
    }
}

/// Attaches every line of the table, however long it takes. What is wrong with
/// one keeps no other from being attached.
pub(super) async fn keep_attached(registry: Registry, path: PathBuf) {
    let table = path.clone();
    let (requests, errors) = match tokio::task::spawn_blocking(move || read(&table)).await {
        Ok(table) => table,
        Err(error) => return tracing::error!(path = %path.display(), %error, "cannot be read"),
    };
    for error in errors {
        tracing::error!(%error, "a line of the table is left out");
    }
    for request in requests {
        tokio::spawn(attach(registry.clone(), request));
    }
}

async fn attach(registry: Registry, request: AttachRequest) {
    let name = request.name.clone();
    let mut backoff = Backoff::new(PAUSE, LONGEST_PAUSE);
    let mut told = String::new();
    loop {
        let error = match attach_once(&registry, &request).await {
            Ok(()) => return,
            Err(error) if error.code == ErrorCode::Stopping => return,
            Err(error) => error.to_string(),
        };
        if error != told {
            tracing::error!(%name, %error, "not attached yet: trying again");
            told = error;
        }
        tokio::time::sleep(backoff.pause(None)).await;
    }
}

async fn attach_once(registry: &Registry, request: &AttachRequest) -> Result<(), NodeError> {
    // One that an earlier daemon left is on its way by itself.
    let recovered = registry.wait_until(|table| {
        let entry = table.entries.get(&request.name);
        entry.is_none_or(|entry| !matches!(entry.phase, super::entry::Phase::Recovering(_)))
    });
    recovered.await;
    let source = request.account.credential.0.clone();
    let secret = tokio::task::spawn_blocking(move || check_secrecy(&source)).await;
    secret
        .map_err(|error| NodeError::internal(error.to_string()))?
        .map_err(|reason| NodeError::new(ErrorCode::BadAccount, reason))?;
    match registry.attach(request.clone())? {
        Admission::Existing(_) => Ok(()),
        Admission::Begun(attaching) => attaching.outcome().await.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (Vec<AttachRequest>, Vec<String>) {
        let (requests, errors) = parse(Path::new("/etc/dysk/dysktab"), text);
        (requests, errors.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn reads_lines_as_they_are_written() {
        let (requests, errors) = parsed(
            "# comment\n\n data  acct123/dysks/data.vhd\tkey-file=/etc/dysk/key\n\
             logs http://127.0.0.1:10000/acct123/c01/x/y.vhd secret-dir=/s ro,connections=4,wait=2m\n\
             fast acct123/fast.vhd key-file=/k caching=read-write,cache-size=64MiB,integrity=crc64,endpoint=http://h.x/\n",
        );
        assert_eq!(errors, [""; 0]);
        assert_eq!(requests.len(), 3);
        assert_eq!(requests[0].volume(), "acct123/dysks/data.vhd");
        assert_eq!(
            requests[0].account.endpoint,
            "https://acct123.blob.core.windows.net"
        );
        assert!(
            requests
                .iter()
                .all(|request| request.reuse && !request.break_lease)
        );
        assert_eq!(
            requests[1].account.endpoint,
            "http://127.0.0.1:10000/acct123"
        );
        assert!(requests[1].read_only);
        assert_eq!(
            (requests[1].connections, requests[1].policy.wait_ms),
            (Some(4), 120_000)
        );
        assert_eq!(requests[2].volume(), "acct123/dysks/fast.vhd");
        assert_eq!(requests[2].account.endpoint, "http://h.x");
        assert_eq!(requests[2].policy.caching, Caching::ReadWrite);
        assert_eq!(requests[2].policy.cache_size, Some(64 << 20));
    }

    #[test]
    fn a_bad_line_is_named_with_its_remedy_and_harms_no_other() {
        for (bad, said) in [
            ("data acct123/dysks/x.vhd", "2 fields instead of 3 or 4"),
            ("-x acct123/dysks/x.vhd key-file=/k", "is not usable"),
            ("data acct123 key-file=/k", "write ACCOUNT/CONTAINER/BLOB"),
            (
                "data acct123/dysks/x.vhd Zm9vYmFyCg==",
                "write key-file=PATH",
            ),
            ("data acct123/dysks/x.vhd key-file=k", "begin it with /"),
            (
                "data acct123/dysks/x.vhd key-file=/k casing=none",
                "\"casing=none\"",
            ),
            (
                "data acct123/dysks/x.vhd key-file=/k connections=99",
                "take 1 to 16",
            ),
            (
                "data acct123/dysks/x.vhd key-file=/k wait=soon",
                "is no duration",
            ),
            (
                "data acct123/dysks/x.vhd key-file=/k cache-size=1MiB",
                "nothing is cached",
            ),
            ("good acct123/dysks/x.vhd key-file=/k", "was used before"),
        ] {
            let (requests, errors) = parsed(&format!(
                "good acct123/dysks/g.vhd key-file=/k\n{bad}\nlast acct123/dysks/l.vhd key-file=/k"
            ));
            assert_eq!(requests.len(), 2, "{bad}");
            assert_eq!(errors.len(), 1, "{bad}");
            assert!(
                errors[0].starts_with("/etc/dysk/dysktab line 2: "),
                "{errors:?}"
            );
            assert!(errors[0].contains(said), "{errors:?}");
            assert!(!errors[0].contains("Zm9v"), "{errors:?}");
        }
    }

    #[test]
    fn secrets_that_everybody_can_read_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("accountkey");
        std::fs::write(&file, "x").expect("written");
        let mode = |mode| {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).expect("set");
        };
        let sources = [
            CredentialSource::KeyFile(file.clone()),
            CredentialSource::SecretDir(folder.path().to_owned()),
        ];
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755))
            .expect("set");
        mode(0o644);
        for source in &sources {
            let refused = check_secrecy(source).expect_err("refused");
            assert!(refused.contains("chmod 600"), "{refused}");
        }
        mode(0o640);
        for source in &sources {
            check_secrecy(source).expect("private enough");
        }
    }
}
