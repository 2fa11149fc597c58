//! One detach: the reverse of an attach. The device first, so that nothing
//! writes any more; then link and lease; the record last, so that a daemon
//! that dies on the way leaves what its successor needs to finish.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::api::{Detached, ErrorCode};
use super::entry::{Detaching, Entry, Parts, Phase};
use super::error::NodeError;
use super::registry::Registry;
use super::{account, transport::Device};
use crate::volume::Volume;

/// How long the store may take to end what is under way and give the lease
/// back, when nobody is in a hurry. Without an answer the lease ends by
/// itself: nobody renews it.
const CLOSE_PATIENCE: Duration = Duration::from_secs(60);
/// The same when forced.
const FORCED_PATIENCE: Duration = Duration::from_secs(5);

/// How hard to try; may turn from patient to forced on the way.
#[derive(Clone)]
pub(super) struct Effort(watch::Receiver<bool>);

impl Effort {
    pub fn forced() -> Self {
        Self(watch::channel(true).1)
    }

    fn is_forced(&self) -> bool {
        *self.0.borrow()
    }

    /// Ends when a patient effort becomes a forced one; perhaps never.
    async fn forced_later(&mut self) {
        let forced = self.0.wait_for(|force| *force).await.is_ok();
        if !forced {
            std::future::pending::<()>().await;
        }
    }

    /// Ends when the patience for closing a volume has run out.
    async fn exhausted(&mut self) {
        let forced = async {
            self.forced_later().await;
            tokio::time::sleep(FORCED_PATIENCE).await;
        };
        tokio::select! {
            () = forced => {}
            () = tokio::time::sleep(CLOSE_PATIENCE) => {}
        }
    }
}

/// Runs a detach to its end and tells whoever waits.
pub(super) async fn run(
    registry: Registry,
    before: Entry,
    detaching: Detaching,
    outcome: watch::Sender<Option<Result<Detached, NodeError>>>,
) {
    let name = before.request.name.clone();
    let parts = detaching.parts.clone();
    let effort = Effort(detaching.force.subscribe());
    tracing::info!(%name, force = effort.is_forced(), "detach begins");
    let work = {
        let (registry, before, parts) = (registry.clone(), before.clone(), parts.clone());
        async move { take_apart(&registry, &before, &parts, effort).await }
    };
    // A task of its own, so that a panic ends in a phase and not in limbo.
    let result = tokio::spawn(work).await.unwrap_or_else(|error| {
        Err(NodeError::internal(format!(
            "the detach of {name} died ({error}): try again"
        )))
    });
    let result = match result {
        Ok(warnings) => {
            for warning in &warnings {
                tracing::warn!(%name, %warning, "while detaching");
            }
            forget(&registry, &before).await;
            tracing::info!(%name, volume = before.request.volume(), "detached");
            Ok(Detached { name, warnings })
        }
        Err(error) => {
            tracing::warn!(%name, %error, "detach refused or failed");
            let phase = if error.code == ErrorCode::InUse {
                before.phase.clone()
            } else {
                Phase::Failed(parts, error.to_string())
            };
            registry.set_phase(&name, &before.id, phase);
            Err(error)
        }
    };
    outcome.send_replace(Some(result));
}

/// Takes apart device, link and lease, in this order. The lines are what
/// could not be done and settles by itself.
///
/// # Errors
/// The device stays, and with it everything else.
pub(super) async fn take_apart(
    registry: &Registry,
    entry: &Entry,
    parts: &Arc<Parts>,
    mut effort: Effort,
) -> Result<Vec<String>, NodeError> {
    let mut warnings = Vec::new();
    if let Some(device) = &parts.device {
        take_device(device, &mut effort).await?;
    }
    if let Some(device) = parts.device_path.clone() {
        let (links, name) = (registry.0.links.clone(), entry.request.name.clone());
        if let Err(error) = blocking(move || links.remove(&name, &device)).await {
            warnings.push(format!(
                "cannot remove the link of {}: {error}",
                entry.request.name
            ));
        }
    }
    if let Err(error) = close(entry, parts, &mut effort).await {
        warnings.push(format!(
            "{}: lease not released; it ends by itself within a minute: {error}",
            entry.request.volume()
        ));
    }
    Ok(warnings)
}

/// The device goes. A patient detach waits in its flush as long as the store
/// is away; when it becomes a forced one, a second call overtakes the first.
async fn take_device(device: &Arc<dyn Device>, effort: &mut Effort) -> Result<(), NodeError> {
    if effort.is_forced() {
        return Ok(device.detach(true).await?);
    }
    let patient = {
        let device = device.clone();
        tokio::spawn(async move { device.detach(false).await })
    };
    tokio::select! {
        result = patient => match result {
            Ok(result) => Ok(result?),
            Err(error) => Err(NodeError::internal(format!("the detach died: {error}"))),
        },
        () = effort.forced_later() => Ok(device.detach(true).await?),
    }
}

async fn close(entry: &Entry, parts: &Parts, effort: &mut Effort) -> Result<(), NodeError> {
    if let Some(volume) = &parts.volume {
        return close_volume(volume, effort).await;
    }
    let Some(lease) = &parts.lease else {
        return Ok(());
    };
    let request = &entry.request;
    let (_, blob) = account::open_blob(&request.account, &request.container, &request.blob).await?;
    match blob.release_lease(lease, account::ATTEMPT_DEADLINE).await {
        // Somebody else's by now, or nobody's: nothing of ours to release.
        Err(error) if matches!(error.status(), Some(404 | 409 | 412)) => Ok(()),
        result => Ok(result?),
    }
}

/// The volume's lease goes back. With the device gone nobody waits for what
/// may still be under way, so it is given up when the patience ends.
async fn close_volume(volume: &Volume, effort: &mut Effort) -> Result<(), NodeError> {
    let mut close = std::pin::pin!(volume.close());
    tokio::select! {
        result = &mut close => return Ok(result?),
        () = effort.exhausted() => volume.abandon(),
    }
    Ok(close.await?)
}

/// The record and the name go.
pub(super) async fn forget(registry: &Registry, entry: &Entry) {
    let name = &entry.request.name;
    let (records, gone) = (registry.0.records.clone(), name.clone());
    let (names, id) = (registry.0.names.clone(), entry.id.clone());
    if let Err(error) = blocking(move || names.remove(&id)).await {
        tracing::warn!(%name, %error, "cannot remove the name that udev is told");
    }
    if let Err(error) = blocking(move || records.remove(&gone)).await {
        // The next daemon will find that nothing is left of it.
        tracing::error!(%name, %error, "cannot remove the record");
    }
    registry.remove(name, &entry.id);
}

/// Lets udev know the name, for `/dev/dysk/NAME` and what waits for it. The
/// daemon makes the link itself as well: there may be no udev.
pub(super) async fn tell_udev(registry: &Registry, entry: &Entry) {
    let (names, id) = (registry.0.names.clone(), entry.id.clone());
    let name = entry.request.name.clone();
    if let Err(error) = blocking(move || names.write(&id, &name)).await {
        let name = &entry.request.name;
        tracing::warn!(%name, %error, "udev is not told the name");
    }
}

/// Runs file work away from the threads that serve disks.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(io::Error::other)?
}
