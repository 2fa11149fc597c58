//! From a request to its reply: what is refused and with which error value,
//! what the device is asked, and how its answer looks on the wire.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;

use super::inbox::{Body, STATUS_BYTES};
use super::outbox::Outbox;
use crate::device::{BlockDevice, DeviceError, Extent, Geometry, PAGE, ReadData, Segment};
use crate::nbd::wire::reply::{
    self, CHUNK_HEADER_LEN, Chunk, Errno, SimpleReply, StatusExtent, state,
};
use crate::nbd::wire::request::{Command, RequestHeader, flag};

/// Extents in one block status reply, so that it keeps within the bytes taken
/// from the budget for it.
const MAX_EXTENTS: usize = (STATUS_BYTES as usize - CHUNK_HEADER_LEN - 4) / 8;

/// Chunks a structured read is answered with at most; one in more pieces is
/// sent as one chunk of data, its zeroes written out.
const MAX_CHUNKS: usize = 64;

/// What the session allows, beside the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub(super) structured: bool,
    pub(super) base_allocation: Option<u32>,
}

/// A request the device is asked, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read {
        offset: u64,
        len: u32,
    },
    Write {
        offset: u64,
        fua: bool,
    },
    Flush,
    Trim {
        offset: u64,
        len: u64,
        fua: bool,
    },
    WriteZeroes {
        offset: u64,
        len: u64,
        fua: bool,
        no_hole: bool,
        fast: bool,
    },
    Status {
        offset: u64,
        len: u64,
    },
}

impl Operation {
    /// The request changes what the device holds.
    pub(super) fn changes(self) -> bool {
        matches!(
            self,
            Self::Write { .. } | Self::Trim { .. } | Self::WriteZeroes { .. }
        )
    }

    /// Bytes of data that it moves, either way.
    pub(super) fn moves(self, payload: &Bytes) -> usize {
        match self {
            Self::Read { len, .. } => len as usize,
            _ => payload.len(),
        }
    }
}

/// A request that failed, as the client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) errno: Errno,
    pub(super) message: String,
}

impl Failure {
    pub(super) fn new(errno: Errno, message: impl Into<String>) -> Self {
        Self {
            errno,
            message: message.into(),
        }
    }
}

/// A request's result.
#[derive(Debug)]
pub(super) enum Outcome {
    Done,
    Data(ReadData),
    Extents(Vec<Extent>),
    Failed(Failure),
}

/// Checks a request against the protocol, the session and the device, in the
/// order command, flags, payload, permission, range (proto.md, "Error
/// values").
pub(super) fn check(
    header: &RequestHeader,
    body: &Body,
    terms: Terms,
    geometry: &Geometry,
) -> Result<Operation, Failure> {
    let invalid = |message: &str| Failure::new(Errno::Inval, message);
    let command = Command::from_code(header.command)
        .filter(|command| !matches!(command, Command::Cache | Command::Disconnect))
        .ok_or_else(|| invalid(&format!("unknown command {}", header.command)))?;

    // Every command has to accept FUA once it was offered.
    let allowed = flag::FUA
        | match command {
            Command::Read if terms.structured => flag::DF,
            Command::WriteZeroes => flag::NO_HOLE | flag::FAST_ZERO,
            Command::BlockStatus => flag::REQ_ONE,
            _ => 0,
        };
    if header.flags & !allowed != 0 {
        return Err(invalid(&format!(
            "flags {:#x} do not go with command {}",
            header.flags, header.command
        )));
    }

    let (offset, length) = (header.offset, header.length);
    if command == Command::Flush {
        return if offset == 0 && length == 0 {
            Ok(Operation::Flush)
        } else {
            Err(invalid("a flush has no range"))
        };
    }
    if *body == Body::Dropped || (command == Command::Read && length > geometry.max_payload) {
        return Err(invalid(&format!(
            "length {length} is above the limit of {} bytes",
            geometry.max_payload
        )));
    }
    if command == Command::BlockStatus && terms.base_allocation.is_none() {
        return Err(invalid("no metadata context was selected"));
    }
    if length == 0 {
        return Err(invalid("a length of 0 is no range"));
    }
    let writes = matches!(
        command,
        Command::Write | Command::Trim | Command::WriteZeroes
    );
    if writes && geometry.read_only {
        return Err(device_failure(&DeviceError::ReadOnly, false));
    }
    let len = u64::from(length);
    if offset
        .checked_add(len)
        .is_none_or(|end| end > geometry.size)
    {
        let errno = match command {
            Command::Write | Command::WriteZeroes => Errno::NoSpace,
            _ => Errno::Inval,
        };
        let message = format!(
            "{offset}+{length} is beyond the end of the device at {}",
            geometry.size
        );
        return Err(Failure::new(errno, message));
    }

    let fua = header.flags & flag::FUA != 0;
    Ok(match command {
        Command::Read => Operation::Read {
            offset,
            len: length,
        },
        Command::Write => Operation::Write { offset, fua },
        Command::Trim => Operation::Trim { offset, len, fua },
        Command::WriteZeroes => {
            let no_hole = header.flags & flag::NO_HOLE != 0;
            let fast = header.flags & flag::FAST_ZERO != 0;
            // Giving pages back beats writing them; writing zeroes into parts
            // of pages, or keeping them allocated, is a write like any other.
            let aligned = offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
            if fast && (no_hole || !aligned) {
                return Err(device_failure(&DeviceError::NotSupported, true));
            }
            Operation::WriteZeroes {
                offset,
                len,
                fua,
                no_hole,
                fast,
            }
        }
        Command::BlockStatus => Operation::Status { offset, len },
        Command::Flush | Command::Cache | Command::Disconnect => {
            unreachable!("answered above")
        }
    })
}

