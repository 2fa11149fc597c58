//! Growing what is attached: first the disk in the store, then the record,
//! then the kernel's device. Ended anywhere, the same call goes on there; a
//! daemon that takes the attachment up tells the kernel what is missing.

use std::sync::Arc;
use std::time::Duration;

use super::api::{Attachment, ErrorCode, ResizeRequest};
use super::detach::blocking;
use super::entry::{Entry, Parts, Phase};
use super::error::NodeError;
use super::name::AttachmentName;
use super::registry::Registry;
use crate::blob::retry::Backoff;

/// Between two attempts to tell the kernel after a recovery.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

impl Registry {
    /// Grows an attached disk; one that is large enough stays as it is. Runs
    /// on when the future is dropped.
    ///
    /// # Errors
    /// No such attachment, or one on its way in or out; it is read-only or
    /// fenced; the size makes no sense; store or kernel do not take it. The
    /// disk then has its old size or the new one.
    pub async fn resize(
        &self,
        name: &AttachmentName,
        request: ResizeRequest,
    ) -> Result<Attachment, NodeError> {
        let (change, entry, parts) = self.begin_change(name)?;
        let registry = self.clone();
        let work = tokio::spawn(async move {
            let resized = registry.grow(&entry, &parts, request.size_bytes).await;
            drop(change);
            resized
        });
        work.await.unwrap_or_else(|error| {
            Err(NodeError::internal(format!(
                "the resize of {name} died: {error}"
            )))
        })?;
        self.get(name)
    }

    async fn grow(&self, entry: &Entry, parts: &Parts, size: u64) -> Result<(), NodeError> {
        let name = &entry.request.name;
        let (Some(volume), Some(device)) = (&parts.volume, &parts.device) else {
            return Err(NodeError::internal(format!("{name} has no device")));
        };
        let before = volume.size();
        if entry.request.read_only && size > before {
            return Err(NodeError::new(
                ErrorCode::InvalidRequest,
                format!(
                    "{name} is attached read-only, without the lease that a resize needs: \
                     detach it, or resize it where it is attached for writing"
                ),
            ));
        }
        let size = volume.grow(size).await?;
        let (records, of) = (self.0.records.clone(), name.clone());
        blocking(move || records.change(&of, |record| record.size = Some(size)))
            .await
            .map_err(|error| NodeError::internal(format!("cannot change the record: {error}")))?;
        device.resize(size).await?;
        tracing::info!(%name, from = before, to = size, "resized");
        Ok(())
    }

    /// Tells the kernel the size of a disk that was taken up, should an earlier
    /// daemon have died before it did. Nobody waits for it.
    pub(super) fn settle_size(&self, entry: &Entry) {
        let (registry, entry) = (self.clone(), entry.clone());
        tokio::spawn(async move {
            let name = &entry.request.name;
            let mut backoff = Backoff::new(PAUSE, LONGEST_PAUSE);
            loop {
                match registry.tell_kernel(&entry).await {
                    Ok(()) => return,
                    Err(error) => tracing::warn!(%name, %error, "the kernel has another size"),
                }
                tokio::time::sleep(backoff.pause(None)).await;
            }
        });
    }

    async fn tell_kernel(&self, entry: &Entry) -> Result<(), NodeError> {
        let name = &entry.request.name;
        let there = |found: &Entry| match &found.phase {
            Phase::Attached(parts) if found.id == entry.id => Some(Arc::clone(parts)),
            _ => None,
        };
        let attached = self.entry(name).ok().as_ref().and_then(there);
        let Some((volume, device)) = attached.and_then(|parts| {
            let volume = parts.volume.clone().filter(|volume| !volume.is_fenced())?;
            Some((volume, parts.device.clone()?))
        }) else {
            return Ok(());
        };
        let (_change, ..) = match self.begin_change(name) {
            // Whoever takes it up next does this.
            Err(error) if error.code == ErrorCode::Stopping => return Ok(()),
            begun => begun?,
        };
        Ok(device.resize(volume.size()).await?)
    }
}
