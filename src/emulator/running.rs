//! Starts an emulator on threads of its own, so that it can live inside any
//! test or beside any runtime, and stops it.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;

use super::admin;
use super::config::{Config, KeyError, Settings, SettingsChange, Storage};
use super::dice::Dice;
use super::faults::FaultPlan;
use super::ops;
use super::server;
use super::service::State;
use super::stats::{Stats, StatsReport};
use super::store::Store;
use super::throttle::Bucket;
use super::timer::Timer;

/// Requests under way get this long to end when the emulator is stopped.
const GRACE: Duration = Duration::from_secs(2);

/// Why an emulator cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The key is no base64.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        error: io::Error,
    },
    /// The directory cannot be used.
    #[error("cannot use the directory {}: {error}", path.display())]
    Directory {
        /// The directory.
        path: std::path::PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Certificate or key cannot be used.
    #[error("cannot use the certificate: {0}")]
    Tls(io::Error),
    /// No thread could be had.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
}

/// The page-blob service.
#[derive(Clone, Copy, Debug)]
pub struct Emulator;

/// An emulator that runs; dropping it stops it.
#[derive(Debug)]
pub struct Running {
    state: Arc<State>,
    address: SocketAddr,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Emulator {
    /// Starts an emulator on threads of its own; returns once it accepts
    /// connections. May be called inside or outside of a runtime.
    pub fn start(config: Config) -> Result<Running, StartError> {
        raise_descriptor_limit();
        let settings = Settings::of(&config)?;
        let tls = config
            .tls
            .as_ref()
            .map(server::acceptor)
            .transpose()
            .map_err(StartError::Tls)?;
        let store = match &config.storage {
            Storage::Memory => Store::memory(),
            Storage::Dir(path) => Store::open(path).map_err(|error| StartError::Directory {
                path: path.clone(),
                error,
            })?,
        };
        let listen_error = |error| StartError::Listen {
            address: config.listen,
            error,
        };
        let listener = std::net::TcpListener::bind(config.listen).map_err(listen_error)?;
        listener.set_nonblocking(true).map_err(listen_error)?;
        let address = listener.local_addr().map_err(listen_error)?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.enable_all().thread_name("emulator");
        if config.threads > 0 {
            builder.worker_threads(config.threads);
        }
        let runtime = builder.build().map_err(StartError::Thread)?;
        let (listener, timer) = {
            let _inside = runtime.enter();
            let listener = TcpListener::from_std(listener).map_err(listen_error)?;
            (listener, Timer::start().map_err(StartError::Thread)?)
        };
        let state = Arc::new(State {
            url: OnceLock::from(format!("{scheme}://{address}/{}", config.account)),
            account: config.account,
            store,
            faults: FaultPlan::new(config.seed),
            stats: Stats::default(),
            timer,
            cut: watch::Sender::new(0),
            settings: RwLock::new(Arc::new(settings)),
            bucket: Mutex::new(Bucket::default()),
            dice: Mutex::new(Dice::new(config.seed)),
            stopping: AtomicBool::new(false),
            next_id: AtomicU64::new(1),
            run_id: rand::random(),
        });
        let (stop, stopped) = watch::channel(false);
        let own = Arc::clone(&state);
        let thread = std::thread::Builder::new()
            .name("emulator-main".into())
            .spawn(move || {
                runtime.block_on(async {
                    ops::resume_copies(&own);
                    server::accept(Arc::clone(&own), listener, tls, stopped).await;
                    drain(&own).await;
                });
                runtime.shutdown_timeout(GRACE);
            })
            .map_err(StartError::Thread)?;
        Ok(Running {
            state,
            address,
            stop,
            thread: Some(thread),
        })
    }
}

/// Waits until all connections are closed, within bounds.
async fn drain(state: &State) {
    let deadline = tokio::time::Instant::now() + GRACE;
    while state.stats.open_connections.load(Ordering::Relaxed) > 0
        && tokio::time::Instant::now() < deadline
    {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Each blob holds a file open, or two: as many as the system allows.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!("the limit of open files stays as it is: {error}");
    }
}

impl Running {
    /// The endpoint: `http://ADDRESS/ACCOUNT`.
    #[must_use]
    pub fn url(&self) -> &str {
        self.state.url()
    }

    /// The address it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The fault plan.
    #[must_use]
    pub fn faults(&self) -> &FaultPlan {
        &self.state.faults
    }

    /// What it has done.
    #[must_use]
    pub fn stats(&self) -> StatsReport {
        self.state.stats.report()
    }

    /// Sets the counters back to 0.
    pub fn reset_stats(&self) {
        self.state.stats.reset();
    }

    /// Puts a change of settings into force.
    pub fn change(&self, change: &SettingsChange) -> Result<(), KeyError> {
        admin::change_settings(&self.state, change)
    }

    /// Ends the term of the blob's lease now; false when no finite lease is
    /// held (or there is no such blob).
    pub fn expire_lease(&self, container: &str, blob: &str) -> bool {
        admin::expire_lease_of(&self.state, container, blob).unwrap_or(false)
    }

    /// Resets all open connections.
    pub fn cut_connections(&self) {
        admin::cut_connections(&self.state);
    }

    /// Bytes of storage the blob's data takes up; none when there is no such
    /// blob.
    #[must_use]
    pub fn allocated(&self, container: &str, blob: &str) -> Option<u64> {
        let slot = self.state.store.slot(container, blob).ok()?;
        let versions = slot.read();
        versions.base.as_ref()?.allocated().ok()
    }

    /// Stops it: no new connections, requests under way get two seconds to
    /// end, late executions still to come are dropped.
    pub fn stop(mut self) {
        self.stop_now();
    }

    fn stop_now(&mut self) {
        self.state.stopping.store(true, Ordering::Release);
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the emulator's main thread panicked");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop_now();
    }
}
