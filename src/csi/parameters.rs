//! The parameters of a StorageClass. Every one is known or refused by name.

use std::collections::HashMap;

use tonic::Status;

use crate::blob::reference::{DEFAULT_CONTAINER, VolumeRef};
use crate::blob::vhd::Layout;
use crate::size::ByteSize;
use crate::volume::{Caching, Limits, Settings};

/// Written by the sidecars, or read by them; nothing to do with us.
const SIDECARS: &str = "csi.storage.k8s.io/";

/// Those that only the node needs: handed on in the volume context.
const FOR_THE_NODE: [&str; 6] = [
    "cachingMode",
    "connections",
    "ioDeadline",
    "integrity",
    "iops",
    "bandwidth",
];
/// Those that may be changed later, by a VolumeAttributesClass.
const MUTABLE: [&str; 3] = ["cachingMode", "iops", "bandwidth"];

/// The tiers of premium page blobs (Set Blob Tier, REST reference).
const TIERS: [&str; 9] = ["P4", "P6", "P10", "P15", "P20", "P30", "P40", "P50", "P60"];

/// What a StorageClass asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Container of the blobs.
    pub container: String,
    /// What blob names begin with.
    pub prefix: String,
    /// How disks lie in their blobs.
    pub layout: Layout,
    /// The blob service, where it is not the account's usual one.
    pub endpoint: Option<String>,
    /// Another cloud.
    pub realm: Option<String>,
    /// The tier of a premium page blob.
    pub tier: Option<String>,
    /// What the node is told.
    pub context: HashMap<String, String>,
}

impl Parameters {
    /// Reads `parameters`.
    ///
    /// # Errors
    /// INVALID_ARGUMENT names the parameter and what is wrong.
    pub fn parse(parameters: &HashMap<String, String>) -> Result<Self, Status> {
        let refuse = |text: String| Err(Status::invalid_argument(text));
        let mut parsed = Self {
            container: DEFAULT_CONTAINER.into(),
            prefix: String::new(),
            layout: Layout::Vhd,
            endpoint: None,
            realm: None,
            tier: None,
            context: HashMap::new(),
        };
        for (name, value) in parameters {
            match name.as_str() {
                "container" => {
                    if VolumeRef::parse(&format!("account/{value}/x")).is_err() {
                        return refuse(format!(
                            "parameter container: \"{value}\" is not 3 to 63 lower-case letters, digits and single hyphens"
                        ));
                    }
                    parsed.container.clone_from(value);
                }
                "blobPrefix" => {
                    if !value
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
                    {
                        return refuse(format!(
                            "parameter blobPrefix: \"{value}\" has other characters than letters, digits, - and _"
                        ));
                    }
                    parsed.prefix.clone_from(value);
                }
                "format" => {
                    parsed.layout = match value.as_str() {
                        "vhd" => Layout::Vhd,
                        "raw" => Layout::Raw,
                        _ => {
                            return refuse(format!(
                                "parameter format: \"{value}\" is neither vhd nor raw"
                            ));
                        }
                    }
                }
                "endpoint" => {
                    if value.contains(['?', '#', '@']) {
                        return refuse(
                            "parameter endpoint: a url without query and user, such as \
                             https://ACCOUNT.blob.core.windows.net; credentials belong into the Secret"
                                .into(),
                        );
                    }
                    parsed.endpoint = Some(value.clone());
                }
                "realm" => parsed.realm = Some(value.clone()),
                "tier" => {
                    if !TIERS.contains(&value.as_str()) {
                        return refuse(format!(
                            "parameter tier: \"{value}\" is none of {}",
                            TIERS.join(", ")
                        ));
                    }
                    parsed.tier = Some(value.clone());
                }
                "csiProvisionerSecretName" => {
                    return refuse(format!(
                        "parameter {name}: write csi.storage.k8s.io/provisioner-secret-name"
                    ));
                }
                "csiProvisionerSecretNamespace" => {
                    return refuse(format!(
                        "parameter {name}: write csi.storage.k8s.io/provisioner-secret-namespace"
                    ));
                }
                known if FOR_THE_NODE.contains(&known) => {
                    check_for_node(known, value)?;
                    parsed.context.insert(name.clone(), value.clone());
                }
                other if other.starts_with(SIDECARS) => {}
                other => return refuse(format!("parameter {other}: there is no such parameter")),
            }
        }
        for (key, value) in [("endpoint", &parsed.endpoint), ("realm", &parsed.realm)] {
            if let Some(value) = value {
                parsed.context.insert(key.into(), value.clone());
            }
        }
        Ok(parsed)
    }
}

