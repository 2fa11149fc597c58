//! What the service manager hears while the daemon runs: that it is ready,
//! how its disks are, and that it is alive. Signs of life come by way of the
//! control socket, so that they prove what they stand for; the store has no
//! part in them.

use std::path::Path;
use std::time::Duration;

use super::Notifier;
use crate::node::client::Client;
use crate::node::entry::Phase;
use crate::node::registry::{Registry, Table};

/// How long being ready waits for what an earlier daemon left. What waits for
/// the store for longer is served when it comes back.
const READY_PATIENCE: Duration = Duration::from_secs(10);
/// The least time between two lines of status.
const STATUS_PAUSE: Duration = Duration::from_secs(1);
/// Between two attempts at the daemon's own control socket.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// Tells that the daemon is ready: its control socket answers, and what an
/// earlier one left is served again or waits for the store.
pub(in crate::node) async fn tell_ready(notifier: &Notifier, registry: &Registry, socket: &Path) {
    let settled = registry.wait_until(|table| {
        let mut phases = table.entries.values().map(|entry| &entry.phase);
        !phases.any(|phase| matches!(phase, Phase::Recovering(_)))
    });
    if tokio::time::timeout(READY_PATIENCE, settled).await.is_err() {
        tracing::warn!("ready, but not everything of an earlier dyskd is served yet");
    }
    let client = Client::new(socket);
    while let Err(error) = client.health().await {
        tracing::warn!(%error, "the control socket does not answer yet");
        tokio::time::sleep(ASK_AGAIN).await;
    }
    notifier.say(&format!("READY=1\nSTATUS={}", status(registry)));
}

/// Keeps the line of status true; never ends.
pub(in crate::node) async fn tell_status(notifier: &Notifier, registry: &Registry) {
    let mut told = String::new();
    loop {
        registry.wait_until(|table| summary(table) != told).await;
        told = status(registry);
        notifier.say(&format!("STATUS={told}"));
        tokio::time::sleep(STATUS_PAUSE).await;
    }
}

fn status(registry: &Registry) -> String {
    registry.look(summary)
}

fn summary(table: &Table) -> String {
    let mut counts = [0_u32; 4];
    for entry in table.entries.values() {
        counts[match entry.phase {
            Phase::Attached(_) => 0,
            Phase::Attaching { .. } => 1,
            Phase::Recovering(_) => 2,
            Phase::Detaching(_) | Phase::Failed(..) | Phase::Stale(..) => 3,
        }] += 1;
    }
    let mut text = format!("{} attached", counts[0]);
    for (count, what) in counts[1..]
        .iter()
        .zip(["attaching", "recovering", "leaving or failed"])
    {
        if *count > 0 {
            text.push_str(&format!(", {count} {what}"));
        }
    }
    text
}

/// Gives a sign of life three times within `limit`, as long as the control
/// API and the thread that keeps the leases answer; never ends.
pub(in crate::node) async fn watchdog(notifier: &Notifier, socket: &Path, limit: Duration) {
    let client = Client::new(socket);
    let mut tick = tokio::time::interval(limit / 3);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if let Err(error) = client.health().await {
            tracing::error!(%error, "no sign of life: the control api does not answer");
            continue;
        }
        if tokio::time::timeout(limit / 3, crate::volume::keepers_answer())
            .await
            .is_err()
        {
            tracing::error!("no sign of life: the thread that keeps the leases does not answer");
            continue;
        }
        notifier.say("WATCHDOG=1");
    }
}
