//! Settings that the cluster changes while a disk is attached: looked for
//! beside the disk's blob every [`EVERY`], recorded, taken up, and noted there.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;

use super::detach::blocking;
use super::entry::{Entry, Phase};
use super::error::NodeError;
use super::registry::Registry;
use crate::volume::{Limits, Volume};

/// Between two looks. One costs one request, to another blob than the disk's.
const EVERY: Duration = Duration::from_secs(5);
/// Disks that are looked after at once.
const AT_ONCE: usize = 16;

/// Looks after all disks that follow their settings, for ever.
pub(super) async fn follow(registry: &Registry) {
    loop {
        tokio::time::sleep(EVERY).await;
        let attached = registry.following();
        futures_util::stream::iter(attached)
            .for_each_concurrent(AT_ONCE, |(entry, volume)| async move {
                if let Err(error) = registry.take_up(&entry, &volume).await {
                    let name = &entry.request.name;
                    // The disk's own requests say loudly what is wrong.
                    tracing::debug!(%name, %error, "cannot look for its settings");
                }
            })
            .await;
    }
}

impl Registry {
    /// Those that are attached and follow their settings.
    fn following(&self) -> Vec<(Entry, Arc<Volume>)> {
        let table = self.0.lock();
        let entries = table.entries.values().filter(|e| e.request.follow_settings);
        let volumes = entries.filter_map(|entry| match &entry.phase {
            Phase::Attached(parts) => Some((entry.clone(), parts.volume.clone()?)),
            _ => None,
        });
        volumes.filter(|(_, volume)| !volume.is_fenced()).collect()
    }

    /// Puts other limits into the request of `entry`; says whether it is there.
    fn set_limits(&self, entry: &Entry, limits: Limits) -> bool {
        let mut table = self.0.lock();
        let found = table.entries.get_mut(&entry.request.name);
        let Some(found) = found.filter(|found| found.id == entry.id) else {
            return false;
        };
        Arc::make_mut(&mut found.request).policy.limits = limits;
        true
    }

    async fn take_up(&self, entry: &Entry, volume: &Volume) -> Result<(), NodeError> {
        let Some(wish) = volume.wish().await? else {
            return Ok(());
        };
        if wish.taken_up.is_some() {
            return Ok(());
        }
        let name = &entry.request.name;
        let policy = &entry.request.policy;
        let limits = wish.settings.limits(policy.limits);
        if let Err(reason) = limits.check() {
            tracing::warn!(%name, reason, "a setting is not taken up");
            return Ok(());
        }
        if limits != policy.limits {
            let (records, of) = (self.0.records.clone(), name.clone());
            // Alone its limits: whatever else has changed meanwhile stays.
            blocking(move || records.change(&of, |r| r.request.policy.limits = limits))
                .await
                .map_err(|error| {
                    NodeError::internal(format!("cannot change the record: {error}"))
                })?;
            if !self.set_limits(entry, limits) {
                // Detached meanwhile: what was written is nobody's.
                let (records, gone) = (self.0.records.clone(), name.clone());
                return blocking(move || records.remove(&gone))
                    .await
                    .map_err(|error| {
                        NodeError::internal(format!("cannot remove a record: {error}"))
                    });
            }
        }
        volume.take_up(&wish, policy.caching).await?;
        tracing::info!(%name, settings = %wish.settings, "settings taken up");
        Ok(())
    }
}
