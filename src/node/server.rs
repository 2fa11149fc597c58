//! The control API's server: HTTP/1 on a UNIX socket, one request per
//! connection, every resource bounded.

use std::convert::Infallible;
use std::fs::Permissions;
use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Frame, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use super::api::{
    AttachEvent, AttachRequest, AttachmentList, ErrorAnswer, ErrorCode, Health, Stats, Version,
};
use super::error::NodeError;
use super::name::AttachmentName;
use super::registry::{Admission, Attaching, Registry};
use super::{exposition, scrape};

/// Most connections at once; more wait in the backlog. Above the registry's
/// bound on attaches, so that attaches that wait never keep a list out.
const MAX_CONNECTIONS: usize = 1024;
/// Most bytes of a request's body; an attach takes a few hundred.
const MAX_BODY: usize = 64 << 10;
/// From connecting to the end of the headers, and again to that of the body.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long answers may take to leave when the daemon stops.
const FAREWELL: Duration = Duration::from_secs(2);
/// Newest version of the API.
const API_VERSION: u32 = 1;

/// The control socket, listening.
pub(super) struct Server {
    path: PathBuf,
    listener: UnixListener,
    registry: Registry,
}

impl Server {
    /// Listens on `path`, mode 0600. The caller holds the run directory's
    /// lock, so a socket that is there is a dead daemon's.
    pub fn bind(path: PathBuf, registry: Registry) -> io::Result<Self> {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        // The directory is 0700: nobody came in between.
        std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        Ok(Self {
            path,
            listener,
            registry,
        })
    }

