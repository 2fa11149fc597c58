//! The read side of a connection: bytes in, whole requests out.
//!
//! Headers and small payloads are read through one buffer so that many
//! requests arrive per system call; the bulk of a large payload is read
//! straight into the buffer the device gets.
//!
//! | expecting | has | leaves when |
//! |---|---|---|
//! | header | nothing | 28 bytes are buffered |
//! | budget | a header | its bytes are granted |
//! | payload | a header, its bytes granted, a part of the payload | the payload is whole |
//! | drain | a header whose payload no limit allows | the payload has passed |
//!
//! Invariant: while a payload or a drain is incomplete the buffer is empty.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::OwnedSemaphorePermit;

use super::{ByteBudget, SessionError};
use crate::buffers::Buffer;
use crate::nbd::wire::request::{Command, REQUEST_LEN, RequestHeader};

/// Bytes of the read buffer.
const BUFFER: usize = 64 << 10;

/// A payload with at least this many bytes to come is read without a copy.
const DIRECT: usize = 16 << 10;

/// Bytes a block status reply may take; see `execute::MAX_EXTENTS`.
pub(super) const STATUS_BYTES: u32 = 16 << 10;

/// What any request takes at least, for what it occupies besides its payload:
/// so the budget bounds requests without one as well.
const REQUEST_BYTES: u32 = 4 << 10;

type Grant = Pin<Box<dyn Future<Output = OwnedSemaphorePermit> + Send>>;

/// What came with a header.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// The payload, empty for all but writes.
    Payload(Bytes),
    /// The payload was above the limit and is gone.
    Dropped,
}

/// A whole request.
pub(super) struct Incoming {
    pub(super) header: RequestHeader,
    pub(super) body: Body,
    /// Held until the reply is sent.
    pub(super) hold: Option<OwnedSemaphorePermit>,
}

enum Expect {
    Header,
    Budget {
        header: RequestHeader,
        grant: Grant,
    },
    Payload {
        header: RequestHeader,
        payload: Buffer,
        hold: Option<OwnedSemaphorePermit>,
    },
    Drain {
        header: RequestHeader,
        left: usize,
    },
}

/// What [`Inbox::next`] found.
pub(super) enum Next {
    /// A request, whole.
    Request(Incoming),
    /// More bytes have to be read first.
    Starved,
    /// The byte budget is used up; the task is woken when it is granted.
    Blocked,
}

/// See the module.
pub(super) struct Inbox {
    buffer: BytesMut,
    expect: Expect,
    budget: ByteBudget,
    max_payload: u32,
}

impl Inbox {
    pub(super) fn new(unread: &Bytes, budget: ByteBudget, max_payload: u32) -> Self {
        let mut buffer = BytesMut::with_capacity(BUFFER.max(unread.len()));
        buffer.extend_from_slice(unread);
        Self {
            buffer,
            expect: Expect::Header,
            budget,
            max_payload,
        }
    }

    /// The next request that the bytes read so far make whole.
    pub(super) fn next(&mut self, cx: &mut Context<'_>) -> Result<Next, SessionError> {
        loop {
            match std::mem::replace(&mut self.expect, Expect::Header) {
                Expect::Header => {
                    let Some(bytes) = self.buffer.first_chunk::<REQUEST_LEN>() else {
                        return Ok(Next::Starved);
                    };
                    let header = RequestHeader::parse(bytes)?;
                    self.buffer.advance(REQUEST_LEN);
                    self.expect = self.admit(header);
                }
                Expect::Budget { header, mut grant } => match grant.as_mut().poll(cx) {
                    Poll::Ready(hold) => self.expect = Self::receive(header, Some(hold)),
                    Poll::Pending => {
                        self.expect = Expect::Budget { header, grant };
                        return Ok(Next::Blocked);
                    }
                },
                Expect::Payload {
                    header,
                    mut payload,
                    hold,
                } => {
                    let take = (header.payload_len() - payload.len()).min(self.buffer.len());
                    payload.extend_from_slice(&self.buffer[..take]);
                    self.buffer.advance(take);
                    if payload.len() < header.payload_len() {
                        self.expect = Expect::Payload {
                            header,
                            payload,
                            hold,
                        };
                        return Ok(Next::Starved);
                    }
                    return Ok(Next::Request(Incoming {
                        header,
                        body: Body::Payload(payload.share()),
                        hold,
                    }));
                }
                Expect::Drain { header, left } => {
                    let take = left.min(self.buffer.len());
                    self.buffer.advance(take);
                    if take < left {
                        self.expect = Expect::Drain {
                            header,
                            left: left - take,
                        };
                        return Ok(Next::Starved);
                    }
                    return Ok(Next::Request(Incoming {
                        header,
                        body: Body::Dropped,
                        hold: None,
                    }));
                }
            }
        }
    }

