//! One attach, top to bottom; a failure anywhere takes back, in reverse,
//! what was done before it.
//!
//! 1. its turn comes; the node can attach at all; the record is written
//! 2. the blob is made, when asked for
//! 3. the volume is opened: lease, size, layout, fence; the record learns them
//! 4. the transport makes the device and waits until it can be used
//! 5. the record learns the device; the link is made
//! 6. the registry takes it over
//!
//! No step is ever dropped half way: a lease whose request was cut off could
//! still be granted. A cancelled attach finishes its step and then unwinds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{oneshot, watch};

use super::api::{Attachment, CONNECTIONS, NewDisk, Stage};
use super::detach::{self, Effort};
use super::entry::{Entry, Parts, Phase, find_aside};
use super::error::NodeError;
use super::record::Record;
use super::registry::{Registry, cancelled};
use super::transport::Export;
use super::{account, provision};
use crate::blob::{LeaseId, PageBlob};
use crate::volume::{self, Access, OpenOptions, Volume};

/// An attach that was admitted.
pub(super) struct Task {
    pub registry: Registry,
    pub entry: Entry,
    pub stage: watch::Sender<Stage>,
    pub cancel: Arc<AtomicBool>,
}

/// What was done so far.
#[derive(Default)]
struct Done {
    parts: Parts,
    created: Option<(PageBlob, NewDisk)>,
}

impl Task {
    /// Runs to the end and tells `outcome`, whether anybody listens or not.
    pub async fn run(self, outcome: oneshot::Sender<Result<Attachment, NodeError>>) {
        let (registry, entry) = (self.registry.clone(), self.entry.clone());
        let name = &entry.request.name;
        // A task of its own, so that a panic ends in a phase and not in limbo.
        let result = match tokio::spawn(self.work()).await {
            Ok(result) => result,
            Err(error) => {
                let reason = format!("the attach died ({error}): detach {name} to tidy up");
                tracing::error!(%name, %reason, "attach panicked");
                let parts = Arc::new(Parts::default());
                registry.set_phase(name, &entry.id, Phase::Failed(parts, reason.clone()));
                Err(NodeError::internal(reason))
            }
        };
        // A caller that went away after the commit finds it in the list.
        drop(outcome.send(result));
    }

    async fn work(self) -> Result<Attachment, NodeError> {
        let name = &self.entry.request.name;
        let volume = self.entry.request.volume();
        tracing::info!(%name, %volume, id = %self.entry.id, "attach begins");
        let mut done = Done::default();
        let result = match self.advance(&mut done).await {
            Ok(()) => self
                .registry
                .commit(&self.entry, Arc::new(done.parts.clone())),
            Err(error) => Err(error),
        };
        match result {
            Ok(attachment) => {
                let device = done.parts.device_path.clone().unwrap_or_default();
                tracing::info!(%name, %volume, device = %device.display(), "attached");
                self.registry.watch(&self.entry, &done.parts);
                Ok(attachment)
            }
            Err(error) => {
                tracing::warn!(%name, %volume, %error, "attach failed");
                self.stage.send_replace(Stage::Undoing);
                self.unwind(done).await;
                Err(error)
            }
        }
    }

