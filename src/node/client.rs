//! The control API's client, for `dyskctl` and the CSI plugin.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::api::{
    AttachEvent, AttachRequest, Attachment, AttachmentList, CredentialChange, Detached,
    ErrorAnswer, ErrorBody, Health, ResizeRequest, SnapshotRequest, SnapshotTaken, Stage, Stats,
    Version,
};
use super::name::AttachmentName;
use crate::volume::{FormatMark, FormatState};

/// For requests that the daemon answers from memory.
const QUICK: Duration = Duration::from_secs(10);
/// Most bytes of one line of progress.
const MAX_LINE: usize = 64 << 10;

/// A client of one daemon; each request has a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// A request that was not fulfilled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the socket.
    #[error("dyskd is not running (no answer at {socket}): start it with `systemctl start dyskd`, or name its socket with --socket", socket = .0.display())]
    NotRunning(PathBuf),
    /// The socket is not for this user.
    #[error("not allowed to reach dyskd at {socket}: run as root", socket = .0.display())]
    NotAllowed(PathBuf),
    /// The daemon said no.
    #[error("{}", .0.message)]
    Refused(ErrorBody),
    /// The connection broke, or the answer makes no sense.
    #[error("dyskd at {socket}: {reason}", socket = socket.display())]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// What happened.
        reason: String,
    },
}

