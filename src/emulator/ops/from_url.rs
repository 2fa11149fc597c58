//! Put Page From URL, from blobs of this account.

use std::sync::Arc;

use hyper::StatusCode;

use super::page::{guard_page_write, page_range};
use super::{MAX_PUT_PAGE, changed, end_lease, locate, source};
use crate::emulator::checksum;
use crate::emulator::conditions::check_source;
use crate::emulator::refusal::{self, Refusal};
use crate::emulator::reply::Reply;
use crate::emulator::request::{Request, parse_range};
use crate::emulator::service::State;

pub(super) fn put(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let range = page_range(request)?;
    let len = range.end - range.start;
    let name = "x-ms-source-range";
    let text = request.required(name)?;
    let Some((first, Some(last))) = parse_range(text) else {
        return Err(refusal::invalid_header(name, text));
    };
    if len > MAX_PUT_PAGE {
        return Err((&refusal::REQUEST_BODY_TOO_LARGE).into());
    }
    if last - first + 1 != len || request.body_len > 0 {
        return Err(refusal::invalid_header(name, text));
    }
    let source = source::resolve(state, request, false)?;
    let pieces = {
        let versions = source.slot.read();
        let blob = versions
            .get(source.snapshot.as_deref())
            .map_err(|_| &refusal::CANNOT_VERIFY_COPY_SOURCE)?;
        check_source(request, &blob.record)?;
        if last >= blob.record.size {
            return Err((&refusal::INVALID_RANGE).into());
        }
        [blob.read(first, usize::try_from(len).map_err(std::io::Error::other)?)?]
    };
    let md5 = checksum::md5(&pieces);
    let crc = checksum::crc64(&pieces);
    if let Some(sent) = request.header("x-ms-source-content-md5")
        && sent != md5
    {
        return Err((&refusal::MD5_MISMATCH).into());
    }
    if let Some(sent) = request.header("x-ms-source-content-crc64")
        && sent != crc
    {
        return Err((&refusal::CRC64_MISMATCH).into());
    }
    let (container, slot) = locate(state, request)?;
    let mut versions = slot.write();
    let blob = versions.base_mut()?;
    let ends = guard_page_write(request, &blob.record, &range)?;
    end_lease(&container, blob, ends)?;
    blob.write_pages(range.start, &pieces, len, state.store.next_version())?;
    Ok(changed(StatusCode::CREATED, &blob.record)
        .header("x-ms-content-crc64", crc)
        .fixed("x-ms-request-server-encrypted", "true"))
}
