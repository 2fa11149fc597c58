//! Who may do what: Shared Key ("Authorize with Shared Key", REST reference),
//! shared access signatures (in `sas`), and anonymous reads of public
//! containers.

use std::fmt::Write as _;

use hyper::header::{HeaderValue, WWW_AUTHENTICATE};

use super::clock;
use super::config::Settings;
use super::operation::Operation;
use super::record::PublicAccess;
use super::refusal::{self, Refusal};
use super::request::Request;
use super::sas;

/// How far the client's clock may be off, in seconds.
const MAX_SKEW: i64 = 15 * 60;

/// How a request was authorised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Authority {
    /// The account key: everything.
    SharedKey,
    /// A SAS with these permissions.
    Sas(String),
    /// Nothing; the container is public.
    Anonymous,
}

/// Authorises `request` for `operation`.
pub(super) fn authorize(
    request: &Request,
    operation: Operation,
    settings: &Settings,
    account: &str,
    public: impl FnOnce() -> PublicAccess,
) -> Result<Authority, Refusal> {
    if settings.firewall {
        return Err((&refusal::AUTHORIZATION_FAILURE).into());
    }
    if settings.https_required && !request.secure {
        return Err((&refusal::ACCOUNT_REQUIRES_HTTPS).into());
    }
    let now = clock::skewed_seconds(settings.clock_skew);
    if let Some(authorization) = request.header("authorization") {
        return shared_key(request, authorization, settings, account, now)
            .map(|()| Authority::SharedKey);
    }
    if request.query("sig").is_some() {
        let asked = sas::Asked {
            query: &request.query,
            target: &request.target,
            operation,
            peer: Some(request.peer),
            secure: request.secure,
        };
        return sas::verify(&asked, settings, account, now).map(Authority::Sas);
    }
    let allowed = match public() {
        PublicAccess::None => false,
        PublicAccess::Blob => operation.reads_blob(),
        PublicAccess::Container => {
            operation.reads_blob()
                || matches!(
                    operation,
                    Operation::ListBlobs | Operation::GetContainerProperties
                )
        }
    };
    if allowed {
        return Ok(Authority::Anonymous);
    }
    let challenge = HeaderValue::from_static("Bearer");
    Err(Refusal::from(&refusal::NO_AUTHENTICATION_INFORMATION).header(WWW_AUTHENTICATE, challenge))
}

/// 403 AuthenticationFailed with the detail only this error has.
pub(super) fn failed(detail: impl Into<String>) -> Refusal {
    Refusal::from(&refusal::AUTHENTICATION_FAILED).with("AuthenticationErrorDetail", detail)
}

fn shared_key(
    request: &Request,
    authorization: &str,
    settings: &Settings,
    account: &str,
    now: i64,
) -> Result<(), Refusal> {
    let Some((name, signature)) = authorization
        .strip_prefix("SharedKey ")
        .and_then(|rest| rest.split_once(':'))
    else {
        return Err((&refusal::INVALID_AUTHENTICATION_INFO).into());
    };
    if settings.shared_key_disabled {
        return Err((&refusal::KEY_BASED_AUTHENTICATION_NOT_PERMITTED).into());
    }
    if name != account {
        return Err(failed(format!("The account name {name} does not exist.")));
    }
    let date = request
        .header("x-ms-date")
        .or_else(|| request.header("date"))
        .ok_or_else(|| failed("The Date header is missing."))?;
    let Some(seconds) = clock::parse_http_date(date) else {
        return Err(failed(format!("The Date header is invalid: '{date}'")));
    };
    if seconds < now - MAX_SKEW {
        return Err(failed(format!("Request date header too old: '{date}'")));
    }
    if seconds > now + MAX_SKEW {
        return Err(failed(format!("Request date header too new: '{date}'")));
    }
    let text = string_to_sign(request, account);
    if settings
        .keys
        .iter()
        .any(|key| key.verifies(&text, signature))
    {
        return Ok(());
    }
    Err(failed(format!(
        "The MAC signature found in the HTTP request '{signature}' is not the same as any \
         computed signature. Server used following string to sign: '{text}'."
    )))
}

/// The string to sign of versions 2015-02-21 and later.
fn string_to_sign(request: &Request, account: &str) -> String {
    let mut text = String::with_capacity(640);
    text.push_str(request.method.as_str());
    text.push('\n');
    let dated = request.header("x-ms-date").is_some();
    for name in [
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
    ] {
        let value = request.header(name).unwrap_or_default();
        let absent = (name == "content-length" && value == "0") || (name == "date" && dated);
        if !absent {
            text.push_str(value);
        }
        text.push('\n');
    }
    let mut headers: Vec<(&str, &str)> = request
        .headers
        .iter()
        .filter(|(name, _)| name.as_str().starts_with("x-ms-"))
        .map(|(name, value)| (name.as_str(), value.to_str().unwrap_or_default().trim()))
        .collect();
    // Stable: values of one name stay in the order in which they came.
    headers.sort_by_key(|(name, _)| *name);
    push_grouped(&mut text, &headers, |text, name, values| {
        text.push_str(name);
        text.push(':');
        text.push_str(values);
        text.push('\n');
    });
    // Writing to a String cannot fail.
    let written = write!(text, "/{account}{}", request.path);
    debug_assert!(written.is_ok());
    let mut query: Vec<(&str, &str)> = request
        .query
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    query.sort_unstable();
    push_grouped(&mut text, &query, |text, name, values| {
        text.push('\n');
        text.push_str(name);
        text.push(':');
        text.push_str(values);
    });
    text
}

/// Pushes sorted pairs, the values of equal names joined by commas.
fn push_grouped(text: &mut String, pairs: &[(&str, &str)], push: impl Fn(&mut String, &str, &str)) {
    for group in pairs.chunk_by(|a, b| a.0 == b.0) {
        match group {
            [(name, value)] => push(text, name, value),
            _ => {
                let values: Vec<&str> = group.iter().map(|(_, value)| *value).collect();
                push(text, group[0].0, &values.join(","));
            }
        }
    }
}
