//! What a refusal means for a person, and what to do about it.
//!
//! The store's own message is never repeated: for a failed signature it holds
//! the signature.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use super::credential::Credential;
use super::date;
use super::endpoint::Endpoint;
use super::types::BlobAddress;

/// From here on a clock is worth a word; the store's own limit is 15 minutes.
const NOTABLE_SKEW: Duration = Duration::from_secs(5 * 60);

/// All that is known about a refusal.
pub(super) struct Refusal<'a> {
    pub status: u16,
    pub code: &'a str,
    /// The header or parameter that the store blames.
    pub culprit: Option<&'a str>,
    /// The answer's `Date`.
    pub date: Option<SystemTime>,
    pub address: &'a BlobAddress,
    pub endpoint: &'a Endpoint,
    pub credential: &'a Credential,
    pub peer: SocketAddr,
}

/// The remedy, with its leading separator; empty when there is none to give.
pub(super) fn refusal(refusal: &Refusal<'_>) -> String {
    let text = match remedy(refusal) {
        Some(text) => format!(": {text}"),
        None => String::new(),
    };
    match refusal.culprit {
        Some(culprit) => format!("{text} ({culprit})"),
        None => text,
    }
}

fn remedy(refusal: &Refusal<'_>) -> Option<String> {
    let BlobAddress {
        account, container, ..
    } = refusal.address;
    let host = &refusal.endpoint.host;
    Some(match refusal.code {
        "AuthenticationFailed" => authentication(refusal),
        "InvalidAuthenticationInfo" | "NoAuthenticationInformation" => {
            format!(
                "the store could not read the authorisation; check the credentials for account {account}"
            )
        }
        "KeyBasedAuthenticationNotPermitted" => format!(
            "account {account} has shared key access disabled: allow it (allowSharedKeyAccess) or use a user delegation sas"
        ),
        "AuthorizationFailure" => format!(
            "the account's firewall or network rules refuse this machine, or the credential has no right to this: {host} resolved to {}; allow this network or use the private endpoint",
            refusal.peer.ip()
        ),
        "AuthorizationPermissionMismatch"
        | "AuthorizationResourceTypeMismatch"
        | "AuthorizationServiceMismatch"
        | "InsufficientAccountPermissions" => {
            "the credential does not grant this; use the account key or a sas with the permission"
                .into()
        }
        "AuthorizationProtocolMismatch" => {
            "the sas allows https only: use an https endpoint".into()
        }
        "AuthorizationSourceIPMismatch" => {
            "the sas is bound to other ip addresses than this machine's".into()
        }
        "AccountRequiresHttps" => format!(
            "account {account} requires secure transfer: use an https endpoint in place of {}",
            refusal.endpoint.base
        ),
        "PublicAccessNotPermitted" => "the container is not public: give a key or a sas".into(),
        "AccountIsDisabled" => format!("account {account} is disabled: enable it in the portal"),
        "BlobNotFound" => "there is no such blob: check its name or create it".into(),
        "ContainerNotFound" => {
            format!("there is no container {container}: check its name or create it")
        }
        "ContainerBeingDeleted" => {
            format!("container {container} is being deleted: wait half a minute or use another")
        }
        "ResourceNotFound" | "" if refusal.status == 404 => {
            "it is not there: check account, container and blob, or create it".into()
        }
        "InvalidBlobType" | "BlobTypeNotSupported" => {
            "this blob is not a page blob and cannot be a disk: name another".into()
        }
        "BlobAlreadyExists" | "UnauthorizedBlobOverwrite" => {
            "the blob exists already: choose another name".into()
        }
        "SnapshotsPresent" => "the blob has snapshots: delete them with it or first".into(),
        "PendingCopyOperation" => {
            "a copy to this blob is under way: wait for it or abort it".into()
        }
        "LeaseIdMissing" => "the blob is leased, and this request names no lease".into(),
        "" if refusal.status == 403 => authentication(refusal),
        _ => return None,
    })
}

/// A signature that was refused: clock or key.
fn authentication(refusal: &Refusal<'_>) -> String {
    if let Some(date) = refusal.date {
        let (ahead, skew) = date::skew(date);
        if skew >= NOTABLE_SKEW {
            let side = if ahead { "behind" } else { "ahead of" };
            return format!(
                "this machine's clock is {} s {side} the store's, which allows 15 minutes: set the clock (ntp)",
                skew.as_secs()
            );
        }
    }
    let account = &refusal.address.account;
    match refusal.credential {
        Credential::SharedKey(_) => format!(
            "the key is not one of account {account}'s keys: check it, it may have been rotated"
        ),
        Credential::Sas(_) => {
            "the sas is not valid: it may have expired, lack the permission or be cut short".into()
        }
        Credential::Anonymous => format!("account {account} wants a key or a sas, none was given"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::credential::SharedKey;
    use super::*;

    fn explain(status: u16, code: &str, date: Option<SystemTime>) -> String {
        let endpoint = Endpoint::parse("http://acct.blob.core.windows.net").expect("an endpoint");
        refusal(&Refusal {
            status,
            code,
            culprit: None,
            date,
            address: &BlobAddress::new("acct", "dysks", "vol1.vhd"),
            endpoint: &endpoint,
            credential: &Credential::SharedKey(SharedKey::from_base64("a2V5").expect("a key")),
            peer: "10.1.2.3:443".parse().expect("an address"),
        })
    }

    #[test]
    fn tells_a_wrong_clock_from_a_wrong_key() {
        let now = SystemTime::now();
        let ahead = explain(
            403,
            "AuthenticationFailed",
            Some(now - Duration::from_secs(1800)),
        );
        assert!(ahead.contains("s ahead of the store's"), "{ahead}");
        let behind = explain(
            403,
            "AuthenticationFailed",
            Some(now + Duration::from_secs(1800)),
        );
        assert!(behind.contains("s behind the store's"), "{behind}");
        for date in [Some(now), None] {
            let key = explain(403, "AuthenticationFailed", date);
            assert!(key.contains("not one of account acct's keys"), "{key}");
        }
    }

    #[test]
    fn gives_each_refusal_its_remedy() {
        for (status, code, words) in [
            (
                403,
                "KeyBasedAuthenticationNotPermitted",
                "allowSharedKeyAccess",
            ),
            (403, "AuthorizationFailure", "resolved to 10.1.2.3"),
            (
                400,
                "AccountRequiresHttps",
                "https endpoint in place of http://acct",
            ),
            (404, "BlobNotFound", "create it"),
            (404, "ContainerNotFound", "container dysks"),
            (404, "", "check account, container and blob"),
            (409, "InvalidBlobType", "not a page blob"),
        ] {
            let text = explain(status, code, None);
            assert!(
                text.starts_with(": ") && text.contains(words),
                "{code}: {text}"
            );
        }
        assert_eq!(explain(503, "ServerBusy", None), "");
    }
}
