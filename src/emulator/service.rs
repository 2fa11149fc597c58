//! From a request to its answer: authorise, let faults strike, wait for the
//! caps, execute, add the latency.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::Method;
use hyper::body::{Body as _, Incoming};
use hyper::header::{self, HeaderName, HeaderValue};

use super::auth::{self, Authority};
use super::clock;
use super::config::Settings;
use super::dice::Dice;
use super::faults::{Effect, FaultPlan};
use super::operation::Operation;
use super::ops;
use super::record::PublicAccess;
use super::refusal::{self, Refusal};
use super::reply::Reply;
use super::request::Request;
use super::stats::Stats;
use super::store::Store;
use super::throttle::Bucket;
use super::timer::Timer;

/// Largest body of Put Blob (a block blob's content).
const MAX_PUT_BLOB: u64 = 64 << 20;

/// A body that is too large is read up to here before it is refused, so that
/// the client gets to see the refusal.
const MAX_DRAIN: u64 = 256 << 20;

/// The version of the service that is assumed when a request names none.
const DEFAULT_VERSION: &str = "2021-12-02";

/// Everything a running emulator has.
#[derive(Debug)]
pub(super) struct State {
    pub account: String,
    pub store: Store,
    pub faults: FaultPlan,
    pub stats: Stats,
    pub timer: Timer,
    /// Set once the listener is bound.
    pub url: OnceLock<String>,
    /// Counts up to have all open connections reset.
    pub cut: tokio::sync::watch::Sender<u64>,
    pub settings: RwLock<Arc<Settings>>,
    pub bucket: Mutex<Bucket>,
    pub dice: Mutex<Dice>,
    pub stopping: AtomicBool,
    pub next_id: AtomicU64,
    /// Makes request ids of different runs differ.
    pub run_id: u64,
}

impl State {
    /// The settings in force.
    pub(super) fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The URL of the account.
    pub(super) fn url(&self) -> &str {
        self.url.get().map_or("", String::as_str)
    }

    /// True once the emulator is being stopped.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn request_id(&self) -> String {
        let number = self.next_id.fetch_add(1, Ordering::Relaxed);
        let run = self.run_id;
        format!(
            "{:08x}-{:04x}-{:04x}-{:04x}-{number:012x}",
            run >> 32,
            (run >> 16) & 0xffff,
            run & 0xffff,
            0x8000
        )
    }

    fn latency(&self, settings: &Settings) -> Duration {
        if settings.jitter.is_zero() {
            return settings.latency;
        }
        let nanos = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        let jitter = nanos(settings.jitter);
        let spread = self
            .dice
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .below(jitter.saturating_mul(2).saturating_add(1));
        Duration::from_nanos(
            nanos(settings.latency)
                .saturating_add(spread)
                .saturating_sub(jitter),
        )
    }
}

/// Where a request came from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin {
    pub peer: IpAddr,
    pub secure: bool,
}

/// The connection is to be reset instead of an answer.
#[derive(Debug, thiserror::Error)]
#[error("the connection is cut")]
pub(super) struct Cut;

/// What came of a request.
type Outcome = Result<Result<Reply, Refusal>, Cut>;

/// Answers one request of the Blob service.
pub(super) async fn answer(
    state: &Arc<State>,
    origin: Origin,
    request: hyper::Request<Incoming>,
) -> Result<Reply, Cut> {
    let request_id = state.request_id();
    let head = request.method() == Method::HEAD;
    let headers = request.headers();
    let version = headers
        .get("x-ms-version")
        .cloned()
        .unwrap_or(HeaderValue::from_static(DEFAULT_VERSION));
    let client_id = headers.get("x-ms-client-request-id").cloned();
    let mut operation = None;
    let outcome = serve(state, origin, request, &mut operation).await?;
    let mut reply = outcome.unwrap_or_else(|refusal| {
        state
            .stats
            .count_error(operation, refusal.status().as_u16(), refusal.code());
        Reply::refusal(&refusal, &request_id, head)
    });
    state
        .stats
        .bytes_out
        .fetch_add(reply.body.len(), Ordering::Relaxed);
    reply = reply
        .fixed(
            "server",
            concat!("dysk-emulator/", env!("CARGO_PKG_VERSION")),
        )
        .header("x-ms-request-id", request_id);
    reply
        .headers
        .insert(HeaderName::from_static("x-ms-version"), version);
    if let Some(id) = client_id {
        reply
            .headers
            .insert(HeaderName::from_static("x-ms-client-request-id"), id);
    }
    let skew = state.settings().clock_skew;
    reply
        .headers
        .insert(header::DATE, clock::http_date(clock::skewed_seconds(skew)));
    Ok(reply)
}

