//! Where an account answers, and how its objects are spelled in a URL and in
//! the string that is signed.

use std::borrow::Cow;

use hyper::header::HeaderValue;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use url::{Host, Url};

use super::types::BlobAddress;

/// What stays as it is in a path: RFC 3986's unreserved characters, the
/// separator, and the `$` of `$root`.
const PATH: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b'/')
    .remove(b'$');

/// What stays as it is in the value of a query parameter.
pub(super) const QUERY: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// A checked base URL.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    /// HTTPS rather than HTTP.
    pub tls: bool,
    /// Host name or address, without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// The `Host` header.
    pub authority: HeaderValue,
    /// `scheme://authority`, then the path up to the container, without a
    /// final slash.
    pub base: String,
    /// The path part of `base`: empty, or `/ACCOUNT` in path style.
    path: String,
}

impl Endpoint {
    /// Checks `text`; the reason why it cannot be an endpoint on failure.
    pub fn parse(text: &str) -> Result<Self, String> {
        let url = Url::parse(text).map_err(|error| {
            format!("{error}; write it as https://ACCOUNT.blob.core.windows.net")
        })?;
        let tls = match url.scheme() {
            "https" => true,
            "http" => false,
            other => return Err(format!("scheme {other} is neither https nor http")),
        };
        if url.query().is_some() || url.fragment().is_some() {
            return Err("it must end before the query; give a signature as a credential".into());
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("it must not hold a user name or password".into());
        }
        let host = match url.host() {
            Some(Host::Domain(name)) => name.to_owned(),
            Some(Host::Ipv4(address)) => address.to_string(),
            Some(Host::Ipv6(address)) => address.to_string(),
            None => return Err("it names no host".into()),
        };
        let port = url
            .port_or_known_default()
            .ok_or_else(|| "it names no port".to_owned())?;
        let shown = url.host_str().unwrap_or(&host);
        let authority = match url.port() {
            Some(port) => format!("{shown}:{port}"),
            None => shown.to_owned(),
        };
        let path = url.path().trim_end_matches('/').to_owned();
        Ok(Self {
            tls,
            base: format!("{}://{authority}{path}", url.scheme()),
            authority: HeaderValue::from_str(&authority).map_err(|error| error.to_string())?,
            host,
            port,
            path,
        })
    }

    /// `scheme://authority`.
    pub fn origin(&self) -> String {
        let len = self.base.len() - self.path.len();
        self.base[..len].to_owned()
    }
}

/// One object, spelled once for all requests to it.
#[derive(Clone, Debug)]
pub(super) struct Target {
    /// The object for people.
    pub address: BlobAddress,
    /// The encoded path of the request line.
    pub path: String,
    /// The canonicalized resource without its parameters: the account, then
    /// [`Target::path`] (which names the account again in path style).
    pub resource: String,
}

impl Target {
    /// Spells `address` under `endpoint`.
    pub fn new(endpoint: &Endpoint, address: BlobAddress) -> Self {
        let mut path = endpoint.path.clone();
        for part in [&address.container, &address.blob] {
            if !part.is_empty() {
                path.push('/');
                path.extend(encode_path(part));
            }
        }
        if path.is_empty() {
            path.push('/');
        }
        Self {
            resource: format!("/{}{path}", address.account),
            path,
            address,
        }
    }
}

/// `text` as part of a URL's path; `/` separates.
fn encode_path(text: &str) -> impl Iterator<Item = &str> {
    utf8_percent_encode(text, PATH)
}

/// `text` as a query parameter's value.
pub(super) fn encode_query(text: &str) -> Cow<'_, str> {
    utf8_percent_encode(text, QUERY).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn spells_host_and_path_style() {
        let host = Endpoint::parse("https://acct.blob.core.windows.net/").expect("host style");
        assert!(host.tls);
        assert_eq!(
            (host.port, host.base.as_str()),
            (443, "https://acct.blob.core.windows.net")
        );
        let target = Target::new(&host, BlobAddress::new("acct", "dysks", "a b/ü+1%.vhd"));
        assert_eq!(target.path, "/dysks/a%20b/%C3%BC%2B1%25.vhd");
        assert_eq!(target.resource, "/acct/dysks/a%20b/%C3%BC%2B1%25.vhd");

        let path = Endpoint::parse("http://127.0.0.1:10000/devstoreaccount1").expect("path style");
        assert_eq!(
            (path.port, path.authority.to_str().ok()),
            (10000, Some("127.0.0.1:10000"))
        );
        let target = Target::new(&path, BlobAddress::new("devstoreaccount1", "$root", "x"));
        assert_eq!(target.path, "/devstoreaccount1/$root/x");
        assert_eq!(
            target.resource,
            "/devstoreaccount1/devstoreaccount1/$root/x"
        );

        let six = Endpoint::parse("http://[::1]:9/a").expect("IPv6");
        assert_eq!(
            (six.host.as_str(), six.base.as_str()),
            ("::1", "http://[::1]:9/a")
        );
    }

    #[test]
    fn refuses_what_is_no_endpoint() {
        for text in [
            "",
            "acct",
            "ftp://acct",
            "https://",
            "https://u:p@acct/",
            "https://acct/?sig=secret",
        ] {
            let reason = Endpoint::parse(text).expect_err(text);
            assert!(!reason.contains("secret"), "{reason}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in "(https?://)?.{0,40}") {
            let _checked = Endpoint::parse(&text).is_ok();
        }
    }
}
