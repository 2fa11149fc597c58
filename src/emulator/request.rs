//! A request with its body, as the operations see it.

use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use hyper::header::{IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_UNMODIFIED_SINCE};
use hyper::http::request::Parts;
use hyper::{HeaderMap, Method};
use percent_encoding::percent_decode_str;

use super::clock;
use super::refusal::{self, Refusal};

/// What a request is about; empty parts are absent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Target {
    /// Container name.
    pub container: String,
    /// Blob name.
    pub blob: String,
}

impl Target {
    /// Takes `/account/container/blob` apart; `None` when it is not about
    /// `account`. With the account in the host name, `path` is without it.
    pub(super) fn parse(path: &str, host: Option<&str>, account: &str) -> Option<Self> {
        let in_host = host
            .and_then(|host| host.strip_prefix(account))
            .is_some_and(|rest| rest.starts_with('.'));
        let rest = path.strip_prefix('/')?;
        let rest = if in_host {
            rest
        } else {
            let rest = rest.strip_prefix(account)?;
            if rest.is_empty() {
                rest
            } else {
                rest.strip_prefix('/')?
            }
        };
        let (container, blob) = rest.split_once('/').unwrap_or((rest, ""));
        let decode = |part| percent_decode_str(part).decode_utf8().ok();
        Some(Self {
            container: decode(container)?.into_owned(),
            blob: decode(blob)?.into_owned(),
        })
    }
}

/// Query parameters, decoded.
pub(super) type Query = Vec<(String, String)>;

/// Decodes a query string. A `+` stands for itself, as in SAS signatures that
/// were not escaped.
pub(super) fn parse_query(text: &str) -> Query {
    text.split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let decode = |part: &str| percent_decode_str(part).decode_utf8_lossy().into_owned();
            (decode(name).to_ascii_lowercase(), decode(value))
        })
        .collect()
}

/// A request whose body has come in whole.
#[derive(Clone, Debug)]
pub(super) struct Request {
    /// Method.
    pub method: Method,
    /// Path as it came, still encoded.
    pub path: String,
    /// Query.
    pub query: Query,
    /// Headers.
    pub headers: HeaderMap,
    /// Whose.
    pub target: Target,
    /// The body in the pieces in which it came.
    pub body: Vec<Bytes>,
    /// Bytes in the body.
    pub body_len: u64,
    /// The client's address.
    pub peer: IpAddr,
    /// Over TLS?
    pub secure: bool,
    /// When it came, in ticks.
    pub now: u64,
    /// False for a SAS that may create but not overwrite.
    pub may_overwrite: bool,
    /// Signed with the account key: copies may read anything in the account.
    pub trusted: bool,
}

impl Request {
    /// A request about the account, without its body yet.
    pub(super) fn new(
        parts: Parts,
        account: &str,
        peer: IpAddr,
        secure: bool,
    ) -> Result<Self, Refusal> {
        let host = parts
            .headers
            .get(hyper::header::HOST)
            .and_then(|host| host.to_str().ok());
        let path = parts.uri.path().to_owned();
        let target = Target::parse(&path, host, account).ok_or(&refusal::RESOURCE_NOT_FOUND)?;
        Ok(Self {
            method: parts.method,
            query: parse_query(parts.uri.query().unwrap_or_default()),
            path,
            headers: parts.headers,
            target,
            body: Vec::new(),
            body_len: 0,
            peer,
            secure,
            now: clock::now(),
            may_overwrite: true,
            trusted: false,
        })
    }

    /// The same request, held back until now.
    pub(super) fn arriving_now(&self) -> Arc<Self> {
        Arc::new(Self {
            now: clock::now(),
            ..self.clone()
        })
    }

    /// The same request without its `If-*` headers, arriving now.
    pub(super) fn unconditional(&self) -> Arc<Self> {
        let mut request = Self {
            now: clock::now(),
            ..self.clone()
        };
        for name in [
            IF_MATCH,
            IF_NONE_MATCH,
            IF_MODIFIED_SINCE,
            IF_UNMODIFIED_SINCE,
        ] {
            request.headers.remove(name);
        }
        Arc::new(request)
    }

