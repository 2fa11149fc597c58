//! Copy sources: a URL in `x-ms-copy-source` as a blob of this account.

use std::sync::Arc;

use percent_encoding::percent_decode_str;

use crate::emulator::clock;
use crate::emulator::operation::Operation;
use crate::emulator::record::PublicAccess;
use crate::emulator::refusal::{self, Refusal};
use crate::emulator::request::{Request, Target, parse_query};
use crate::emulator::sas;
use crate::emulator::service::State;
use crate::emulator::store::Slot;

/// A blob or a snapshot a copy reads.
pub(super) struct CopySource {
    pub target: Target,
    pub snapshot: Option<String>,
    pub slot: Arc<Slot>,
    /// The URL without a SAS, as it is shown.
    pub shown: String,
}

/// Finds the source and checks that it may be read: with `trusted` always
/// (Copy Blob within the account under the account key), else by its SAS or
/// because its container is public.
pub(super) fn resolve(
    state: &State,
    request: &Request,
    trusted: bool,
) -> Result<CopySource, Refusal> {
    let text = request.required("x-ms-copy-source")?;
    let invalid = || refusal::invalid_header("x-ms-copy-source", text);
    let mut url = url::Url::parse(text).map_err(|_| invalid())?;
    let host = match url.port() {
        Some(port) => format!("{}:{port}", url.host_str().unwrap_or_default()),
        None => url.host_str().unwrap_or_default().to_owned(),
    };
    let missing = || Refusal::from(&refusal::CANNOT_VERIFY_COPY_SOURCE);
    let target = Target::parse(url.path(), Some(&host), &state.account).ok_or_else(missing)?;
    if target.blob.is_empty() {
        return Err(invalid());
    }
    let query = parse_query(url.query().unwrap_or_default());
    let snapshot = query
        .iter()
        .find(|(name, _)| name == "snapshot")
        .map(|(_, value)| value.clone());
    if !trusted {
        authorize(state, &target, &query, url.scheme() == "https")?;
    }
    let slot = state
        .store
        .slot(&target.container, &target.blob)
        .map_err(|_| missing())?;
    url.set_query(
        snapshot
            .as_ref()
            .map(|time| format!("snapshot={time}"))
            .as_deref(),
    );
    Ok(CopySource {
        target,
        snapshot: snapshot.map(|time| percent_decode_str(&time).decode_utf8_lossy().into_owned()),
        slot,
        shown: url.into(),
    })
}

fn authorize(
    state: &State,
    target: &Target,
    query: &crate::emulator::request::Query,
    secure: bool,
) -> Result<(), Refusal> {
    let public = state
        .store
        .container(&target.container)
        .is_ok_and(|container| container.record.public != PublicAccess::None);
    if public {
        return Ok(());
    }
    let settings = state.settings();
    let asked = sas::Asked {
        query,
        target,
        operation: Operation::GetBlob,
        peer: None,
        secure,
    };
    let now = clock::skewed_seconds(settings.clock_skew);
    sas::verify(&asked, &settings, &state.account, now)
        .map(drop)
        .map_err(|refusal| {
            Refusal::from(&refusal::CANNOT_VERIFY_COPY_SOURCE_AUTH)
                .with(
                    "CopySourceStatusCode",
                    refusal.status().as_u16().to_string(),
                )
                .with("CopySourceErrorCode", refusal.code())
        })
}