/// Asks the device. A panic in it is an I/O error of this one request.
pub(super) async fn execute<D: BlockDevice>(
    device: Arc<D>,
    operation: Operation,
    payload: Bytes,
) -> Outcome {
    let fast = matches!(operation, Operation::WriteZeroes { fast: true, .. });
    match Caught(std::pin::pin!(ask(&*device, operation, payload))).await {
        Some(Ok(outcome)) => outcome,
        Some(Err(error)) => Outcome::Failed(device_failure(&error, fast)),
        None => {
            tracing::error!(?operation, "the device panicked within a request");
            Outcome::Failed(Failure::new(
                Errno::Io,
                "internal error, see the server's log",
            ))
        }
    }
}

async fn ask<D: BlockDevice>(
    device: &D,
    operation: Operation,
    payload: Bytes,
) -> Result<Outcome, DeviceError> {
    match operation {
        Operation::Read { offset, len } => {
            let data = device.read(offset, len).await?;
            if data.len() != len as usize {
                tracing::error!(offset, len, got = data.len(), "the device's read is short");
                return Err(DeviceError::Io(format!(
                    "read of {len} bytes at {offset} returned {}",
                    data.len()
                )));
            }
            return Ok(Outcome::Data(data));
        }
        Operation::Status { offset, len } => {
            return Ok(Outcome::Extents(device.extents(offset, len).await?));
        }
        Operation::Write { offset, fua } => device.write(offset, payload, fua).await?,
        Operation::Flush => device.flush().await?,
        Operation::Trim { offset, len, fua } => device.trim(offset, len, fua).await?,
        Operation::WriteZeroes {
            offset,
            len,
            fua,
            no_hole,
            ..
        } => device.write_zeroes(offset, len, fua, no_hole).await?,
    }
    Ok(Outcome::Done)
}

/// The error value for a device's error. `NBD_ENOTSUP` is for those who asked
/// for a fast zero; nobody else may get it.
fn device_failure(error: &DeviceError, fast: bool) -> Failure {
    let errno = match error {
        DeviceError::Io(_) => Errno::Io,
        DeviceError::Invalid(_) => Errno::Inval,
        DeviceError::NoSpace => Errno::NoSpace,
        DeviceError::ReadOnly => Errno::Perm,
        DeviceError::Shutdown => Errno::Shutdown,
        DeviceError::NotSupported if fast => Errno::NotSup,
        DeviceError::NotSupported => Errno::Inval,
    };
    Failure::new(errno, error.to_string())
}

