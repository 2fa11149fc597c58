//! The transmission phase: one connection, pipelined, on any
//! [`BlockDevice`].
//!
//! [`transmit`] is one task that owns the socket. It reads requests
//! (`inbox`), checks and starts them (`execute`), and writes replies in
//! the order they become ready (`outbox`); `connection` is the loop that
//! ties them together. A request is polled once where it is read, so requests
//! enter the device in the order they arrived. One that has to wait goes on in
//! the connection's task (`running`), a large one in a task of its own; nothing
//! that happens to the connection stops either half way.

mod busy;
mod connection;
mod execute;
mod inbox;
mod outbox;
mod running;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError, watch};

use super::wire::WireError;
use crate::device::BlockDevice;

/// What the owner of a connection wants of it. Only ever raised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    /// Serve.
    #[default]
    Run,
    /// Take no further request, answer those taken, and hand the stream back
    /// as [`Ended::Paused`].
    Pause,
    /// Answer what is running, refuse what still comes with `ESHUTDOWN`, and
    /// end.
    Close,
}

/// A bound on payload bytes: of writes being received or executed, and of
/// reads being executed or not yet sent; every other request counts as 4 KiB,
/// so it bounds requests too. Clones share it, so its owner decides whether a
/// connection, a volume or a process has one.
#[derive(Clone, Debug)]
pub struct ByteBudget {
    permits: Arc<Semaphore>,
    total: u32,
}

impl ByteBudget {
    /// A budget of `total` bytes. A single request above it waits until it can
    /// have all of it.
    #[must_use]
    pub fn new(total: u32) -> Self {
        let total = total.max(1);
        Self {
            permits: Arc::new(Semaphore::new(total as usize)),
            total,
        }
    }

    /// Bytes not in use.
    #[must_use]
    pub fn available(&self) -> usize {
        self.permits.available_permits()
    }

    fn try_take(&self, bytes: u32) -> Option<OwnedSemaphorePermit> {
        match Arc::clone(&self.permits).try_acquire_many_owned(bytes.min(self.total)) {
            Ok(permit) => Some(permit),
            Err(TryAcquireError::NoPermits) => None,
            Err(TryAcquireError::Closed) => unreachable!("the semaphore is never closed"),
        }
    }

    fn take(&self, bytes: u32) -> impl Future<Output = OwnedSemaphorePermit> + Send + use<> {
        let permits = Arc::clone(&self.permits);
        let bytes = bytes.min(self.total);
        async move {
            permits
                .acquire_many_owned(bytes)
                .await
                .expect("the semaphore is never closed")
        }
    }
}

/// Bounds of one connection.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Requests taken and not yet answered. At least the 128 the Linux kernel
    /// keeps open on a connection, or requests wait unread.
    pub max_requests: usize,
    /// Payload bytes.
    pub budget: ByteBudget,
    /// How long a peer may take no byte of the replies due to it after
    /// everything else has ended.
    pub linger: Duration,
}

impl Default for Limits {
    /// 256 requests, 64 MiB of the connection's own, five seconds.
    fn default() -> Self {
        Self {
            max_requests: 256,
            budget: ByteBudget::new(64 << 20),
            linger: Duration::from_secs(5),
        }
    }
}

/// What was agreed before transmission began.
#[derive(Clone, Debug, Default)]
pub struct Session {
    /// The client asked for structured replies.
    pub structured: bool,
    /// The id under which `base:allocation` was selected.
    pub base_allocation: Option<u32>,
    /// Bounds.
    pub limits: Limits,
    /// Bytes already read from the stream and not consumed, as
    /// [`Ended::Paused`] returned them.
    pub unread: Bytes,
}

impl Session {
    /// A session with the Linux kernel, which enters the transmission phase
    /// without a handshake and knows simple replies only.
    #[must_use]
    pub fn kernel(limits: Limits) -> Self {
        Self {
            limits,
            ..Self::default()
        }
    }
}

/// How a transmission came to its end.
#[derive(Debug)]
pub enum Ended<S> {
    /// Paused at a request boundary: every request taken was answered.
    Paused {
        /// The stream, for the next [`transmit`], here or in another process.
        stream: S,
        /// Bytes to give to that one as [`Session::unread`]: it may open with
        /// a part of a header, or a header and a part of its payload.
        unread: Bytes,
    },
    /// The client said goodbye, or closed its sending side, and has all its
    /// replies.
    Disconnected,
    /// The peer hung up without a word. Requests it left running may finish in
    /// the device, or be given up where they wait ([`crate::caller`]); those
    /// not yet started never will.
    Vanished,
    /// Closed as [`Stop::Close`] asked, everything taken answered.
    Closed,
}

/// A connection that could not go on. Errors of single requests are not among
/// them: those go to the client in its replies.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Reading from the socket failed.
    #[error("cannot read from the nbd client: {0}")]
    Read(#[source] io::Error),
    /// Writing to the socket failed; the client is gone.
    #[error("cannot write to the nbd client: {0}")]
    Write(#[source] io::Error),
    /// The stream is out of step.
    #[error("nbd protocol violation: {0}")]
    Protocol(#[from] WireError),
    /// The peer hung up within a message.
    #[error("nbd client hung up within a request")]
    Truncated,
    /// The peer took no reply for [`Limits::linger`] while the connection was
    /// to end.
    #[error("nbd client stopped reading its replies")]
    Stalled,
}

/// Serves `device` on `stream` until the client leaves or `stop` says so.
///
/// Requests run concurrently and are answered as they finish. When the sender
/// of `stop` is dropped its last word stands. Dropping the returned future
/// drops the connection; requests it started go on as those of a peer that
/// hung up.
///
/// A peer that hung up takes its unread writes with it: a client that replays
/// them on another connection must not see the old copy applied after a newer
/// write. So a client has to leave its connection open until it has its
/// replies, as all of them do.
///
/// # Errors
/// [`SessionError`]; none of them says anything about a request.
pub async fn transmit<S, D>(
    stream: S,
    device: Arc<D>,
    session: Session,
    stop: watch::Receiver<Stop>,
) -> Result<Ended<S>, SessionError>
where
    S: AsyncRead + AsyncWrite + AsFd + Unpin + Send,
    D: BlockDevice,
{
    connection::Connection::new(stream, device, session)
        .run(stop)
        .await
}
