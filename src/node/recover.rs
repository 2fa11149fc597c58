//! One attachment of an earlier daemon, taken up again.
//!
//! | the record says | the kernel says | what happens |
//! |---|---|---|
//! | this boot | connected under the attachment's id | lease renewed under its id, connections replaced: attached |
//! | this boot | the same, but the lease is somebody else's | attached and fenced: all I/O ends in EIO |
//! | this boot | no such device | lease released if it is still that one, then link and record go |
//! | another boot | not asked | the same |
//!
//! A device that lives is taken up even if the daemon died before it could
//! tell anybody: whoever uses it has a right to it, whoever does not can
//! detach it.
//!
//! What may heal is waited for: a store that is away, credentials that are
//! not there, a kernel that does not answer. The device's I/O waits
//! meanwhile, and the reason is in the list. A forced detach and a clean stop
//! end the waiting; the device and its record then stay as they are.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::account;
use super::api::CONNECTIONS;
use super::detach;
use super::entry::{Detaching, Entry, Parts, Phase, Recovering, find_aside};
use super::error::NodeError;
use super::policy::Staging;
use super::record::{Record, this_boot};
use super::registry::Registry;
use super::transport::{Device, Export, Parked};
use crate::blob::LeaseId;
use crate::blob::retry::Backoff;
use crate::volume::{OpenError, OpenOptions, Volume};

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Enters the record's attachment into the table and recovers it in a task.
pub(super) fn begin(registry: &Registry, record: Record, inherited: Option<Inherited>) {
    let (doing_sender, doing) = watch::channel("looking for its device".to_owned());
    let cancel = watch::Sender::new(false);
    let parts = Parts {
        lease: record.lease.clone().map(LeaseId::from_text),
        device_path: record.device.clone(),
        link: record
            .device
            .is_some()
            .then(|| registry.0.links.path(&record.request.name)),
        ..Parts::default()
    };
    let cancelled = cancel.subscribe();
    let entry = Entry {
        id: record.id.clone(),
        request: Arc::new(record.request.clone()),
        since: record.since,
        phase: Phase::Recovering(Recovering {
            parts: Arc::new(parts.clone()),
            doing,
            cancel,
        }),
    };
    registry.adopt(entry.clone());
    let recovery = Recovery {
        registry: registry.clone(),
        entry,
        record,
        parts,
        doing: doing_sender,
        cancelled,
        inherited,
    };
    tokio::spawn(recovery.run());
}

/// What an earlier daemon handed over.
#[derive(Default)]
pub(super) struct Inherited {
    /// The volume, where it is open here already.
    pub volume: Option<Arc<Volume>>,
    /// The connections.
    pub parked: Vec<Parked>,
}

struct Recovery {
    registry: Registry,
    entry: Entry,
    record: Record,
    parts: Parts,
    doing: watch::Sender<String>,
    cancelled: watch::Receiver<bool>,
    inherited: Option<Inherited>,
}

/// How a recovery ends.
enum End {
    /// The device is served again.
    Served,
    /// There is nothing to serve.
    Gone(&'static str),
    /// Whoever waited was told not to.
    GivenUp,
}

impl Recovery {
    async fn run(mut self) {
        let (registry, entry) = (self.registry.clone(), self.entry.clone());
        let name = &entry.request.name;
        let volume = entry.request.volume();
        // A task of its own, so that a panic ends in a phase and not in limbo.
        let work = tokio::spawn(async move {
            let end = self.advance().await;
            (end, self.parts, self.doing.borrow().clone())
        });
        let (end, parts, doing) = match work.await {
            Ok(ended) => ended,
            Err(error) => {
                let reason = format!("its recovery died ({error}): detach {name} to tidy up");
                tracing::error!(%name, %volume, %reason, "recovery panicked");
                let parts = match &entry.phase {
                    Phase::Recovering(recovering) => recovering.parts.clone(),
                    _ => Arc::default(),
                };
                return registry.set_phase(name, &entry.id, Phase::Failed(parts, reason));
            }
        };
        let device = parts.device_path.clone().unwrap_or_default();
        let parts = Arc::new(parts);
        match end {
            End::Served => {
                registry.set_phase(name, &entry.id, Phase::Attached(parts.clone()));
                registry.watch(&entry, &parts);
                tracing::info!(%name, %volume, device = %device.display(), "recovered");
                registry.settle_size(&entry);
            }
            End::Gone(why) => {
                tracing::info!(%name, %volume, "{why}; tidying up");
                tidy_up(&registry, &entry, parts, why);
            }
            End::GivenUp => {
                let reason = format!("not served: its recovery was given up while {doing}");
                tracing::warn!(%name, %volume, %reason, "stale device");
                registry.set_phase(name, &entry.id, Phase::Stale(parts, reason));
            }
        }
    }

