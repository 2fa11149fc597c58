//! What an argument names among the attachments of this node.

use std::path::Path;

use super::Global;
use super::error::CliError;
use crate::blob::reference::{DEFAULT_CONTAINER, VolumeRef};
use crate::node::api::Attachment;
use crate::node::client::ClientError;

/// The attachment that `text` names: by its name, its device, its link or its
/// volume. None when it names no device and nothing of that name is attached
/// here, or no daemon runs.
pub async fn attached(global: &Global, text: &str) -> Result<Option<Attachment>, CliError> {
    let is_path = text.starts_with('/');
    let attachments = match global.client().list().await {
        Ok(attachments) => attachments,
        Err(ClientError::NotRunning(_) | ClientError::NotAllowed(_)) if !is_path => {
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    if is_path {
        return by_device(attachments, Path::new(text)).map(Some);
    }
    let named = VolumeRef::parse(text).ok();
    Ok(attachments.into_iter().find(|attachment| {
        attachment.name.to_string() == text
            || named.as_ref().is_some_and(|named| is_of(attachment, named))
    }))
}

/// The attachment with this device or link.
pub fn by_device(attachments: Vec<Attachment>, path: &Path) -> Result<Attachment, CliError> {
    let real = std::fs::canonicalize(path).ok();
    let is_it = |candidate: &Option<std::path::PathBuf>| {
        let candidate = candidate.as_deref();
        candidate.is_some() && (candidate == Some(path) || candidate == real.as_deref())
    };
    attachments
        .into_iter()
        .find(|a| is_it(&a.device) || a.link.as_deref() == Some(path))
        .ok_or_else(|| {
            CliError::failed(format!(
                "{} is not attached by dyskd: see `dyskctl list`",
                path.display()
            ))
        })
}

fn is_of(attachment: &Attachment, named: &VolumeRef) -> bool {
    let container = named.container.as_deref().unwrap_or(DEFAULT_CONTAINER);
    let endpoint = named
        .endpoint
        .as_deref()
        .map(|url| url.trim_end_matches('/'));
    named.account.as_deref() == Some(&attachment.account)
        && named.blob.as_deref() == Some(&attachment.blob)
        && container == attachment.container
        && endpoint.is_none_or(|url| url == attachment.endpoint.trim_end_matches('/'))
}
