//! Set Blob Properties (size, sequence number, content headers) and Set Blob
//! Metadata.

use std::sync::Arc;

use hyper::StatusCode;

use super::{changed, guard_write, locate, put, replace, require_pages};
use crate::emulator::lease::Lease;
use crate::emulator::record::{Content, Record};
use crate::emulator::refusal::{self, Refusal};
use crate::emulator::reply::Reply;
use crate::emulator::request::Request;
use crate::emulator::service::State;

pub(super) fn set(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let (container, slot) = locate(state, request)?;
    let mut versions = slot.write();
    let blob = versions.base_mut()?;
    let ends = guard_write(request, &blob.record)?;
    let mut next = blob.record.clone();
    set_sequence_number(request, &mut next)?;
    if request.header("x-ms-blob-content-length").is_some() {
        require_pages(&next)?;
        next.size = put::checked_size(request, "x-ms-blob-content-length")?;
    }
    set_content(request, &mut next);
    if ends {
        next.lease = Lease::Available;
    }
    next.version = state.store.next_version();
    let old = blob.record.size;
    replace(&container, blob, next)?;
    if blob.record.size != old {
        blob.resized(old)?;
    }
    Ok(changed(StatusCode::OK, &blob.record))
}

fn set_sequence_number(request: &Request, next: &mut Record) -> Result<(), Refusal> {
    let name = "x-ms-sequence-number-action";
    let number = put::sequence_number(request)?;
    let Some(action) = request.header(name) else {
        return match number {
            Some(_) => Err(refusal::missing_header(name)),
            None => Ok(()),
        };
    };
    require_pages(next)?;
    let required = || number.ok_or_else(|| refusal::missing_header("x-ms-blob-sequence-number"));
    next.sequence_number = match action.to_ascii_lowercase().as_str() {
        "max" => next.sequence_number.max(required()?),
        "update" => required()?,
        "increment" => {
            if let Some(number) = number {
                let number = number.to_string();
                return Err(refusal::invalid_header(
                    "x-ms-blob-sequence-number",
                    &number,
                ));
            }
            let raised = next.sequence_number + 1;
            if i64::try_from(raised).is_err() {
                return Err((&refusal::SEQUENCE_NUMBER_INCREMENT_TOO_LARGE).into());
            }
            raised
        }
        _ => return Err(refusal::invalid_header(name, action)),
    };
    Ok(())
}

/// When any content header is set, those that are not are taken away.
fn set_content(request: &Request, next: &mut Record) {
    let get = |name: &str| request.header(name).map(str::to_owned);
    let content = Content {
        kind: get("x-ms-blob-content-type"),
        encoding: get("x-ms-blob-content-encoding"),
        language: get("x-ms-blob-content-language"),
        md5: get("x-ms-blob-content-md5"),
        cache_control: get("x-ms-blob-cache-control"),
        disposition: get("x-ms-blob-content-disposition"),
    };
    if content != Content::default() {
        next.content = content;
    }
}

pub(super) fn set_metadata(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let metadata = request.metadata()?;
    let (container, slot) = locate(state, request)?;
    let mut versions = slot.write();
    let blob = versions.base_mut()?;
    let ends = guard_write(request, &blob.record)?;
    let mut next = blob.record.clone();
    next.metadata = metadata;
    if ends {
        next.lease = Lease::Available;
    }
    next.version = state.store.next_version();
    replace(&container, blob, next)?;
    Ok(Reply::new(StatusCode::OK)
        .version(&blob.record)
        .fixed("x-ms-request-server-encrypted", "true"))
}
