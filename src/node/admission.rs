//! Which attaches are refused before anything is done for them.

use std::collections::BTreeMap;

use super::api::{AttachRequest, CONNECTIONS, ErrorCode, MAX_CONNECTIONS, State};
use super::entry::{Entry, Phase};
use super::error::NodeError;
use super::name::AttachmentName;
use super::provision;

/// The entry to reuse, none when name and volume are free, or the refusal.
///
/// # Errors
/// Name or volume are taken.
pub(super) fn conflict(
    entries: &BTreeMap<AttachmentName, Entry>,
    request: &AttachRequest,
) -> Result<Option<Entry>, NodeError> {
    let name = &request.name;
    if let Some(entry) = entries.values().find(|e| e.is_of_volume(request)) {
        let reusable = request.reuse
            && entry.request.name == *name
            && matches!(entry.phase, Phase::Attached(_))
            && entry.has_options_of(request);
        if reusable {
            return Ok(Some(entry.clone()));
        }
        let view = entry.view();
        let place = match (view.state, &view.device) {
            (State::Attached, Some(device)) => format!("at {}", device.display()),
            (state, _) => format!("({state})"),
        };
        return Err(NodeError::new(
            ErrorCode::AlreadyAttached,
            format!(
                "blob {} is attached already as {} {place}: use that, or detach it first",
                request.volume(),
                view.name
            ),
        ));
    }
    match entries.get(name) {
        None => Ok(None),
        Some(entry) => Err(NodeError::new(
            ErrorCode::NameInUse,
            format!(
                "name {name} is in use by {}: choose another with --name, or detach it first",
                entry.request.volume()
            ),
        )),
    }
}

/// Does the request make sense?
///
/// # Errors
/// What is wrong with it.
pub(super) fn check(request: &AttachRequest) -> Result<(), NodeError> {
    let refuse = |code, text: &str| Err(NodeError::new(code, text));
    let invalid = ErrorCode::InvalidRequest;
    if let Err(reason) = request.policy.check() {
        return refuse(invalid, reason);
    }
    let connections = request.connections.unwrap_or(CONNECTIONS);
    if !(1..=MAX_CONNECTIONS).contains(&connections) {
        return Err(NodeError::new(
            invalid,
            format!("{connections} connections are not possible: take 1 to {MAX_CONNECTIONS}"),
        ));
    }
    if request.container.is_empty() || request.blob.is_empty() || request.account.name.is_empty() {
        return refuse(invalid, "account, container and blob must all be named");
    }
    if request.read_only && request.create.is_some() {
        return refuse(
            invalid,
            "a new disk cannot be attached read-only: create it first",
        );
    }
    if request.read_only && request.break_lease {
        return refuse(
            invalid,
            "a read-only attach takes no lease: leave out --break-lease",
        );
    }
    request.create.map_or(Ok(()), provision::check_size)
}
