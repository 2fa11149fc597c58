//! Snapshot Blob and Delete Blob.

use std::sync::Arc;

use hyper::StatusCode;

use super::{guard_write, locate};
use crate::emulator::blob::Blob;
use crate::emulator::clock;
use crate::emulator::conditions::{self, Access};
use crate::emulator::lease::Lease;
use crate::emulator::record::{Record, modified};
use crate::emulator::refusal::{self, Refusal};
use crate::emulator::reply::Reply;
use crate::emulator::request::Request;
use crate::emulator::service::State;
use crate::emulator::store::{Container, Versions};

pub(super) fn create(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let metadata = request.metadata()?;
    let (container, slot) = locate(state, request)?;
    let mut versions = slot.write_long();
    let base = versions.base_mut()?;
    conditions::check(request, Some(&base.record), Access::Write)?;
    base.record
        .lease
        .check_read(request.header("x-ms-lease-id"), request.now)?;
    if base.record.copy_pending() {
        return Err((&refusal::PENDING_COPY).into());
    }
    let version = state.store.next_version();
    let time = clock::iso(modified(version));
    let mut record = Record {
        snapshot: Some(time.clone()),
        files: uuid::Uuid::new_v4().simple().to_string(),
        created: request.now,
        lease: Lease::Available,
        ..base.record.clone()
    };
    if !metadata.is_empty() {
        record.metadata = metadata;
        record.version = version;
    }
    let (data, map) = container.new_files(&record.files)?;
    let mut snapshot = Blob::create(record, data, map)?;
    snapshot.copy_of(base)?;
    container.commit(&snapshot.record)?;
    base.snapshot_taken()?;
    let reply = Reply::new(StatusCode::CREATED)
        .version(&snapshot.record)
        .header("x-ms-snapshot", time.clone())
        .fixed("x-ms-request-server-encrypted", "true");
    versions.snapshots.insert(time, snapshot);
    Ok(reply)
}

/// What `x-ms-delete-snapshots` asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Snapshots {
    Refuse,
    Include,
    Only,
}

pub(super) fn delete(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let name = "x-ms-delete-snapshots";
    let snapshots = match request.header(name) {
        None => Snapshots::Refuse,
        Some("include") => Snapshots::Include,
        Some("only") => Snapshots::Only,
        Some(other) => return Err(refusal::invalid_header(name, other)),
    };
    let (container, slot) = locate(state, request)?;
    let mut versions = slot.write();
    // Dropped after the lock: freeing large files takes its time.
    let gone = match request.snapshot() {
        Some(_) if snapshots != Snapshots::Refuse => {
            return Err(refusal::invalid_header(name, "with a snapshot"));
        }
        Some(time) => {
            let record = &versions.get(Some(time))?.record;
            conditions::check(request, Some(record), Access::Write)?;
            vec![remove_snapshot(&container, &mut versions, time)?]
        }
        None => delete_blob(&container, &mut versions, request, snapshots)?,
    };
    drop(versions);
    drop(gone);
    Ok(Reply::new(StatusCode::ACCEPTED).fixed("x-ms-delete-type-permanent", "true"))
}

fn delete_blob(
    container: &Container,
    versions: &mut Versions,
    request: &Request,
    snapshots: Snapshots,
) -> Result<Vec<Blob>, Refusal> {
    let record = &versions.get(None)?.record;
    if snapshots == Snapshots::Only {
        conditions::check(request, Some(record), Access::Write)?;
    } else {
        guard_write(request, record)?;
        if snapshots == Snapshots::Refuse && !versions.snapshots.is_empty() {
            return Err((&refusal::SNAPSHOTS_PRESENT).into());
        }
    }
    let mut gone = Vec::new();
    // Newest first: then no snapshot has to hand on what it touched.
    while let Some((time, snapshot)) = versions.snapshots.pop_last() {
        debug_assert_eq!(snapshot.record.snapshot.as_ref(), Some(&time));
        container.remove(&snapshot.record)?;
        gone.push(snapshot);
    }
    if snapshots == Snapshots::Only {
        if let Some(base) = &mut versions.base {
            base.tracking = false;
        }
    } else if let Some(base) = versions.base.take() {
        container.remove(&base.record)?;
        gone.push(base);
    }
    Ok(gone)
}

/// Takes one snapshot out; what it touched counts for the next one.
fn remove_snapshot(
    container: &Container,
    versions: &mut Versions,
    time: &str,
) -> Result<Blob, Refusal> {
    let gone = versions
        .snapshots
        .remove(time)
        .ok_or(&refusal::BLOB_NOT_FOUND)?;
    let lineage = &gone.record.lineage;
    let next = versions
        .snapshots
        .range_mut(time.to_owned()..)
        .map(|(_, blob)| blob)
        .chain(versions.base.as_mut())
        .find(|blob| blob.record.lineage == *lineage);
    if let Some(next) = next {
        next.inherit_touched(&gone)?;
    }
    container.remove(&gone.record)?;
    Ok(gone)
}
