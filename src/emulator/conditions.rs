//! Conditional headers: "Specifying conditional headers for Blob service
//! operations", and the sequence-number conditions of Put Page.

use hyper::HeaderMap;

use super::clock;
use super::record::{Record, etag};
use super::refusal::{self, Refusal};
use super::request::Request;

/// What becomes of a request whose conditions fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// 304 for the conditions a cache sends, else 412.
    Read,
    /// 412.
    Write,
}

/// Checks `If-*` against the blob as it is; `blob` is none when it is not there.
pub(super) fn check(
    request: &Request,
    blob: Option<&Record>,
    access: Access,
) -> Result<(), Refusal> {
    let found = blob.map(|record| (record.version, record.modified_seconds()));
    let unmodified: Refusal = match access {
        Access::Read => (&refusal::NOT_MODIFIED).into(),
        Access::Write => (&refusal::CONDITION_NOT_MET).into(),
    };
    match evaluate(&request.headers, "", found)? {
        Verdict::Met => Ok(()),
        Verdict::Changed => Err((&refusal::CONDITION_NOT_MET).into()),
        Verdict::Unchanged => Err(unmodified),
    }
}

/// Checks `x-ms-source-if-*` against the source of a copy.
pub(super) fn check_source(request: &Request, source: &Record) -> Result<(), Refusal> {
    let found = Some((source.version, source.modified_seconds()));
    match evaluate(&request.headers, "x-ms-source-", found)? {
        Verdict::Met => Ok(()),
        _ => Err((&refusal::SOURCE_CONDITION_NOT_MET).into()),
    }
}

enum Verdict {
    Met,
    /// `If-Match` or `If-Unmodified-Since` failed.
    Changed,
    /// `If-None-Match` or `If-Modified-Since` failed.
    Unchanged,
}

fn evaluate(
    headers: &HeaderMap,
    prefix: &str,
    found: Option<(u64, i64)>,
) -> Result<Verdict, Refusal> {
    let get = |name: &str| {
        let value = if prefix.is_empty() {
            headers.get(name)
        } else {
            headers.get(format!("{prefix}{name}"))
        };
        value
            .and_then(|value| value.to_str().ok())
            .filter(|value| !value.is_empty())
    };
    let date = |name: &str| {
        get(name)
            .map(|text| {
                clock::parse_http_date(text).ok_or_else(|| refusal::invalid_header(name, text))
            })
            .transpose()
    };
    let is = |tags: &str| {
        found.is_some_and(|(version, _)| {
            let own = etag(version);
            tags.split(',')
                .map(str::trim)
                .any(|tag| tag == "*" || tag.trim_matches('"') == own.trim_matches('"'))
        })
    };
    if get("if-match").is_some_and(|tags| !is(tags)) {
        return Ok(Verdict::Changed);
    }
    let modified = found.map(|(_, modified)| modified);
    if let (Some(limit), Some(modified)) = (date("if-unmodified-since")?, modified)
        && modified > limit
    {
        return Ok(Verdict::Changed);
    }
    let since = date("if-modified-since")?;
    // With both, the entity tag decides (RFC 9110, 13.2.2).
    if let Some(tags) = get("if-none-match") {
        if is(tags) {
            return Ok(Verdict::Unchanged);
        }
    } else if let (Some(limit), Some(modified)) = (since, modified)
        && modified <= limit
    {
        return Ok(Verdict::Unchanged);
    }
    Ok(Verdict::Met)
}

/// Checks `x-ms-if-sequence-number-*` against the blob's number.
pub(super) fn check_sequence_number(request: &Request, number: u64) -> Result<(), Refusal> {
    type Holds = fn(u64, u64) -> bool;
    let conditions: [(&str, Holds); 3] = [
        ("x-ms-if-sequence-number-lt", |number, bound| number < bound),
        ("x-ms-if-sequence-number-le", |number, bound| {
            number <= bound
        }),
        ("x-ms-if-sequence-number-eq", |number, bound| {
            number == bound
        }),
    ];
    for (name, holds) in conditions {
        if let Some(bound) = request.number(name)?
            && !holds(number, bound)
        {
            return Err((&refusal::SEQUENCE_NUMBER_CONDITION_NOT_MET).into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn judges_each_header() {
        let verdict = |name: &'static str, value: &str, found: Option<(u64, i64)>| {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().expect("a header value"));
            match evaluate(&headers, "", found) {
                Ok(Verdict::Met) => "met",
                Ok(Verdict::Changed) => "changed",
                Ok(Verdict::Unchanged) => "unchanged",
                Err(_) => "invalid",
            }
        };
        let blob = Some((0xAB, 1_700_000_000));
        let then = "Tue, 14 Nov 2023 22:13:20 GMT";
        let earlier = "Tue, 14 Nov 2023 22:13:19 GMT";
        for (name, value, found, expected) in [
            ("if-match", "\"0xAB\"", blob, "met"),
            ("if-match", "0xAB", blob, "met"),
            ("if-match", "*", blob, "met"),
            ("if-match", "*", None, "changed"),
            ("if-match", "\"0xAC\"", blob, "changed"),
            ("if-none-match", "\"0xAB\"", blob, "unchanged"),
            ("if-none-match", "*", blob, "unchanged"),
            ("if-none-match", "*", None, "met"),
            ("if-none-match", "\"0xAC\"", blob, "met"),
            ("if-modified-since", then, blob, "unchanged"),
            ("if-modified-since", earlier, blob, "met"),
            ("if-unmodified-since", then, blob, "met"),
            ("if-unmodified-since", earlier, blob, "changed"),
            ("if-unmodified-since", "now", blob, "invalid"),
        ] {
            assert_eq!(verdict(name, value, found), expected, "{name}: {value}");
        }
    }
}
