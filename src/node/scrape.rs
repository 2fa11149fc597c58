//! `GET /metrics` over TCP, for a Prometheus that cannot reach the control
//! socket. It shows numbers and the names of volumes, and takes nothing.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::exposition::{self, Process};
use super::registry::Registry;

/// Most scrapes at once; more wait in the backlog.
const MAX_CONNECTIONS: usize = 16;
/// How long one may take to ask, and to read its answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Listens on an address.
pub(super) struct Scrape {
    listener: TcpListener,
    registry: Registry,
}

impl Scrape {
    pub async fn bind(address: SocketAddr, registry: Registry) -> io::Result<Self> {
        Ok(Self {
            listener: TcpListener::bind(address).await?,
            registry,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers for as long as it is polled; connections end with it.
    pub async fn run(self) {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let accepted = async {
                let slot = slots.clone().acquire_owned().await;
                (slot, self.listener.accept().await)
            };
            tokio::select! {
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                (slot, accepted) = accepted => match accepted {
                    Ok((stream, _)) => {
                        let registry = self.registry.clone();
                        connections.spawn(async move {
                            serve(stream, &registry).await;
                            drop(slot);
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a scrape");
                        // Out of file descriptors: one will be free again.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
            }
        }
    }
}

async fn serve(stream: tokio::net::TcpStream, registry: &Registry) {
    let service = service_fn(|request| {
        let answer = answer(&request, registry);
        async { Ok::<_, Infallible>(answer) }
    });
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(2 * PATIENCE, serving).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a scrape ended early"),
        Err(_) => tracing::debug!("a scrape took too long"),
    }
}

fn answer<B>(request: &Request<B>, registry: &Registry) -> Response<Full<Bytes>> {
    let refuse = |status, text: &'static str| {
        let mut answer = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
        *answer.status_mut() = status;
        answer
    };
    if request.uri().path() != "/metrics" {
        return refuse(StatusCode::NOT_FOUND, "the metrics are at /metrics\n");
    }
    if request.method() != Method::GET {
        return refuse(StatusCode::METHOD_NOT_ALLOWED, "/metrics takes GET\n");
    }
    let mut answer = Response::new(Full::new(metrics(registry)));
    let text = HeaderValue::from_static(exposition::CONTENT_TYPE);
    answer.headers_mut().insert(CONTENT_TYPE, text);
    answer
}

/// What a scrape reads.
pub(super) fn metrics(registry: &Registry) -> Bytes {
    exposition::text(&registry.numbers(), Process::now()).into()
}
