//! Accepts connections and serves HTTP/1.1 on them, plain or over TLS.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use super::config::TlsFiles;
use super::service::{self, Cut, Origin, State};

/// A TLS client has this long for its handshake.
const HANDSHAKE: Duration = Duration::from_secs(30);

/// Reads certificate and key.
pub(super) fn acceptor(files: &TlsFiles) -> io::Result<TlsAcceptor> {
    let named = |path: &std::path::Path, error: &dyn std::fmt::Display| {
        io::Error::other(format!("{}: {error}", path.display()))
    };
    let chain = CertificateDer::pem_file_iter(&files.cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| named(&files.cert, &error))?;
    let key =
        PrivateKeyDer::from_pem_file(&files.key).map_err(|error| named(&files.key, &error))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| named(&files.cert, &error))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Accepts until `stop` turns true.
pub(super) async fn accept(
    state: Arc<State>,
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    mut stop: watch::Receiver<bool>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stopped(&mut stop) => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                let origin = Origin {
                    peer: peer.ip().to_canonical(),
                    secure: tls.is_some(),
                };
                let (state, tls, stop) = (Arc::clone(&state), tls.clone(), stop.clone());
                tokio::spawn(async move {
                    state.stats.connections.fetch_add(1, Ordering::Relaxed);
                    state.stats.open_connections.fetch_add(1, Ordering::Relaxed);
                    if let Err(error) = connection(&state, stream, origin, tls, stop).await {
                        tracing::debug!("connection from {peer}: {error}");
                    }
                    state.stats.open_connections.fetch_sub(1, Ordering::Relaxed);
                });
            }
            Err(error) => {
                // Out of file descriptors, most likely: others must end first.
                tracing::warn!("cannot accept: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn connection(
    state: &Arc<State>,
    stream: TcpStream,
    origin: Origin,
    tls: Option<TlsAcceptor>,
    stop: watch::Receiver<bool>,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    // A second handle on the socket, to make its close a reset.
    let socket = {
        use std::os::fd::AsFd as _;
        stream.as_fd().try_clone_to_owned()?
    };
    match tls {
        None => serve(state, stream, socket, origin, stop).await,
        Some(tls) => {
            let stream = tokio::time::timeout(HANDSHAKE, tls.accept(stream)).await??;
            serve(state, stream, socket, origin, stop).await
        }
    }
}

/// Serves one connection to its end. Dropping `stream` and then `socket` closes
/// it; with no linger time that is a reset.
async fn serve(
    state: &Arc<State>,
    stream: impl AsyncRead + AsyncWrite + Unpin,
    socket: OwnedFd,
    origin: Origin,
    mut stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let mut cut = state.cut.subscribe();
    cut.mark_unchanged();
    let socket = &socket;
    let respond = service_fn(
        |request: hyper::Request<hyper::body::Incoming>| async move {
            let reply = if request.uri().path().starts_with("/-/") {
                super::admin::answer(state, request).await
            } else {
                service::answer(state, origin, request).await
            };
            match reply {
                Ok(reply) => Ok(reply.into_response()),
                Err(cut) => {
                    reset_on_close(socket);
                    Err::<_, Cut>(cut)
                }
            }
        },
    );
    let mut builder = http1::Builder::new();
    builder.max_buf_size(512 << 10).auto_date_header(false);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), respond));
    loop {
        tokio::select! {
            served = connection.as_mut() => return served.map_err(io::Error::other),
            () = stopped(&mut stop) => {
                connection.as_mut().graceful_shutdown();
                return connection.await.map_err(io::Error::other);
            }
            changed = cut.changed() => {
                if changed.is_ok() {
                    reset_on_close(socket);
                    return Ok(());
                }
            }
        }
    }
}

/// Waits until the emulator is to stop (or is gone, which is the same).
async fn stopped(stop: &mut watch::Receiver<bool>) {
    if let Err(error) = stop.wait_for(|stop| *stop).await {
        tracing::debug!("the emulator is gone: {error}");
    }
}

fn reset_on_close(socket: &OwnedFd) {
    if let Err(error) = rustix::net::sockopt::set_socket_linger(socket, Some(Duration::ZERO)) {
        tracing::warn!("a connection closes instead of being reset: {error}");
    }
}