async fn serve(
    state: &Arc<State>,
    origin: Origin,
    request: hyper::Request<Incoming>,
    operation: &mut Option<Operation>,
) -> Outcome {
    let (parts, body) = request.into_parts();
    let sized = parts.headers.contains_key(header::CONTENT_LENGTH);
    let writes = parts.method == Method::PUT;
    let parsed = Request::new(parts, &state.account, origin.peer, origin.secure)
        .and_then(|request| Ok((Operation::of(&request)?, request)));
    let limit = match &parsed {
        Ok((Operation::PutBlob, _)) => MAX_PUT_BLOB,
        _ => ops::MAX_PUT_PAGE,
    };
    // The body is taken in before anything is said: a refusal sent while the
    // client still writes would be lost with the connection.
    let pieces = read_body(state, body, limit).await?;
    let arrived = Instant::now();
    let (found, mut request) = match parsed {
        Ok(parsed) => parsed,
        Err(refusal) => return Ok(Err(refusal)),
    };
    *operation = Some(found);
    state.stats.count(found);
    match pieces {
        Some(pieces) => {
            request.body_len = pieces.iter().map(|piece| piece.len() as u64).sum();
            request.body = pieces;
        }
        None => return Ok(Err((&refusal::REQUEST_BODY_TOO_LARGE).into())),
    }
    if writes && !sized {
        return Ok(Err((&refusal::MISSING_CONTENT_LENGTH).into()));
    }
    let settings = state.settings();
    let container = request.target.container.clone();
    let public = || {
        state
            .store
            .container(&container)
            .map_or(PublicAccess::None, |container| container.record.public)
    };
    match auth::authorize(&request, found, &settings, &state.account, public) {
        Ok(Authority::SharedKey) => request.trusted = true,
        Ok(Authority::Sas(permissions)) => request.may_overwrite = permissions.contains('w'),
        Ok(Authority::Anonymous) => {}
        Err(refusal) => return Ok(Err(refusal)),
    }
    let fault = state.faults.strike(found, &request);
    let mut latency = state.latency(&settings);
    if let Some((effect, _)) = &fault {
        state.stats.count_fault(effect.name());
        if let Effect::Latency { latency: other } = effect {
            latency = other.0;
        }
    }
    let waited = match admit(state, &settings, found, &request) {
        Ok(wait) => wait,
        Err(refusal) => return Ok(Err(refusal)),
    };
    state.timer.sleep(waited).await;
    let request = Arc::new(request);
    let outcome = match fault {
        None => Ok(execute(state, found, &request).await),
        Some((effect, luck)) => suffer(state, found, &request, effect, luck).await,
    };
    state.timer.sleep_until(arrived + waited + latency).await;
    outcome
}

/// Reads a body of at most `limit` bytes; none when it is larger.
async fn read_body(
    state: &State,
    mut body: Incoming,
    limit: u64,
) -> Result<Option<Vec<Bytes>>, Cut> {
    let mut pieces = Vec::new();
    let mut len = 0;
    if body.is_end_stream() {
        return Ok(Some(pieces));
    }
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| Cut)?.into_data() else {
            continue;
        };
        len += data.len() as u64;
        if len <= limit {
            pieces.push(data);
        } else if len > MAX_DRAIN {
            return Err(Cut);
        }
    }
    state.stats.bytes_in.fetch_add(len, Ordering::Relaxed);
    Ok((len <= limit).then_some(pieces))
}

/// The wait for the caps of the blob and the account, or 503.
fn admit(
    state: &State,
    settings: &Settings,
    operation: Operation,
    request: &Request,
) -> Result<Duration, Refusal> {
    let capped = |caps: super::throttle::Caps| caps != super::throttle::Caps::default();
    if !capped(settings.blob) && !capped(settings.account) {
        return Ok(Duration::ZERO);
    }
    let target = &request.target;
    let Ok(slot) = state.store.slot(&target.container, &target.blob) else {
        return Ok(Duration::ZERO);
    };
    // Others that name a range move none of its bytes.
    let bytes = match request.range() {
        Ok(Some((first, Some(last)))) if operation == Operation::GetBlob => last - first + 1,
        _ => request.body_len,
    };
    let now = Instant::now();
    let mut blob = slot.bucket.lock().unwrap_or_else(PoisonError::into_inner);
    let mut account = state.bucket.lock().unwrap_or_else(PoisonError::into_inner);
    let waits = [
        blob.wait(settings.blob, now, settings.queue),
        account.wait(settings.account, now, settings.queue),
    ];
    let [Some(first), Some(second)] = waits else {
        state.stats.throttled.fetch_add(1, Ordering::Relaxed);
        return Err((&refusal::SERVER_BUSY).into());
    };
    blob.take(settings.blob, now, bytes);
    account.take(settings.account, now, bytes);
    Ok(first.max(second))
}

