//! The write side of a connection: replies in, vectored writes out.
//!
//! Data goes to the socket from where the device left it; headers are small
//! and held inline. Replies that are queued together leave in one system call.
//! The queue needs no bound of its own: every reply in it holds one of the
//! connection's request slots, and its bytes of the budget, until it is sent.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::AsyncWrite;
use tokio::sync::OwnedSemaphorePermit;

use crate::device::{ReadData, Segment};

/// Longest inline piece: a whole OFFSET_HOLE chunk.
const INLINE: usize = 32;

/// Pieces given to one write.
const SLICES: usize = 128;

/// Where zeroes that nobody fetched come from.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

enum Content {
    Inline {
        bytes: [u8; INLINE],
        at: u8,
        len: u8,
    },
    Data(Bytes),
    Zeroes(usize),
}

struct Piece {
    content: Content,
    /// Set on the last piece of a reply.
    end: bool,
    /// Given back when the piece has been sent.
    hold: Option<OwnedSemaphorePermit>,
}

impl Content {
    fn len(&self) -> usize {
        match self {
            Self::Inline { at, len, .. } => (len - at).into(),
            Self::Data(bytes) => bytes.len(),
            Self::Zeroes(len) => *len,
        }
    }

    fn advance(&mut self, by: usize) {
        match self {
            Self::Inline { at, .. } => *at += u8::try_from(by).expect("within the piece"),
            Self::Data(bytes) => bytes.advance(by),
            Self::Zeroes(len) => *len -= by,
        }
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Outbox {
    pieces: VecDeque<Piece>,
}

impl Outbox {
    /// Queues the bytes of a header, or of a whole small message.
    ///
    /// # Panics
    /// When it is above 32 bytes.
    pub(super) fn push_inline(&mut self, header: &[u8]) {
        let mut bytes = [0; INLINE];
        bytes[..header.len()].copy_from_slice(header);
        let len = u8::try_from(header.len()).expect("at most 32 bytes");
        self.push(Content::Inline { bytes, at: 0, len });
    }

    /// Queues `bytes`.
    pub(super) fn push_data(&mut self, bytes: Bytes) {
        self.push(Content::Data(bytes));
    }

    /// Queues all of `data`, zeroes included.
    pub(super) fn push_read(&mut self, data: &ReadData) {
        for segment in data.segments() {
            match segment {
                Segment::Data(bytes) => self.push_data(bytes.clone()),
                Segment::Zeroes(len) => self.push(Content::Zeroes(*len)),
            }
        }
    }

    /// Marks what was queued last as the end of a reply that holds `hold`.
    pub(super) fn end_reply(&mut self, hold: Option<OwnedSemaphorePermit>) {
        let last = self.pieces.back_mut().expect("a reply has a header");
        debug_assert!(!last.end, "a reply ends once");
        last.end = true;
        last.hold = hold;
    }

    fn push(&mut self, content: Content) {
        self.pieces.push_back(Piece {
            content,
            end: false,
            hold: None,
        });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Writes once; ready with the number of replies that are now sent whole.
    pub(super) fn poll_write<S>(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut S,
    ) -> Poll<io::Result<usize>>
    where
        S: AsyncWrite + Unpin,
    {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let mut used = 0;
        'fill: for piece in &self.pieces {
            match &piece.content {
                Content::Inline { bytes, at, len } => {
                    slices[used] = IoSlice::new(&bytes[(*at).into()..(*len).into()]);
                    used += 1;
                }
                Content::Data(bytes) => {
                    slices[used] = IoSlice::new(bytes);
                    used += 1;
                }
                Content::Zeroes(len) => {
                    let mut left = *len;
                    while left > 0 {
                        let take = left.min(ZEROES.len());
                        slices[used] = IoSlice::new(&ZEROES[..take]);
                        used += 1;
                        left -= take;
                        if used == SLICES {
                            break 'fill;
                        }
                    }
                }
            }
            if used == SLICES {
                break;
            }
        }
        let written = ready!(Pin::new(stream).poll_write_vectored(cx, &slices[..used]))?;
        if written == 0 && used > 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        Poll::Ready(Ok(self.sent(written)))
    }

    /// Drops `written` bytes from the front; returns how many replies ended.
    fn sent(&mut self, mut written: usize) -> usize {
        let mut replies = 0;
        while let Some(piece) = self.pieces.front_mut() {
            let len = piece.content.len();
            if written < len {
                piece.content.advance(written);
                break;
            }
            written -= len;
            replies += usize::from(piece.end);
            self.pieces.pop_front();
        }
        replies
    }
}
