//! A listening NBD server for one device: accepts, negotiates, transmits, and
//! stops cleanly. The kernel's client needs none of this, its sockets are made
//! in pairs.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::Mode;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixSocket, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::negotiation::{Export, Negotiated, NegotiationError, negotiate};
use super::transmission::{ByteBudget, Ended, Limits, Session, SessionError, Stop, transmit};
use crate::device::BlockDevice;

/// Connections waiting to be accepted.
const BACKLOG: u32 = 128;

/// Bytes of the send buffer of a UNIX connection. The default holds about two
/// replies of 64 KiB, which makes reads of large blocks take turns.
const SEND_BUFFER: usize = 4 << 20;

/// How long to wait after `accept` failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Bounds of a server.
#[derive(Clone, Copy, Debug)]
pub struct ServerLimits {
    /// Connections at a time; more wait to be accepted.
    pub connections: usize,
    /// For one whole handshake.
    pub handshake: Duration,
    /// Payload bytes in flight on one connection.
    pub payload: u32,
}

impl Default for ServerLimits {
    /// 16 connections, ten seconds, 32 MiB each.
    fn default() -> Self {
        Self {
            connections: 16,
            handshake: Duration::from_secs(10),
            payload: 32 << 20,
        }
    }
}

/// A server that could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody answers on the socket.
    #[error("{} is in use by a running server; choose another path", .0.display())]
    InUse(PathBuf),
    /// There is a file of another kind.
    #[error("{} exists and is no socket; remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// The operating system refused.
    #[error("cannot listen on {address}: {source}")]
    Io {
        /// Path or address.
        address: String,
        /// Why.
        source: io::Error,
    },
}

impl BindError {
    fn io(address: &impl ToString) -> impl FnOnce(io::Error) -> Self {
        let address = address.to_string();
        move |source| Self::Io { address, source }
    }
}

/// A connection that did not end well.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error(transparent)]
    Negotiation(#[from] NegotiationError),
    #[error(transparent)]
    Session(#[from] SessionError),
}

#[derive(Debug)]
enum Listener {
    Unix(UnixListener, SocketFile),
    Tcp(TcpListener),
}

enum Client {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// The path of a listening socket, removed when dropped as long as it is still
/// the same file.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if inode(&self.path).is_ok_and(|now| now == self.inode)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    let meta = std::fs::symlink_metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}

/// A server that listens and serves once it is [`Server::run`].
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    limits: ServerLimits,
}

impl Server {
    /// Listens on a UNIX socket that only this user can connect to (mode
    /// 0600). A socket nobody answers on is replaced. Needs a runtime.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind_unix(path: impl Into<PathBuf>) -> Result<Self, BindError> {
        let path = path.into();
        let failed = |source| BindError::Io {
            address: path.display().to_string(),
            source,
        };
        remove_stale(&path)?;
        let socket = UnixSocket::new_stream().map_err(failed)?;
        // The mode of the socket becomes the mode of the file when it is
        // bound, so nobody can connect before it is set.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)
            .map_err(|error| failed(error.into()))?;
        socket.bind(&path).map_err(failed)?;
        let inode = inode(&path).map_err(failed)?;
        let file = SocketFile {
            path: path.clone(),
            inode,
        };
        let listener = socket.listen(BACKLOG).map_err(failed)?;
        Ok(Self {
            listener: Listener::Unix(listener, file),
            limits: ServerLimits::default(),
        })
    }

    /// Listens on a TCP address. There is neither encryption nor
    /// authentication: whoever reaches the address has the disk.
    ///
    /// # Errors
    /// [`BindError::Io`].
    pub async fn bind_tcp(address: SocketAddr) -> Result<Self, BindError> {
        let listener = TcpListener::bind(address)
            .await
            .map_err(BindError::io(&address))?;
        Ok(Self {
            listener: Listener::Tcp(listener),
            limits: ServerLimits::default(),
        })
    }

    /// With other bounds than the default ones.
    #[must_use]
    pub fn with_limits(mut self, limits: ServerLimits) -> Self {
        self.limits = limits;
        self
    }

    /// The address of a TCP server, with the port the system chose for port 0.
    #[must_use]
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match &self.listener {
            Listener::Tcp(listener) => listener.local_addr().ok(),
            Listener::Unix(..) => None,
        }
    }

    /// The NBD URI clients can use for `export`.
    #[must_use]
    pub fn uri(&self, export: &str) -> String {
        let name =
            percent_encoding::utf8_percent_encode(export, percent_encoding::NON_ALPHANUMERIC);
        match &self.listener {
            Listener::Unix(_, file) => {
                let path = file.path.to_string_lossy();
                let path = percent_encoding::utf8_percent_encode(&path, PATH);
                format!("nbd+unix:///{name}?socket={path}")
            }
            Listener::Tcp(listener) => match listener.local_addr() {
                Ok(address) => format!("nbd://{address}/{name}"),
                Err(_) => format!("nbd://localhost/{name}"),
            },
        }
    }

    /// Serves `device` under `export_name` until `stop` is raised, to
    /// [`Stop::Pause`] or [`Stop::Close`] alike; then no connection is
    /// accepted any more, requests being executed are answered, and the socket
    /// is removed. When the sender of `stop` is dropped its last word stands.
    pub async fn run<D: BlockDevice>(
        self,
        device: Arc<D>,
        export_name: &str,
        stop: watch::Receiver<Stop>,
    ) {
        let Self { listener, limits } = self;
        let slots = Arc::new(Semaphore::new(limits.connections.max(1)));
        let mut connections = JoinSet::new();
        let mut stopped = std::pin::pin!(stopped(stop.clone()));
        loop {
            let accept = async {
                let slot = Arc::clone(&slots)
                    .acquire_owned()
                    .await
                    .expect("the semaphore is never closed");
                (listener.accept().await, slot)
            };
            let (client, slot) = tokio::select! {
                () = &mut stopped => break,
                Some(ended) = connections.join_next() => {
                    report(ended);
                    continue;
                }
                accepted = accept => accepted,
            };
            let client = match client {
                Ok(client) => client,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an nbd connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (device, stop) = (Arc::clone(&device), stop.clone());
            let export = Export {
                name: export_name.to_owned(),
                geometry: device.geometry(),
            };
            connections.spawn(async move {
                let ended = match client {
                    Client::Unix(stream) => serve(stream, device, export, limits, stop).await,
                    Client::Tcp(stream) => serve(stream, device, export, limits, stop).await,
                };
                drop(slot);
                ended
            });
        }
        drop(listener);
        while let Some(ended) = connections.join_next().await {
            report(ended);
        }
    }
}

