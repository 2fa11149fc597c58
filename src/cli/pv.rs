//! `dyskctl pv`: a static PersistentVolume for a blob that is there already.
//!
//! Nothing but what a cluster needs to find the volume again: the handle, the
//! Secret's name and the capacity. It keeps the blob (`Retain`).

use clap::Args;
use serde_json::{Value, json};

use super::account::AccountOptions;
use super::error::CliError;
use super::policy::CachingArg;
use super::target::Target;
use super::{Global, Output, output};
use crate::blob::reference::{DEFAULT_CONTAINER, VolumeRef};
use crate::node::NodeError;
use crate::node::account::{ATTEMPT_DEADLINE, open_blob};
use crate::size::ByteSize;
use crate::volume;

/// The driver's name in a cluster.
const DRIVER: &str = "csi-dysk";
/// The longest name of an object of a cluster (RFC 1123 subdomain).
const LONGEST_NAME: usize = 253;

#[derive(Debug, Args)]
pub struct Options {
    /// ACCOUNT/CONTAINER/BLOB, ACCOUNT/BLOB or a blob URL
    volume: String,
    /// The PersistentVolume's name [default: made of the blob's]
    #[arg(long)]
    name: Option<String>,
    /// Its capacity, such as 32GiB [default: asked of the store]
    #[arg(long)]
    size: Option<ByteSize>,
    /// Its filesystem
    #[arg(long, default_value = "ext4", value_parser = ["ext4", "xfs", "btrfs"])]
    fstype: String,
    /// Its storage class; a claim names the same one
    #[arg(long, default_value = DRIVER)]
    storage_class: String,
    /// The Secret with accountname and accountkey
    #[arg(long, value_name = "NAMESPACE/NAME", default_value = "dysk/dyskcreds")]
    secret: String,
    /// Caching mode on the node
    #[arg(long, value_enum)]
    caching: Option<CachingArg>,
    /// For readers on many nodes: attached without a lease, never written to
    #[arg(long)]
    read_only: bool,
    /// A raw device for the pod, without a filesystem
    #[arg(long, conflicts_with = "fstype")]
    block: bool,
    #[command(flatten)]
    account: AccountOptions,
}

/// What is known of the volume.
struct Known {
    account: String,
    container: String,
    blob: String,
    endpoint: Option<String>,
    size: u64,
}

pub async fn run(global: &Global, options: Options) -> Result<(), CliError> {
    let known = match options.size {
        Some(size) => named(&options, size)?,
        None => asked(&options).await?,
    };
    let volume = object(&options, &known)?;
    match global.output {
        Output::Json => output::json(&volume),
        Output::Table => output::print(&yaml(&volume)),
    }
}

/// From the text alone: neither store nor credential is needed.
fn named(options: &Options, size: ByteSize) -> Result<Known, CliError> {
    let named = VolumeRef::parse(&options.volume).map_err(CliError::failed)?;
    let (Some(account), Some(blob)) = (named.account, named.blob) else {
        return Err(CliError::failed(
            "the volume names no account: write ACCOUNT/CONTAINER/BLOB or a blob URL",
        ));
    };
    Ok(Known {
        account,
        container: named.container.unwrap_or_else(|| DEFAULT_CONTAINER.into()),
        blob,
        endpoint: options.account.endpoint.clone().or(named.endpoint),
        size: size.0,
    })
}

async fn asked(options: &Options) -> Result<Known, CliError> {
    let without = |error: &dyn std::fmt::Display| {
        CliError::failed(format!("{error}; or say how large it is with --size"))
    };
    let target =
        Target::find(&options.volume, None, &options.account).map_err(|error| without(&error))?;
    let opened = open_blob(&target.account, &target.container, &target.blob).await;
    let (_, blob) = opened.map_err(|error| without(&error))?;
    let disk = volume::inspect(&blob, ATTEMPT_DEADLINE)
        .await
        .map_err(|error| without(&NodeError::from(error)))?;
    let given = VolumeRef::parse(&options.volume).ok();
    let given = given.and_then(|named| named.endpoint);
    Ok(Known {
        account: target.account.name,
        container: target.container,
        blob: target.blob,
        endpoint: options.account.endpoint.clone().or(given),
        size: disk.size,
    })
}

