//! The emulator's own interface under `/-/`: faults, settings, statistics, and
//! things to break. It asks for no credentials; see `docs/emulator.md`.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::{Method, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::clock;
use super::config::SettingsChange;
use super::faults::Rule;
use super::refusal::Refusal;
use super::reply::Reply;
use super::request::{Query, parse_query};
use super::service::{Cut, State};

const MAX_BODY: usize = 1 << 20;

/// Answers a request under `/-/`.
pub(super) async fn answer(
    state: &Arc<State>,
    request: hyper::Request<Incoming>,
) -> Result<Reply, Cut> {
    let (parts, body) = request.into_parts();
    let body = match Limited::new(body, MAX_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return Ok(bad(&format!("the body cannot be read: {error}"))),
    };
    let query = parse_query(parts.uri.query().unwrap_or_default());
    let path = parts.uri.path().trim_start_matches("/-/");
    Ok(match (&parts.method, path) {
        (&Method::GET, "faults") => json(&state.faults.report()),
        (&Method::PUT, "faults") => with(&body, |rules: Vec<Rule>| {
            state.faults.set(rules);
            Ok(done())
        }),
        (&Method::DELETE, "faults") => {
            state.faults.clear();
            done()
        }
        (&Method::GET, "stats") => json(&state.stats.report()),
        (&Method::DELETE, "stats") => {
            state.stats.reset();
            done()
        }
        (&Method::GET, "settings") => json(&state.settings().report()),
        (&Method::PUT, "settings") => with(&body, |change: SettingsChange| {
            change_settings(state, &change).map_err(|error| error.to_string())?;
            Ok(done())
        }),
        (&Method::POST, "leases/expire") => expire_lease(state, &query),
        (&Method::POST, "connections/cut") => {
            cut_connections(state);
            done()
        }
        (_, "faults" | "stats" | "settings" | "leases/expire" | "connections/cut") => {
            plain(StatusCode::METHOD_NOT_ALLOWED, "not with this method\n")
        }
        _ => plain(
            StatusCode::NOT_FOUND,
            "there are faults, stats, settings, leases/expire and connections/cut\n",
        ),
    })
}

/// Puts a change of settings into force.
pub(super) fn change_settings(
    state: &State,
    change: &SettingsChange,
) -> Result<(), super::config::KeyError> {
    let mut settings = state
        .settings
        .write()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut next = (**settings).clone();
    next.apply(change)?;
    *settings = Arc::new(next);
    Ok(())
}

/// Resets all open connections.
pub(super) fn cut_connections(state: &State) {
    state.cut.send_modify(|count| *count += 1);
}

/// Ends the term of a blob's lease now.
pub(super) fn expire_lease_of(state: &State, container: &str, blob: &str) -> Result<bool, Refusal> {
    let container = state.store.container(container)?;
    let slot = state.store.slot(&container.record.name, blob)?;
    let mut versions = slot.write();
    let base = versions.base_mut()?;
    let mut next = base.record.clone();
    let held = next.lease.expire(clock::now());
    container.commit(&next)?;
    base.record = next;
    Ok(held)
}

fn expire_lease(state: &State, query: &Query) -> Reply {
    let get = |name: &str| {
        query
            .iter()
            .find(|(own, _)| own == name)
            .map(|(_, value)| value.as_str())
    };
    let (Some(container), Some(blob)) = (get("container"), get("blob")) else {
        return bad("name the blob: ?container=NAME&blob=NAME");
    };
    match expire_lease_of(state, container, blob) {
        Ok(true) => done(),
        Ok(false) => plain(StatusCode::CONFLICT, "no finite lease is held\n"),
        Err(refusal) => plain(refusal.status(), &format!("{}\n", refusal.code())),
    }
}

fn with<T: DeserializeOwned>(body: &Bytes, act: impl FnOnce(T) -> Result<Reply, String>) -> Reply {
    serde_json::from_slice(body)
        .map_err(|error| error.to_string())
        .and_then(act)
        .unwrap_or_else(|error| bad(&error))
}

fn done() -> Reply {
    Reply::new(StatusCode::NO_CONTENT)
}

fn bad(why: &str) -> Reply {
    plain(StatusCode::BAD_REQUEST, &format!("{why}\n"))
}

fn plain(status: StatusCode, text: &str) -> Reply {
    Reply::new(status)
        .fixed("content-type", "text/plain")
        .bytes(text.to_owned())
}

fn json(value: &impl Serialize) -> Reply {
    match serde_json::to_vec_pretty(value) {
        Ok(mut text) => {
            text.push(b'\n');
            Reply::new(StatusCode::OK)
                .fixed("content-type", "application/json")
                .bytes(text)
        }
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")),
    }
}
