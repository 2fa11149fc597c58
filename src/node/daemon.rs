//! The daemon as a whole: run directory, what was left behind, control API,
//! clean stop.
//!
//! See [`super::stop`] for what a clean stop does.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::api::RUN_DIR;
use super::dysktab;
use super::handover;
use super::link::{LINK_DIR, Links, Names};
use super::policy::Staging;
use super::record::Records;
use super::recover::Inherited;
use super::registry::Registry;
use super::run_dir::{RunDir, RunDirError};
use super::scrape::Scrape;
use super::server::Server;
use super::service::{self, Notifier, Service};
use super::settings;
use super::startup;
use super::stop;
use super::transport::Transport;
use crate::buffers;
use crate::volume::Budget;

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
    /// The table of what is to be attached; none is fine.
    pub dysktab: Option<PathBuf>,
    /// Whether a clean stop leaves attached what is not in use, too.
    pub keep_attached: bool,
    /// Where to answer Prometheus over TCP; nowhere when `None`.
    pub metrics: Option<SocketAddr>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            run_dir: RUN_DIR.into(),
            link_dir: LINK_DIR.into(),
            cache_budget: DEFAULT_CACHE_BUDGET,
            takeover: false,
            dysktab: None,
            keep_attached: false,
            metrics: None,
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
    /// The address for metrics cannot be listened on.
    #[error("cannot answer metrics on {address}: {error}")]
    Metrics {
        /// The address.
        address: SocketAddr,
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
    notifier: Option<Arc<Notifier>>,
    watchdog: Option<Duration>,
    dysktab: Option<PathBuf>,
    keep_attached: bool,
    scrape: Option<Scrape>,
}

impl Daemon {
    /// Claims the run directory, takes stock of what is in it and opens the
    /// control socket: from here on clients can connect.
    ///
    /// # Errors
    /// [`DaemonError`]; nothing was changed.
    pub async fn start(config: Config, transport: Arc<dyn Transport>) -> Result<Self, DaemonError> {
        Self::start_as(config, transport, Service::default()).await
    }

    /// As [`Daemon::start`], for a service manager: with the connections that
    /// an earlier daemon left with it.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub async fn start_as(
        config: Config,
        transport: Arc<dyn Transport>,
        service: Service,
    ) -> Result<Self, DaemonError> {
        let failed = |path: PathBuf| move |error| DaemonError::Io { path, error };
        let staging = Staging {
            dir: config.run_dir.join("staging"),
            budget: Budget::new(config.cache_budget),
        };
        let Service {
            notifier,
            watchdog,
            received,
        } = service;
        let notifier = notifier.map(Arc::new);
        let mut inherited = stored(received, notifier.clone()).await;
        let mut patience = Duration::ZERO;
        if config.takeover {
            inherited.extend(take_over(&config, &staging).await);
            patience = OTHERS_END_PATIENCE;
        }
        let path = config.run_dir.clone();
        let claim = move || RunDir::claim_within(&path, patience);
        let run_dir = tokio::task::spawn_blocking(claim)
            .await
            .map_err(io::Error::other)
            .map_err(failed(config.run_dir.clone()))??;
        let records_dir = run_dir.records();
        let records = Records::open(records_dir.clone()).map_err(failed(records_dir.clone()))?;
        let registry = Registry::new(
            transport,
            records,
            Links::new(config.link_dir),
            Names::new(config.run_dir.join("udev")),
            staging,
        );
        startup::take_stock(&registry, inherited)
            .await
            .map_err(failed(records_dir))?;
        let socket = run_dir.socket();
        let server =
            Server::bind(socket.clone(), registry.clone()).map_err(failed(socket.clone()))?;
        let scrape = match config.metrics {
            Some(address) => {
                let failed = |error| DaemonError::Metrics { address, error };
                let scrape = Scrape::bind(address, registry.clone()).await;
                Some(scrape.map_err(failed)?)
            }
            None => None,
        };
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
            notifier,
            watchdog,
            dysktab: config.dysktab,
            keep_attached: config.keep_attached,
            scrape,
        })
    }

    /// Where metrics are answered over TCP, if anywhere.
    #[must_use]
    pub fn metrics(&self) -> Option<SocketAddr> {
        self.scrape.as_ref()?.address().ok()
    }

    /// Where clients connect.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.run_dir.socket()
    }

    /// Serves until `stop` ends, then stops cleanly: no new requests, what is
    /// not in use is detached unless it is to be kept, the control socket is
    /// removed.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let Self {
            registry,
            server,
            run_dir,
            handed_over,
            notifier,
            watchdog,
            dysktab,
            keep_attached,
            scrape,
        } = self;
        let socket = run_dir.socket();
        if let Some(path) = dysktab {
            tokio::spawn(dysktab::keep_attached(registry.clone(), path));
        }
        // While it stops, it still tells what it does.
        let stopped = async {
            stop.await;
            tracing::info!("stopping");
            if let Some(notifier) = &notifier {
                notifier.say("STOPPING=1");
            }
            stop::stop(&registry, notifier.as_ref(), keep_attached).await;
        };
        let told = async {
            if let Some(notifier) = &notifier {
                service::tell_ready(notifier, &registry, &socket).await;
                service::tell_status(notifier, &registry).await;
            }
            std::future::pending::<()>().await;
        };
        let scraped = async {
            match scrape {
                Some(scrape) => scrape.run().await,
                None => std::future::pending().await,
            }
        };
        let alive = async {
            if let Some((notifier, limit)) = notifier.as_ref().zip(watchdog) {
                service::watchdog(notifier, &socket, limit).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = server.run(stopped) => tracing::info!("stopped"),
            () = told => {}
            () = alive => {}
            () = scraped => {}
            never = buffers::give_back_unused() => match never {},
            () = settings::follow(&registry) => {}
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

/// What an earlier daemon left with the service manager.
async fn stored(
    received: Vec<service::Received>,
    notifier: Option<Arc<Notifier>>,
) -> HashMap<String, Inherited> {
    let work = move || Ok(service::take_up(received, notifier.as_deref()));
    let taken = super::detach::blocking(work).await.unwrap_or_else(|error| {
        tracing::error!(%error, "stored connections are of no use: as after a crash");
        HashMap::new()
    });
    let inherited = |parked| Inherited {
        volume: None,
        parked,
    };
    taken
        .into_iter()
        .map(|(id, parked)| (id, inherited(parked)))
        .collect()
}
