//! One attachment in the registry's table: what it is, which phase it is in,
//! what it consists of.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::Timestamp;
use tokio::sync::watch;

use super::api::{AttachRequest, Attachment, CONNECTIONS, Detached, Stage, State, VolumeNumbers};
use super::error::NodeError;
use super::policy::Staging;
use super::transport::Device;
use crate::blob::LeaseId;
use crate::volume::{SetAside, Volume, VolumeStatus, kept_aside};

#[derive(Clone)]
pub(super) struct Entry {
    pub id: String,
    pub request: Arc<AttachRequest>,
    pub since: Timestamp,
    pub phase: Phase,
}

#[derive(Clone)]
pub(super) enum Phase {
    Attaching {
        stage: watch::Receiver<Stage>,
        cancel: Arc<AtomicBool>,
    },
    Recovering(Recovering),
    Attached(Arc<Parts>),
    Detaching(Detaching),
    Failed(Arc<Parts>, String),
    Stale(Arc<Parts>, String),
}

#[derive(Clone)]
pub(super) struct Recovering {
    pub parts: Arc<Parts>,
    /// What it is doing or waiting for.
    pub doing: watch::Receiver<String>,
    /// Raised to give up: what waits ends as stale.
    pub cancel: watch::Sender<bool>,
}

#[derive(Clone)]
pub(super) struct Detaching {
    pub parts: Arc<Parts>,
    /// Raised by a forced detach, also of one that is under way.
    pub force: watch::Sender<bool>,
    pub outcome: watch::Receiver<Option<Result<Detached, NodeError>>>,
}

/// What an attachment consists of, as far as it exists: what a detach takes
/// apart.
#[derive(Clone, Default)]
pub(super) struct Parts {
    /// The open volume, which holds the lease.
    pub volume: Option<Arc<Volume>>,
    /// Without a volume: a lease that an earlier daemon left.
    pub lease: Option<LeaseId>,
    /// The device.
    pub device: Option<Arc<dyn Device>>,
    /// Where the device is or was, for the link and for people.
    pub device_path: Option<PathBuf>,
    /// The link to it.
    pub link: Option<PathBuf>,
    /// Unflushed writes of before, kept out of the way.
    pub aside: Vec<SetAside>,
}

impl Parts {
    /// What is kept aside now: of before, and since.
    fn kept_aside(&self, status: Option<&VolumeStatus>) -> Vec<SetAside> {
        let since = status.and_then(|status| status.cache.as_ref()?.set_aside.as_ref());
        let mut kept = self.aside.clone();
        kept.extend(since.filter(|since| !self.aside.contains(since)).cloned());
        // Dropped or put back meanwhile.
        kept.retain(|aside| aside.path.exists());
        kept
    }
}

/// The unflushed writes of the request's volume that are kept out of the way.
pub(super) async fn find_aside(request: &AttachRequest, staging: &Staging) -> Vec<SetAside> {
    let own = request.policy.staging_dir.clone();
    let folder = own.unwrap_or_else(|| staging.dir.clone());
    let volume = request.volume();
    let look = {
        let folder = folder.clone();
        super::detach::blocking(move || kept_aside(&folder, &volume))
    };
    look.await.unwrap_or_else(|error| {
        tracing::warn!(
            "cannot look for unflushed writes in {}: {error}",
            folder.display()
        );
        Vec::new()
    })
}

impl Entry {
    /// Its volume, if one is open.
    fn volume(&self) -> Option<&Arc<Volume>> {
        let parts = match &self.phase {
            Phase::Attaching { .. } => return None,
            Phase::Recovering(Recovering { parts, .. })
            | Phase::Detaching(Detaching { parts, .. })
            | Phase::Attached(parts)
            | Phase::Failed(parts, _)
            | Phase::Stale(parts, _) => parts,
        };
        parts.volume.as_ref()
    }

    /// Another holder has taken its volume.
    pub fn is_fenced(&self) -> bool {
        self.volume().is_some_and(|volume| volume.is_fenced())
    }

    /// Its numbers, if its volume is open.
    pub fn numbers(&self) -> Option<VolumeNumbers> {
        Some(VolumeNumbers {
            name: self.request.name.clone(),
            id: self.id.clone(),
            volume: self.request.volume(),
            stats: self.volume()?.stats(),
        })
    }

    /// The entry as the API shows it.
    pub fn view(&self) -> Attachment {
        let none = Arc::new(Parts::default());
        let (state, parts, reason) = match &self.phase {
            Phase::Attaching { stage, cancel } => {
                let mut doing = stage.borrow().to_string();
                if cancel.load(Ordering::SeqCst) {
                    doing.push_str("; cancelled");
                }
                (State::Attaching, &none, Some(doing))
            }
            Phase::Recovering(recovering) => {
                let doing = recovering.doing.borrow().clone();
                (State::Recovering, &recovering.parts, Some(doing))
            }
            Phase::Attached(parts) => (State::Attached, parts, None),
            Phase::Detaching(detaching) => (State::Detaching, &detaching.parts, None),
            Phase::Failed(parts, reason) => (State::Failed, parts, Some(reason.clone())),
            Phase::Stale(parts, reason) => (State::Stale, parts, Some(reason.clone())),
        };
        let status = parts.volume.as_ref().map(|v| v.status());
        let request = &self.request;
        let linked = matches!(state, State::Attached | State::Recovering | State::Stale);
        Attachment {
            id: self.id.clone(),
            name: request.name.clone(),
            state,
            reason,
            account: request.account.name.clone(),
            endpoint: request.account.endpoint.clone(),
            container: request.container.clone(),
            blob: request.blob.clone(),
            size: status.as_ref().map(|s| s.size),
            layout: status.as_ref().map(|s| s.layout),
            read_only: request.read_only,
            caching: request.policy.caching,
            limits: request.policy.limits,
            connections: request.connections.unwrap_or(CONNECTIONS),
            device: parts.device_path.clone(),
            link: parts.link.clone().filter(|_| linked),
            since: self.since,
            fenced: status.as_ref().and_then(|s| s.fenced.clone()),
            fenced_since: status.as_ref().and_then(|s| s.fenced_since),
            kept_aside: parts.kept_aside(status.as_ref()),
            cache: status.as_ref().and_then(|s| s.cache.clone()),
            completed: status.as_ref().map_or(0, |s| s.completed),
            store_requests: status.as_ref().map_or(0, |s| s.store_requests),
            in_flight: status.as_ref().map_or(0, |s| s.in_flight),
            refused: status.as_ref().map_or(0, |s| s.refused),
            throttled: status.as_ref().and_then(|s| s.throttled.clone()),
            blocked: status.as_ref().and_then(|s| s.blocked.clone()),
        }
    }

    /// Is it an attachment of the volume that `request` asks for?
    pub fn is_of_volume(&self, request: &AttachRequest) -> bool {
        let mine = &self.request;
        (&mine.account.name, &mine.container, &mine.blob)
            == (&request.account.name, &request.container, &request.blob)
            && mine.account.endpoint.trim_end_matches('/')
                == request.account.endpoint.trim_end_matches('/')
    }

    /// Was it attached with the options of `request`?
    pub fn has_options_of(&self, request: &AttachRequest) -> bool {
        let mine = &self.request;
        mine.read_only == request.read_only
            && mine.policy == request.policy
            && mine.connections.unwrap_or(CONNECTIONS) == request.connections.unwrap_or(CONNECTIONS)
    }
}