/// Executes, on a thread that may block where that is needed.
async fn execute(
    state: &Arc<State>,
    operation: Operation,
    request: &Arc<Request>,
) -> Result<Reply, Refusal> {
    if !ops::may_block(state, operation, request) {
        return ops::run(state, operation, request);
    }
    let (state, request) = (Arc::clone(state), Arc::clone(request));
    let task = tokio::task::spawn_blocking(move || ops::run(&state, operation, &request));
    task.await.unwrap_or_else(|error| {
        tracing::error!("{} panicked: {error}", operation.name());
        Err((&refusal::INTERNAL_ERROR).into())
    })
}

/// Executes under a fault. `luck` decides details.
async fn suffer(
    state: &Arc<State>,
    operation: Operation,
    request: &Arc<Request>,
    effect: Effect,
    luck: u64,
) -> Outcome {
    match effect {
        Effect::Status {
            status,
            code,
            retry_after,
            applied,
        } => {
            if applied && let Err(refusal) = execute(state, operation, request).await {
                return Ok(Err(refusal));
            }
            let mut refusal = Refusal::custom(status, code, "a fault rule asked for this".into());
            if let Some(seconds) = retry_after {
                refusal = refusal.header(header::RETRY_AFTER, HeaderValue::from(seconds));
            }
            Ok(Err(refusal))
        }
        Effect::ResetBefore => Err(Cut),
        Effect::ResetAfter => {
            if let Err(refusal) = execute(state, operation, request).await {
                tracing::debug!("refused before its reset: {}", refusal.code());
            }
            Err(Cut)
        }
        Effect::Late { delay } => {
            execute_late(state, operation, request, delay.0);
            Err(Cut)
        }
        Effect::Stall { delay, after } => {
            if after {
                let reply = execute(state, operation, request).await;
                state.timer.sleep(delay.0).await;
                return Ok(reply);
            }
            let held = Arc::clone(request);
            execute_held(state, operation, delay.0, move || held.arriving_now()).await
        }
        Effect::Unconditional { delay } => {
            let held = Arc::clone(request);
            execute_held(state, operation, delay.0, move || held.unconditional()).await
        }
        Effect::Corrupt { bytes } => {
            let reply = execute(state, operation, request).await;
            Ok(reply.and_then(|mut reply| {
                reply.body.rewrite(|body| flip(body, bytes, luck))?;
                Ok(reply)
            }))
        }
        Effect::Truncate { keep } => {
            let reply = execute(state, operation, request).await;
            Ok(reply.map(|mut reply| {
                let len = reply.body.len();
                if len > 0 {
                    reply.body.truncate(keep.unwrap_or(len / 2));
                }
                reply
            }))
        }
        Effect::Latency { .. } => Ok(execute(state, operation, request).await),
    }
}

/// Executes after `delay` what `request` is by then: also when its client has
/// gone away meanwhile.
async fn execute_held(
    state: &Arc<State>,
    operation: Operation,
    delay: Duration,
    request: impl FnOnce() -> Arc<Request> + Send + 'static,
) -> Outcome {
    let state = Arc::clone(state);
    state.stats.held.fetch_add(1, Ordering::Relaxed);
    let task = tokio::spawn(async move {
        state.timer.sleep(delay).await;
        let reply = execute(&state, operation, &request()).await;
        state.stats.held.fetch_sub(1, Ordering::Relaxed);
        reply
    });
    task.await.map_err(|_| Cut)
}

/// Executes after `delay`, with all conditions judged then; nobody is told.
fn execute_late(state: &Arc<State>, operation: Operation, request: &Arc<Request>, delay: Duration) {
    state.stats.late_scheduled.fetch_add(1, Ordering::Relaxed);
    let (state, request) = (Arc::clone(state), Arc::clone(request));
    tokio::spawn(async move {
        state.timer.sleep(delay).await;
        if state.is_stopping() {
            return;
        }
        let counter = match execute(&state, operation, &request.arriving_now()).await {
            Ok(_) => &state.stats.late_applied,
            Err(refusal) => {
                tracing::debug!("late {} refused: {}", operation.name(), refusal.code());
                &state.stats.late_refused
            }
        };
        counter.fetch_add(1, Ordering::Relaxed);
    });
}

/// Flips one bit in each of `count` bytes.
fn flip(body: &mut [u8], count: u32, luck: u64) {
    let mut dice = Dice::new(luck);
    for _ in 0..count {
        let at = usize::try_from(dice.below(body.len() as u64)).unwrap_or(0);
        if let Some(byte) = body.get_mut(at) {
            *byte ^= 1 << dice.below(8);
        }
    }
}