/// Queues the reply to `header`. The caller ends it.
pub(super) fn put_reply(out: &mut Outbox, header: &RequestHeader, terms: Terms, outcome: Outcome) {
    let cookie = header.cookie;
    match outcome {
        Outcome::Failed(failure) if terms.structured => {
            let chunk = Chunk::Error {
                error: failure.errno.code(),
                message: failure.message,
                offset: None,
            };
            out.push_data(chunk.encode(cookie, true));
        }
        Outcome::Failed(failure) => put_simple(out, cookie, failure.errno.code()),
        Outcome::Done => put_simple(out, cookie, 0),
        Outcome::Data(data) if terms.structured => put_chunks(out, header, &data),
        Outcome::Data(data) => {
            put_simple(out, cookie, 0);
            out.push_read(&data);
        }
        Outcome::Extents(extents) => {
            let outcome = status(header, terms, &extents);
            out.push_data(outcome.encode(cookie, true));
        }
    }
}

fn put_simple(out: &mut Outbox, cookie: u64, error: u32) {
    out.push_inline(&SimpleReply { error, cookie }.encode());
}

/// A structured read: holes as holes, everything else as data. Neighbouring
/// pieces of data make one chunk.
fn put_chunks(out: &mut Outbox, header: &RequestHeader, data: &ReadData) {
    let (cookie, offset) = (header.cookie, header.offset);
    let runs = || data.segments().chunk_by(|a, b| is_hole(a) == is_hole(b));
    let most = if header.flags & flag::DF != 0 {
        1
    } else {
        MAX_CHUNKS
    };
    let whole = runs().take(most + 1).count() > most;
    if whole {
        out.push_inline(&reply::offset_data_header(cookie, true, offset, data.len()));
        out.push_read(data);
        return;
    }
    let mut at = 0;
    for run in runs() {
        let len = run.iter().map(segment_len).sum();
        let here = offset + at as u64;
        let done = at + len == data.len();
        if run.first().is_some_and(is_hole) {
            let len = u32::try_from(len).expect("a part of a 32 bit length");
            out.push_inline(&reply::offset_hole(cookie, done, here, len));
        } else {
            out.push_inline(&reply::offset_data_header(cookie, done, here, len));
            out.push_read(&data.slice(at, len));
        }
        at += len;
    }
}

fn is_hole(segment: &Segment) -> bool {
    matches!(segment, Segment::Zeroes(_))
}

fn segment_len(segment: &Segment) -> usize {
    match segment {
        Segment::Data(bytes) => bytes.len(),
        Segment::Zeroes(len) => *len,
    }
}

/// The block status chunk: neighbours of one state joined, cut to the request
/// and to what a reply may take.
fn status(header: &RequestHeader, terms: Terms, extents: &[Extent]) -> Chunk {
    let most = if header.flags & flag::REQ_ONE != 0 {
        1
    } else {
        MAX_EXTENTS
    };
    let mut left = header.length;
    let mut listed: Vec<StatusExtent> = Vec::new();
    for extent in extents {
        let length = u32::try_from(extent.len).map_or(left, |len| len.min(left));
        if length == 0 {
            continue;
        }
        let status = if extent.allocated { 0 } else { state::HOLE }
            | if extent.zero { state::ZERO } else { 0 };
        let full = listed.len() == most;
        match listed.last_mut() {
            Some(last) if last.status == status => last.length += length,
            _ if full => break,
            _ => listed.push(StatusExtent { length, status }),
        }
        left -= length;
    }
    if listed.is_empty() {
        // A status of 0 is always right.
        listed.push(StatusExtent {
            length: header.length,
            status: 0,
        });
    }
    Chunk::BlockStatus {
        context: terms.base_allocation.unwrap_or(0),
        extents: listed,
    }
}

/// A future whose panic is `None`.
struct Caught<F>(F);

impl<F: Future + Unpin> Future for Caught<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // The future is not polled again after a panic, so nobody sees what
        // it left broken; the device answers for its own state.
        let polled = std::panic::catch_unwind(AssertUnwindSafe(|| Pin::new(&mut self.0).poll(cx)));
        match polled {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(output)) => Poll::Ready(Some(output)),
            Err(_) => Poll::Ready(None),
        }
    }
}
