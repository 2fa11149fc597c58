//! Every attachment of the node, by name, and the one place where its phase
//! changes.
//!
//! | phase | what is there | next |
//! |---|---|---|
//! | attaching | a task that works down `attach.rs`; a record | attached; gone when undone; failed when undoing failed |
//! | attached | record, lease, device, link; I/O flows | detaching; failed when the kernel let go by other hands |
//! | recovering | an earlier daemon's record and perhaps device; a task that works down `recover.rs` | attached; detaching when there is no device; stale when told to give up |
//! | detaching | a task that works down `detach.rs` | gone; back to attached when in use; failed when the kernel kept the device |
//! | failed | whatever could not be undone | detaching |
//! | stale | an earlier daemon's device and record, not served because its recovery was given up | detaching |
//!
//! Invariants: a name is in the table exactly as long as anything of its
//! attachment (record, lease, device, link, task) exists. A blob is in it at
//! most once. Only the task of an attaching, recovering or detaching entry touches what
//! the entry owns. The table's lock is held for look-ups and phase changes
//! alone, never across an await, so that listing waits for nobody.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use tokio::sync::{oneshot, watch};

use super::admission;
use super::api::{AttachRequest, Attachment, Detached, ErrorCode, Stage, VolumeNumbers};
use super::entry::{Detaching, Entry, Parts, Phase};
use super::error::NodeError;
use super::link::{Links, Names};
use super::name::AttachmentName;
use super::policy::Staging;
use super::record::{Record, Records};
use super::transport::Transport;
use super::turns::Turns;

/// Most attaches under way at once; more are told to come back. Below the
/// server's bound on connections, so that a list always gets through.
const MAX_ATTACHING: usize = 512;

/// The attachments of a node; cheap to clone.
#[derive(Clone)]
pub struct Registry(pub(super) Arc<Shared>);

pub(super) struct Shared {
    pub transport: Arc<dyn Transport>,
    pub records: Records,
    pub links: Links,
    pub names: Names,
    pub staging: Staging,
    pub turns: Turns,
    table: Mutex<Table>,
    /// Poked at every change of a phase.
    changed: watch::Sender<()>,
}

#[derive(Default)]
pub(super) struct Table {
    pub entries: BTreeMap<AttachmentName, Entry>,
    pub stopping: bool,
    /// Resizes and snapshots under way: nothing is handed over meanwhile.
    pub changes: usize,
    /// Another daemon is taking everything over.
    pub handing_over: bool,
}

/// An attach under way. Dropped before its outcome came, it is undone.
pub struct Attaching {
    pub(super) stage: watch::Receiver<Stage>,
    pub(super) outcome: oneshot::Receiver<Result<Attachment, NodeError>>,
    pub(super) cancel: CancelOnDrop,
}

