//! One HTTP/1.1 connection and one exchange on it.
//!
//! No task stands behind a connection: whoever uses it polls hyper's driver in
//! its own future. Dropping that future drops the socket, so no answer can
//! ever be left pending in the pool, and a request costs no task switch.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

/// What became of the bytes of the request under way.
#[derive(Debug, Default)]
pub(super) struct Fate {
    handed: AtomicBool,
    broken: AtomicBool,
    /// The connection is idle and being looked at before it is used again.
    looking: AtomicBool,
}

impl Fate {
    /// True when any byte of the request was accepted by the socket (or by
    /// the TLS session in front of it): it may reach the store.
    pub fn handed(&self) -> bool {
        self.handed.load(Ordering::Relaxed)
    }

    fn broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }
}

/// The transport under hyper. It records whether bytes were handed on, and it
/// swallows what can no longer be sent: a store that answers early and closes
/// makes our write fail, but its answer is still there to be read, and the
/// answer decides. Such a connection is never used again.
struct Watched {
    stream: Stream,
    fate: Arc<Fate>,
}

enum Stream {
    Plain(TokioIo<TcpStream>),
    Tls(Box<TokioIo<TlsStream<TcpStream>>>),
}

macro_rules! on_stream {
    ($this:expr, $stream:ident => $call:expr) => {
        match &mut $this.stream {
            Stream::Plain($stream) => {
                let $stream = Pin::new($stream);
                $call
            }
            Stream::Tls($stream) => {
                let $stream = Pin::new(&mut **$stream);
                $call
            }
        }
    };
}

