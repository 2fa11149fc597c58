//! Shared access signatures made here: for copy sources and for tests.
//!
//! Follows "Create a service SAS" and "Create an account SAS", the forms for
//! version 2020-12-06 and later.

use std::time::SystemTime;

use jiff::{Timestamp, Unit};
use zeroize::Zeroizing;

use super::credential::SharedKey;
use super::endpoint::encode_query;
use super::page_blob::PageBlob;
use super::request::API_VERSION;
use super::types::BlobAddress;

/// What a signature grants and for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Permission letters in the store's order, such as `r` or `racwd`.
    pub permissions: String,
    /// Valid from here on; at once when `None`, which spares trouble with clocks.
    pub start: Option<SystemTime>,
    /// Valid up to here.
    pub expiry: SystemTime,
    /// Refuse plain HTTP.
    pub https_only: bool,
}

impl Grant {
    fn protocol(&self) -> &'static str {
        if self.https_only {
            "https"
        } else {
            "https,http"
        }
    }
}

/// A service SAS for one blob, or for one of its snapshots: the query string.
#[must_use]
pub fn blob_sas(
    key: &SharedKey,
    address: &BlobAddress,
    snapshot: Option<&str>,
    grant: &Grant,
) -> Zeroizing<String> {
    let start = grant.start.map(stamp).unwrap_or_default();
    let expiry = stamp(grant.expiry);
    let resource = if snapshot.is_some() { "bs" } else { "b" };
    let canonical = format!(
        "/blob/{}/{}/{}",
        address.account, address.container, address.blob
    );
    let text = [
        grant.permissions.as_str(),
        &start,
        &expiry,
        &canonical,
        "", // identifier of a stored policy
        "", // addresses
        grant.protocol(),
        API_VERSION,
        resource,
        snapshot.unwrap_or_default(),
        "", // encryption scope
        "", // Cache-Control
        "", // Content-Disposition
        "", // Content-Encoding
        "", // Content-Language
        "", // Content-Type
    ]
    .join("\n");
    query(&[
        ("sv", API_VERSION),
        ("sr", resource),
        ("sp", &grant.permissions),
        ("st", &start),
        ("se", &expiry),
        ("spr", grant.protocol()),
        ("sig", &key.sign(&text)),
    ])
}

/// An account SAS for the blob service, on all of service, containers and
/// objects: the query string.
#[must_use]
pub fn account_sas(key: &SharedKey, account: &str, grant: &Grant) -> Zeroizing<String> {
    let start = grant.start.map(stamp).unwrap_or_default();
    let expiry = stamp(grant.expiry);
    let (services, types) = ("b", "sco");
    // The encryption scope is empty, and every field ends its line.
    let text = [
        account,
        &grant.permissions,
        services,
        types,
        &start,
        &expiry,
        "", // addresses
        grant.protocol(),
        API_VERSION,
        "", // encryption scope
        "",
    ]
    .join("\n");
    query(&[
        ("sv", API_VERSION),
        ("ss", services),
        ("srt", types),
        ("sp", &grant.permissions),
        ("st", &start),
        ("se", &expiry),
        ("spr", grant.protocol()),
        ("sig", &key.sign(&text)),
    ])
}

impl PageBlob {
    /// The URL of this blob or snapshot with a signature of its own: a copy
    /// source that needs no further authorisation. As secret as the key, for
    /// as long as `grant` says.
    #[must_use]
    pub fn signed_url(&self, key: &SharedKey, grant: &Grant) -> Zeroizing<String> {
        let sas = blob_sas(key, self.address(), self.snapshot.as_deref(), grant);
        let separator = if self.snapshot.is_some() { '&' } else { '?' };
        Zeroizing::new(format!("{}{separator}{}", self.url(), sas.as_str()))
    }
}

/// `2026-01-31T12:00:00Z`: the form without fractions, the same signed and sent.
fn stamp(time: SystemTime) -> String {
    Timestamp::try_from(time)
        .and_then(|stamp| stamp.round(Unit::Second))
        .unwrap_or_default()
        .to_string()
}

fn query(parameters: &[(&str, &str)]) -> Zeroizing<String> {
    let mut text = String::with_capacity(256);
    for (name, value) in parameters {
        if value.is_empty() {
            continue;
        }
        if !text.is_empty() {
            text.push('&');
        }
        text.push_str(name);
        text.push('=');
        text.push_str(&encode_query(value));
    }
    Zeroizing::new(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn grant() -> Grant {
        Grant {
            permissions: "rw".into(),
            start: Some(UNIX_EPOCH + Duration::from_secs(1_700_000_000)),
            expiry: UNIX_EPOCH + Duration::from_secs(1_700_003_600),
            https_only: false,
        }
    }

    fn key() -> SharedKey {
        SharedKey::from_base64("MDEyMzQ1Njc4OWFiY2RlZg==").expect("a key")
    }

    // The signatures were computed from the documented strings with Python's
    // hmac module.

    #[test]
    fn signs_blobs_and_snapshots() {
        let address = BlobAddress::new("acct", "dysks", "a b/vol1.vhd");
        assert_eq!(
            blob_sas(&key(), &address, None, &grant()).as_str(),
            "sv=2021-12-02&sr=b&sp=rw&st=2023-11-14T22%3A13%3A20Z&se=2023-11-14T23%3A13%3A20Z\
             &spr=https%2Chttp&sig=wIW4jK1JeME9Pv3Y5PpzVe6OLdAHuqK0fTvdAIchkjo%3D"
        );
        let time = "2023-11-14T22:13:20.1234567Z";
        assert_eq!(
            blob_sas(&key(), &address, Some(time), &grant()).as_str(),
            "sv=2021-12-02&sr=bs&sp=rw&st=2023-11-14T22%3A13%3A20Z&se=2023-11-14T23%3A13%3A20Z\
             &spr=https%2Chttp&sig=GW3vOQOv96DH6YmnYt5CMbnlPFLc9veLXBzENs72B6M%3D"
        );
    }

    #[test]
    fn signs_accounts() {
        let grant = Grant {
            start: None,
            https_only: true,
            ..grant()
        };
        assert_eq!(
            account_sas(&key(), "acct", &grant).as_str(),
            "sv=2021-12-02&ss=b&srt=sco&sp=rw&se=2023-11-14T23%3A13%3A20Z&spr=https&sig=d01g7haJOydUekXx2g5gLEXk3RXoNHB9TE91m35oiho%3D"
        );
    }
}