/// What may stand unescaped in the socket path of a URI.
const PATH: &percent_encoding::AsciiSet = &percent_encoding::NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'.')
    .remove(b'-')
    .remove(b'_');

impl Listener {
    async fn accept(&self) -> io::Result<Client> {
        Ok(match self {
            Self::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                if let Err(error) = grow_send_buffer(&stream) {
                    tracing::debug!(%error, "cannot grow the send buffer");
                }
                Client::Unix(stream)
            }
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%peer, %error, "cannot send without delay");
                }
                Client::Tcp(stream)
            }
        })
    }
}

/// Beyond the system's limit where we may, up to it where we may not.
fn grow_send_buffer(stream: &UnixStream) -> rustix::io::Result<()> {
    sockopt::set_socket_send_buffer_size_force(stream, SEND_BUFFER)
        .or_else(|_| sockopt::set_socket_send_buffer_size(stream, SEND_BUFFER))
}

/// Removes a socket on which nobody listens.
fn remove_stale(path: &Path) -> Result<(), BindError> {
    let address = || path.display().to_string();
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(BindError::io(&address())(error)),
    };
    if !meta.file_type().is_socket() {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(BindError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(BindError::io(&address()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(BindError::io(&address())(error)),
    }
}

async fn stopped(mut stop: watch::Receiver<Stop>) {
    if stop.wait_for(|word| *word > Stop::Run).await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn serve<S, D>(
    mut stream: S,
    device: Arc<D>,
    export: Export,
    limits: ServerLimits,
    stop: watch::Receiver<Stop>,
) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + AsFd + Unpin + Send,
    D: BlockDevice,
{
    let agreed = tokio::select! {
        () = stopped(stop.clone()) => return Ok(()),
        agreed = negotiate(&mut stream, &export, limits.handshake) => agreed?,
    };
    let Negotiated::Transmission(agreed) = agreed else {
        return Ok(());
    };
    let session = Session {
        structured: agreed.structured,
        base_allocation: agreed.base_allocation,
        limits: Limits {
            budget: ByteBudget::new(limits.payload),
            ..Limits::default()
        },
        ..Session::default()
    };
    match transmit(stream, device, session, stop).await? {
        Ended::Vanished => tracing::info!("an nbd client left without a word"),
        Ended::Disconnected | Ended::Closed | Ended::Paused { .. } => {}
    }
    Ok(())
}

fn report(ended: Result<Result<(), ConnectionError>, tokio::task::JoinError>) {
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "nbd connection ended"),
        Err(error) => tracing::error!(%error, "nbd connection died"),
    }
}
