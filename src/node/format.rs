//! Whether an attachment's disk may be formatted: asked of the volume, which
//! holds the lease, by whoever makes filesystems.

use std::sync::Arc;

use super::api::ErrorCode;
use super::entry::Phase;
use super::error::NodeError;
use super::name::AttachmentName;
use super::registry::Registry;
use crate::volume::{FormatError, FormatMark, FormatState, Volume};

impl Registry {
    /// Was anything ever written to the disk, and has a format begun or ended?
    ///
    /// # Errors
    /// No such attachment, one that is not attached or read-only, or the store
    /// cannot tell.
    pub async fn format_state(&self, name: &AttachmentName) -> Result<FormatState, NodeError> {
        let volume = self.attached(name)?;
        Ok(volume.format_state().await?)
    }

    /// Sets the mark of a format.
    ///
    /// # Errors
    /// As [`Registry::format_state`].
    pub async fn set_format_mark(
        &self,
        name: &AttachmentName,
        mark: FormatMark,
    ) -> Result<FormatMark, NodeError> {
        let plain =
            |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric());
        if !plain(&mark.filesystem) {
            return Err(NodeError::new(
                ErrorCode::InvalidRequest,
                format!(
                    "filesystem {:?}: letters and digits name one",
                    mark.filesystem
                ),
            ));
        }
        if uuid::Uuid::try_parse(&mark.uuid).is_err() {
            return Err(NodeError::new(
                ErrorCode::InvalidRequest,
                format!("id {:?}: a filesystem's id is a uuid", mark.uuid),
            ));
        }
        let volume = self.attached(name)?;
        volume.set_format_mark(&mark).await?;
        tracing::info!(%name, filesystem = mark.filesystem, complete = mark.complete, "format marked");
        Ok(mark)
    }

    fn attached(&self, name: &AttachmentName) -> Result<Arc<Volume>, NodeError> {
        let entry = self.entry(name)?;
        if let Phase::Attached(parts) = &entry.phase
            && let Some(volume) = &parts.volume
        {
            return Ok(volume.clone());
        }
        let state = entry.view().state;
        Err(NodeError::new(
            ErrorCode::Busy,
            format!("{name} is {state}: it cannot be formatted now"),
        ))
    }
}

impl From<FormatError> for NodeError {
    fn from(error: FormatError) -> Self {
        match error {
            FormatError::Storage(error) => error.into(),
            FormatError::Device { .. } => Self::new(ErrorCode::StoreRefused, error.to_string()),
            FormatError::Mark(_) => Self::new(ErrorCode::UnusableBlob, error.to_string()),
            FormatError::ReadOnly(_) => Self::new(ErrorCode::InvalidRequest, error.to_string()),
        }
    }
}
