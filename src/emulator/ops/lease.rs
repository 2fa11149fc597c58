//! Lease Blob: acquire, renew, change, release, break. None of them changes the
//! entity tag.

use std::sync::Arc;

use hyper::StatusCode;

use super::{locate, replace};
use crate::emulator::conditions::{self, Access};
use crate::emulator::lease::Lease;
use crate::emulator::record::Record;
use crate::emulator::refusal::{self, Refusal};
use crate::emulator::reply::Reply;
use crate::emulator::request::Request;
use crate::emulator::service::State;

/// Applies `step` to the lease under the blob's lock, stores the result and
/// answers with the blob's version.
fn change_lease<T>(
    state: &State,
    request: &Request,
    status: StatusCode,
    step: impl FnOnce(&Lease) -> Result<(Lease, T), Refusal>,
) -> Result<(Reply, T), Refusal> {
    let (container, slot) = locate(state, request)?;
    let mut versions = slot.write();
    let blob = versions.base_mut()?;
    conditions::check(request, Some(&blob.record), Access::Write)?;
    let (lease, extra) = step(&blob.record.lease)?;
    let next = Record {
        lease,
        ..blob.record.clone()
    };
    replace(&container, blob, next)?;
    Ok((Reply::new(status).version(&blob.record), extra))
}

/// A lease id: a GUID in any of its usual forms.
fn id<'a>(request: &'a Request, name: &str) -> Result<&'a str, Refusal> {
    let text = request.required(name)?;
    check_id(name, text)
}

fn check_id<'a>(name: &str, text: &'a str) -> Result<&'a str, Refusal> {
    uuid::Uuid::try_parse(text)
        .map(|_| text)
        .map_err(|_| refusal::invalid_header(name, text))
}

pub(super) fn acquire(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let duration = request.required("x-ms-lease-duration")?;
    let seconds = match duration.parse::<i64>() {
        Ok(-1) => None,
        Ok(seconds @ 15..=60) => u32::try_from(seconds).ok(),
        _ => return Err(refusal::invalid_header("x-ms-lease-duration", duration)),
    };
    let name = "x-ms-proposed-lease-id";
    let proposed = match request.header(name) {
        Some(text) => check_id(name, text)?.to_owned(),
        None => uuid::Uuid::new_v4().to_string(),
    };
    let (reply, ()) = change_lease(state, request, StatusCode::CREATED, |lease| {
        Ok((lease.acquire(&proposed, seconds, request.now)?, ()))
    })?;
    Ok(reply.header("x-ms-lease-id", proposed))
}

pub(super) fn renew(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let id = id(request, "x-ms-lease-id")?;
    let (reply, ()) = change_lease(state, request, StatusCode::OK, |lease| {
        Ok((lease.renew(id, request.now)?, ()))
    })?;
    Ok(reply.header("x-ms-lease-id", id.to_owned()))
}

pub(super) fn change(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let current = id(request, "x-ms-lease-id")?;
    let proposed = id(request, "x-ms-proposed-lease-id")?;
    let (reply, ()) = change_lease(state, request, StatusCode::OK, |lease| {
        Ok((lease.change(current, proposed, request.now)?, ()))
    })?;
    Ok(reply.header("x-ms-lease-id", proposed.to_owned()))
}

pub(super) fn release(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let id = id(request, "x-ms-lease-id")?;
    let (reply, ()) = change_lease(state, request, StatusCode::OK, |lease| {
        Ok((lease.release(id)?, ()))
    })?;
    Ok(reply)
}

pub(super) fn break_(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let name = "x-ms-lease-break-period";
    let period = request
        .number(name)?
        .map(|seconds| match u32::try_from(seconds) {
            Ok(seconds @ 0..=60) => Ok(seconds),
            _ => Err(refusal::invalid_header(name, &seconds.to_string())),
        })
        .transpose()?;
    let (reply, left) = change_lease(state, request, StatusCode::ACCEPTED, |lease| {
        lease.break_(period, request.now)
    })?;
    Ok(reply.number("x-ms-lease-time", left))
}