    async fn advance(&mut self) -> End {
        let boot = this_boot();
        if self.record.boot.is_some() && boot.is_some() && self.record.boot != boot {
            return End::Gone("the node was rebooted since it was attached");
        }
        let device = match self.find().await {
            Ok(Some(device)) => device,
            Ok(None) => return End::Gone("the device of an earlier dyskd is gone"),
            Err(GivenUp) => return End::GivenUp,
        };
        self.parts.device_path = Some(device.path().to_owned());
        // Not served; what a detach needs if this is given up.
        self.parts.device = Some(device);
        let Inherited { volume, parked } = self.inherited.take().unwrap_or_default();
        let volume = match volume {
            Some(volume) => volume,
            None => match self.open().await {
                Ok(volume) => volume,
                Err(GivenUp) => return End::GivenUp,
            },
        };
        self.parts.volume = Some(volume.clone());
        let staging = &self.registry.0.staging;
        self.parts.aside = find_aside(&self.record.request, staging).await;
        match self.serve(volume, parked).await {
            Some(device) => self.parts.device = Some(device),
            None => {
                self.parts.device = None;
                return End::Gone("its device went while it was recovered");
            }
        }
        self.link().await;
        End::Served
    }

    async fn find(&mut self) -> Result<Option<Arc<dyn Device>>, GivenUp> {
        let mut backoff = Backoff::new(PAUSE, LONGEST_PAUSE);
        loop {
            match self.registry.0.transport.find(&self.record.id).await {
                Ok(found) => return Ok(found),
                Err(error) => {
                    self.wait("looking for its device", &error, &mut backoff)
                        .await?;
                }
            }
        }
    }

    /// Renews the lease and opens the volume, however long the store takes.
    async fn open(&mut self) -> Result<Arc<Volume>, GivenUp> {
        self.doing.send_replace("opening the volume".into());
        let mut backoff = Backoff::new(PAUSE, LONGEST_PAUSE);
        loop {
            let error = match self.open_once().await? {
                Ok(volume) => return Ok(volume),
                Err(error) => error,
            };
            self.wait("opening the volume", &error, &mut backoff)
                .await?;
        }
    }

    /// The request as it is by now: its credential may have been replaced.
    fn learn_request(&mut self) {
        if let Ok(entry) = self.registry.entry(&self.record.request.name)
            && entry.id == self.record.id
        {
            self.record.request = (*entry.request).clone();
        }
    }

    async fn open_once(&mut self) -> Result<Result<Arc<Volume>, NodeError>, GivenUp> {
        self.learn_request();
        let (record, mut cancelled) = (self.record.clone(), self.cancelled.clone());
        let staging = self.registry.0.staging.clone();
        let work = async move {
            tokio::select! {
                biased;
                opened = open_again(&record, &staging, false) => Ok(opened),
                _ = cancelled.wait_for(|cancelled| *cancelled) => Err(GivenUp),
            }
        };
        work.await
    }

