//! A clean stop. What nobody uses is detached. What is in use stays attached
//! for the next daemon: its connections are left with the service manager, if
//! there is one, and its I/O goes on where it stood still as soon as the next
//! one runs. Without, the kernel holds its I/O and sends it again, as after a
//! crash. Nothing is lost either way; disconnecting would turn a mounted
//! filesystem's next write into an error.
//!
//! Where an orchestrator attaches and detaches, a stop detaches nothing at
//! all: a disk that a pod was given may just not be open, and would be gone
//! for it after the daemon's upgrade.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::api::ErrorCode;
use super::detach::blocking;
use super::entry::{Entry, Phase};
use super::handover;
use super::registry::Registry;
use super::service::{self, Notifier};
use crate::device::BlockDevice;
use crate::volume::Volume;

/// How long a stop waits for attaches to unwind and for detaches.
const STOP_PATIENCE: Duration = Duration::from_secs(60);

/// Ends everything; with `keep_attached`, nothing is detached. Afterwards the
/// process has to end as well.
pub(super) async fn stop(
    registry: &Registry,
    notifier: Option<&Arc<Notifier>>,
    keep_attached: bool,
) {
    registry.begin_stop();
    let settled = registry.wait_until(|table| {
        table.changes == 0
            && !table.entries.values().any(|e| {
                matches!(
                    e.phase,
                    Phase::Attaching { .. } | Phase::Recovering(_) | Phase::Detaching(_)
                )
            })
    });
    if tokio::time::timeout(STOP_PATIENCE, settled).await.is_err() {
        tracing::error!("an attach or detach does not end; leaving its record");
    }
    let mut stops = JoinSet::new();
    for entry in registry.entries() {
        stops.spawn(stop_one(registry.clone(), entry, keep_attached));
    }
    let mut staying = Vec::new();
    while let Some(stopped) = stops.join_next().await {
        match stopped {
            Ok(stays) => staying.extend(stays),
            Err(error) => tracing::error!(%error, "stopping an attachment died"),
        }
    }
    if let Some(notifier) = notifier {
        park(registry, &staying, notifier).await;
    }
    for volume in registry.entries().iter().filter_map(handover::served) {
        // Its end would release the lease; this process ends in its stead.
        std::mem::forget(volume);
    }
}

/// Detaches unless told to keep; the entry, when it stays.
async fn stop_one(registry: Registry, entry: Entry, keep_attached: bool) -> Option<Entry> {
    let name = &entry.request.name;
    let volume = entry.request.volume();
    let parts = match &entry.phase {
        Phase::Attached(parts) | Phase::Failed(parts, _) => parts.clone(),
        Phase::Stale(_, reason) => {
            tracing::warn!(%name, %volume, %reason, "left as it was found");
            return None;
        }
        Phase::Attaching { .. } | Phase::Recovering(_) | Phase::Detaching(_) => return None,
    };
    let reason = if keep_attached {
        "told to keep what is attached".into()
    } else {
        let detach = registry.detach(name, false);
        match tokio::time::timeout(STOP_PATIENCE, detach).await {
            Ok(Ok(_)) => return None,
            Ok(Err(error)) if error.code == ErrorCode::NotAttached => return None,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the store does not answer".into(),
        }
    };
    if let Some(volume) = &parts.volume {
        leave(volume).await;
    }
    let device = parts.device_path.clone().unwrap_or_default();
    tracing::warn!(
        %name, %volume, device = %device.display(), %reason,
        "stays attached: its i/o waits for the next dyskd"
    );
    Some(entry)
}

/// Makes an open volume fit to be left to the next daemon: the lease is not
/// given back, and what is staged is in the store, should there be no next one.
async fn leave(volume: &Arc<Volume>) {
    match tokio::time::timeout(STOP_PATIENCE, volume.flush()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(%error, "cannot flush"),
        Err(_) => tracing::error!("cannot flush: the store does not answer"),
    }
    std::mem::forget(volume.clone());
}

/// Stops reading from the connections and leaves them with the manager. There
/// is no way back from here.
async fn park(registry: &Registry, staying: &[Entry], notifier: &Arc<Notifier>) {
    registry.set_handing_over(true);
    let parked = match handover::park(staying).await {
        Ok(parked) => parked,
        Err(error) => return tracing::error!(%error, "not parked: as after a crash"),
    };
    let notifier = notifier.clone();
    let kept = blocking(move || {
        for (id, connections) in &parked {
            match service::keep(&notifier, id, connections) {
                Ok(()) => tracing::info!(id, "parked for the next dyskd"),
                Err(error) => tracing::error!(id, %error, "not parked: as after a crash"),
            }
        }
        // Who ends before that is not known to have sent it.
        notifier.barrier()
    });
    if let Err(error) = kept.await {
        tracing::error!(%error, "the service manager may not have kept the connections");
    }
}
