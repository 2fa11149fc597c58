//! The text by which a person names a volume: `ACCOUNT/CONTAINER/BLOB` or a
//! blob URL.

use percent_encoding::percent_decode_str;
use url::{Host, Url};

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
    /// Container and account names are checked against Azure's rules. Blob
    /// names in a URL are percent-decoded; those outside one are taken as they are.
    ///
    /// # Errors
    /// [`VolumeRefError`], which never repeats a URL's query.
    pub fn parse(text: &str) -> Result<Self, VolumeRefError> {
        let text = text.trim();
        let parsed = if text.contains("://") {
            parse_url(text)
        } else {
            parse_path(text)
        };
        parsed.map_err(|reason| VolumeRefError {
            text: without_secrets(text),
            reason,
        })
    }
}

/// A URL may hold a signature in its query and a password before its host.
fn without_secrets(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else {
        return text.to_owned();
    };
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let host_end = rest.find('/').unwrap_or(rest.len());
    let host_start = rest[..host_end].rfind('@').map_or(0, |at| at + 1);
    format!("{scheme}://{}", &rest[host_start..])
}

fn parse_path(text: &str) -> Result<VolumeRef, String> {
    let parts: Vec<&str> = text.splitn(3, '/').collect();
    let (account, container, blob) = match *parts.as_slice() {
        [""] => return Err("it is empty".into()),
        [word] => {
            // An account or a blob, so only what is neither is refused here.
            check_blob(word)?;
            return Ok(VolumeRef {
                account: Some(word.to_owned()),
                container: None,
                blob: None,
                endpoint: None,
            });
        }
        [account, blob] => (account, None, blob),
        [account, container, blob] => (account, Some(container), blob),
        _ => return Err("it has no such form".into()),
    };
    check_account(account)?;
    container.map_or(Ok(()), check_container)?;
    check_blob(blob)?;
    Ok(VolumeRef {
        account: Some(account.to_owned()),
        container: container.map(ToOwned::to_owned),
        blob: Some(blob.to_owned()),
        endpoint: None,
    })
}

fn parse_url(text: &str) -> Result<VolumeRef, String> {
    let url = Url::parse(text).map_err(|error| error.to_string())?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err("the url is neither https nor http".into());
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(
            "the url has a query: give a signature by AZURE_STORAGE_SAS_TOKEN, not in the url"
                .into(),
        );
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("the url holds a user name or password".into());
    }
    let host = url.host_str().ok_or("the url names no host")?;
    let authority = match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    };
    let mut endpoint = format!("{}://{authority}", url.scheme());
    // Split before decoding: an encoded slash belongs to a name.
    let mut rest = url.path().trim_start_matches('/');
    let account = if is_path_style(&url) {
        let (account, after) = rest.split_once('/').unwrap_or((rest, ""));
        let account = decode(account)?;
        if account.is_empty() {
            return Err("the url's path names no account".into());
        }
        endpoint.push('/');
        endpoint.push_str(&account);
        rest = after;
        account
    } else {
        host.split('.').next().unwrap_or_default().to_owned()
    };
    check_account(&account)?;
    let (container, blob) = match rest.split_once('/') {
        Some((container, blob)) => (decode(container)?, decode(blob)?),
        // A blob right below the account is in the root container.
        None if !rest.is_empty() => {
            return Err("the url names a container and no blob, or a blob of the root container (write /$root/BLOB)".into());
        }
        None => return Err("the url names no container and no blob".into()),
    };
    check_container(&container)?;
    check_blob(&blob)?;
    Ok(VolumeRef {
        account: Some(account),
        container: Some(container),
        blob: Some(blob),
        endpoint: Some(endpoint),
    })
}

/// The account is in the path where the host cannot name it.
fn is_path_style(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => !name.contains('.'),
        Some(Host::Ipv4(_) | Host::Ipv6(_)) => true,
        None => false,
    }
}

fn decode(text: &str) -> Result<String, String> {
    percent_decode_str(text)
        .decode_utf8()
        .map(std::borrow::Cow::into_owned)
        .map_err(|_| "the url's path is not utf-8".into())
}

/// "Storage account names must be between 3 and 24 characters in length and
/// may contain numbers and lowercase letters only."
fn check_account(name: &str) -> Result<(), String> {
    let letters = name
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if (3..=24).contains(&name.len()) && letters {
        Ok(())
    } else {
        Err(format!(
            "account \"{name}\" is not 3 to 24 lower-case letters and digits"
        ))
    }
}

/// "Naming and referencing containers, blobs, and metadata", container names.
fn check_container(name: &str) -> Result<(), String> {
    if matches!(name, "$root" | "$web") {
        return Ok(());
    }
    let bytes = name
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    let hyphens = name.starts_with('-') || name.ends_with('-') || name.contains("--");
    if (3..=63).contains(&name.len()) && bytes && !hyphens {
        Ok(())
    } else {
        Err(format!(
            "container \"{name}\" is not 3 to 63 lower-case letters, digits and single hyphens"
        ))
    }
}

