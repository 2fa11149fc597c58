//! Get Blob, Get Blob Properties, Get Blob Metadata.

use std::collections::VecDeque;
use std::sync::Arc;

use hyper::header::{HeaderName, HeaderValue};
use hyper::{HeaderMap, StatusCode};

use super::{MAX_PUT_PAGE, guard_read};
use crate::blob::LeaseState;
use crate::emulator::blob::Blob;
use crate::emulator::checksum;
use crate::emulator::clock;
use crate::emulator::lease::{state_name, status_name};
use crate::emulator::record::{Kind, Record};
use crate::emulator::refusal::{self, Refusal};
use crate::emulator::reply::{BlobReader, Reply, Source};
use crate::emulator::request::Request;
use crate::emulator::service::State;

/// Reads up to this go out in one piece, read under one lock.
const ONE_PIECE: u64 = 4 << 20;

pub(super) fn get(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let target = &request.target;
    let range = request.range()?;
    let slot = state.store.slot(&target.container, &target.blob)?;
    let versions = slot.read();
    let blob = versions.get(request.snapshot())?;
    let record = &blob.record;
    guard_read(request, record)?;
    let (first, len) = clip(range, record.size)?;
    let status = match range {
        Some(_) => StatusCode::PARTIAL_CONTENT,
        None => StatusCode::OK,
    };
    let mut reply = describe(Reply::new(status), record, request.now);
    if range.is_some() {
        let last = first + len - 1;
        reply = reply.header(
            "content-range",
            format!("bytes {first}-{last}/{}", record.size),
        );
    }
    if let Some(md5) = &record.content.md5 {
        let name = match range {
            Some(_) => "x-ms-blob-content-md5",
            None => "content-md5",
        };
        reply = reply.header(name, md5.clone());
    }
    let wants = wanted_sum(request, range.is_some(), len)?;
    if len > ONE_PIECE {
        let reader = BlobReader {
            slot: Arc::clone(&slot),
            snapshot: request.snapshot().map(str::to_owned),
            files: record.files.clone(),
            at: first,
            end: first + len,
        };
        return Ok(reply.body(Source::Blob(reader), len));
    }
    let bytes = read_piece(blob, first, len)?;
    drop(versions);
    let pieces = [bytes];
    reply = match wants {
        Some(Sum::Md5) => reply.header("content-md5", checksum::md5(&pieces)),
        Some(Sum::Crc64) => reply.header("x-ms-content-crc64", checksum::crc64(&pieces)),
        None => reply,
    };
    Ok(reply.body(Source::Pieces(VecDeque::from(pieces)), len))
}

fn read_piece(blob: &Blob, first: u64, len: u64) -> Result<bytes::Bytes, Refusal> {
    let len = usize::try_from(len).map_err(std::io::Error::other)?;
    Ok(blob.read(first, len)?)
}

/// The bytes asked for, cut at the end: first byte and length.
fn clip(range: Option<(u64, Option<u64>)>, size: u64) -> Result<(u64, u64), Refusal> {
    let Some((first, last)) = range else {
        return Ok((0, size));
    };
    if first >= size {
        let whole = HeaderValue::from_str(&format!("bytes */{size}"))
            .unwrap_or(HeaderValue::from_static("bytes */0"));
        return Err(
            Refusal::from(&refusal::INVALID_RANGE).header(hyper::header::CONTENT_RANGE, whole)
        );
    }
    let end = last.map_or(size, |last| size.min(last + 1));
    Ok((first, end - first))
}

enum Sum {
    Md5,
    Crc64,
}

/// `x-ms-range-get-content-md5` and `-crc64`: one of both, with a range, up to
/// 4 MiB.
fn wanted_sum(request: &Request, ranged: bool, len: u64) -> Result<Option<Sum>, Refusal> {
    let names = ["x-ms-range-get-content-md5", "x-ms-range-get-content-crc64"];
    let wanted = names.map(|name| {
        request
            .header(name)
            .is_some_and(|value| value.eq_ignore_ascii_case("true"))
    });
    let (name, sum) = match wanted {
        [false, false] => return Ok(None),
        [true, false] => (names[0], Sum::Md5),
        [false, true] => (names[1], Sum::Crc64),
        [true, true] => return Err(refusal::invalid_header(names[0], "true")),
    };
    if !ranged || len > MAX_PUT_PAGE {
        return Err(refusal::invalid_header(name, "true"));
    }
    Ok(Some(sum))
}

