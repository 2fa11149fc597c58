//! An answer on its way out: status, headers, body.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};

use super::clock;
use super::record::Record;
use super::refusal::Refusal;
use super::store::Slot;

/// Bytes read under one lock by a body that is streamed.
const CHUNK: u64 = 1 << 20;

/// Where the bytes of an answer come from.
#[derive(Debug)]
pub(super) enum Source {
    /// There are none.
    Empty,
    /// From memory.
    Pieces(VecDeque<Bytes>),
    /// From a blob, as they are sent.
    Blob(BlobReader),
}

/// Reads a range of a blob (or snapshot) in chunks.
#[derive(Debug)]
pub(super) struct BlobReader {
    /// Where it is.
    pub slot: Arc<Slot>,
    /// Which snapshot.
    pub snapshot: Option<String>,
    /// Its files: another blob of the same name is another blob.
    pub files: String,
    /// Next byte.
    pub at: u64,
    /// First byte after the range.
    pub end: u64,
}

impl BlobReader {
    fn next(&mut self) -> std::io::Result<Bytes> {
        let versions = self.slot.read();
        let blob = versions
            .get(self.snapshot.as_deref())
            .ok()
            .filter(|blob| blob.record.files == self.files && blob.record.size >= self.end)
            .ok_or_else(|| std::io::Error::other("the blob was replaced while it was read"))?;
        let len = (self.end - self.at).min(CHUNK);
        let bytes = blob.read(
            self.at,
            usize::try_from(len).map_err(std::io::Error::other)?,
        )?;
        self.at += len;
        Ok(bytes)
    }
}

/// The body of an answer. `len` is what the headers promise; a body made to
/// break off ends early with an error, on which the connection is cut.
#[derive(Debug)]
pub(super) struct ReplyBody {
    source: Source,
    len: u64,
    left: u64,
}

impl ReplyBody {
    pub(super) fn empty() -> Self {
        Self::new(Source::Empty, 0)
    }

    fn new(source: Source, len: u64) -> Self {
        Self {
            source,
            len,
            left: len,
        }
    }

    /// Bytes the headers promise.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Makes the body break off after `bytes`.
    pub(super) fn truncate(&mut self, bytes: u64) {
        self.left = bytes.min(self.len.saturating_sub(1));
    }

    /// Passes the bytes that are in memory through `change`; a streamed body
    /// is first read whole.
    pub(super) fn rewrite(&mut self, change: impl FnOnce(&mut [u8])) -> std::io::Result<()> {
        let mut bytes = Vec::new();
        match &mut self.source {
            Source::Empty => return Ok(()),
            Source::Pieces(pieces) => {
                for piece in pieces.drain(..) {
                    bytes.extend_from_slice(&piece);
                }
            }
            Source::Blob(reader) => {
                while reader.at < reader.end {
                    bytes.extend_from_slice(&reader.next()?);
                }
            }
        }
        change(&mut bytes);
        self.source = Source::Pieces(VecDeque::from([Bytes::from(bytes)]));
        Ok(())
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        let this = &mut *self;
        let next = match &mut this.source {
            Source::Empty => None,
            Source::Pieces(pieces) => pieces.pop_front().map(Ok),
            Source::Blob(reader) => (reader.at < reader.end).then(|| reader.next()),
        };
        Poll::Ready(match next {
            None => None,
            Some(Err(error)) => Some(Err(error)),
            Some(Ok(_)) if this.left == 0 => Some(Err(std::io::Error::other("cut on demand"))),
            Some(Ok(mut bytes)) => {
                let len = bytes.len() as u64;
                if len > this.left {
                    bytes.truncate(usize::try_from(this.left).unwrap_or(0));
                    // What is left over makes the next poll break off.
                    if let Source::Pieces(pieces) = &mut this.source {
                        pieces.push_front(Bytes::from_static(b"?"));
                    }
                }
                this.left -= bytes.len() as u64;
                Some(Ok(Frame::data(bytes)))
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.source, Source::Empty)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.len)
    }
}

/// An answer.
#[derive(Debug)]
pub(super) struct Reply {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: ReplyBody,
}

impl Reply {
    /// An answer without a body.
    pub(super) fn new(status: StatusCode) -> Self {
        Self {
            status,
            headers: HeaderMap::with_capacity(24),
            body: ReplyBody::empty(),
        }
    }

    /// Sets a header to a fixed text.
    pub(super) fn fixed(mut self, name: &'static str, value: &'static str) -> Self {
        self.headers.insert(
            HeaderName::from_static(name),
            HeaderValue::from_static(value),
        );
        self
    }

    /// Sets a header; a value HTTP cannot carry is left out.
    pub(super) fn header(mut self, name: &'static str, value: impl Into<Bytes>) -> Self {
        if let Ok(value) = HeaderValue::from_maybe_shared(value.into()) {
            self.headers.insert(HeaderName::from_static(name), value);
        }
        self
    }

    /// Sets a header to a number.
    pub(super) fn number(mut self, name: &'static str, value: u64) -> Self {
        self.headers
            .insert(HeaderName::from_static(name), HeaderValue::from(value));
        self
    }

    /// Sets `ETag` and `Last-Modified`.
    pub(super) fn version(self, record: &Record) -> Self {
        let mut reply = self.header("etag", record.etag());
        reply.headers.insert(
            header::LAST_MODIFIED,
            clock::http_date_of(record.modified()),
        );
        reply
    }

    /// Gives it a body.
    pub(super) fn body(mut self, source: Source, len: u64) -> Self {
        self.body = ReplyBody::new(source, len);
        self.headers
            .insert(header::CONTENT_LENGTH, HeaderValue::from(len));
        self
    }

    /// Gives it bytes.
    pub(super) fn bytes(self, bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        let len = bytes.len() as u64;
        self.body(Source::Pieces(VecDeque::from([bytes])), len)
    }

    /// Gives it an XML document.
    pub(super) fn xml(self, document: String) -> Self {
        self.fixed("content-type", "application/xml")
            .bytes(document)
    }

    /// The answer to a refused request. `head` requests and 304 get no body.
    pub(super) fn refusal(refusal: &Refusal, request_id: &str, head: bool) -> Self {
        let mut reply = Self::new(refusal.status());
        if !refusal.code().is_empty() {
            reply = reply.header("x-ms-error-code", refusal.code().to_owned());
        }
        for (name, value) in refusal.headers() {
            reply.headers.insert(name.clone(), value.clone());
        }
        if head || refusal.status() == StatusCode::NOT_MODIFIED {
            return reply;
        }
        let mut xml = super::xml::Xml::new();
        xml.open("Error");
        xml.text("Code", refusal.code());
        let time = clock::iso(clock::now());
        let message = format!("{}\nRequestId:{request_id}\nTime:{time}", refusal.message());
        xml.text("Message", &message);
        for (name, value) in refusal.fields() {
            xml.text(name, value);
        }
        xml.close("Error");
        reply.xml(xml.finish())
    }

    /// What hyper sends.
    pub(super) fn into_response(self) -> Response<ReplyBody> {
        let mut response = Response::new(self.body);
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        response
    }
}
