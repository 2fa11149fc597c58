//! Shared access signatures: "Create an account SAS" and "Create a service
//! SAS", REST reference, for versions 2015-04-05 and later.

use std::net::IpAddr;

use super::auth::failed;
use super::clock;
use super::config::Settings;
use super::operation::Operation;
use super::refusal::{self, Refusal};
use super::request::{Query, Target};

/// What is asked for under a SAS.
#[derive(Debug)]
pub(super) struct Asked<'a> {
    /// The query with the SAS in it.
    pub query: &'a Query,
    /// What it is about.
    pub target: &'a Target,
    /// What is to be done.
    pub operation: Operation,
    /// The client's address; none when the service itself reads a copy source.
    pub peer: Option<IpAddr>,
    /// Over TLS?
    pub secure: bool,
}

impl Asked<'_> {
    fn get(&self, name: &str) -> &str {
        self.query
            .iter()
            .find(|(own, _)| own == name)
            .map_or("", |(_, value)| value)
    }
}

/// Checks signature, time, address, protocol, resource and permission; gives
/// the permissions.
pub(super) fn verify(
    asked: &Asked<'_>,
    settings: &Settings,
    account: &str,
    now: i64,
) -> Result<String, Refusal> {
    if settings.shared_key_disabled {
        return Err((&refusal::KEY_BASED_AUTHENTICATION_NOT_PERMITTED).into());
    }
    let version = asked.get("sv");
    if version.len() != 10 || version < "2015-04-05" {
        return Err(failed(format!("sv is not supported: '{version}'")));
    }
    if !asked.get("skoid").is_empty() {
        return Err(failed("user delegation keys are not known here"));
    }
    let account_wide = !asked.get("ss").is_empty();
    let text = if account_wide {
        account_text(asked, account, version)
    } else {
        service_text(asked, account, version)?
    };
    let signature = asked.get("sig");
    if !settings
        .keys
        .iter()
        .any(|key| key.verifies(&text, signature))
    {
        return Err(failed(format!(
            "Signature did not match. String to sign used was {text}"
        )));
    }
    if !asked.get("si").is_empty() {
        return Err(failed("the stored access policy does not exist"));
    }
    check_time(asked, now)?;
    if asked.get("spr") == "https" && !asked.secure {
        return Err((&refusal::AUTHORIZATION_PROTOCOL_MISMATCH).into());
    }
    check_address(asked)?;
    if account_wide {
        check_account_scope(asked)?;
    } else if !matches!(asked.get("sr"), "c") && asked.target.blob.is_empty() {
        return Err((&refusal::AUTHORIZATION_FAILURE).into());
    }
    let permissions = asked.get("sp");
    let needed = asked.operation.permissions();
    if !needed.chars().any(|letter| permissions.contains(letter)) {
        return Err((&refusal::AUTHORIZATION_PERMISSION_MISMATCH).into());
    }
    Ok(permissions.to_owned())
}

fn account_text(asked: &Asked<'_>, account: &str, version: &str) -> String {
    let mut text = format!("{account}\n");
    for name in ["sp", "ss", "srt", "st", "se", "sip", "spr", "sv"] {
        text.push_str(asked.get(name));
        text.push('\n');
    }
    if version >= "2020-12-06" {
        text.push_str(asked.get("ses"));
        text.push('\n');
    }
    text
}

fn service_text(asked: &Asked<'_>, account: &str, version: &str) -> Result<String, Refusal> {
    let Target { container, blob } = asked.target;
    let snapshot = asked.get("snapshot");
    let resource = match (asked.get("sr"), snapshot.is_empty()) {
        ("c", _) if !container.is_empty() => format!("/blob/{account}/{container}"),
        ("b", true) | ("bs", false) => format!("/blob/{account}/{container}/{blob}"),
        _ => return Err(failed("sr does not fit what is asked for")),
    };
    let signed_snapshot = if asked.get("sr") == "bs" {
        snapshot
    } else {
        ""
    };
    let mut parts = vec![
        asked.get("sp"),
        asked.get("st"),
        asked.get("se"),
        &resource,
        asked.get("si"),
        asked.get("sip"),
        asked.get("spr"),
        asked.get("sv"),
    ];
    if version >= "2018-11-09" {
        parts.extend([asked.get("sr"), signed_snapshot]);
    }
    if version >= "2020-12-06" {
        parts.push(asked.get("ses"));
    }
    parts.extend(["rscc", "rscd", "rsce", "rscl", "rsct"].map(|name| asked.get(name)));
    Ok(parts.join("\n"))
}

fn check_time(asked: &Asked<'_>, now: i64) -> Result<(), Refusal> {
    let (start, expiry) = (asked.get("st"), asked.get("se"));
    let bound = |text: &str| {
        clock::parse_iso(text).ok_or_else(|| failed(format!("the time '{text}' is not valid")))
    };
    let started = start.is_empty() || bound(start)? <= now;
    if started && now < bound(expiry)? {
        return Ok(());
    }
    let time = |text: &str| {
        clock::parse_iso(text).map_or_else(String::new, |seconds| {
            clock::http_date(seconds)
                .to_str()
                .unwrap_or_default()
                .to_owned()
        })
    };
    let current = clock::http_date(now);
    Err(failed(format!(
        "Signature not valid in the specified time frame: Start [{}] - Expiry [{}] - Current [{}]",
        time(start),
        time(expiry),
        current.to_str().unwrap_or_default()
    )))
}

fn check_address(asked: &Asked<'_>) -> Result<(), Refusal> {
    let (range, Some(peer)) = (asked.get("sip"), asked.peer) else {
        return Ok(());
    };
    if range.is_empty() {
        return Ok(());
    }
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    match (first.parse::<IpAddr>(), last.parse::<IpAddr>()) {
        (Ok(first), Ok(last)) if (first..=last).contains(&peer) => Ok(()),
        _ => Err((&refusal::AUTHORIZATION_SOURCE_IP_MISMATCH).into()),
    }
}

fn check_account_scope(asked: &Asked<'_>) -> Result<(), Refusal> {
    if !asked.get("ss").contains('b') {
        return Err((&refusal::AUTHORIZATION_SERVICE_MISMATCH).into());
    }
    let needed = if asked.target.container.is_empty() {
        's'
    } else if asked.target.blob.is_empty() {
        'c'
    } else {
        'o'
    };
    if !asked.get("srt").contains(needed) {
        return Err((&refusal::AUTHORIZATION_RESOURCE_TYPE_MISMATCH).into());
    }
    Ok(())
}
