//! The one place that executes an attempt: a slot, a connection, one exchange,
//! all within one deadline, and the judgement of how far the request got.
//!
//! One thing is done twice inside an attempt: a request that a pooled
//! connection refused *unsent* (the store had closed it while it was idle)
//! moves on to another connection. Nothing of it had left this machine, so
//! this is no retry. A fresh connection gets one try only.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{CONTENT_LENGTH, DATE, HeaderMap, RETRY_AFTER};
use tokio::time::timeout;

use super::account::AccountInner;
use super::answer::Answer;
use super::connection::{Connection, Fate};
use super::credential::Credential;
use super::date;
use super::error::{Failure, StorageError};
use super::explain::{self, Refusal};
use super::pool::Slot;
use super::request::Request;
use super::xml;

/// The store refuses requests whose date is 15 minutes off; it may have been
/// a little less when the answer left.
const REFUSED_SKEW: Duration = Duration::from_secs(14 * 60);

/// Bytes of an error's body that are read, and of a write's.
const SMALL_BODY: u64 = 64 << 10;

/// What the body of a 2xx answer must look like.
#[derive(Clone, Copy, Debug)]
pub(super) enum Expect {
    /// Nothing worth reading.
    Nothing,
    /// Exactly this many bytes.
    Exactly(u64),
    /// A document of at most this many bytes.
    UpTo(u64),
}

/// How far an attempt got, for when its deadline cuts it off.
#[derive(Default)]
struct Progress {
    waiting: &'static str,
    peer: Option<SocketAddr>,
    fate: Option<Arc<Fate>>,
    /// The head of an answer that was no success.
    refused: Option<(u16, HeaderMap)>,
}

/// Makes one attempt at `request`, signed with `credential`; `deadline` bounds all of it.
pub(super) async fn execute(
    account: &AccountInner,
    credential: &Credential,
    request: &Request,
    expect: Expect,
    deadline: Duration,
) -> Result<Answer, StorageError> {
    let mut progress = Progress::default();
    // Boxed because it is large: whoever waits for it is moved into place
    // several times on the way up, and would take it along each time.
    let work = Box::pin(attempt(account, credential, request, expect, &mut progress));
    match timeout(deadline, work).await {
        Ok(result) => result,
        // The attempt's future is gone, and its connection with it: what the
        // fate says now is final.
        Err(_) => Err(cut_off(account, credential, request, deadline, progress)),
    }
}

fn cut_off(
    account: &AccountInner,
    credential: &Credential,
    request: &Request,
    deadline: Duration,
    progress: Progress,
) -> StorageError {
    if let (Some((status, headers)), Some(peer)) = (&progress.refused, progress.peer) {
        let from = (peer, credential);
        return refusal(account, request, *status, headers, &[], from);
    }
    let written = progress.fate.is_some_and(|fate| fate.handed());
    let place = match progress.peer {
        Some(peer) => format!(" from {peer}"),
        None => String::new(),
    };
    request.error(
        Failure::Deadline { written },
        format!(": {}{place} after {deadline:?}", progress.waiting),
    )
}

async fn attempt(
    account: &AccountInner,
    credential: &Credential,
    request: &Request,
    expect: Expect,
    progress: &mut Progress,
) -> Result<Answer, StorageError> {
    progress.waiting = "still waiting for one of the pool's connections";
    let slot = account.pool.slot().await;
    loop {
        progress.waiting = "no connection yet";
        let (mut connection, pooled) = match slot.idle().await {
            Some(connection) => (connection, true),
            None => {
                let connector = &account.shared.connector;
                let connection = connector
                    .connect()
                    .await
                    .map_err(|error| request.error(error.failure, error.detail))?;
                (connection, false)
            }
        };
        progress.waiting = "no answer";
        progress.peer = Some(connection.peer);
        let endpoint = &account.shared.connector.endpoint;
        let message = request.build(endpoint, credential)?;
        progress.fate = Some(connection.fate());
        match connection.send(message).await {
            Ok(head) => {
                let work = Work {
                    account,
                    credential,
                    request,
                    expect,
                };
                return receive(&work, slot, connection, head, progress).await;
            }
            Err(unanswered) if pooled && !unanswered.written => {
                tracing::debug!("stale connection to {}: moving on", connection.peer);
                progress.fate = None;
            }
            Err(unanswered) => {
                return Err(request.error(
                    Failure::Broken {
                        written: unanswered.written,
                    },
                    format!(": {}: {}", connection.peer, unanswered.reason),
                ));
            }
        }
    }
}

/// What an attempt is about.
struct Work<'a> {
    account: &'a AccountInner,
    credential: &'a Credential,
    request: &'a Request,
    expect: Expect,
}