    /// Serves until `stopped` ends, then lets answers under way leave and
    /// removes the socket.
    pub async fn run(self, stopped: impl Future<Output = ()>) {
        let mut stopped = std::pin::pin!(stopped);
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let accepted = async {
                let slot = slots.clone().acquire_owned().await;
                (slot, self.listener.accept().await)
            };
            tokio::select! {
                () = &mut stopped => break,
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                (slot, stream) = accepted => match stream {
                    Ok((stream, _)) => {
                        let serving = serve(stream, self.registry.clone());
                        connections.spawn(async move {
                            serving.await;
                            drop(slot);
                        });
                    }
                    Err(error) => {
                        tracing::error!(%error, "cannot accept on the control socket");
                        // Out of file descriptors: one will be free again.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
            }
        }
        let farewell = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(FAREWELL, farewell).await.is_err() {
            tracing::warn!("a client of the control socket does not read its answer");
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the control socket");
        }
    }
}

async fn serve(stream: UnixStream, registry: Registry) {
    let allowed = match stream.peer_cred() {
        Ok(peer) => peer.uid() == 0 || peer.uid() == rustix::process::geteuid().as_raw(),
        Err(error) => {
            tracing::warn!(%error, "a peer without credentials");
            false
        }
    };
    let service = service_fn(move |request| {
        let registry = registry.clone();
        async move {
            let answer = if allowed {
                route(request, &registry).await
            } else {
                Err(NodeError::new(
                    ErrorCode::Forbidden,
                    "only root may control dyskd: run it with sudo",
                ))
            };
            Ok::<_, Infallible>(answer.unwrap_or_else(refusal))
        }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIMEOUT)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a control connection ended early");
    }
}

type Answer = Response<AnswerBody>;

async fn route(request: Request<Incoming>, registry: &Registry) -> Result<Answer, NodeError> {
    let path = request.uri().path().to_owned();
    let query = request.uri().query().unwrap_or_default().to_owned();
    let method = request.method().clone();
    let wrong_method = |allowed: &'static str| {
        let error = NodeError::new(
            ErrorCode::WrongMethod,
            format!("{method} is not for {path}: it takes {allowed}"),
        );
        let mut answer = refusal(error);
        answer
            .headers_mut()
            .insert(ALLOW, hyper::header::HeaderValue::from_static(allowed));
        Ok(answer)
    };
    if path == "/metrics" {
        return match method {
            Method::GET => Ok(metrics(registry)),
            _ => wrong_method("GET"),
        };
    }
    match path.strip_prefix("/v1/") {
        Some("stats") if method == Method::GET => Ok(json(StatusCode::OK, &stats(registry))),
        Some("version") if method == Method::GET => Ok(json(
            StatusCode::OK,
            &Version {
                version: env!("CARGO_PKG_VERSION").into(),
                api: API_VERSION,
            },
        )),
        Some("health") if method == Method::GET => {
            let (attachments, fenced, stopping) = registry.health();
            let status = if stopping { "stopping" } else { "ok" }.into();
            Ok(json(
                StatusCode::OK,
                &Health {
                    status,
                    attachments,
                    fenced,
                },
            ))
        }
        Some("attachments") if method == Method::GET => {
            let attachments = registry.list();
            Ok(json(StatusCode::OK, &AttachmentList { attachments }))
        }
        Some("attachments") if method == Method::POST => {
            let progress = flag(&query, "progress")?;
            attach(read(request).await?, progress, registry).await
        }
        Some("version" | "health" | "stats") => wrong_method("GET"),
        Some("attachments") => wrong_method("GET, POST"),
        Some(rest) => {
            let rest = rest.strip_prefix("attachments/");
            let rest = rest.ok_or_else(|| no_such_path(&path))?;
            let (name, part) = match rest.rsplit_once('/') {
                Some((name, part)) => (name, Some(part)),
                None => (rest, None),
            };
            match (part, &method) {
                (None, &Method::GET) => Ok(json(StatusCode::OK, &registry.get(&parse(name)?)?)),
                (None, &Method::DELETE) => {
                    let force = flag(&query, "force")?;
                    let detached = registry.detach(&parse(name)?, force).await?;
                    Ok(json(StatusCode::OK, &detached))
                }
                (Some("credential"), &Method::PUT) => {
                    let name = parse(name)?;
                    let change = read(request).await?;
                    let attachment = registry.replace_credential(&name, change).await?;
                    Ok(json(StatusCode::OK, &attachment))
                }
                (Some("resize"), &Method::POST) => {
                    let name = parse(name)?;
                    let attachment = registry.resize(&name, read(request).await?).await?;
                    Ok(json(StatusCode::OK, &attachment))
                }
                (Some("snapshot"), &Method::POST) => {
                    let name = parse(name)?;
                    let taken = registry.snapshot(&name, read(request).await?).await?;
                    Ok(json(StatusCode::OK, &taken))
                }
                (Some("format"), &Method::GET) => Ok(json(
                    StatusCode::OK,
                    &registry.format_state(&parse(name)?).await?,
                )),
                (Some("format"), &Method::PUT) => {
                    let name = parse(name)?;
                    let mark = registry
                        .set_format_mark(&name, read(request).await?)
                        .await?;
                    Ok(json(StatusCode::OK, &mark))
                }
                (None, _) => wrong_method("GET, DELETE"),
                (Some("credential"), _) => wrong_method("PUT"),
                (Some("resize" | "snapshot"), _) => wrong_method("POST"),
                (Some("format"), _) => wrong_method("GET, PUT"),
                (Some(_), _) => Err(no_such_path(&path)),
            }
        }
        None => Err(no_such_path(&path)),
    }
}

fn stats(registry: &Registry) -> Stats {
    static BEGUN: LazyLock<Instant> = LazyLock::new(Instant::now);
    let begun = *BEGUN;
    Stats {
        at: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
        volumes: registry.numbers(),
    }
}

fn metrics(registry: &Registry) -> Answer {
    let body = AnswerBody::Whole(Full::new(scrape::metrics(registry)));
    let mut answer = Response::new(body);
    let text = hyper::header::HeaderValue::from_static(exposition::CONTENT_TYPE);
    answer.headers_mut().insert(CONTENT_TYPE, text);
    answer
}

fn no_such_path(path: &str) -> NodeError {
    NodeError::new(
        ErrorCode::NoSuchPath,
        format!("no such path: {path}: this dyskd speaks /v{API_VERSION}/"),
    )
}

fn parse(name: &str) -> Result<AttachmentName, NodeError> {
    name.parse()
        .map_err(|error: super::name::NameError| invalid(error.to_string()))
}

fn invalid(message: String) -> NodeError {
    NodeError::new(ErrorCode::InvalidRequest, message)
}

