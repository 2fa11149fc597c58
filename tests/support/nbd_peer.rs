//! A client that speaks raw NBD messages, right or wrong ones, to a
//! transmission on the other end of a socket pair.

#![allow(dead_code, reason = "every test file uses another part of it")]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dysk::device::BlockDevice;
use dysk::nbd::transmission::{Ended, Session, SessionError, Stop, transmit};
use dysk::nbd::wire::reply::{CHUNK_HEADER_LEN, Chunk, ChunkHeader, FLAG_DONE, SimpleReply};
use dysk::nbd::wire::request::{Command, RequestHeader};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Nothing here takes long; what does has hung.
pub const HANG: Duration = Duration::from_secs(30);

pub type Transmission = JoinHandle<Result<Ended<UnixStream>, SessionError>>;

/// A request without flags.
pub fn request(command: Command, cookie: u64, offset: u64, length: u32) -> RequestHeader {
    RequestHeader {
        flags: 0,
        command: command.code(),
        cookie,
        offset,
        length,
    }
}

/// Awaits with an end.
pub async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(HANG, future)
        .await
        .unwrap_or_else(|_| panic!("{what} hangs"))
}

/// Waits until `condition` holds, looking at every turn of the scheduler.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    soon(what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

/// The client's end of a connection.
pub struct Peer {
    pub stream: UnixStream,
}

impl Peer {
    pub async fn send_raw(&mut self, bytes: &[u8]) {
        soon("sending", self.stream.write_all(bytes))
            .await
            .expect("the server takes bytes");
    }

    pub async fn send(&mut self, header: RequestHeader, payload: &[u8]) {
        self.send_raw(&[&header.encode()[..], payload].concat())
            .await;
    }

    pub async fn receive(&mut self, len: usize) -> Bytes {
        let mut bytes = vec![0; len];
        soon("receiving", self.stream.read_exact(&mut bytes))
            .await
            .expect("the server answers");
        bytes.into()
    }

    pub async fn simple(&mut self) -> SimpleReply {
        let bytes = self.receive(16).await;
        SimpleReply::parse(bytes[..].try_into().expect("16 bytes")).expect("a simple reply")
    }

    /// One chunk: cookie, whether it is the last of its reply, contents.
    pub async fn chunk(&mut self) -> (u64, bool, Chunk) {
        let bytes = self.receive(CHUNK_HEADER_LEN).await;
        let header =
            ChunkHeader::parse(bytes[..].try_into().expect("20 bytes")).expect("a chunk header");
        let payload = self.receive(header.length as usize).await;
        let chunk = Chunk::parse(&header, &payload).expect("a chunk");
        (header.cookie, header.flags & FLAG_DONE != 0, chunk)
    }

    /// All chunks of the reply that comes next.
    pub async fn chunks(&mut self) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        loop {
            let (_, done, chunk) = self.chunk().await;
            chunks.push(chunk);
            if done {
                return chunks;
            }
        }
    }

    /// Reads to the end of the stream; nothing may come before it.
    pub async fn ended(&mut self) {
        let mut rest = Vec::new();
        let read = soon("the end of the stream", self.stream.read_to_end(&mut rest)).await;
        // A reset is an end as well.
        if read.is_ok() {
            assert_eq!(rest, b"", "something was sent instead of the end");
        }
    }
}

/// A transmission and its client.
pub struct Rig<D> {
    pub peer: Peer,
    pub disk: Arc<D>,
    pub stop: watch::Sender<Stop>,
    pub transmission: Transmission,
}

impl<D: BlockDevice> Rig<D> {
    pub fn new(disk: D, session: Session) -> Self {
        let (server, client) = UnixStream::pair().expect("a socket pair");
        let disk = Arc::new(disk);
        let (stop, stopped) = watch::channel(Stop::Run);
        let transmission = tokio::spawn(transmit(server, Arc::clone(&disk), session, stopped));
        Self {
            peer: Peer { stream: client },
            disk,
            stop,
            transmission,
        }
    }

    /// How the transmission ended.
    pub async fn ended(self) -> Result<Ended<UnixStream>, SessionError> {
        soon("the end of the transmission", self.transmission)
            .await
            .expect("no panic")
    }
}

/// A session with structured replies and block status.
pub fn structured() -> Session {
    Session {
        structured: true,
        base_allocation: Some(1),
        ..Session::default()
    }
}