/// Reads the answer's body and settles what becomes of the connection: kept
/// only when the whole answer was read and was what it had to be.
async fn receive(
    work: &Work<'_>,
    slot: Slot<'_>,
    mut connection: Box<Connection>,
    head: hyper::Response<Incoming>,
    progress: &mut Progress,
) -> Result<Answer, StorageError> {
    let Work {
        account,
        credential,
        request,
        expect,
    } = *work;
    let (head, mut body) = head.into_parts();
    let status = head.status.as_u16();
    connection.keep_alive = keep_alive(&head.headers);
    let peer = connection.peer;

    if !head.status.is_success() {
        progress.refused = Some((status, head.headers.clone()));
        // The status is what counts; its explanation gets a moment.
        let text = read(&mut connection, &mut body, SMALL_BODY);
        let text = timeout(Duration::from_secs(1), text).await;
        let complete = matches!(text, Ok(Ok(_)));
        let pieces = match text {
            Ok(Ok(pieces)) => pieces,
            Ok(Err(_)) | Err(_) => Vec::new(),
        };
        if complete {
            slot.keep(connection).await;
        }
        let text = pieces.concat();
        return Err(refusal(
            account,
            request,
            status,
            &head.headers,
            &text,
            (peer, credential),
        ));
    }

    progress.waiting = "the answer's body is incomplete";
    let limit = match expect {
        Expect::Nothing => SMALL_BODY,
        Expect::Exactly(len) | Expect::UpTo(len) => len,
    };
    if let Expect::Exactly(len) = expect {
        let announced = head.headers.get(CONTENT_LENGTH);
        let announced = announced.and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|announced| announced != len) {
            return Err(request.bad_answer(format_args!(
                "{} bytes where {len} were asked for",
                announced.unwrap_or_default()
            )));
        }
    }
    let pieces = read(&mut connection, &mut body, limit)
        .await
        .map_err(|reason| request.bad_answer(format_args!("{peer}: {reason}")))?;
    if let Expect::Exactly(len) = expect {
        let got: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
        if got != len {
            return Err(request.bad_answer(format_args!("{got} bytes where {len} were asked for")));
        }
    }
    slot.keep(connection).await;
    Ok(Answer {
        status,
        headers: head.headers,
        pieces,
    })
}

/// Reads a body to its end; refuses one longer than `limit`.
async fn read(
    connection: &mut Connection,
    body: &mut Incoming,
    limit: u64,
) -> Result<Vec<bytes::Bytes>, String> {
    let mut pieces = Vec::new();
    let mut len = 0;
    while let Some(piece) = connection.piece(body).await {
        let piece = piece?;
        len += piece.len() as u64;
        if len > limit {
            return Err(format!("more than the {limit} bytes that were expected"));
        }
        pieces.push(piece);
    }
    Ok(pieces)
}

/// The error for an answer that is no success.
fn refusal(
    account: &AccountInner,
    request: &Request,
    status: u16,
    headers: &HeaderMap,
    body: &[u8],
    (peer, credential): (SocketAddr, &Credential),
) -> StorageError {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let document = xml::error(body);
    let code = match text("x-ms-error-code") {
        Some(code) => code.to_owned(),
        None => document.code.unwrap_or_default(),
    };
    let date = text(DATE.as_str()).and_then(date::parse);
    let detail = explain::refusal(&Refusal {
        status,
        code: &code,
        culprit: document.culprit.as_deref(),
        date,
        address: &request.target().address,
        endpoint: &account.shared.connector.endpoint,
        credential,
        peer,
    });
    let mut error = request.error(Failure::Status { status, code }, detail);
    error.clock = date.is_some_and(|date| date::skew(date).1 >= REFUSED_SKEW);
    error.retry_after = text(RETRY_AFTER.as_str()).and_then(retry_after);
    error.request_id = text("x-ms-request-id").map(ToOwned::to_owned);
    error
}

/// `Retry-After`: seconds, or a date.
fn retry_after(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.trim().parse::<u32>() {
        return Some(Duration::from_secs(seconds.into()));
    }
    match date::skew(date::parse(text)?) {
        (true, ahead) => Some(ahead),
        (false, _) => Some(Duration::ZERO),
    }
}

/// The server's promise in `Keep-Alive: timeout=N`.
fn keep_alive(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("keep-alive")?.to_str().ok()?;
    text.split(',').find_map(|part| {
        let (name, value) = part.split_once('=')?;
        if !name.trim().eq_ignore_ascii_case("timeout") {
            return None;
        }
        Some(Duration::from_secs(
            value.trim().parse::<u32>().ok()?.into(),
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_keep_alive_and_retry_after() {
        let mut headers = HeaderMap::new();
        headers.insert("keep-alive", "max=100, Timeout=5".parse().expect("a value"));
        assert_eq!(keep_alive(&headers), Some(Duration::from_secs(5)));
        assert_eq!(keep_alive(&HeaderMap::new()), None);
        assert_eq!(retry_after(" 7 "), Some(Duration::from_secs(7)));
        assert_eq!(
            retry_after("Sun, 06 Nov 1994 08:49:37 GMT"),
            Some(Duration::ZERO)
        );
        assert_eq!(retry_after("soon"), None);
    }

    proptest! {
        #[test]
        fn never_panics(text in "[ -~]{0,40}") {
            retry_after(&text);
            let mut headers = HeaderMap::new();
            headers.insert("keep-alive", text.parse().expect("printable"));
            keep_alive(&headers);
        }
    }
}
