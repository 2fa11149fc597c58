//! `dyskctl serve`: a volume for any NBD client, without daemon or kernel.
//!
//! The first SIGINT or SIGTERM ends it cleanly: what was asked is answered,
//! the lease given back, the socket removed; the exit code is 0. A second one
//! gives up on a store that does not answer.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde::Serialize;
use tokio::sync::watch;

use super::account::AccountOptions;
use super::error::{CliError, note};
use super::policy::{PolicyOptions, waits_for};
use super::signals::Signals;
use super::target::Target;
use super::{Global, Output, output};
use crate::blob::LeaseId;
use crate::buffers;
use crate::device::BlockDevice;
use crate::nbd::server::Server;
use crate::nbd::transmission::Stop;
use crate::node::NodeError;
use crate::node::account::{open_blob, pace};
use crate::node::policy::{Policy, Staging};
use crate::volume::{Budget, DEFAULT_STAGING_DIR, OpenOptions, Recover, Volume};

/// Clients that ask for no export by name get it, which is most of them.
const EXPORT: &str = "";

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("where").required(true).args(["unix", "listen"]))]
pub struct Options {
    /// ACCOUNT/CONTAINER/BLOB, ACCOUNT/BLOB or a blob URL
    volume: String,
    /// Listen on this UNIX socket, for this user only
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,
    /// Listen on this TCP address; whoever reaches it has the disk
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Refuse writes, and take no lease
    #[arg(long)]
    read_only: bool,
    /// Take the volume from whoever holds its lease; their writes will fail
    #[arg(long, conflicts_with = "read_only")]
    break_lease: bool,
    #[command(flatten)]
    policy: PolicyOptions,
    #[command(flatten)]
    account: AccountOptions,
}

#[derive(Serialize)]
struct Serving<'a> {
    uri: &'a str,
    size: u64,
}

pub async fn run(global: &Global, options: Options) -> Result<(), CliError> {
    // Options that contradict each other are told first of all.
    let access = Access {
        read_only: options.read_only,
        break_lease: options.break_lease,
        policy: options.policy.policy()?,
        recover: options.policy.recover(),
    };
    let target = Target::find(&options.volume, None, &options.account)?;
    let mut signals = Signals::new()?;
    // First the address: a mistake there should cost no lease.
    let server = match (&options.unix, options.listen) {
        (Some(path), _) => Server::bind_unix(path),
        (None, Some(address)) => Server::bind_tcp(address).await,
        (None, None) => return Err(CliError::failed("give --unix or --listen")),
    }
    .map_err(CliError::failed)?;
    let (volume, address) = open(&target, access, &mut signals).await?;
    serve(global, server, volume, &address, signals).await
}

/// What is asked for besides the volume.
pub struct Access {
    pub read_only: bool,
    pub break_lease: bool,
    pub policy: Policy,
    pub recover: Recover,
}

/// Opens a volume in this process, and says what it waits for; gives back the
/// volume and its address in words.
pub async fn open(
    target: &Target,
    access: Access,
    signals: &mut Signals,
) -> Result<(Arc<Volume>, String), CliError> {
    let (_, blob) = open_blob(&target.account, &target.container, &target.blob).await?;
    let address = blob.address().to_string();
    let (waiting, mut told) = watch::channel(false);
    let mut open = OpenOptions {
        read_only: access.read_only,
        break_lease: access.break_lease,
        waiting: Some(waiting),
        pace: Some(pace(&target.account)),
        ..access.policy.open_options(LeaseId::random(), &staging())
    };
    open.staging.recover = access.recover;
    let opened = async {
        let mut opening = std::pin::pin!(Volume::open(blob, open));
        tokio::select! {
            biased;
            opened = &mut opening => return opened,
            Ok(_) = told.wait_for(|waiting| *waiting) => {
                note(&waits_for(&address, &access.policy));
            }
        }
        opening.await
    };
    let volume = tokio::select! {
        // Dropped half way, it releases a lease that it took.
        opened = opened => opened.map_err(NodeError::from)?,
        () = signals.next() => return Err(CliError::interrupted("interrupted before it served")),
    };
    Ok((volume, address))
}

/// Where an export stages, unless told: with the daemon's for root, else in
/// the user's own runtime folder.
fn staging() -> Staging {
    let dir = match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(own) if !rustix::process::geteuid().is_root() => {
            PathBuf::from(own).join("dysk-staging")
        }
        _ => PathBuf::from(DEFAULT_STAGING_DIR),
    };
    Staging {
        dir,
        budget: Budget::unlimited(),
    }
}

async fn serve(
    global: &Global,
    server: Server,
    volume: Arc<Volume>,
    address: &str,
    mut signals: Signals,
) -> Result<(), CliError> {
    let uri = server.uri(EXPORT);
    let size = volume.geometry().size;
    match global.output {
        Output::Json => output::json(&Serving { uri: &uri, size })?,
        Output::Table => output::line(&uri)?,
    }
    tracing::info!(volume = address, %uri, size, "serving");
    if !(buffers::set_up_allocator() && buffers::keep_heap_ends()) {
        tracing::debug!("the C library keeps its own way with large buffers");
    }
    let (stop, stopped) = watch::channel(Stop::Run);
    let mut running = tokio::spawn({
        let volume = volume.clone();
        async move { server.run(volume, EXPORT, stopped).await }
    });
    let ended = tokio::select! {
        ended = &mut running => Some(ended),
        () = signals.next() => None,
        never = buffers::give_back_unused() => match never {},
    };
    tracing::info!(volume = address, "stopping");
    stop.send_replace(Stop::Close);
    let close = async {
        let ended = match ended {
            Some(ended) => ended,
            None => running.await,
        };
        (ended, volume.close().await)
    };
    let mut close = std::pin::pin!(close);
    let (ended, closed) = tokio::select! {
        both = &mut close => both,
        () = signals.next() => {
            tracing::warn!(volume = address, "giving up on what is under way");
            volume.abandon();
            close.await
        }
    };
    ended.map_err(|error| CliError::failed(format!("serving {address} died: {error}")))?;
    closed.map_err(|error| {
        CliError::failed(format!(
            "lease not released: {error}: it ends by itself within a minute"
        ))
    })
}
