//! Put Blob: a new page blob, or a block or append blob with its content.

use std::sync::Arc;

use hyper::StatusCode;

use super::changed;
use crate::emulator::blob::{Blob, MAX_PAGE_BLOB};
use crate::emulator::checksum;
use crate::emulator::conditions::{self, Access};
use crate::emulator::pages::PAGE;
use crate::emulator::record::{Content, Kind, Record};
use crate::emulator::refusal::{self, Refusal};
use crate::emulator::reply::Reply;
use crate::emulator::request::Request;
use crate::emulator::service::State;
use crate::emulator::store::{Container, Versions};

pub(super) fn put_blob(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let text = request.required("x-ms-blob-type")?;
    let kind = Kind::parse(text).ok_or_else(|| refusal::invalid_header("x-ms-blob-type", text))?;
    let size = match kind {
        Kind::PageBlob => page_blob_size(request)?,
        Kind::BlockBlob => request.body_len,
        Kind::AppendBlob => 0,
    };
    if kind != Kind::BlockBlob && request.body_len > 0 {
        let len = request.body_len.to_string();
        return Err(refusal::invalid_header("Content-Length", &len));
    }
    super::page::check_sums(request)?;
    let sequence_number = match kind {
        Kind::PageBlob => sequence_number(request)?.unwrap_or(0),
        _ => 0,
    };
    let metadata = request.metadata()?;
    if kind == Kind::PageBlob {
        check_tier(state, request)?;
    }
    let container = state.store.container(&request.target.container)?;
    let (slot, _alive) = container.slot_for_create(&request.target.blob)?;
    let mut versions = slot.write();
    check_overwrite(request, &versions)?;
    let id = uuid::Uuid::new_v4().simple().to_string();
    let record = Record {
        name: request.target.blob.clone(),
        snapshot: None,
        kind,
        files: id.clone(),
        lineage: id,
        size,
        version: state.store.next_version(),
        created: request.now,
        sequence_number,
        content: content(request, kind),
        metadata,
        lease: kept_lease(&versions, request),
        copy: None,
    };
    let reply = changed(StatusCode::CREATED, &record)
        .header("x-ms-content-crc64", checksum::crc64(&request.body))
        .fixed("x-ms-request-server-encrypted", "true");
    let old = install(&container, &mut versions, record, |blob| {
        if kind == Kind::BlockBlob {
            blob.write_content(&request.body)?;
        }
        Ok(())
    })?;
    drop(versions);
    // Freeing a large file takes its time; nobody has to wait for it.
    drop(old);
    Ok(reply)
}

/// A page blob has a tier in a premium account alone.
pub(super) fn check_tier(state: &State, request: &Request) -> Result<(), Refusal> {
    const TIERS: [&str; 9] = ["P4", "P6", "P10", "P15", "P20", "P30", "P40", "P50", "P60"];
    let name = "x-ms-access-tier";
    match request.header(name) {
        Some(tier) if !state.settings().premium || !TIERS.contains(&tier) => {
            Err(refusal::invalid_header(name, tier))
        }
        _ => Ok(()),
    }
}

/// Checks that a new blob may take the place of the one there is, if any.
pub(super) fn check_overwrite(request: &Request, versions: &Versions) -> Result<(), Refusal> {
    let existing = versions.base.as_ref().map(|blob| &blob.record);
    if existing.is_some() && request.header("if-none-match") == Some("*") {
        return Err((&refusal::BLOB_ALREADY_EXISTS).into());
    }
    conditions::check(request, existing, Access::Write)?;
    let lease = request.header("x-ms-lease-id");
    let Some(record) = existing else {
        return match lease {
            Some(_) => Err((&refusal::LEASE_NOT_PRESENT_WITH_BLOB).into()),
            None => Ok(()),
        };
    };
    record.lease.check_write(lease, request.now)?;
    if record.copy_pending() {
        return Err((&refusal::PENDING_COPY).into());
    }
    if !request.may_overwrite {
        return Err((&refusal::AUTHORIZATION_PERMISSION_MISMATCH).into());
    }
    Ok(())
}

/// The lease of the blob that is overwritten goes on when the writer named it.
pub(super) fn kept_lease(versions: &Versions, request: &Request) -> crate::emulator::lease::Lease {
    match (&versions.base, request.header("x-ms-lease-id")) {
        (Some(blob), Some(_)) => blob.record.lease.clone(),
        _ => Default::default(),
    }
}

/// Makes a blob of `record`, has `fill` fill it and puts it in place of the
/// one there is, which it gives back.
pub(super) fn install(
    container: &Container,
    versions: &mut Versions,
    record: Record,
    fill: impl FnOnce(&mut Blob) -> std::io::Result<()>,
) -> Result<Option<Blob>, Refusal> {
    let (data, map) = container.new_files(&record.files)?;
    let mut blob = Blob::create(record, data, map)?;
    fill(&mut blob)?;
    container.commit(&blob.record)?;
    let old = versions.base.replace(blob);
    if let Some(old) = &old {
        container.remove_files(&old.record.files)?;
    }
    Ok(old)
}

fn page_blob_size(request: &Request) -> Result<u64, Refusal> {
    let name = "x-ms-blob-content-length";
    request.required(name)?;
    checked_size(request, name)
}

/// A page blob's size: whole pages, at most 8 TiB.
pub(super) fn checked_size(request: &Request, name: &str) -> Result<u64, Refusal> {
    let size = request.number(name)?.unwrap_or(0);
    if size > MAX_PAGE_BLOB || !size.is_multiple_of(PAGE) {
        return Err(refusal::invalid_header(name, &size.to_string()));
    }
    Ok(size)
}

/// `x-ms-blob-sequence-number`, 0 to 2^63 - 1.
pub(super) fn sequence_number(request: &Request) -> Result<Option<u64>, Refusal> {
    let name = "x-ms-blob-sequence-number";
    match request.number(name)? {
        Some(number) if i64::try_from(number).is_err() => {
            Err(refusal::invalid_header(name, &number.to_string()))
        }
        number => Ok(number),
    }
}

fn content(request: &Request, kind: Kind) -> Content {
    let get = |own: &str, plain: &str| {
        request
            .header(own)
            .or_else(|| request.header(plain))
            .map(str::to_owned)
    };
    let md5 = match kind {
        Kind::BlockBlob => Some(checksum::md5(&request.body)),
        _ => request.header("x-ms-blob-content-md5").map(str::to_owned),
    };
    Content {
        kind: get("x-ms-blob-content-type", "content-type"),
        encoding: get("x-ms-blob-content-encoding", "content-encoding"),
        language: get("x-ms-blob-content-language", "content-language"),
        md5,
        cache_control: get("x-ms-blob-cache-control", "cache-control"),
        disposition: get("x-ms-blob-content-disposition", "content-disposition"),
    }
}