pub(super) struct CancelOnDrop(pub Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        // Without effect on an attach that is through already.
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Attaching {
    /// What it is doing.
    #[must_use]
    pub fn stages(&self) -> watch::Receiver<Stage> {
        self.stage.clone()
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// The attach failed and nothing of it is left, or the text says what is.
    pub async fn outcome(self) -> Result<Attachment, NodeError> {
        let Self {
            outcome, cancel, ..
        } = self;
        let result = outcome
            .await
            .unwrap_or_else(|_| Err(NodeError::internal("the attach died; see dyskd's log")));
        drop(cancel);
        result
    }
}

/// What became of a request to attach.
pub enum Admission {
    /// It began.
    Begun(Attaching),
    /// The same attachment is there already, and reuse was asked for.
    Existing(Box<Attachment>),
}

impl Registry {
    pub(super) fn new(
        transport: Arc<dyn Transport>,
        records: Records,
        links: Links,
        names: Names,
        staging: Staging,
    ) -> Self {
        Self(Arc::new(Shared {
            transport,
            records,
            links,
            names,
            staging,
            turns: Turns::default(),
            table: Mutex::default(),
            changed: watch::Sender::new(()),
        }))
    }

    /// Begins an attach.
    ///
    /// # Errors
    /// The request makes no sense, or name or volume are taken.
    pub fn attach(&self, request: AttachRequest) -> Result<Admission, NodeError> {
        admission::check(&request)?;
        let mut table = self.0.lock();
        if table.stopping || table.handing_over {
            return Err(stopping());
        }
        if let Some(existing) = admission::conflict(&table.entries, &request)? {
            drop(table);
            return Ok(Admission::Existing(Box::new(existing.view())));
        }
        let attaching = |e: &&Entry| matches!(e.phase, Phase::Attaching { .. });
        if table.entries.values().filter(attaching).count() >= MAX_ATTACHING {
            return Err(NodeError::new(
                ErrorCode::Overloaded,
                format!("{MAX_ATTACHING} attaches are under way: try again in a moment"),
            ));
        }
        let cancel = Arc::new(AtomicBool::new(false));
        let (stage_sender, stage) = watch::channel(Stage::Recording);
        let (outcome_sender, outcome) = oneshot::channel();
        let entry = Entry {
            id: uuid::Uuid::new_v4().to_string(),
            request: Arc::new(request),
            since: Timestamp::now(),
            phase: Phase::Attaching {
                stage: stage.clone(),
                cancel: cancel.clone(),
            },
        };
        let name = entry.request.name.clone();
        table.entries.insert(name, entry.clone());
        drop(table);
        let task = super::attach::Task {
            registry: self.clone(),
            entry,
            stage: stage_sender,
            cancel: cancel.clone(),
        };
        tokio::spawn(task.run(outcome_sender));
        Ok(Admission::Begun(Attaching {
            stage,
            outcome,
            cancel: CancelOnDrop(cancel),
        }))
    }

    /// Detaches and waits for the end. Runs on when the future is dropped.
    ///
    /// # Errors
    /// No such attachment; in use and not forced; the kernel kept the device.
    pub async fn detach(&self, name: &AttachmentName, force: bool) -> Result<Detached, NodeError> {
        let mut step = self.begin_detach(name, force)?;
        while let DetachStep::GivingUp(id) = &step {
            self.wait_until(|table| {
                let recovering =
                    |e: &&Entry| e.id == *id && matches!(e.phase, Phase::Recovering(_));
                table.entries.get(name).filter(recovering).is_none()
            })
            .await;
            step = self.begin_detach(name, force)?;
        }
        match step {
            DetachStep::GivingUp(_) => unreachable!("waited for above"),
            DetachStep::Wait(mut outcome) => {
                let result = outcome.wait_for(Option::is_some).await.map(|r| r.clone());
                match result {
                    Ok(Some(result)) => result,
                    _ => Err(NodeError::internal(format!(
                        "the detach of {name} died; see dyskd's log"
                    ))),
                }
            }
            DetachStep::Cancelled(id) => {
                self.wait_until(|table| table.entries.get(name).is_none_or(|e| e.id != id))
                    .await;
                Ok(Detached {
                    name: name.clone(),
                    warnings: Vec::new(),
                })
            }
        }
    }

    fn begin_detach(&self, name: &AttachmentName, force: bool) -> Result<DetachStep, NodeError> {
        let mut table = self.0.lock();
        if table.handing_over {
            return Err(stopping());
        }
        let entry = table.entries.get_mut(name).ok_or_else(|| unknown(name))?;
        let parts = match &entry.phase {
            Phase::Attaching { cancel, .. } if force => {
                cancel.store(true, Ordering::SeqCst);
                return Ok(DetachStep::Cancelled(entry.id.clone()));
            }
            Phase::Attaching { stage, .. } => {
                let stage = *stage.borrow();
                return Err(NodeError::new(
                    ErrorCode::Busy,
                    format!("{name} is still being attached ({stage}): wait, or use --force"),
                ));
            }
            Phase::Recovering(recovering) if force => {
                recovering.cancel.send_replace(true);
                return Ok(DetachStep::GivingUp(entry.id.clone()));
            }
            Phase::Recovering(recovering) => {
                let doing = recovering.doing.borrow().clone();
                return Err(NodeError::new(
                    ErrorCode::Busy,
                    format!("{name} is still being recovered ({doing}): wait, or use --force"),
                ));
            }
            Phase::Detaching(detaching) => {
                if force {
                    detaching.force.send_replace(true);
                }
                return Ok(DetachStep::Wait(detaching.outcome.clone()));
            }
            Phase::Attached(parts) | Phase::Failed(parts, _) | Phase::Stale(parts, _) => {
                parts.clone()
            }
        };
        let before = entry.clone();
        let (sender, outcome) = watch::channel(None);
        let detaching = Detaching {
            parts,
            force: watch::Sender::new(force),
            outcome: outcome.clone(),
        };
        entry.phase = Phase::Detaching(detaching.clone());
        drop(table);
        self.poke();
        let registry = self.clone();
        tokio::spawn(super::detach::run(registry, before, detaching, sender));
        Ok(DetachStep::Wait(outcome))
    }

    /// Every attachment, by name.
    #[must_use]
    pub fn list(&self) -> Vec<Attachment> {
        let entries: Vec<_> = self.0.lock().entries.values().cloned().collect();
        entries.iter().map(Entry::view).collect()
    }

    /// What the open volumes counted, by name.
    #[must_use]
    pub fn numbers(&self) -> Vec<VolumeNumbers> {
        let entries: Vec<_> = self.0.lock().entries.values().cloned().collect();
        entries.iter().filter_map(Entry::numbers).collect()
    }

    /// One attachment.
    ///
    /// # Errors
    /// [`ErrorCode::NotAttached`].
    pub fn get(&self, name: &AttachmentName) -> Result<Attachment, NodeError> {
        Ok(self.entry(name)?.view())
    }

    /// The entry of `name`.
    pub(super) fn entry(&self, name: &AttachmentName) -> Result<Entry, NodeError> {
        let entry = self.0.lock().entries.get(name).cloned();
        entry.ok_or_else(|| unknown(name))
    }

    /// Puts another request into the entry `id`; says whether it is there.
    pub(super) fn set_request(
        &self,
        name: &AttachmentName,
        id: &str,
        request: Arc<AttachRequest>,
    ) -> bool {
        let mut table = self.0.lock();
        let entry = table.entries.get_mut(name).filter(|e| e.id == id);
        entry.map(|entry| entry.request = request).is_some()
    }

    /// How many attachments there are, how many of them are fenced, and whether
    /// the daemon is stopping.
    #[must_use]
    pub fn health(&self) -> (usize, usize, bool) {
        let table = self.0.lock();
        let fenced = table.entries.values().filter(|entry| entry.is_fenced());
        (table.entries.len(), fenced.count(), table.stopping)
    }

    /// Moves the entry `id` to `phase`, unless it is another one by now.
    pub(super) fn set_phase(&self, name: &AttachmentName, id: &str, phase: Phase) {
        if let Some(entry) = self.0.lock().entries.get_mut(name).filter(|e| e.id == id) {
            entry.phase = phase;
        }
        self.poke();
    }

    /// Makes an attach that is through an attachment, unless it was cancelled.
    pub(super) fn commit(&self, entry: &Entry, parts: Arc<Parts>) -> Result<Attachment, NodeError> {
        let mut table = self.0.lock();
        let stopping_now = table.stopping;
        let Some(found) = table.entries.get_mut(&entry.request.name) else {
            return Err(NodeError::internal("the attachment left the table"));
        };
        debug_assert_eq!(found.id, entry.id, "only its task removes an entry");
        match &found.phase {
            Phase::Attaching { .. } if stopping_now => return Err(stopping()),
            Phase::Attaching { cancel, .. } if cancel.load(Ordering::SeqCst) => {
                return Err(cancelled(&entry.request.name));
            }
            _ => found.phase = Phase::Attached(parts),
        }
        let found = found.clone();
        drop(table);
        self.poke();
        Ok(found.view())
    }

    /// The kernel let go of the device of an attachment nobody is detaching.
    pub(super) fn lost_device(&self, name: &AttachmentName, id: &str) {
        let mut table = self.0.lock();
        let Some(entry) = table.entries.get_mut(name).filter(|e| e.id == id) else {
            return;
        };
        if let Phase::Attached(parts) = &entry.phase {
            let device = parts.device_path.clone().unwrap_or_default();
            let reason = format!(
                "{} was disconnected by other hands: detach {name} to release the volume",
                device.display()
            );
            tracing::error!(%name, volume = entry.request.volume(), %reason, "device lost");
            entry.phase = Phase::Failed(parts.clone(), reason);
        }
        drop(table);
        self.poke();
    }

    /// Notices when the kernel lets go of an attachment's device without us.
    pub(super) fn watch(&self, entry: &Entry, parts: &Parts) {
        let Some(device) = parts.device.clone() else {
            return;
        };
        let (registry, name, id) = (self.clone(), entry.request.name.clone(), entry.id.clone());
        tokio::spawn(async move {
            device.gone().await;
            registry.lost_device(&name, &id);
        });
    }

    /// Adds an entry that start-up found.
    pub(super) fn adopt(&self, entry: Entry) {
        let name = entry.request.name.clone();
        self.0.lock().entries.insert(name, entry);
        self.poke();
    }

    /// Removes the entry `id`: nothing of the attachment exists any more.
    pub(super) fn remove(&self, name: &AttachmentName, id: &str) {
        let mut table = self.0.lock();
        if table.entries.get(name).is_some_and(|e| e.id == id) {
            table.entries.remove(name);
        }
        drop(table);
        self.poke();
    }

    /// Refuses attaches and detaches while `on`.
    pub(super) fn set_handing_over(&self, on: bool) {
        self.0.lock().handing_over = on;
    }

    /// Refuses attaches from now on and cancels those under way.
    pub(super) fn begin_stop(&self) {
        let mut table = self.0.lock();
        table.stopping = true;
        for entry in table.entries.values() {
            match &entry.phase {
                Phase::Attaching { cancel, .. } => cancel.store(true, Ordering::SeqCst),
                Phase::Recovering(recovering) => {
                    recovering.cancel.send_replace(true);
                }
                _ => {}
            }
        }
    }

    /// The entries now.
    pub(super) fn entries(&self) -> Vec<Entry> {
        self.0.lock().entries.values().cloned().collect()
    }

    /// What `look` sees in the table now.
    pub(super) fn look<T>(&self, look: impl FnOnce(&Table) -> T) -> T {
        look(&self.0.lock())
    }

    /// Waits until the table satisfies `condition`.
    pub(super) async fn wait_until(&self, condition: impl Fn(&Table) -> bool) {
        let mut changed = self.0.changed.subscribe();
        loop {
            changed.borrow_and_update();
            if condition(&self.0.lock()) {
                return;
            }
            if changed.changed().await.is_err() {
                return; // Unreachable while we hold the sender.
            }
        }
    }

    pub(super) fn poke(&self) {
        self.0.changed.send_replace(());
    }
}

enum DetachStep {
    Wait(watch::Receiver<Option<Result<Detached, NodeError>>>),
    Cancelled(String),
    GivingUp(String),
}

impl Shared {
    /// Writes a record.
    pub async fn write(&self, record: &Record) -> Result<(), NodeError> {
        let (records, record) = (self.records.clone(), record.clone());
        let path = records.path(&record.request.name);
        super::detach::blocking(move || records.write(&record))
            .await
            .map_err(|e| NodeError::internal(format!("cannot write {}: {e}", path.display())))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing that runs under the lock leaves the table half changed.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn unknown(name: &AttachmentName) -> NodeError {
    NodeError::new(
        ErrorCode::NotAttached,
        format!("nothing is attached as {name}: see `dyskctl list`"),
    )
}

pub(super) fn stopping() -> NodeError {
    NodeError::new(
        ErrorCode::Stopping,
        "dyskd is stopping: try again when it runs",
    )
}

pub(super) fn cancelled(name: &AttachmentName) -> NodeError {
    NodeError::new(
        ErrorCode::Cancelled,
        format!("the attach of {name} was cancelled and undone"),
    )
}