pub(super) fn properties(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let target = &request.target;
    let slot = state.store.slot(&target.container, &target.blob)?;
    let versions = slot.read();
    let record = &versions.get(request.snapshot())?.record;
    guard_read(request, record)?;
    let mut reply = describe(Reply::new(StatusCode::OK), record, request.now)
        .number("content-length", record.size)
        .fixed("x-ms-access-tier-inferred", "true");
    if let Some(md5) = &record.content.md5 {
        reply = reply.header("content-md5", md5.clone());
    }
    Ok(reply)
}

pub(super) fn metadata(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let target = &request.target;
    let slot = state.store.slot(&target.container, &target.blob)?;
    let versions = slot.read();
    let record = &versions.get(request.snapshot())?.record;
    guard_read(request, record)?;
    let mut reply = Reply::new(StatusCode::OK).version(record);
    add_metadata(&mut reply, &record.metadata);
    Ok(reply)
}

/// `x-ms-meta-*`.
pub(super) fn add_metadata(reply: &mut Reply, metadata: &[(String, String)]) {
    for (name, value) in metadata {
        let name = HeaderName::try_from(format!("x-ms-meta-{name}"));
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_str(value)) {
            reply.headers.insert(name, value);
        }
    }
}

/// The headers that describe a blob, all but its length and MD5.
fn describe(reply: Reply, record: &Record, now: u64) -> Reply {
    let mut reply = reply
        .version(record)
        .fixed("accept-ranges", "bytes")
        .fixed("x-ms-blob-type", record.kind.name())
        .fixed("x-ms-server-encrypted", "true");
    insert(
        &mut reply.headers,
        "x-ms-creation-time",
        clock::http_date_of(record.created),
    );
    if record.kind == Kind::PageBlob {
        reply = reply.number("x-ms-blob-sequence-number", record.sequence_number);
    }
    if record.snapshot.is_none() {
        let state = record.lease.state(now);
        reply = reply
            .fixed("x-ms-lease-state", state_name(state))
            .fixed("x-ms-lease-status", status_name(state));
        if state == LeaseState::Leased {
            let duration = if record.lease.is_infinite() {
                "infinite"
            } else {
                "fixed"
            };
            reply = reply.fixed("x-ms-lease-duration", duration);
        }
    }
    let content = &record.content;
    reply = match &content.kind {
        Some(kind) => reply.header("content-type", kind.clone()),
        None => reply.fixed("content-type", "application/octet-stream"),
    };
    for (name, value) in [
        ("content-encoding", &content.encoding),
        ("content-language", &content.language),
        ("cache-control", &content.cache_control),
        ("content-disposition", &content.disposition),
    ] {
        if let Some(value) = value {
            reply = reply.header(name, value.clone());
        }
    }
    add_metadata(&mut reply, &record.metadata);
    describe_copy(reply, record)
}

fn describe_copy(reply: Reply, record: &Record) -> Reply {
    let Some(copy) = &record.copy else {
        return reply;
    };
    let mut reply = reply
        .header("x-ms-copy-id", copy.id.clone())
        .fixed("x-ms-copy-status", copy.status.name())
        .header("x-ms-copy-source", copy.source_url.clone())
        .header(
            "x-ms-copy-progress",
            format!("{}/{}", copy.done, copy.total),
        );
    if let Some(completed) = copy.completed {
        insert(
            &mut reply.headers,
            "x-ms-copy-completion-time",
            clock::http_date_of(completed),
        );
    }
    match &copy.description {
        Some(text) => reply.header("x-ms-copy-status-description", text.clone()),
        None => reply,
    }
}

fn insert(headers: &mut HeaderMap, name: &'static str, value: HeaderValue) {
    headers.insert(HeaderName::from_static(name), value);
}
