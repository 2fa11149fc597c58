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
//!
//! ## What is waited for
//! A stop never needs the store: record, lease and staging file of an
//! attachment are what a killed daemon leaves as well, and its successor goes
//! on from there. So what is waited for is what saves the successor work, each
//! attachment by itself and all at once:
//!
//! | what | for how long |
//! |---|---|
//! | a volume that moves: staged writes that reach the store | until it is done, at most [`PATIENCE`] in all |
//! | one that is stuck: the store refuses access, or does nothing for [`STUCK`] | not at all, once that is known |
//! | an attach or recovery on its way, which unwinds | [`UNWINDING`] |
//!
//! Meanwhile the I/O of everything in use goes on; it stands still from the
//! parking on, where what is stuck holds up nobody either.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::api::ErrorCode;
use super::detach::blocking;
use super::entry::{Entry, Parts, Phase};
use super::handover;
use super::registry::Registry;
use super::service::{self, Notifier};
use crate::device::BlockDevice;
use crate::volume::Volume;

/// How long a stop waits for volumes that move: 256 MiB of staged writes at
/// 500 requests a second are half written then.
const PATIENCE: Duration = Duration::from_secs(60);
/// A volume that is asked for something and does nothing for this long is
/// stuck.
const STUCK: Duration = Duration::from_secs(5);
/// How long a resize or snapshot on its way may take: it holds writes for 10 s
/// at most.
const CHANGING: Duration = Duration::from_secs(15);
/// How long an attach or a recovery on its way may take to unwind.
const UNWINDING: Duration = Duration::from_secs(5);

/// Ends everything; with `keep_attached`, nothing is detached. Afterwards the
/// process has to end as well.
pub(super) async fn stop(
    registry: &Registry,
    notifier: Option<&Arc<Notifier>>,
    keep_attached: bool,
) {
    registry.begin_stop();
    let until = Instant::now() + PATIENCE;
    // A resize is not cut off between the store, the kernel and the record.
    let unchanging = registry.wait_until(|table| table.changes == 0);
    if tokio::time::timeout(CHANGING, unchanging).await.is_err() {
        tracing::error!("a resize or snapshot does not end: left half way");
    }
    let mut stops = JoinSet::new();
    for entry in registry.entries() {
        stops.spawn(stop_one(registry.clone(), entry, until, keep_attached));
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
async fn stop_one(
    registry: Registry,
    entry: Entry,
    until: Instant,
    keep_attached: bool,
) -> Option<Entry> {
    let entry = settled(&registry, entry, until).await?;
    let name = &entry.request.name;
    let volume = entry.request.volume();
    let parts = match &entry.phase {
        Phase::Attached(parts) | Phase::Failed(parts, _) => parts.clone(),
        Phase::Stale(_, reason) => {
            tracing::warn!(%name, %volume, %reason, "left as it was found");
            return None;
        }
        Phase::Attaching { .. } | Phase::Recovering(_) => {
            tracing::warn!(%name, %volume, "left half way: the next dyskd tidies up");
            return None;
        }
        Phase::Detaching(detaching) => {
            tracing::warn!(%name, %volume, "its detach does not end: left to the next dyskd");
            keep_lease(&detaching.parts);
            return None;
        }
    };
    let reason = if keep_attached {
        "told to keep what is attached".into()
    } else {
        let detach = registry.detach(name, false);
        match while_it_moves(&parts, until, detach).await {
            Some(Ok(_)) => return None,
            Some(Err(error)) if error.code == ErrorCode::NotAttached => return None,
            Some(Err(error)) => error.to_string(),
            None => "the store does not answer".into(),
        }
    };
    if is_gone(&parts).await {
        tracing::warn!(%name, %volume, %reason, "detached, its lease not released");
        keep_lease(&parts);
        return None;
    }
    if let Some(volume) = &parts.volume {
        leave(volume, &parts, until).await;
    }
    keep_lease(&parts);
    let device = parts.device_path.clone().unwrap_or_default();
    tracing::warn!(
        %name, %volume, device = %device.display(), %reason,
        "stays attached: its i/o waits for the next dyskd"
    );
    Some(entry)
}

/// The entry once nothing is on its way with it any more, or as it is when
/// that takes too long; none when it is gone.
async fn settled(registry: &Registry, entry: Entry, until: Instant) -> Option<Entry> {
    let on_its_way = |entry: &Entry| {
        matches!(
            entry.phase,
            Phase::Attaching { .. } | Phase::Recovering(_) | Phase::Detaching(_)
        )
    };
    let (name, id) = (&entry.request.name, &entry.id);
    let quiet = registry.wait_until(|table| {
        let same = table.entries.get(name).filter(|entry| entry.id == *id);
        !same.is_some_and(on_its_way)
    });
    match &entry.phase {
        Phase::Detaching(detaching) => {
            while_it_moves(&detaching.parts, until, quiet).await;
        }
        _ => {
            // Over at once when nothing is on its way.
            tokio::time::timeout(UNWINDING, quiet).await.ok();
        }
    }
    registry.entry(name).ok().filter(|now| now.id == entry.id)
}

/// The kernel has let go of the device.
async fn is_gone(parts: &Parts) -> bool {
    match &parts.device {
        Some(device) => tokio::time::timeout(Duration::ZERO, device.gone())
            .await
            .is_ok(),
        None => true,
    }
}

/// What becomes of `work` with a volume; none when that is stuck, or `until`
/// has come.
async fn while_it_moves<T>(
    parts: &Parts,
    until: Instant,
    work: impl Future<Output = T>,
) -> Option<T> {
    let stuck = async {
        match &parts.volume {
            Some(volume) => volume.stuck(STUCK).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        done = work => Some(done),
        () = stuck => None,
        () = tokio::time::sleep_until(until) => None,
    }
}

/// Makes an open volume fit to be left to the next daemon: what is staged is in
/// the store, should there be no next one.
async fn leave(volume: &Arc<Volume>, parts: &Parts, until: Instant) {
    let staged = volume.status().cache.map_or(0, |cache| cache.dirty_bytes);
    match while_it_moves(parts, until, volume.flush()).await {
        Some(Ok(())) => {}
        Some(Err(error)) => tracing::error!(%error, "cannot flush"),
        None => tracing::error!(staged, "not flushed: the store does not answer"),
    }
}

/// The volume's end would release its lease, perhaps while its requests are
/// still on their way: it is the next daemon's to resume or release.
fn keep_lease(parts: &Parts) {
    if let Some(volume) = &parts.volume {
        std::mem::forget(volume.clone());
    }
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