/// A limit of requests a second, 0 for none.
pub fn iops(text: &str) -> Option<u32> {
    let limits = |iops| Limits {
        iops: Some(iops),
        bandwidth: None,
    };
    let number: u32 = text.parse().ok()?;
    (number == 0 || limits(number).check().is_ok()).then_some(number)
}

/// A limit of bytes a second, 0 for none.
pub fn bandwidth(text: &str) -> Option<u64> {
    let limits = |bandwidth| Limits {
        iops: None,
        bandwidth: Some(bandwidth),
    };
    let size: ByteSize = text.parse().ok()?;
    (size.0 == 0 || limits(size.0).check().is_ok()).then_some(size.0)
}

/// Reads mutable parameters.
///
/// # Errors
/// INVALID_ARGUMENT names the parameter and what is wrong.
pub fn settings(mutable: &HashMap<String, String>) -> Result<Settings, Status> {
    for (name, value) in mutable {
        if !MUTABLE.contains(&name.as_str()) {
            return Err(Status::invalid_argument(format!(
                "mutable parameter {name}: only {} can be changed",
                MUTABLE.join(", ")
            )));
        }
        check_for_node(name, value)?;
    }
    let value = |name: &str| mutable.get(name).map(String::as_str);
    Ok(Settings {
        caching: value("cachingMode").map(|mode| match mode {
            "read-only" => Caching::ReadOnly,
            "read-write" => Caching::ReadWrite,
            _ => Caching::None,
        }),
        iops: value("iops").and_then(iops),
        bandwidth: value("bandwidth").and_then(bandwidth),
    })
}

fn check_for_node(name: &str, value: &str) -> Result<(), Status> {
    let (good, expected) = match name {
        "cachingMode" => (
            ["none", "read-only", "read-write"].contains(&value),
            "none, read-only or read-write",
        ),
        "iops" => (
            iops(value).is_some(),
            "a number of requests a second from 10, or 0 for no limit",
        ),
        "bandwidth" => (
            bandwidth(value).is_some(),
            "a size such as 60MiB, which is meant for a second and at least 1MiB, or 0 for no limit",
        ),
        "integrity" => (
            ["off", "md5", "crc64"].contains(&value),
            "off, md5 or crc64",
        ),
        "connections" => (
            value.parse::<u32>().is_ok_and(|n| (1..=16).contains(&n)),
            "a number from 1 to 16",
        ),
        _ => (
            value
                .parse::<jiff::SignedDuration>()
                .is_ok_and(|deadline| deadline.as_millis() > 0),
            "a duration above 0, such as 5m",
        ),
    };
    if good {
        return Ok(());
    }
    Err(Status::invalid_argument(format!(
        "parameter {name}: \"{value}\" is not {expected}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Parameters, String> {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Parameters::parse(&pairs.iter().map(owned).collect())
            .map_err(|status| status.message().to_owned())
    }

    #[test]
    fn known_parameters_are_taken() {
        let parsed = parse(&[
            ("container", "disks"),
            ("blobPrefix", "test-"),
            ("format", "raw"),
            ("cachingMode", "read-write"),
            ("ioDeadline", "5m"),
            ("csi.storage.k8s.io/fstype", "xfs"),
        ])
        .expect("known");
        assert_eq!(
            (parsed.container.as_str(), parsed.layout),
            ("disks", Layout::Raw)
        );
        assert_eq!(parsed.context.len(), 2);
    }

    #[test]
    fn others_are_refused_by_name() {
        for (name, value, text) in [
            ("sku", "x", "parameter sku: there is no such parameter"),
            (
                "format",
                "qcow2",
                "parameter format: \"qcow2\" is neither vhd nor raw",
            ),
            (
                "connections",
                "0",
                "parameter connections: \"0\" is not a number from 1 to 16",
            ),
            (
                "iops",
                "9",
                "parameter iops: \"9\" is not a number of requests a second from 10, or 0 for no limit",
            ),
            (
                "tier",
                "P5",
                "parameter tier: \"P5\" is none of P4, P6, P10, P15, P20, P30, P40, P50, P60",
            ),
            (
                "csiProvisionerSecretName",
                "s",
                "parameter csiProvisionerSecretName: write csi.storage.k8s.io/provisioner-secret-name",
            ),
        ] {
            assert_eq!(parse(&[(name, value)]), Err(text.to_owned()));
        }
        let wrong = [("ioDeadline".to_owned(), "5m".to_owned())].into();
        let refused = settings(&wrong).expect_err("it cannot be changed");
        assert!(
            refused
                .message()
                .starts_with("mutable parameter ioDeadline"),
            "{refused}"
        );
        let text = parse(&[("endpoint", "https://x/?sig=hidden")]).expect_err("a secret");
        assert!(!text.contains("hidden"), "{text}");
    }
}
