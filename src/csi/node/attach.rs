//! From a request's volume, secrets and context to an attachment of the
//! daemon's.

use std::collections::HashMap;
use std::path::Path;

use sha2::{Digest, Sha256};
use tonic::Status;

use super::{Node, blocking};
use crate::csi::handle::Handle;
use crate::csi::{failure, parameters, publishing, secrets};
use crate::mounts;
use crate::node::AttachmentName;
use crate::node::account::{ATTEMPT_DEADLINE, open_blob};
use crate::node::api::{AttachRequest, Attachment, CredentialChange, ErrorCode, State};
use crate::node::client::ClientError;
use crate::node::name::fingerprint;
use crate::node::policy::Policy;
use crate::volume;

/// For somebody else's lease: a dead node's ends within a minute.
const WAIT_MS: u64 = 70_000;
/// The part of a blob's name that goes into the attachment's.
const READABLE: usize = 44;

/// The name of a volume's attachment: for people the blob's name, for
/// uniqueness a hash of the volume's handle. Any text has one.
pub fn name_of(volume_id: &str) -> Result<AttachmentName, Status> {
    let last = volume_id.rsplit('/').next().unwrap_or(volume_id);
    let stem = last.strip_suffix(".vhd").unwrap_or(last);
    let readable: String = stem
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '-' || c == '_' {
                c
            } else {
                '_'
            }
        })
        .take(READABLE)
        .collect();
    let hash = fingerprint(volume_id.as_bytes());
    let readable = readable.trim_start_matches('-');
    let name = if readable.is_empty() {
        hash
    } else {
        format!("{readable}-{hash}")
    };
    name.parse()
        .map_err(|error: crate::node::name::NameError| Status::internal(error.to_string()))
}

/// The request to attach `volume_id` with what the call brought.
///
/// # Errors
/// INVALID_ARGUMENT names what is missing or wrong; NOT_FOUND: no such volume.
pub fn request(
    volume_id: &str,
    given: &HashMap<String, String>,
    context: &HashMap<String, String>,
    published: &HashMap<String, String>,
    read_only: bool,
) -> Result<AttachRequest, Status> {
    let handle = Handle::named(volume_id)?;
    let value = |key: &str| context.get(key).map(String::as_str);
    let account = secrets::spec(given, value("endpoint"), value("realm"))?;
    secrets::are_of(&handle.account, &account.name, &handle)?;
    let wrong = |key: &str| {
        Status::invalid_argument(format!("volume context {key}: its value is not understood"))
    };
    let word = |key: &str| value(key).map(serde_json::Value::from);
    let mut policy = Policy {
        wait_ms: WAIT_MS,
        ..Policy::default()
    };
    if let Some(caching) = word("cachingMode") {
        policy.caching = serde_json::from_value(caching).map_err(|_| wrong("cachingMode"))?;
    }
    if let Some(integrity) = word("integrity") {
        policy.integrity = serde_json::from_value(integrity).map_err(|_| wrong("integrity"))?;
    }
    if let Some(iops) = value("iops") {
        let iops = parameters::iops(iops).ok_or_else(|| wrong("iops"))?;
        policy.limits.iops = Some(iops).filter(|iops| *iops > 0);
    }
    if let Some(bandwidth) = value("bandwidth") {
        let bandwidth = parameters::bandwidth(bandwidth).ok_or_else(|| wrong("bandwidth"))?;
        policy.limits.bandwidth = Some(bandwidth).filter(|bandwidth| *bandwidth > 0);
    }
    if let Some(deadline) = value("ioDeadline") {
        let deadline: jiff::SignedDuration = deadline.parse().map_err(|_| wrong("ioDeadline"))?;
        let deadline = u64::try_from(deadline.as_millis()).map_err(|_| wrong("ioDeadline"))?;
        policy.io_deadline_ms = Some(deadline);
    }
    let connections = match value("connections") {
        Some(number) => Some(number.parse().map_err(|_| wrong("connections"))?),
        None => None,
    };
    Ok(AttachRequest {
        name: name_of(volume_id)?,
        account,
        container: handle.container,
        blob: handle.blob,
        read_only: read_only || publishing::reads_only(published),
        policy,
        connections,
        break_lease: false,
        recover: crate::volume::Recover::default(),
        create: None,
        reuse: true,
        holder: published.get(publishing::NODE).cloned(),
        follow_settings: true,
    })
}