fn object(options: &Options, known: &Known) -> Result<Value, CliError> {
    let name = match &options.name {
        Some(name) if *name == object_name(name) => name.clone(),
        Some(name) => {
            return Err(CliError::failed(format!(
                "name \"{name}\": a cluster takes lower-case letters, digits, - and . of at most \
                 {LONGEST_NAME} bytes, such as \"{}\"",
                object_name(name)
            )));
        }
        None => object_name(known.blob.strip_suffix(".vhd").unwrap_or(&known.blob)),
    };
    let secret = options.secret.split_once('/').filter(|(namespace, name)| {
        !namespace.is_empty() && !name.is_empty() && !name.contains('/')
    });
    let (namespace, secret) = secret.ok_or_else(|| {
        CliError::failed(format!(
            "secret \"{}\": write NAMESPACE/NAME",
            options.secret
        ))
    })?;
    let secret = json!({ "name": secret, "namespace": namespace });
    let mut attributes = json!({ "container": known.container, "blob": known.blob });
    if let Some(endpoint) = &known.endpoint {
        attributes["endpoint"] = json!(endpoint);
    }
    if let Some(caching) = options.caching {
        attributes["cachingMode"] = json!(crate::volume::Caching::from(caching));
    }
    let mut csi = json!({
        "driver": DRIVER,
        "volumeHandle": format!("{}/{}/{}", known.account, known.container, known.blob),
        "readOnly": options.read_only,
        "volumeAttributes": attributes,
        "nodeStageSecretRef": secret,
        "nodeExpandSecretRef": secret,
        "controllerExpandSecretRef": secret,
    });
    if !options.block {
        csi["fsType"] = json!(options.fstype);
    }
    let access = match options.read_only {
        true => "ReadOnlyMany",
        false => "ReadWriteOnce",
    };
    Ok(json!({
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": { "name": name },
        "spec": {
            "capacity": { "storage": quantity(known.size) },
            "accessModes": [access],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": options.storage_class,
            "volumeMode": if options.block { "Block" } else { "Filesystem" },
            "csi": csi,
        },
    }))
}

/// Bytes as a quantity of Kubernetes, never rounded.
fn quantity(bytes: u64) -> String {
    for (shift, suffix) in [(40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")] {
        if bytes.is_multiple_of(1 << shift) {
            return format!("{}{suffix}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// `text` as an object's name (RFC 1123 subdomain).
fn object_name(text: &str) -> String {
    let plain = |c: char| match c.to_ascii_lowercase() {
        c if c.is_ascii_alphanumeric() || c == '.' => c,
        _ => '-',
    };
    let name: String = text.chars().map(plain).take(LONGEST_NAME).collect();
    // Each label between dots begins and ends with a letter or digit.
    let labels = name.split('.').map(|label| label.trim_matches('-'));
    let labels: Vec<&str> = labels.filter(|label| !label.is_empty()).collect();
    match labels.is_empty() {
        true => "dysk".into(),
        false => labels.join("."),
    }
}

/// `value` as YAML in blocks. Strings are in JSON's quotes, which are YAML's
/// too, unless they can be nothing but strings.
fn yaml(value: &Value) -> String {
    let mut text = String::new();
    block(value, 0, &mut text);
    text
}

fn block(value: &Value, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                text.push_str(&format!("{indent}{key}:"));
                entry(value, depth, text);
            }
        }
        Value::Array(items) => {
            for item in items {
                text.push_str(&format!("{indent}-"));
                entry(item, depth, text);
            }
        }
        scalar => text.push_str(&format!("{indent}{}\n", plain(scalar))),
    }
}

fn entry(value: &Value, depth: usize, text: &mut String) {
    if value.is_object() || value.is_array() {
        text.push('\n');
        block(value, depth + 1, text);
    } else {
        text.push_str(&format!(" {}\n", plain(value)));
    }
}

fn plain(value: &Value) -> String {
    let words = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"];
    match value.as_str() {
        Some(word)
            if word.starts_with(|c: char| c.is_ascii_alphabetic())
                && word
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c))
                && !words.contains(&word.to_ascii_lowercase().as_str()) =>
        {
            word.to_owned()
        }
        _ => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_a_cluster_takes() {
        for (text, name) in [
            ("vol1", "vol1"),
            ("My Disk_1", "my-disk-1"),
            ("a..b.-c-", "a.b.c"),
            ("\u{fc}", "dysk"),
        ] {
            assert_eq!(object_name(text), name);
        }
    }

    #[test]
    fn a_capacity_is_never_rounded() {
        for (bytes, text) in [
            (32 << 30, "32Gi"),
            (1 << 40, "1Ti"),
            ((1 << 30) + (1 << 20), "1025Mi"),
            ((1 << 30) - 512, "1073741312"),
        ] {
            assert_eq!(quantity(bytes), text);
        }
    }

    #[test]
    fn strings_stay_strings() {
        let value = json!({ "a": "yes", "b": "32Gi", "c": "x: y", "d": true, "e": ["x/y"] });
        assert_eq!(
            yaml(&value),
            "a: \"yes\"\nb: \"32Gi\"\nc: \"x: y\"\nd: true\ne:\n  - x/y\n"
        );
    }
}
