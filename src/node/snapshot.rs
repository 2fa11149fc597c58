//! Snapshots of what is attached: by the daemon, which can flush and hold its
//! writes.

use super::api::{SnapshotRequest, SnapshotTaken};
use super::error::NodeError;
use super::name::AttachmentName;
use super::registry::Registry;

impl Registry {
    /// Takes a snapshot of an attached disk, or finds the one of that name.
    /// Runs on when the future is dropped.
    ///
    /// # Errors
    /// No such attachment, or one on its way in or out; it is fenced; the
    /// store refuses or does not answer in time.
    pub async fn snapshot(
        &self,
        name: &AttachmentName,
        request: SnapshotRequest,
    ) -> Result<SnapshotTaken, NodeError> {
        let (change, entry, parts) = self.begin_change(name)?;
        let volume = parts.volume.clone();
        let volume = volume.ok_or_else(|| NodeError::internal(format!("{name} has no volume")))?;
        let work = tokio::spawn(async move {
            let taken = volume.snapshot(&request.name).await;
            drop(change);
            taken
        });
        let taken = work.await.map_err(|error| {
            NodeError::internal(format!("the snapshot of {name} died: {error}"))
        })??;
        tracing::info!(%name, time = taken.time, "snapshot taken");
        Ok(SnapshotTaken::new(&entry.request.volume(), taken))
    }
}