/// The attachment called `name`, if there is one.
pub async fn look(node: &Node, name: &AttachmentName) -> Result<Option<Attachment>, Status> {
    match node.daemon.status(name).await {
        Ok(there) => Ok(Some(there)),
        Err(ClientError::Refused(refused)) if refused.code == ErrorCode::NotAttached => Ok(None),
        Err(error) => Err(failure::of_daemon(&error)),
    }
}

/// Its device.
pub fn device(attachment: &Attachment) -> Result<&Path, Status> {
    attachment.device.as_deref().ok_or_else(|| {
        Status::unavailable(format!(
            "{}: {}, without a device: try again",
            attachment.name, attachment.state
        ))
    })
}

/// Attaches, or finds the attachment that an earlier call made; one that is
/// dead is taken away first, with what is mounted at `staging`.
pub async fn attach(
    node: &Node,
    request: &AttachRequest,
    staging: &Path,
) -> Result<Attachment, Status> {
    let name = &request.name;
    let there = look(node, name).await?;
    if let Some(there) = &there {
        match there.state {
            State::Attached if there.fenced.is_none() => {}
            State::Attaching | State::Recovering | State::Detaching => {
                return Err(Status::unavailable(format!(
                    "{name}: {}: try again in a moment",
                    there.state
                )));
            }
            _ => clear_away(node, there, staging).await?,
        }
    }
    let mut request = request.clone();
    let lives = |there: &&Attachment| there.state == State::Attached && there.fenced.is_none();
    match there.as_ref().filter(lives) {
        // Whatever it was changed to since.
        Some(there) => {
            request.policy.caching = there.caching;
            request.policy.limits = there.limits;
        }
        None => follow_wish(&mut request).await?,
    }
    let request = &request;
    let attached = node.daemon.attach(request, |_| {}).await;
    let attached = attached.map_err(|error| match &error {
        ClientError::Refused(refused)
            if there.is_some() && refused.code == ErrorCode::AlreadyAttached =>
        {
            Status::already_exists(format!("staged already, with other options: {error}"))
        }
        _ => failure::of_daemon(&error),
    })?;
    if there.is_some() {
        renew_credential(node, request).await?;
    } else {
        node.remember(name, &digest(request));
    }
    Ok(attached)
}

/// Puts into `request` what was wished for the volume after it was made.
async fn follow_wish(request: &mut AttachRequest) -> Result<(), Status> {
    let opened = open_blob(&request.account, &request.container, &request.blob).await;
    let (_, blob) = opened.map_err(|error| failure::of_account(&error))?;
    let wish = volume::wish(&blob, ATTEMPT_DEADLINE).await;
    if let Some(wish) = wish.map_err(|error| failure::of_storage(&error))? {
        let policy = &mut request.policy;
        policy.caching = wish.settings.caching.unwrap_or(policy.caching);
        policy.limits = wish.settings.limits(policy.limits);
    }
    Ok(())
}

/// Takes away an attachment that serves nobody any more.
async fn clear_away(node: &Node, dead: &Attachment, staging: &Path) -> Result<(), Status> {
    tracing::warn!(name = %dead.name, state = %dead.state, fenced = dead.fenced, "staging anew");
    let path = staging.to_owned();
    blocking(move || Ok(mounts::unmount_all(&path)?)).await?;
    detach(node, &dead.name).await
}