impl Watched {
    fn settle(&self, sent: Poll<io::Result<usize>>, len: usize) -> Poll<io::Result<usize>> {
        match sent {
            Poll::Ready(Ok(n)) => {
                if n > 0 {
                    self.fate.handed.store(true, Ordering::Relaxed);
                }
                Poll::Ready(Ok(n))
            }
            Poll::Ready(Err(error)) => {
                tracing::debug!("cannot send: {error}; waiting for what the peer had to say");
                self.fate.broken.store(true, Ordering::Relaxed);
                Poll::Ready(Ok(len))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl Watched {
    /// Asks the kernel whether the peer has closed. The reactor learns of it
    /// only when it next polls, which may be after we have written a request
    /// whose outcome nobody will ever know.
    fn is_closed(&self) -> io::Result<bool> {
        use rustix::net::RecvFlags;
        let socket = match &self.stream {
            Stream::Plain(stream) => stream.inner(),
            Stream::Tls(stream) => stream.inner().get_ref().0,
        };
        let mut byte = [0_u8];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(socket, &mut byte, flags) {
            Ok((_, 0)) => Ok(true),
            // Unasked bytes end a plain connection; TLS has messages of its own.
            Ok(_) => Ok(matches!(self.stream, Stream::Plain(_))),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl Read for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        if self.fate.looking.load(Ordering::Relaxed) && self.is_closed()? {
            return Poll::Ready(Ok(()));
        }
        on_stream!(self, stream => stream.poll_read(cx, buffer))
    }
}

impl Write for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.fate.broken() {
            return Poll::Ready(Ok(bytes.len()));
        }
        let sent = on_stream!(self, stream => stream.poll_write(cx, bytes));
        self.settle(sent, bytes.len())
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let len = pieces.iter().map(|piece| piece.len()).sum();
        if self.fate.broken() {
            return Poll::Ready(Ok(len));
        }
        let sent = on_stream!(self, stream => stream.poll_write_vectored(cx, pieces));
        self.settle(sent, len)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.fate.broken() {
            return Poll::Ready(Ok(()));
        }
        let flushed = on_stream!(self, stream => stream.poll_flush(cx));
        // As in `settle`: what cannot be sent is no reason not to read.
        self.settle(flushed.map_ok(|()| 0), 0).map_ok(|_| ())
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_stream!(self, stream => stream.poll_shutdown(cx))
    }
}

/// A request that got no answer.
#[derive(Debug)]
pub(super) struct Unanswered {
    /// True when the request may reach the store ([`Fate::handed`]).
    pub written: bool,
    /// What the connection said.
    pub reason: String,
}

/// An open connection, idle or in the hands of one attempt.
pub(super) struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    driver: http1::Connection<Watched, Full<Bytes>>,
    driver_done: bool,
    fate: Arc<Fate>,
    /// The address at the other end.
    pub peer: SocketAddr,
    /// When it last became idle.
    pub idle_since: Instant,
    /// How long the server keeps an idle connection, as it last said.
    pub keep_alive: Option<Duration>,
}

impl Connection {
    /// HTTP on a plain socket.
    pub async fn plain(socket: TcpStream, peer: SocketAddr) -> hyper::Result<Box<Self>> {
        Self::open(Stream::Plain(TokioIo::new(socket)), peer).await
    }

    /// HTTP inside TLS.
    pub async fn tls(session: TlsStream<TcpStream>, peer: SocketAddr) -> hyper::Result<Box<Self>> {
        Self::open(Stream::Tls(Box::new(TokioIo::new(session))), peer).await
    }

    /// In a box, for it is large and changes hands with every request.
    async fn open(stream: Stream, peer: SocketAddr) -> hyper::Result<Box<Self>> {
        let fate = Arc::new(Fate::default());
        let watched = Watched {
            stream,
            fate: fate.clone(),
        };
        let (sender, driver) = http1::Builder::new().handshake(watched).await?;
        Ok(Box::new(Self {
            sender,
            driver,
            driver_done: false,
            fate,
            peer,
            idle_since: Instant::now(),
            keep_alive: None,
        }))
    }

    /// What becomes of the request under way; stays readable when the
    /// connection is gone.
    pub fn fate(&self) -> Arc<Fate> {
        self.fate.clone()
    }

    /// Sends `request` and waits for the head of its answer.
    pub async fn send(
        &mut self,
        request: hyper::Request<Full<Bytes>>,
    ) -> Result<hyper::Response<Incoming>, Unanswered> {
        self.fate.handed.store(false, Ordering::Relaxed);
        let (driver, done) = (&mut self.driver, &mut self.driver_done);
        let mut answer = pin!(self.sender.try_send_request(request));
        let result = poll_fn(|cx| {
            drive(driver, done, cx);
            answer.as_mut().poll(cx)
        })
        .await;
        result.map_err(|refused| {
            // A request that hyper hands back was never started; one that it
            // started may still have met a closed socket.
            let written = refused.message().is_none() && self.fate.handed();
            Unanswered {
                written,
                reason: reason(refused.error()),
            }
        })
    }

    /// The next piece of the answer's body; `None` at its end.
    pub async fn piece(&mut self, body: &mut Incoming) -> Option<Result<Bytes, String>> {
        let (driver, done) = (&mut self.driver, &mut self.driver_done);
        poll_fn(|cx| {
            loop {
                let mut frame = Pin::new(&mut *body).poll_frame(cx);
                if frame.is_pending() {
                    drive(driver, done, cx);
                    frame = Pin::new(&mut *body).poll_frame(cx);
                }
                match frame {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(None) => return Poll::Ready(None),
                    Poll::Ready(Some(Err(error))) => {
                        return Poll::Ready(Some(Err(reason(&error))));
                    }
                    Poll::Ready(Some(Ok(frame))) => {
                        // Trailers carry nothing that we asked for.
                        if let Ok(data) = frame.into_data() {
                            return Poll::Ready(Some(Ok(data)));
                        }
                    }
                }
            }
        })
        .await
    }

    /// True when the exchange is over and the connection can take another
    /// request, as far as we have heard; never waits.
    pub async fn is_settled(&mut self) -> bool {
        poll_fn(|cx| {
            drive(&mut self.driver, &mut self.driver_done, cx);
            Poll::Ready(!self.driver_done && !self.fate.broken() && self.sender.is_ready())
        })
        .await
    }

    /// As [`Connection::is_settled`], and the kernel has not heard of a close either.
    pub async fn is_open(&mut self) -> bool {
        self.fate.looking.store(true, Ordering::Relaxed);
        let open = self.is_settled().await;
        self.fate.looking.store(false, Ordering::Relaxed);
        open
    }
}

/// Moves hyper's side on. Its own end and errors reach us through the answer.
fn drive(
    driver: &mut http1::Connection<Watched, Full<Bytes>>,
    done: &mut bool,
    cx: &mut Context<'_>,
) {
    use std::future::Future as _;
    if !*done && let Poll::Ready(result) = Pin::new(driver).poll(cx) {
        *done = true;
        if let Err(error) = result {
            tracing::debug!("connection ended: {error}");
        }
    }
}

/// hyper's error with its cause, in one line.
fn reason(error: &hyper::Error) -> String {
    use std::error::Error as _;
    if error.is_parse() {
        return format!("the answer is not HTTP: {error}");
    }
    if error.is_incomplete_message() {
        return "the store closed the connection before its answer was complete".into();
    }
    match error.source() {
        Some(cause) => cause.to_string(),
        None => error.to_string(),
    }
}
