//! The string that Shared Key signs ("Authorize with Shared Key", Blob
//! service, version 2015-02-21 and later).

use std::borrow::Cow;
use std::fmt::Write as _;

use hyper::Method;
use hyper::header::{HeaderName, HeaderValue};

/// The standard headers that are signed by position, after the verb.
/// `Date` stays empty because `x-ms-date` is sent.
const POSITIONS: [&str; 11] = [
    "content-encoding",
    "content-language",
    "content-length",
    "content-md5",
    "content-type",
    "date",
    "if-modified-since",
    "if-match",
    "if-none-match",
    "if-unmodified-since",
    "range",
];

/// Builds the string. Sorts `headers` by name on the way, which is harmless.
///
/// `resource` is `/account` and the encoded path; `query` is decoded.
pub(super) fn string_to_sign(
    method: &Method,
    headers: &mut [(HeaderName, HeaderValue)],
    content_length: usize,
    resource: &str,
    query: &[(&'static str, Cow<'static, str>)],
) -> String {
    headers.sort_unstable_by(|(a, _), (b, _)| a.as_str().cmp(b.as_str()));
    let mut text = String::with_capacity(512);
    text.push_str(method.as_str());
    text.push('\n');
    for position in POSITIONS {
        if position == "content-length" {
            if content_length > 0 {
                // Writing to a String cannot fail.
                let _infallible = write!(text, "{content_length}");
            }
        } else if let Some((_, value)) = headers.iter().find(|(name, _)| name == position) {
            text.push_str(as_text(value));
        }
        text.push('\n');
    }
    for (name, value) in headers.iter() {
        if name.as_str().starts_with("x-ms-") {
            text.push_str(name.as_str());
            text.push(':');
            text.push_str(as_text(value).trim());
            text.push('\n');
        }
    }
    text.push_str(resource);
    let mut parameters: Vec<_> = query.iter().collect();
    parameters.sort_unstable_by_key(|(name, _)| *name);
    for (name, value) in parameters {
        text.push('\n');
        text.push_str(name);
        text.push(':');
        text.push_str(value);
    }
    text
}

/// Values are ASCII by construction ([`super::request::Request::header`]).
fn as_text(value: &HeaderValue) -> &str {
    value.to_str().unwrap_or_default()
}
