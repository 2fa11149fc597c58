//! The operations of the service: each is one function from a request to an
//! answer. They run to their end without waiting for anything but files and the
//! lock of one blob, so conditions and effect are one step for everybody else.

mod container;
mod copy;
mod from_url;
mod lease;
mod list;
mod page;
mod properties;
mod put;
mod ranges;
mod read;
mod snapshot;
mod source;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use hyper::StatusCode;

use super::blob::Blob;
use super::conditions::{self, Access};
use super::lease::Lease;
use super::operation::Operation;
use super::record::{Kind, Record};
use super::refusal::{self, Refusal};
use super::reply::Reply;
use super::request::Request;
use super::service::State;
use super::store::{Container, Slot};

pub(super) use copy::resume as resume_copies;

/// Most bytes of one Put Page, and of a read with a checksum.
pub(super) const MAX_PUT_PAGE: u64 = 4 << 20;

/// Clears longer than this go to a thread that may block.
const LONG_CLEAR: u64 = 64 << 20;

/// Executes `operation`.
pub(super) fn run(
    state: &Arc<State>,
    operation: Operation,
    request: &Request,
) -> Result<Reply, Refusal> {
    match operation {
        Operation::ListContainers => list::containers(state, request),
        Operation::CreateContainer => container::create(state, request),
        Operation::GetContainerProperties => container::properties(state, request),
        Operation::DeleteContainer => container::delete(state, request),
        Operation::ListBlobs => list::blobs(state, request),
        Operation::PutBlob => put::put_blob(state, request),
        Operation::PutPage => page::put(state, request),
        Operation::ClearPages => page::clear(state, request),
        Operation::PutPageFromUrl => from_url::put(state, request),
        Operation::GetBlob => read::get(state, request),
        Operation::GetBlobProperties => read::properties(state, request),
        Operation::SetBlobProperties => properties::set(state, request),
        Operation::GetBlobMetadata => read::metadata(state, request),
        Operation::SetBlobMetadata => properties::set_metadata(state, request),
        Operation::GetPageRanges => ranges::get(state, request),
        Operation::AcquireLease => lease::acquire(state, request),
        Operation::RenewLease => lease::renew(state, request),
        Operation::ChangeLease => lease::change(state, request),
        Operation::ReleaseLease => lease::release(state, request),
        Operation::BreakLease => lease::break_(state, request),
        Operation::SnapshotBlob => snapshot::create(state, request),
        Operation::CopyBlob => copy::start(state, request),
        Operation::AbortCopy => copy::abort(state, request),
        Operation::DeleteBlob => snapshot::delete(state, request),
    }
}

/// Must it run on a thread that may block? True for what moves or frees many
/// bytes, and for everything that would wait for such an operation.
pub(super) fn may_block(state: &State, operation: Operation, request: &Request) -> bool {
    match operation {
        Operation::SnapshotBlob
        | Operation::DeleteBlob
        | Operation::DeleteContainer
        | Operation::ListBlobs
        | Operation::PutBlob
        | Operation::CopyBlob
        | Operation::PutPageFromUrl => true,
        Operation::ListContainers
        | Operation::CreateContainer
        | Operation::GetContainerProperties => false,
        Operation::ClearPages
            if request.range().is_ok_and(|range| {
                range.is_some_and(|(first, last)| last.is_none_or(|last| last - first > LONG_CLEAR))
            }) =>
        {
            true
        }
        _ => state
            .store
            .slot(&request.target.container, &request.target.blob)
            .is_ok_and(|slot| slot.busy.load(Ordering::Acquire)),
    }
}

/// The container and the slot a request is about.
fn locate(state: &State, request: &Request) -> Result<(Arc<Container>, Arc<Slot>), Refusal> {
    let container = state.store.container(&request.target.container)?;
    let slot = container
        .slots()
        .blobs
        .get(&request.target.blob)
        .cloned()
        .ok_or(&refusal::BLOB_NOT_FOUND)?;
    Ok((container, slot))
}

/// Checks that a read may go on: conditional headers, then the lease when one
/// is named.
fn guard_read(request: &Request, record: &Record) -> Result<(), Refusal> {
    conditions::check(request, Some(record), Access::Read)?;
    record
        .lease
        .check_read(request.header("x-ms-lease-id"), request.now)
}

/// Checks that a write may go on: conditional headers, then the lease, then
/// that no copy is under way. Says whether the write ends a dead lease.
fn guard_write(request: &Request, record: &Record) -> Result<bool, Refusal> {
    if let Some(time) = request.snapshot() {
        return Err(refusal::invalid_query("snapshot", time));
    }
    conditions::check(request, Some(record), Access::Write)?;
    let ends = record
        .lease
        .check_write(request.header("x-ms-lease-id"), request.now)?;
    if record.copy_pending() {
        return Err((&refusal::PENDING_COPY).into());
    }
    Ok(ends)
}

fn require_pages(record: &Record) -> Result<(), Refusal> {
    if record.kind == Kind::PageBlob {
        Ok(())
    } else {
        Err((&refusal::INVALID_BLOB_TYPE).into())
    }
}

/// Ends a dead lease before a write that does not name it.
fn end_lease(container: &Container, blob: &mut Blob, ends: bool) -> Result<(), Refusal> {
    if !ends {
        return Ok(());
    }
    let mut next = blob.record.clone();
    next.lease = Lease::Available;
    replace(container, blob, next)
}

/// Stores `next` as the record of `blob`.
fn replace(container: &Container, blob: &mut Blob, next: Record) -> Result<(), Refusal> {
    container.commit(&next)?;
    blob.record = next;
    Ok(())
}

/// The answer to a change: entity tag, time, and a page blob's sequence number.
fn changed(status: StatusCode, record: &Record) -> Reply {
    let reply = Reply::new(status).version(record);
    if record.kind == Kind::PageBlob {
        reply.number("x-ms-blob-sequence-number", record.sequence_number)
    } else {
        reply
    }
}