/// Detaches; what is not attached is fine.
pub async fn detach(node: &Node, name: &AttachmentName) -> Result<(), Status> {
    match node.daemon.detach(name, false).await {
        Ok(done) => {
            for warning in done.warnings {
                tracing::warn!(%name, warning, "detached");
            }
        }
        Err(ClientError::Refused(refused)) if refused.code == ErrorCode::NotAttached => {}
        Err(error) => return Err(failure::of_daemon(&error)),
    }
    node.forget(name);
    Ok(())
}

/// What tells one credential from another, without keeping it.
fn digest(request: &AttachRequest) -> [u8; 32] {
    let text = serde_json::to_vec(&request.account).unwrap_or_default();
    Sha256::digest(&text).into()
}

/// Hands the credential to the daemon, unless it is the one it was handed
/// last: so a rotated Secret reaches a volume that is in use.
pub async fn renew_credential(node: &Node, request: &AttachRequest) -> Result<(), Status> {
    let digest = digest(request);
    if node.remembers(&request.name, &digest) {
        return Ok(());
    }
    let change = CredentialChange {
        credential: request.account.credential.clone(),
    };
    node.daemon
        .replace_credential(&request.name, &change)
        .await
        .map_err(|error| failure::of_daemon(&error))?;
    node.remember(&request.name, &digest);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_tell_people_the_volume() {
        let claim = "acct/dysks/pvc-0b5c8d4e-7a1f-4c39-9d0e-3f1a2b3c4d5e.vhd";
        let name = name_of(claim).expect("a name").to_string();
        assert!(
            name.starts_with("pvc-0b5c8d4e-7a1f-4c39-9d0e-3f1a2b3c4d5e-"),
            "{name}"
        );
        assert_ne!(name_of("a/b/c.vhd").ok(), name_of("a/bb/c.vhd").ok());
    }

    proptest! {
        #[test]
        fn every_text_has_a_name(a in ".{0,140}", b in ".{0,140}") {
            let (x, y) = (name_of(&a), name_of(&b));
            prop_assert!(x.is_ok() && y.is_ok());
            prop_assert_eq!(x.ok() == y.ok(), a == b);
        }
    }

    #[test]
    fn the_context_becomes_the_policy() {
        let map = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
            let owned = |(k, v): &(&str, &str)| ((*k).to_owned(), (*v).to_owned());
            pairs.iter().map(owned).collect()
        };
        let secret = map(&[("accountname", "acct"), ("accountkey", "c2VjcmV0")]);
        let context = map(&[
            ("cachingMode", "read-write"),
            ("integrity", "crc64"),
            ("ioDeadline", "5m"),
            ("connections", "4"),
            ("iops", "500"),
            ("bandwidth", "60MiB"),
            ("leaseID", "stale"),
        ]);
        let none = HashMap::new();
        let request =
            request("acct/dysks/v.vhd", &secret, &context, &none, false).expect("a request");
        assert_eq!(request.policy.io_deadline_ms, Some(300_000));
        assert_eq!(request.policy.caching, crate::volume::Caching::ReadWrite);
        assert_eq!(request.policy.integrity, crate::blob::Checksum::Crc64);
        assert_eq!(request.connections, Some(4));
        let limits = request.policy.limits;
        assert_eq!((limits.iops, limits.bandwidth), (Some(500), Some(60 << 20)));
        assert_eq!(request.policy.check(), Ok(()));
        for (context, text) in [
            (map(&[("cachingMode", "fast")]), "cachingMode"),
            (map(&[("ioDeadline", "-5m")]), "ioDeadline"),
        ] {
            let refused = super::request("acct/dysks/v.vhd", &secret, &context, &none, false);
            let refused = refused.expect_err("refused");
            assert!(refused.message().contains(text), "{refused}");
        }
        let other = super::request("other/dysks/v.vhd", &secret, &none, &none, false);
        assert_eq!(
            other.expect_err("refused").code(),
            tonic::Code::InvalidArgument
        );
    }
}