/// Blob names: 1 to 1024 characters. Segments that a URL would swallow are
/// refused, and so are control characters.
fn check_blob(name: &str) -> Result<(), String> {
    let length = name.chars().count();
    if !(1..=1024).contains(&length) {
        return Err(format!(
            "a blob name has 1 to 1024 characters, not {length}"
        ));
    }
    if name.chars().any(char::is_control) {
        return Err("the blob name holds a control character".into());
    }
    if name.split('/').any(|part| matches!(part, "." | "..")) {
        return Err("the blob name has a part that is . or ..".into());
    }
    if name.ends_with('/') {
        return Err("the blob name ends in a slash".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parts(
        text: &str,
    ) -> (
        Option<String>,
        Option<String>,
        Option<String>,
        Option<String>,
    ) {
        let parsed = VolumeRef::parse(text).expect(text);
        (
            parsed.account,
            parsed.container,
            parsed.blob,
            parsed.endpoint,
        )
    }

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn parses_what_people_write() {
        assert_eq!(
            parts("acct/dysks/vol1.vhd"),
            (some("acct"), some("dysks"), some("vol1.vhd"), None)
        );
        assert_eq!(
            parts("acct/vol1.vhd"),
            (some("acct"), None, some("vol1.vhd"), None)
        );
        assert_eq!(parts("vol1"), (some("vol1"), None, None, None));
        assert_eq!(
            parts("acct/$root/a/b c%41.vhd"),
            (some("acct"), some("$root"), some("a/b c%41.vhd"), None)
        );
        assert_eq!(
            parts("https://acct.blob.core.windows.net/dysks/a%20b/%C3%BC.vhd"),
            (
                some("acct"),
                some("dysks"),
                some("a b/ü.vhd"),
                some("https://acct.blob.core.windows.net")
            )
        );
        for host in [
            "127.0.0.1:10000",
            "localhost:10000",
            "[::1]:10000",
            "azurite",
        ] {
            assert_eq!(
                parts(&format!("http://{host}/devstoreaccount1/dysks/v")),
                (
                    some("devstoreaccount1"),
                    some("dysks"),
                    some("v"),
                    some(&format!("http://{host}/devstoreaccount1"))
                )
            );
        }
    }

    #[test]
    fn refuses_with_a_reason_and_without_secrets() {
        for (text, words) in [
            ("", "empty"),
            ("Acct/dysks/v", "account \"Acct\""),
            ("ab/dysks/v", "3 to 24"),
            ("acct/Dysks/v", "container \"Dysks\""),
            ("acct/a--b/v", "single hyphens"),
            ("acct/-ab/v", "single hyphens"),
            ("acct/dysks/", "1 to 1024"),
            ("acct/dysks/a/../b", ".."),
            ("acct/dysks/a/", "slash"),
            ("https://acct.blob.core.windows.net/dysks", "no blob"),
            ("https://acct.blob.core.windows.net/", "no container"),
            ("ftp://acct/dysks/v", "neither https"),
            ("http://localhost/", "names no account"),
            (
                "https://acct.blob.core.windows.net/dysks/v?sig=secret",
                "AZURE_STORAGE_SAS_TOKEN",
            ),
            ("https://u:secret@acct.blob/dysks/v", "password"),
        ] {
            let error = VolumeRef::parse(text).expect_err(text).to_string();
            assert!(error.contains(words), "{text}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
        assert!(VolumeRef::parse(&format!("acct/dysks/{}", "x".repeat(1024))).is_ok());
        assert!(VolumeRef::parse(&format!("acct/dysks/{}", "x".repeat(1025))).is_err());
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,60}|(https?://)?[a-z0-9:@.\\[\\]/%?#$-]{0,60}") {
            let _parsed = VolumeRef::parse(&text).is_ok();
        }

        #[test]
        fn takes_every_legal_triple(
            account in "[a-z0-9]{3,24}",
            container in "[a-z0-9]([a-z0-9]|-[a-z0-9]){2,20}",
            blob in "[a-zA-Z0-9 _%?#ü-]{1,30}(/[a-z]{1,5}){0,3}",
        ) {
            // Outer blanks are not part of what a person meant.
            let blob = blob.trim().to_owned();
            prop_assume!(!blob.is_empty());
            let parsed = VolumeRef::parse(&format!("{account}/{container}/{blob}")).expect("legal");
            prop_assert_eq!(parsed.account, Some(account));
            prop_assert_eq!(parsed.container, Some(container));
            prop_assert_eq!(parsed.blob, Some(blob));
        }
    }
}