    /// New connections; none when the device is not there any more. Not given
    /// up: the volume is open, and the kernel answers.
    async fn serve(&self, volume: Arc<Volume>, mut parked: Vec<Parked>) -> Option<Arc<dyn Device>> {
        self.doing.send_replace("reconnecting the device".into());
        if let Some(fenced) = volume.status().fenced {
            tracing::error!(
                name = %self.record.request.name,
                volume = %self.record.request.volume(),
                %fenced,
                "another holder took the volume: all its i/o ends in errors"
            );
        }
        let mut backoff = Backoff::new(PAUSE, LONGEST_PAUSE);
        loop {
            let export = Export {
                id: self.record.id.clone(),
                name: self.record.request.name.to_string(),
                connections: self.record.request.connections.unwrap_or(CONNECTIONS),
                volume: volume.clone(),
            };
            match self
                .registry
                .0
                .transport
                .resume(export, std::mem::take(&mut parked))
                .await
            {
                Ok(device) => return device,
                Err(error) => {
                    let name = &self.record.request.name;
                    tracing::error!(%name, %error, "cannot reconnect the device yet");
                    self.doing
                        .send_replace(format!("reconnecting the device: {error}"));
                    tokio::time::sleep(backoff.pause(None)).await;
                }
            }
        }
    }

    /// The record and the link as an attach would have left them. The disk is
    /// served already, so a failure is told and no more.
    async fn link(&mut self) {
        let name = self.record.request.name.clone();
        detach::tell_udev(&self.registry, &self.entry).await;
        let Some(device) = self.parts.device_path.clone() else {
            return;
        };
        let size = self.parts.volume.as_ref().map(|volume| volume.size());
        if self.record.device.as_ref() != Some(&device) || self.record.size != size {
            self.record.device = Some(device.clone());
            self.record.size = size.or(self.record.size);
            self.learn_request();
            if let Err(error) = self.registry.0.write(&self.record).await {
                tracing::error!(%name, %error, "the record does not name the device");
            }
        }
        let (links, linked) = (self.registry.0.links.clone(), name.clone());
        match detach::blocking(move || links.make(&linked, &device)).await {
            Ok(link) => self.parts.link = Some(link),
            Err(error) => {
                self.parts.link = None;
                tracing::error!(%name, %error, "cannot make the link");
            }
        }
    }

    /// Tells what is waited for and waits a little.
    async fn wait(
        &mut self,
        doing: &str,
        error: &(dyn std::error::Error + Sync),
        backoff: &mut Backoff,
    ) -> Result<(), GivenUp> {
        let name = &self.record.request.name;
        tracing::warn!(%name, volume = %self.record.request.volume(), %error, "cannot recover yet");
        self.doing.send_replace(format!("{doing}: {error}"));
        tokio::select! {
            () = tokio::time::sleep(backoff.pause(None)) => Ok(()),
            _ = self.cancelled.wait_for(|cancelled| *cancelled) => Err(GivenUp),
        }
    }
}

/// Opens the volume of a record under its lease; fenced when that is somebody
/// else's by now. Dropped or failed, the lease is as it was.
///
/// `hold_back`: what is staged is not written back yet, see
/// [`OpenOptions::hold_back`].
pub(super) async fn open_again(
    record: &Record,
    staging: &Staging,
    hold_back: bool,
) -> Result<Arc<Volume>, NodeError> {
    let request = &record.request;
    let (_, blob) = account::open_blob(&request.account, &request.container, &request.blob).await?;
    let lease = record.lease.clone().map(LeaseId::from_text);
    // Read-only takes no lease: this one is never used.
    let lease = lease.unwrap_or_else(LeaseId::random);
    let options = OpenOptions {
        read_only: request.read_only,
        resume: true,
        hold_back,
        pace: Some(account::pace(&request.account)),
        ..request.policy.open_options(lease, staging)
    };
    let known = record.size.zip(record.layout);
    match (Volume::open(blob.clone(), options.clone()).await, known) {
        (Err(OpenError::Fenced { reason, .. }), Some(known)) => {
            Ok(Volume::fenced(blob, &options, known, reason))
        }
        (opened, _) => Ok(opened?),
    }
}

struct GivenUp;

/// Takes apart what is left of an attachment without a device.
fn tidy_up(registry: &Registry, entry: &Entry, parts: Arc<Parts>, why: &str) {
    let (sender, outcome) = watch::channel(None);
    let detaching = Detaching {
        parts: parts.clone(),
        force: watch::Sender::new(false),
        outcome,
    };
    let mut before = entry.clone();
    before.phase = Phase::Stale(parts, why.into());
    let phase = Phase::Detaching(detaching.clone());
    registry.set_phase(&entry.request.name, &entry.id, phase);
    tokio::spawn(detach::run(registry.clone(), before, detaching, sender));
}