    async fn advance(&self, done: &mut Done) -> Result<(), NodeError> {
        let shared = &self.registry.0;
        let request = &self.entry.request;
        let turn = shared.turns.next().await;
        self.go_on()?;
        shared.transport.check().await?;
        let lease = LeaseId::random();
        let mut record = Record::new(
            self.entry.id.clone(),
            (**request).clone(),
            (!request.read_only).then(|| lease.as_str().to_owned()),
        );
        record.since = self.entry.since;
        shared.write(&record).await?;
        self.go_on()?;

        let (account, blob) =
            account::open_blob(&request.account, &request.container, &request.blob).await?;
        if let Some(disk) = request.create {
            self.stage.send_replace(Stage::Creating);
            provision::create(&account, &blob, disk).await?;
            done.created = Some((blob.clone(), disk));
            self.go_on()?;
        }

        self.stage.send_replace(Stage::Opening);
        if let Some(holder) = &request.holder {
            let needs = if request.read_only {
                Access::Read
            } else {
                Access::Write
            };
            volume::expect_published(&blob, holder, needs, account::ATTEMPT_DEADLINE).await?;
        }
        let mut options = OpenOptions {
            read_only: request.read_only,
            break_lease: request.break_lease,
            pace: Some(account::pace(&request.account)),
            ..request.policy.open_options(lease, &shared.staging)
        };
        options.staging.recover = request.recover;
        let volume = self.open(blob, options).await?;
        done.parts.volume = Some(volume.clone());
        if let Some(holder) = &request.holder {
            volume.name_holder(holder).await?;
        }
        done.parts.aside = find_aside(request, &shared.staging).await;
        let status = volume.status();
        (record.size, record.layout) = (Some(status.size), Some(status.layout));
        shared.write(&record).await?;
        self.go_on()?;

        self.stage.send_replace(Stage::Connecting);
        detach::tell_udev(&self.registry, &self.entry).await;
        drop(turn);
        let export = Export {
            id: self.entry.id.clone(),
            name: request.name.to_string(),
            connections: request.connections.unwrap_or(CONNECTIONS),
            volume,
        };
        let device = shared.transport.attach(export).await?;
        let path = device.path().to_owned();
        done.parts.device = Some(device);
        done.parts.device_path = Some(path.clone());
        record.device = Some(path.clone());
        shared.write(&record).await?;
        let (links, name) = (shared.links.clone(), request.name.clone());
        let link = detach::blocking(move || links.make(&name, &path))
            .await
            .map_err(|e| {
                NodeError::internal(format!("cannot make the link of {}: {e}", request.name))
            })?;
        done.parts.link = Some(link);
        Ok(())
    }

    /// Opens the volume and tells while somebody else's lease is waited for.
    async fn open(&self, blob: PageBlob, options: OpenOptions) -> Result<Arc<Volume>, NodeError> {
        let (waiting, mut told) = watch::channel(false);
        let options = OpenOptions {
            waiting: Some(waiting),
            ..options
        };
        let mut opening = std::pin::pin!(Volume::open(blob, options));
        loop {
            tokio::select! {
                opened = &mut opening => return Ok(opened?),
                Ok(()) = told.changed() => {
                    let waits = *told.borrow_and_update();
                    let stage = if waits { Stage::Waiting } else { Stage::Opening };
                    self.stage.send_replace(stage);
                }
            }
        }
    }

    fn go_on(&self) -> Result<(), NodeError> {
        if self.cancel.load(Ordering::SeqCst) {
            return Err(cancelled(&self.entry.request.name));
        }
        Ok(())
    }

    /// Takes everything back. What resists stays in the table as failed.
    async fn unwind(&self, done: Done) {
        let name = &self.entry.request.name;
        let parts = Arc::new(done.parts);
        // Nobody was told the device's name, so whoever has it open is a
        // prober: it does not keep the device.
        let effort = Effort::forced();
        let mut warnings =
            match detach::take_apart(&self.registry, &self.entry, &parts, effort).await {
                Ok(warnings) => warnings,
                Err(error) => {
                    tracing::error!(%name, %error, "a failed attach could not be undone");
                    let phase = Phase::Failed(parts, error.to_string());
                    return self.registry.set_phase(name, &self.entry.id, phase);
                }
            };
        if let Some((blob, disk)) = done.created
            && let Err(error) = provision::take_back(&blob, disk).await
        {
            warnings.push(error.to_string());
        }
        for warning in warnings {
            tracing::warn!(%name, %warning, "while undoing an attach");
        }
        detach::forget(&self.registry, &self.entry).await;
    }
}
