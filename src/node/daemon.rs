//! The daemon as a whole: run directory, what was left behind, control API,
//! clean stop.
//!
//! A clean stop detaches what nobody uses. What is in use is left as it is,
//! with its record and its lease: the kernel holds its I/O until the next
//! daemon takes it up, which loses nothing; disconnecting it would turn a
//! mounted filesystem's next write into an error.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::api::{ErrorCode, RUN_DIR};
use super::entry::{Entry, Phase};
use super::handover;
use super::link::{LINK_DIR, Links};
use super::policy::Staging;
use super::record::Records;
use super::recover::Inherited;
use super::registry::Registry;
use super::run_dir::{RunDir, RunDirError};
use super::server::Server;
use super::startup;
use super::transport::Transport;
use crate::device::BlockDevice;
use crate::volume::{Budget, Volume};

/// How long a stop waits for attaches to unwind and for detaches.
const STOP_PATIENCE: Duration = Duration::from_secs(60);

/// How long a daemon that handed over may take to end.
const OTHERS_END_PATIENCE: Duration = Duration::from_secs(10);

/// What all volumes of a node may cache together, unless told otherwise.
const DEFAULT_CACHE_BUDGET: u64 = 1 << 30;

/// Where the daemon keeps its things.
#[derive(Clone, Debug)]
pub struct Config {
    /// Socket, lock and records; made 0700.
    pub run_dir: PathBuf,
    /// Links to devices.
    pub link_dir: PathBuf,
    /// The most that all volumes together may cache, in bytes.
    pub cache_budget: u64,
    /// Take over from the daemon that runs in `run_dir`, if one does.
    pub takeover: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            run_dir: RUN_DIR.into(),
            link_dir: LINK_DIR.into(),
            cache_budget: DEFAULT_CACHE_BUDGET,
            takeover: false,
        }
    }
}

/// A daemon that could not start.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The run directory is another daemon's or unusable.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// Records or control socket cannot be used.
    #[error("{path}: {error}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

/// A daemon that has started.
pub struct Daemon {
    // Dropped last: the run directory is ours as long as anything runs.
    registry: Registry,
    server: Server,
    run_dir: RunDir,
    handed_over: oneshot::Receiver<()>,
}

impl Daemon {
    /// Claims the run directory, takes stock of what is in it and opens the
    /// control socket: from here on clients can connect.
    ///
    /// # Errors
    /// [`DaemonError`]; nothing was changed.
    pub async fn start(config: Config, transport: Arc<dyn Transport>) -> Result<Self, DaemonError> {
        let failed = |path: PathBuf| move |error| DaemonError::Io { path, error };
        let staging = Staging {
            dir: config.run_dir.join("staging"),
            budget: Budget::new(config.cache_budget),
        };
        let (inherited, patience) = match config.takeover {
            true => (take_over(&config, &staging).await, OTHERS_END_PATIENCE),
            false => (HashMap::new(), Duration::ZERO),
        };
        let path = config.run_dir.clone();
        let claim = move || RunDir::claim_within(&path, patience);
        let run_dir = tokio::task::spawn_blocking(claim)
            .await
            .map_err(io::Error::other)
            .map_err(failed(config.run_dir.clone()))??;
        let records_dir = run_dir.records();
        let records = Records::open(records_dir.clone()).map_err(failed(records_dir.clone()))?;
        let registry = Registry::new(transport, records, Links::new(config.link_dir), staging);
        startup::take_stock(&registry, inherited)
            .await
            .map_err(failed(records_dir))?;
        let socket = run_dir.socket();
        let server =
            Server::bind(socket.clone(), registry.clone()).map_err(failed(socket.clone()))?;
        let handed_over = handover::offer(&config.run_dir, registry.clone())
            .map_err(failed(config.run_dir.clone()))?;
        tracing::info!(
            socket = %socket.display(),
            version = env!("CARGO_PKG_VERSION"),
            "dyskd is ready"
        );
        Ok(Self {
            registry,
            server,
            run_dir,
            handed_over,
        })
    }

    /// Where clients connect.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.run_dir.socket()
    }

    /// Serves until `stop` ends, then stops cleanly: no new requests, what is
    /// not in use is detached, the control socket is removed.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let Self {
            registry,
            server,
            run_dir,
            handed_over,
        } = self;
        // While it stops, it still tells what it does.
        let stopped = async {
            stop.await;
            tracing::info!("stopping");
            stop_registry(&registry).await;
        };
        tokio::select! {
            () = server.run(stopped) => tracing::info!("stopped"),
            // Never, when its thread has ended.
            Ok(()) = handed_over => {
                tracing::info!("another dyskd goes on");
                // Its lock is free when nothing of this process is left.
                return std::mem::forget(run_dir);
            }
        }
        drop(run_dir);
    }
}

/// What a running daemon hands over; nothing when it does not, which leaves it
/// running or, should it have died, is a crash to recover from.
async fn take_over(config: &Config, staging: &Staging) -> HashMap<String, Inherited> {
    let dir = config.run_dir.clone();
    let taken = async {
        let records = RunDir::records_in(&dir);
        let load = move || Ok(Records::open(records)?.load()?.0);
        handover::take_over(dir, super::detach::blocking(load).await?, staging).await
    };
    taken.await.unwrap_or_else(|error| {
        tracing::error!(%error, "the running dyskd did not hand over");
        HashMap::new()
    })
}

async fn stop_registry(registry: &Registry) {
    registry.begin_stop();
    let settled = registry.wait_until(|table| {
        !table.entries.values().any(|e| {
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
        stops.spawn(stop_one(registry.clone(), entry));
    }
    while let Some(stopped) = stops.join_next().await {
        if let Err(error) = stopped {
            tracing::error!(%error, "stopping an attachment died");
        }
    }
}

async fn stop_one(registry: Registry, entry: Entry) {
    let name = &entry.request.name;
    let volume = entry.request.volume();
    let parts = match &entry.phase {
        Phase::Attached(parts) | Phase::Failed(parts, _) => parts.clone(),
        Phase::Stale(_, reason) => {
            tracing::warn!(%name, %volume, %reason, "left as it was found");
            return;
        }
        Phase::Attaching { .. } | Phase::Recovering(_) | Phase::Detaching(_) => return,
    };
    let detach = registry.detach(name, false);
    let reason = match tokio::time::timeout(STOP_PATIENCE, detach).await {
        Ok(Ok(_)) => return,
        Ok(Err(error)) if error.code == ErrorCode::NotAttached => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => "the store does not answer".into(),
    };
    if let Some(volume) = &parts.volume {
        leave(volume).await;
    }
    let device = parts.device_path.clone().unwrap_or_default();
    tracing::error!(
        %name, %volume, device = %device.display(), %reason,
        "left attached: its i/o waits for the next dyskd"
    );
}

/// Leaves an open volume to the next daemon: everything acknowledged is
/// durable, and the lease is not given back.
async fn leave(volume: &Arc<Volume>) {
    match tokio::time::timeout(STOP_PATIENCE, volume.flush()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(%error, "cannot flush"),
        Err(_) => tracing::error!("cannot flush: the store does not answer"),
    }
    // Its end would release the lease; this process ends in its stead.
    std::mem::forget(volume.clone());
}
