//! Create, Get Properties and Delete Container.

use std::sync::Arc;

use hyper::StatusCode;
use hyper::header;

use crate::emulator::clock;
use crate::emulator::record::{ContainerRecord, PublicAccess, etag, modified};
use crate::emulator::refusal::{self, Refusal};
use crate::emulator::reply::Reply;
use crate::emulator::request::Request;
use crate::emulator::service::State;

pub(super) fn create(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let name = &request.target.container;
    check_name(name)?;
    let public = match request.header("x-ms-blob-public-access") {
        None => PublicAccess::None,
        Some("blob") => PublicAccess::Blob,
        Some("container") => PublicAccess::Container,
        Some(other) => return Err(refusal::invalid_header("x-ms-blob-public-access", other)),
    };
    let record = ContainerRecord {
        name: name.clone(),
        version: state.store.next_version(),
        metadata: request.metadata()?,
        public,
    };
    let reply = versioned(StatusCode::CREATED, &record);
    state.store.create_container(record)?;
    Ok(reply)
}

/// "Naming and referencing containers": 3 to 63 lower-case letters, digits and
/// single hyphens inside; or one of the special names.
fn check_name(name: &str) -> Result<(), Refusal> {
    if matches!(name, "$root" | "$logs" | "$web") {
        return Ok(());
    }
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let edge = |c: Option<char>| c.is_some_and(|c| c != '-');
    let good = (3..=63).contains(&name.len())
        && name.chars().all(plain)
        && edge(name.chars().next())
        && edge(name.chars().next_back())
        && !name.contains("--");
    if good {
        Ok(())
    } else {
        Err((&refusal::INVALID_RESOURCE_NAME).into())
    }
}

pub(super) fn properties(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let container = state.store.container(&request.target.container)?;
    let record = &container.record;
    let mut reply = versioned(StatusCode::OK, record)
        .fixed("x-ms-lease-status", "unlocked")
        .fixed("x-ms-lease-state", "available")
        .fixed("x-ms-has-immutability-policy", "false")
        .fixed("x-ms-has-legal-hold", "false");
    match record.public {
        PublicAccess::None => {}
        PublicAccess::Blob => reply = reply.fixed("x-ms-blob-public-access", "blob"),
        PublicAccess::Container => reply = reply.fixed("x-ms-blob-public-access", "container"),
    }
    super::read::add_metadata(&mut reply, &record.metadata);
    Ok(reply)
}

pub(super) fn delete(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    state.store.delete_container(&request.target.container)?;
    Ok(Reply::new(StatusCode::ACCEPTED))
}

fn versioned(status: StatusCode, record: &ContainerRecord) -> Reply {
    let mut reply = Reply::new(status).header("etag", etag(record.version));
    reply.headers.insert(
        header::LAST_MODIFIED,
        clock::http_date_of(modified(record.version)),
    );
    reply
}