    /// What a new header has to wait for.
    fn admit(&self, header: RequestHeader) -> Expect {
        if header.payload_len() > self.max_payload as usize {
            let left = header.payload_len();
            return Expect::Drain { header, left };
        }
        let bytes = match Command::from_code(header.command) {
            Some(Command::Write) => header.length,
            Some(Command::Read) if header.length <= self.max_payload => header.length,
            Some(Command::BlockStatus) => STATUS_BYTES,
            Some(Command::Flush | Command::Trim | Command::WriteZeroes) => REQUEST_BYTES,
            _ => 0,
        };
        // Goodbye, and what nobody knows, are answered at once.
        if bytes == 0 {
            return Self::receive(header, None);
        }
        let bytes = bytes.max(REQUEST_BYTES);
        match self.budget.try_take(bytes) {
            Some(hold) => Self::receive(header, Some(hold)),
            None => Expect::Budget {
                header,
                grant: Box::pin(self.budget.take(bytes)),
            },
        }
    }

    fn receive(header: RequestHeader, hold: Option<OwnedSemaphorePermit>) -> Expect {
        Expect::Payload {
            header,
            payload: Buffer::with_room(header.payload_len()),
            hold,
        }
    }

    /// Reads once, ready with the number of bytes; 0 is the end of the stream.
    /// Pending without a read when the buffer is full, which it only is while
    /// requests in it wait for something else.
    pub(super) fn poll_fill<S>(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut S,
    ) -> Poll<Result<usize, SessionError>>
    where
        S: AsyncRead + Unpin,
    {
        if let Expect::Payload {
            header, payload, ..
        } = &mut self.expect
        {
            let left = header.payload_len() - payload.len();
            if left >= DIRECT {
                let mut target = (&mut **payload).limit(left);
                let read = std::pin::pin!(stream.read_buf(&mut target));
                return Poll::Ready(ready!(read.poll(cx)).map_err(SessionError::Read));
            }
        }
        if self.is_full() {
            return Poll::Pending;
        }
        // Payloads are copied out, so nobody shares the buffer and it is
        // reused in place.
        self.buffer.reserve(BUFFER - self.buffer.len());
        let mut target = (&mut self.buffer).limit(BUFFER);
        let read = std::pin::pin!(stream.read_buf(&mut target));
        Poll::Ready(ready!(read.poll(cx)).map_err(SessionError::Read))
    }

    /// Nothing is read before what is there was taken.
    pub(super) fn is_full(&self) -> bool {
        self.buffer.len() >= BUFFER
    }

    /// True when the stream may end here: no message was begun.
    pub(super) fn between_requests(&self) -> bool {
        matches!(self.expect, Expect::Header) && self.buffer.is_empty()
    }

    /// Everything read and not handed out, as the next reader must see it.
    pub(super) fn into_unread(self) -> Bytes {
        let mut unread = BytesMut::new();
        match self.expect {
            Expect::Header => {}
            Expect::Budget { header, .. } => unread.put_slice(&header.encode()),
            Expect::Payload {
                header, payload, ..
            } => {
                unread.put_slice(&header.encode());
                unread.put_slice(&payload);
            }
            Expect::Drain { header, left } => {
                // The part that has passed cannot be given back. A shorter
                // write with flags nobody knows gets the same `EINVAL`.
                let rest = RequestHeader {
                    flags: u16::MAX,
                    length: u32::try_from(left).unwrap_or(header.length),
                    ..header
                };
                unread.put_slice(&rest.encode());
            }
        }
        unread.put_slice(&self.buffer);
        unread.freeze()
    }
}