/// The one query parameter a path takes: `NAME=true` or `NAME=false`.
fn flag(query: &str, name: &str) -> Result<bool, NodeError> {
    let mut value = false;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        value = match pair.split_once('=') {
            Some((key, "true")) if key == name => true,
            Some((key, "false")) if key == name => false,
            _ => {
                return Err(invalid(format!(
                    "query {pair:?} is not understood: this path takes {name}=true or {name}=false"
                )));
            }
        };
    }
    Ok(value)
}

async fn read<T: DeserializeOwned>(request: Request<Incoming>) -> Result<T, NodeError> {
    let body = Limited::new(request.into_body(), MAX_BODY).collect();
    let body = tokio::time::timeout(REQUEST_TIMEOUT, body)
        .await
        .map_err(|_| invalid("the request's body did not come in time".into()))?
        .map_err(|error| invalid(format!("cannot read the request's body: {error}")))?;
    serde_json::from_slice(&body.to_bytes())
        .map_err(|error| invalid(format!("the request is not understood: {error}")))
}

async fn attach(
    request: AttachRequest,
    progress: bool,
    registry: &Registry,
) -> Result<Answer, NodeError> {
    let attaching = match registry.attach(request)? {
        Admission::Existing(attachment) => return Ok(json(StatusCode::OK, &attachment)),
        Admission::Begun(attaching) => attaching,
    };
    if !progress {
        // Dropped with the connection, this cancels the attach.
        return Ok(json(StatusCode::CREATED, &attaching.outcome().await?));
    }
    let (lines, body) = mpsc::channel(4);
    tokio::spawn(report(attaching, lines));
    let mut answer = Response::new(AnswerBody::Lines(body));
    answer.headers_mut().insert(
        CONTENT_TYPE,
        hyper::header::HeaderValue::from_static("application/x-ndjson"),
    );
    Ok(answer)
}

/// Writes the lines of an attach with progress. A body that is dropped, as
/// when the client hangs up, cancels the attach.
async fn report(attaching: Attaching, lines: mpsc::Sender<Bytes>) {
    let mut stages = attaching.stages();
    let work = async {
        let mut outcome = std::pin::pin!(attaching.outcome());
        loop {
            let stage = *stages.borrow_and_update();
            if lines.send(line(&AttachEvent::Stage(stage))).await.is_err() {
                return;
            }
            tokio::select! {
                biased;
                result = &mut outcome => {
                    let last = match result {
                        Ok(attachment) => AttachEvent::Attached(Box::new(attachment)),
                        Err(error) => AttachEvent::Failed(error.into()),
                    };
                    // A client that just left finds it in the list.
                    drop(lines.send(line(&last)).await);
                    return;
                }
                Ok(()) = stages.changed() => {}
            }
        }
    };
    tokio::select! {
        () = work => {}
        () = lines.closed() => {}
    }
}

fn line<T: Serialize>(value: &T) -> Bytes {
    let mut text = to_json(value);
    text.push(b'\n');
    text.into()
}

fn to_json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("the API's types have string keys and cannot fail")
}

fn json<T: Serialize>(status: StatusCode, value: &T) -> Answer {
    let mut answer = Response::new(AnswerBody::Whole(Full::new(line(value))));
    *answer.status_mut() = status;
    answer.headers_mut().insert(
        CONTENT_TYPE,
        hyper::header::HeaderValue::from_static("application/json"),
    );
    answer
}

fn refusal(error: NodeError) -> Answer {
    let status = error.code.status();
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let error = error.into();
    json(status, &ErrorAnswer { error })
}

enum AnswerBody {
    Whole(Full<Bytes>),
    Lines(mpsc::Receiver<Bytes>),
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Self::Whole(body) => Pin::new(body).poll_frame(context),
            Self::Lines(lines) => lines
                .poll_recv(context)
                .map(|line| line.map(|line| Ok(Frame::data(line)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(body) if body.is_end_stream())
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match self {
            Self::Whole(body) => body.size_hint(),
            Self::Lines(_) => hyper::body::SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_one_flag_it_knows() {
        for (query, expected) in [("", Some(false)), ("force=true", Some(true))] {
            assert_eq!(flag(query, "force").ok(), expected);
        }
        for query in ["force", "force=1", "forse=true", "force=true&x=y"] {
            assert!(flag(query, "force").is_err(), "{query}");
        }
    }
}