    /// The value of a header that is text; empty ones count as absent.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .filter(|value| !value.is_empty())
    }

    /// As [`Request::header`]; 400 when absent.
    pub(super) fn required(&self, name: &str) -> Result<&str, Refusal> {
        self.header(name)
            .ok_or_else(|| refusal::missing_header(name))
    }

    /// A header that is a whole number; 400 when it is something else.
    pub(super) fn number(&self, name: &str) -> Result<Option<u64>, Refusal> {
        self.header(name)
            .map(|value| {
                value
                    .parse()
                    .map_err(|_| refusal::invalid_header(name, value))
            })
            .transpose()
    }

    /// The value of a query parameter (its name in lower case).
    pub(super) fn query(&self, name: &str) -> Option<&str> {
        self.query
            .iter()
            .find(|(own, _)| own == name)
            .map(|(_, value)| value.as_str())
    }

    /// `snapshot` in the query.
    pub(super) fn snapshot(&self) -> Option<&str> {
        self.query("snapshot").filter(|time| !time.is_empty())
    }

    /// The user metadata in `x-ms-meta-*`; names must be C# identifiers.
    pub(super) fn metadata(&self) -> Result<Vec<(String, String)>, Refusal> {
        let mut metadata = Vec::new();
        for (name, value) in &self.headers {
            let Some(name) = name.as_str().strip_prefix("x-ms-meta-") else {
                continue;
            };
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let digit_first = name.starts_with(|c: char| c.is_ascii_digit());
            let value = value.to_str().map_err(|_| &refusal::INVALID_METADATA)?;
            if name.is_empty() || digit_first || !name.chars().all(plain) {
                return Err((&refusal::INVALID_METADATA).into());
            }
            metadata.push((name.to_owned(), value.to_owned()));
        }
        Ok(metadata)
    }

    /// `x-ms-range`, else `Range`: first byte, and last byte unless it is open.
    pub(super) fn range(&self) -> Result<Option<(u64, Option<u64>)>, Refusal> {
        let Some((name, text)) = ["x-ms-range", "range"]
            .into_iter()
            .find_map(|name| self.header(name).map(|text| (name, text)))
        else {
            return Ok(None);
        };
        parse_range(text)
            .map(Some)
            .ok_or_else(|| refusal::invalid_header(name, text))
    }
}

/// `bytes=FIRST-[LAST]`.
pub(super) fn parse_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let first: u64 = first.parse().ok()?;
    if last.is_empty() {
        return Some((first, None));
    }
    let last: u64 = last.parse().ok()?;
    (first <= last && last < u64::MAX).then_some((first, Some(last)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_account_in_path_or_host() {
        let of = |path: &str, host: Option<&str>| {
            Target::parse(path, host, "acct").map(|t| format!("{}|{}", t.container, t.blob))
        };
        let found = |text: &str| Some(text.to_owned());
        assert_eq!(of("/acct/c/a/b%20c", None), found("c|a/b c"));
        assert_eq!(of("/acct", None), found("|"));
        assert_eq!(of("/acct/", None), found("|"));
        assert_eq!(of("/acct/c", Some("127.0.0.1:1")), found("c|"));
        assert_eq!(of("/c/b", Some("acct.blob.localhost:1")), found("c|b"));
        assert_eq!(of("/other/c", None), None);
        assert_eq!(of("/acctor/c", None), None);
    }

    #[test]
    fn parses_ranges() {
        assert_eq!(parse_range("bytes=0-511"), Some((0, Some(511))));
        assert_eq!(parse_range("bytes=7-"), Some((7, None)));
        for text in ["bytes=-5", "bytes=5-4", "0-511", "bytes=a-b", "bytes=1"] {
            assert_eq!(parse_range(text), None, "{text}");
        }
    }

    #[test]
    fn decodes_queries() {
        assert_eq!(
            parse_query("COMP=page&sig=a%2Bb+c%3D&flag"),
            [("comp", "page"), ("sig", "a+b+c="), ("flag", "")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
        );
    }
}
