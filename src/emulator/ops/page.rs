//! Put Page: update and clear.

use std::sync::Arc;

use hyper::StatusCode;

use super::{MAX_PUT_PAGE, changed, end_lease, guard_write, locate, require_pages};
use crate::emulator::checksum;
use crate::emulator::conditions::check_sequence_number;
use crate::emulator::pages::PAGE;
use crate::emulator::record::Record;
use crate::emulator::refusal::{self, Refusal};
use crate::emulator::reply::Reply;
use crate::emulator::request::Request;
use crate::emulator::service::State;

pub(super) fn put(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let range = page_range(request)?;
    let len = range.end - range.start;
    if len > MAX_PUT_PAGE {
        return Err((&refusal::REQUEST_BODY_TOO_LARGE).into());
    }
    if request.body_len != len {
        let sent = request.body_len.to_string();
        return Err(refusal::invalid_header("Content-Length", &sent));
    }
    let echo = check_sums(request)?;
    let (container, slot) = locate(state, request)?;
    let mut versions = slot.write();
    let blob = versions.base_mut()?;
    let ends = guard_page_write(request, &blob.record, &range)?;
    end_lease(&container, blob, ends)?;
    blob.write_pages(range.start, &request.body, len, state.store.next_version())?;
    let reply = changed(StatusCode::CREATED, &blob.record);
    drop(versions);
    Ok(reply
        .header(echo.0, echo.1)
        .fixed("x-ms-request-server-encrypted", "true"))
}

pub(super) fn clear(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let range = page_range(request)?;
    if request.body_len > 0 {
        let sent = request.body_len.to_string();
        return Err(refusal::invalid_header("Content-Length", &sent));
    }
    let (container, slot) = locate(state, request)?;
    let mut versions = slot.write();
    let blob = versions.base_mut()?;
    let ends = guard_page_write(request, &blob.record, &range)?;
    end_lease(&container, blob, ends)?;
    blob.clear_pages(range, state.store.next_version())?;
    Ok(changed(StatusCode::CREATED, &blob.record))
}

/// The range of a page write: required, closed, and on page boundaries.
pub(super) fn page_range(request: &Request) -> Result<std::ops::Range<u64>, Refusal> {
    let (first, last) = request
        .range()?
        .ok_or_else(|| refusal::missing_header("x-ms-range"))?;
    let last = last.ok_or(&refusal::INVALID_PAGE_RANGE)?;
    let end = last + 1;
    if !first.is_multiple_of(PAGE) || !end.is_multiple_of(PAGE) {
        return Err((&refusal::INVALID_PAGE_RANGE).into());
    }
    Ok(first..end)
}

/// All checks of a page write against the blob as it is now, in the order:
/// type, conditional headers, lease, sequence number, size.
pub(super) fn guard_page_write(
    request: &Request,
    record: &Record,
    range: &std::ops::Range<u64>,
) -> Result<bool, Refusal> {
    require_pages(record)?;
    let ends = guard_write(request, record)?;
    check_sequence_number(request, record.sequence_number)?;
    if range.end > record.size {
        return Err((&refusal::INVALID_PAGE_RANGE).into());
    }
    Ok(ends)
}

/// Checks the body against the sums sent with it, and gives the one to echo:
/// the MD5 when one was sent, else the CRC.
pub(super) fn check_sums(request: &Request) -> Result<(&'static str, String), Refusal> {
    let sent = request.header("x-ms-content-crc64");
    let crc = checksum::crc64(&request.body);
    if let Some(sent) = sent {
        if !checksum::is_base64_of(sent, 8) {
            return Err(refusal::invalid_header("x-ms-content-crc64", sent));
        }
        if sent != crc {
            return Err(Refusal::from(&refusal::CRC64_MISMATCH)
                .with("UserSpecifiedCrc64", sent)
                .with("ServerCalculatedCrc64", crc));
        }
    }
    let Some(sent) = request.header("content-md5") else {
        return Ok(("x-ms-content-crc64", crc));
    };
    if !checksum::is_base64_of(sent, 16) {
        return Err((&refusal::INVALID_MD5).into());
    }
    let md5 = checksum::md5(&request.body);
    if sent != md5 {
        return Err(Refusal::from(&refusal::MD5_MISMATCH)
            .with("UserSpecifiedMd5", sent)
            .with("ServerCalculatedMd5", md5));
    }
    Ok(("content-md5", md5))
}
