//! Copy Blob and Abort Copy Blob. The copy runs in the background and shares
//! nothing with its source; it fails when the source changes under it, which a
//! snapshot cannot.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::StatusCode;

use super::put::{check_overwrite, check_tier, install, kept_lease};
use super::{locate, replace, source};
use crate::emulator::clock;
use crate::emulator::conditions::check_source;
use crate::emulator::record::{Copy, CopyStatus, Kind, Record, Source};
use crate::emulator::refusal::{self, Refusal};
use crate::emulator::reply::Reply;
use crate::emulator::request::Request;
use crate::emulator::service::State;
use crate::emulator::store::{Container, Slot};

/// Bytes moved under one lock.
const STEP: u64 = 4 << 20;

pub(super) fn start(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let metadata = request.metadata()?;
    let source = source::resolve(state, request, request.trusted)?;
    let target = &request.target;
    if source.target == *target && source.snapshot.is_none() {
        let url = request.required("x-ms-copy-source")?;
        return Err(refusal::invalid_header("x-ms-copy-source", url));
    }
    let origin = {
        let versions = source.slot.read();
        let blob = versions
            .get(source.snapshot.as_deref())
            .map_err(|_| &refusal::CANNOT_VERIFY_COPY_SOURCE)?;
        check_source(request, &blob.record)?;
        source_lease(request, &blob.record)?;
        if blob.record.copy_pending() {
            return Err((&refusal::PENDING_COPY).into());
        }
        blob.record.clone()
    };
    if origin.kind == Kind::PageBlob {
        check_tier(state, request)?;
    }
    let container = state.store.container(&target.container)?;
    let (slot, _alive) = container.slot_for_create(&target.blob)?;
    let mut versions = slot.write();
    check_overwrite(request, &versions)?;
    if let Some(base) = &versions.base
        && base.record.kind != origin.kind
    {
        return Err((&refusal::INVALID_BLOB_TYPE).into());
    }
    let files = uuid::Uuid::new_v4().simple().to_string();
    let id = uuid::Uuid::new_v4().to_string();
    let record = Record {
        name: target.blob.clone(),
        snapshot: None,
        files: files.clone(),
        lineage: files,
        version: state.store.next_version(),
        created: request.now,
        metadata: if metadata.is_empty() {
            origin.metadata
        } else {
            metadata
        },
        lease: kept_lease(&versions, request),
        copy: Some(Copy {
            id: id.clone(),
            source_url: source.shown,
            source: Source {
                container: source.target.container,
                blob: source.target.blob,
                snapshot: source.snapshot,
                version: origin.version,
            },
            status: CopyStatus::Pending,
            description: None,
            done: 0,
            total: origin.size,
            completed: None,
        }),
        kind: origin.kind,
        size: origin.size,
        sequence_number: origin.sequence_number,
        content: origin.content,
    };
    let reply = Reply::new(StatusCode::ACCEPTED)
        .version(&record)
        .header("x-ms-copy-id", id.clone())
        .fixed("x-ms-copy-status", CopyStatus::Pending.name());
    let old = install(&container, &mut versions, record, |_| Ok(()))?;
    drop(versions);
    drop(old);
    spawn(state, &container, &slot, id);
    Ok(reply)
}

fn source_lease(request: &Request, source: &Record) -> Result<(), Refusal> {
    source
        .lease
        .check_read(request.header("x-ms-source-lease-id"), request.now)
}

/// Takes up the copies that were under way when the process died.
pub(in crate::emulator) fn resume(state: &Arc<State>) {
    for container in state.store.containers() {
        for slot in container.slots().blobs.values() {
            let pending = slot
                .read()
                .base
                .as_ref()
                .filter(|blob| blob.record.copy_pending())
                .and_then(|blob| blob.record.copy.as_ref().map(|copy| copy.id.clone()));
            if let Some(id) = pending {
                spawn(state, &container, slot, id);
            }
        }
    }
}

fn spawn(state: &Arc<State>, container: &Arc<Container>, slot: &Arc<Slot>, id: String) {
    let (state, container, slot) = (Arc::clone(state), Arc::clone(container), Arc::clone(slot));
    tokio::task::spawn_blocking(move || {
        let outcome = transfer(&state, &slot, &id);
        if let Err(refusal) = finish(&state, &container, &slot, &id, outcome) {
            tracing::error!("copy {id} could not be ended: {}", refusal.message());
        }
    });
}

/// How a transfer ended.
enum Outcome {
    Done,
    Failed(String),
    /// Aborted, deleted, or the emulator stops: nothing more to say.
    Dropped,
}

fn transfer(state: &State, slot: &Slot, id: &str) -> Outcome {
    match try_transfer(state, slot, id) {
        Ok(outcome) => outcome,
        Err(refusal) => Outcome::Failed(format!(
            "{} {} \"Copy failed when reading the source.\"",
            refusal.status().as_u16(),
            refusal.code()
        )),
    }
}