impl Client {
    /// A client of the daemon at `socket`; connects to nothing yet.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// The socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Attaches; `progress` hears of each stage. Dropping the future undoes
    /// the attach, unless it was just through.
    ///
    /// # Errors
    /// [`ClientError`]; when it is [`ClientError::Broken`], the attachment may
    /// be there.
    pub async fn attach(
        &self,
        request: &AttachRequest,
        mut progress: impl FnMut(Stage),
    ) -> Result<Attachment, ClientError> {
        let body = serde_json::to_vec(request).map_err(|e| self.broken(e))?;
        let answer = self
            .send(Method::POST, "/v1/attachments?progress=true", body.into())
            .await?;
        // One that was there already is answered in one piece.
        let lines = answer
            .headers()
            .get(CONTENT_TYPE)
            .is_some_and(|t| t == "application/x-ndjson");
        if !answer.status().is_success() || !lines {
            return self.finish(answer).await;
        }
        let mut body = answer.into_body();
        let mut buffer = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|e| self.broken(e))?;
            buffer.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()));
            while let Some(end) = buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                match serde_json::from_slice(&line).map_err(|e| self.broken(e))? {
                    AttachEvent::Stage(stage) => progress(stage),
                    AttachEvent::Attached(attachment) => return Ok(*attachment),
                    AttachEvent::Failed(error) => return Err(ClientError::Refused(error)),
                }
            }
            if buffer.len() > MAX_LINE {
                return Err(self.broken("a line of progress has no end"));
            }
        }
        Err(self.broken("it went away during the attach; see its log"))
    }

    /// Detaches.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn detach(
        &self,
        name: &AttachmentName,
        force: bool,
    ) -> Result<Detached, ClientError> {
        let path = format!("/v1/attachments/{name}?force={force}");
        let answer = self.send(Method::DELETE, &path, Bytes::new()).await?;
        self.finish(answer).await
    }

    /// Grows an attached disk to at least `size_bytes`, in use or not, and
    /// answers with the attachment as it is then. Safe to repeat.
    ///
    /// # Errors
    /// [`ClientError`]; the disk has its old size or the new one.
    pub async fn resize(
        &self,
        name: &AttachmentName,
        size_bytes: u64,
    ) -> Result<Attachment, ClientError> {
        let body = serde_json::to_vec(&ResizeRequest { size_bytes }).map_err(|e| self.broken(e))?;
        let path = format!("/v1/attachments/{name}/resize");
        let answer = self.send(Method::POST, &path, body.into()).await?;
        self.finish(answer).await
    }

    /// Takes a snapshot of an attached disk, or finds the one of that name.
    ///
    /// # Errors
    /// [`ClientError`]; the snapshot may be there then, a repeat finds it.
    pub async fn snapshot(
        &self,
        name: &AttachmentName,
        snapshot: &str,
    ) -> Result<SnapshotTaken, ClientError> {
        let request = SnapshotRequest {
            name: snapshot.to_owned(),
        };
        let body = serde_json::to_vec(&request).map_err(|e| self.broken(e))?;
        let path = format!("/v1/attachments/{name}/snapshot");
        let answer = self.send(Method::POST, &path, body.into()).await?;
        self.finish(answer).await
    }

    /// Replaces an attachment's credentials.
    ///
    /// # Errors
    /// [`ClientError`]; refused ones are not taken into use.
    pub async fn replace_credential(
        &self,
        name: &AttachmentName,
        change: &CredentialChange,
    ) -> Result<Attachment, ClientError> {
        let body = serde_json::to_vec(change).map_err(|e| self.broken(e))?;
        let path = format!("/v1/attachments/{name}/credential");
        let answer = self.send(Method::PUT, &path, body.into()).await?;
        self.finish(answer).await
    }

    /// Whether the disk may be formatted. Waits for the store.
    ///
    /// # Errors
    /// [`ClientError`]: then nothing is known.
    pub async fn format_state(&self, name: &AttachmentName) -> Result<FormatState, ClientError> {
        let path = format!("/v1/attachments/{name}/format");
        let answer = self.send(Method::GET, &path, Bytes::new()).await?;
        self.finish(answer).await
    }

    /// Sets the mark of a format.
    ///
    /// # Errors
    /// [`ClientError`]: then it may be set or not.
    pub async fn set_format_mark(
        &self,
        name: &AttachmentName,
        mark: &FormatMark,
    ) -> Result<(), ClientError> {
        let body = serde_json::to_vec(mark).map_err(|e| self.broken(e))?;
        let path = format!("/v1/attachments/{name}/format");
        let answer = self.send(Method::PUT, &path, body.into()).await?;
        let _set: FormatMark = self.finish(answer).await?;
        Ok(())
    }

    /// Every attachment, by name.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn list(&self) -> Result<Vec<Attachment>, ClientError> {
        let list: AttachmentList = self.get("/v1/attachments").await?;
        Ok(list.attachments)
    }

    /// One attachment.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn status(&self, name: &AttachmentName) -> Result<Attachment, ClientError> {
        self.get(&format!("/v1/attachments/{name}")).await
    }

    /// What the open volumes counted.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn stats(&self) -> Result<Stats, ClientError> {
        self.get("/v1/stats").await
    }

    /// The daemon's version.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn version(&self) -> Result<Version, ClientError> {
        self.get("/v1/version").await
    }

    /// Whether the daemon is well.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn health(&self) -> Result<Health, ClientError> {
        self.get("/v1/health").await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let work = async {
            let answer = self.send(Method::GET, path, Bytes::new()).await?;
            self.finish(answer).await
        };
        tokio::time::timeout(QUICK, work)
            .await
            .unwrap_or_else(|_| Err(self.broken("no answer in time")))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| self.unreachable(&error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| self.broken(e))?;
        // Ends when sender and answer are dropped, and closes the socket:
        // what tells the daemon that nobody waits any more.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "control connection ended early");
            }
        });
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "dyskd")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|e| self.broken(e))?;
        sender
            .send_request(request)
            .await
            .map_err(|e| self.broken(e))
    }

    async fn finish<T: DeserializeOwned>(
        &self,
        answer: Response<Incoming>,
    ) -> Result<T, ClientError> {
        let status = answer.status();
        let body = answer.into_body().collect().await;
        let body = body.map_err(|e| self.broken(e))?.to_bytes();
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|e| self.broken(e));
        }
        match serde_json::from_slice::<ErrorAnswer>(&body) {
            Ok(answer) => Err(ClientError::Refused(answer.error)),
            Err(_) => Err(self.broken(format!("status {status} without a reason"))),
        }
    }

    fn unreachable(&self, error: &io::Error) -> ClientError {
        let socket = self.socket.clone();
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NotRunning(socket)
            }
            io::ErrorKind::PermissionDenied => ClientError::NotAllowed(socket),
            _ => self.broken(error),
        }
    }

    fn broken(&self, reason: impl std::fmt::Display) -> ClientError {
        ClientError::Broken {
            socket: self.socket.clone(),
            reason: reason.to_string(),
        }
    }
}
