//! dyskd: the node daemon. Parses, sets the process up, runs it until a
//! signal.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::{ArgAction, Parser};
use dysk::node::daemon::{Config, Daemon};
use dysk::node::nbd::NbdTransport;
use dysk::node::service::Service;
use dysk::node::{dysktab, memory};
use dysk::runtime;
use dysk::size::ByteSize;
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Serves Azure page blobs to this node's kernel as disks; dyskctl drives it.
#[derive(Debug, Parser)]
#[command(name = "dyskd", version)]
struct Options {
    /// Where the control socket and the records of attachments are kept
    #[arg(long, value_name = "DIR", default_value_os_t = Config::default().run_dir)]
    run_dir: PathBuf,
    /// Take over from the dyskd that is running, if one is: its disks stay
    /// attached and in use, and it ends
    #[arg(long)]
    takeover: bool,
    /// At a stop, leave all disks attached for the next dyskd, also those that
    /// nobody uses: for nodes whose disks are an orchestrator's to detach
    #[arg(long)]
    keep_attached: bool,
    /// The table of disks to attach at start
    #[arg(long, value_name = "FILE", default_value = dysktab::PATH)]
    dysktab: PathBuf,
    /// The most that all disks together may cache
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    cache_budget: ByteSize,
    /// Answer Prometheus at http://ADDR/metrics, too
    #[arg(long, value_name = "ADDR")]
    metrics: Option<SocketAddr>,
    /// Log more (RUST_LOG says exactly what)
    #[arg(short, long, action = ArgAction::Count)]
    verbose: u8,
}

fn main() -> ExitCode {
    let options = Options::parse();
    start_logging(options.verbose);
    let service = Service::of_process();
    if let Err(error) = run(options, service) {
        eprintln!("dyskd: {error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn run(options: Options, service: Service) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("attaching disks takes root: run dyskd with sudo or as a system service");
    }
    // A core dump would hold account keys.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .context("cannot forbid core dumps")?;
    raise_file_limit();
    memory::prepare();
    let runtime = runtime::start(runtime::all_disks()).context("cannot start the runtime")?;
    let result = runtime.block_on(serve(options, service));
    // Requests of disks that stay attached may wait for the store for ever.
    runtime.shutdown_background();
    result
}

async fn serve(options: Options, service: Service) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for signals")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for signals")?;
    let config = Config {
        run_dir: std::path::absolute(options.run_dir).context("--run-dir")?,
        takeover: options.takeover,
        cache_budget: options.cache_budget.0,
        dysktab: Some(options.dysktab),
        keep_attached: options.keep_attached,
        metrics: options.metrics,
        ..Config::default()
    };
    let daemon = Daemon::start_as(config, Arc::new(NbdTransport::new()), service).await?;
    daemon
        .run(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        })
        .await;
    Ok(())
}

/// Each disk takes a handful of descriptors, and a socket for every request
/// to the store under way.
fn raise_file_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, most) {
        tracing::warn!(%error, "cannot raise the limit on open files");
    }
}

fn start_logging(verbose: u8) {
    let level = if verbose == 0 { "info" } else { "debug" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
}