fn try_transfer(state: &State, slot: &Slot, id: &str) -> Result<Outcome, Refusal> {
    let Some(source) = pending(slot, id).map(|copy| copy.source) else {
        return Ok(Outcome::Dropped);
    };
    let began = Instant::now();
    let mut at = 0;
    loop {
        if state.is_stopping() {
            return Ok(Outcome::Dropped);
        }
        let bandwidth = state.settings().copy_bandwidth;
        let step = if bandwidth == 0 {
            STEP
        } else {
            (bandwidth / 50).next_multiple_of(512).clamp(512, STEP)
        };
        // One lock at a time: two copies may run between the same two blobs.
        let piece = {
            let from = state.store.slot(&source.container, &source.blob)?;
            let versions = from.read();
            let blob = versions.get(source.snapshot.as_deref())?;
            if blob.record.version != source.version {
                return Ok(Outcome::Failed(
                    "412 ConditionNotMet \"The source changed while it was copied.\"".into(),
                ));
            }
            blob.next_bytes(at, step)?
        };
        let Some((offset, bytes)) = piece else {
            return Ok(Outcome::Done);
        };
        let end = offset + bytes.len() as u64;
        {
            let mut versions = slot.write();
            let blob = versions.base_mut()?;
            let Some(copy) = blob
                .record
                .copy
                .as_mut()
                .filter(|copy| copy.id == id && copy.status == CopyStatus::Pending)
            else {
                return Ok(Outcome::Dropped);
            };
            copy.done = end;
            blob.fill(offset, &bytes)?;
        }
        at = end;
        if bandwidth > 0 {
            pace(state, began, at, bandwidth);
        }
    }
}

/// Waits until `bytes` may have been copied since `began`.
fn pace(state: &State, began: Instant, bytes: u64, bandwidth: u64) {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(bandwidth);
    let due = began + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
    while !state.is_stopping() {
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        std::thread::sleep(left.min(Duration::from_millis(50)));
    }
}

fn pending(slot: &Slot, id: &str) -> Option<Copy> {
    let versions = slot.read();
    let copy = versions.base.as_ref()?.record.copy.clone()?;
    (copy.id == id && copy.status == CopyStatus::Pending).then_some(copy)
}

fn finish(
    state: &State,
    container: &Container,
    slot: &Slot,
    id: &str,
    outcome: Outcome,
) -> Result<(), Refusal> {
    match outcome {
        Outcome::Dropped => Ok(()),
        Outcome::Done => end(state, container, slot, id, CopyStatus::Success, None),
        Outcome::Failed(why) => end(state, container, slot, id, CopyStatus::Failed, Some(why)),
    }
}

/// Ends the pending copy `id`; one that did not succeed leaves an empty blob.
fn end(
    state: &State,
    container: &Container,
    slot: &Slot,
    id: &str,
    status: CopyStatus,
    description: Option<String>,
) -> Result<(), Refusal> {
    let mut versions = slot.write();
    let Some(blob) = versions.base.as_mut() else {
        return Ok(());
    };
    let mut next = blob.record.clone();
    let Some(copy) = next
        .copy
        .as_mut()
        .filter(|copy| copy.id == id && copy.status == CopyStatus::Pending)
    else {
        return Ok(());
    };
    copy.status = status;
    copy.description = description;
    copy.completed = Some(clock::now());
    if status == CopyStatus::Success {
        copy.done = copy.total;
    } else {
        next.size = 0;
    }
    next.version = state.store.next_version();
    let old = blob.record.size;
    replace(container, blob, next)?;
    if blob.record.size != old {
        blob.resized(old)?;
    }
    Ok(())
}

pub(super) fn abort(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let name = "x-ms-copy-action";
    let action = request.required(name)?;
    if !action.eq_ignore_ascii_case("abort") {
        return Err(refusal::invalid_header(name, action));
    }
    let id = request
        .query("copyid")
        .ok_or_else(|| refusal::invalid_query("copyid", ""))?;
    let (container, slot) = locate(state, request)?;
    {
        let versions = slot.read();
        let record = &versions.get(None)?.record;
        record
            .lease
            .check_write(request.header("x-ms-lease-id"), request.now)?;
        match &record.copy {
            Some(copy) if copy.status == CopyStatus::Pending && copy.id != id => {
                return Err((&refusal::COPY_ID_MISMATCH).into());
            }
            Some(copy) if copy.status == CopyStatus::Pending => {}
            _ => return Err((&refusal::NO_PENDING_COPY).into()),
        }
    }
    end(state, &container, &slot, id, CopyStatus::Aborted, None)?;
    Ok(Reply::new(StatusCode::NO_CONTENT))
}
