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

#[cfg(test)]
mod tests {
    use super::super::credential::SharedKey;
    use super::*;

    fn header(name: &'static str, value: &'static str) -> (HeaderName, HeaderValue) {
        (
            HeaderName::from_static(name),
            HeaderValue::from_static(value),
        )
    }

    // The expected strings follow the documentation; the signatures were
    // computed from them with Python's hmac module.

    #[test]
    fn signs_a_page_write() {
        let mut headers = [
            header("x-ms-version", "2021-12-02"),
            header("x-ms-range", "bytes=0-4095"),
            header("x-ms-page-write", "update"),
            header("x-ms-if-sequence-number-lt", "8"),
            header("x-ms-lease-id", "f81d4fae-7dec-11d0-a765-00a0c91e6bf6"),
            header("if-match", "\"0x8D\""),
            header("content-md5", "1B2M2Y8AsgTpgAmY7PhCfg=="),
            header("x-ms-date", "Sun, 06 Nov 1994 08:49:37 GMT"),
        ];
        let text = string_to_sign(
            &Method::PUT,
            &mut headers,
            4096,
            "/acct/acct/dysks/a%20b.vhd",
            &[
                ("snapshot", Cow::Borrowed("2023-11-14T22:13:20.1234567Z")),
                ("comp", Cow::Borrowed("page")),
            ],
        );
        assert_eq!(
            text,
            "PUT\n\n\n4096\n1B2M2Y8AsgTpgAmY7PhCfg==\n\n\n\n\"0x8D\"\n\n\n\n\
             x-ms-date:Sun, 06 Nov 1994 08:49:37 GMT\n\
             x-ms-if-sequence-number-lt:8\n\
             x-ms-lease-id:f81d4fae-7dec-11d0-a765-00a0c91e6bf6\n\
             x-ms-page-write:update\n\
             x-ms-range:bytes=0-4095\n\
             x-ms-version:2021-12-02\n\
             /acct/acct/dysks/a%20b.vhd\n\
             comp:page\n\
             snapshot:2023-11-14T22:13:20.1234567Z"
        );
        let key = SharedKey::from_base64("MDEyMzQ1Njc4OWFiY2RlZg==").expect("a key");
        assert_eq!(
            key.sign(&text),
            "p8vFS8jv2sEsX/VhCVMjHldiDG3z/Sb08yQ7+TkgAsQ="
        );
    }

    #[test]
    fn leaves_out_a_length_of_zero() {
        let mut headers = [
            header("x-ms-version", "2021-12-02"),
            header("x-ms-date", "Sun, 06 Nov 1994 08:49:37 GMT"),
            header("x-ms-meta-b", " padded "),
            header("x-ms-meta-a", ""),
        ];
        let text = string_to_sign(&Method::HEAD, &mut headers, 0, "/acct/dysks/v", &[]);
        assert_eq!(
            text,
            "HEAD\n\n\n\n\n\n\n\n\n\n\n\n\
             x-ms-date:Sun, 06 Nov 1994 08:49:37 GMT\n\
             x-ms-meta-a:\n\
             x-ms-meta-b:padded\n\
             x-ms-version:2021-12-02\n\
             /acct/dysks/v"
        );
    }
}
