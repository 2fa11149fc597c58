//! The one seam between the NBD side and the storage side: a block device as
//! the transmission server sees it. It knows neither protocol nor store.

use std::future::Future;

use bytes::Bytes;

use crate::buffers::Buffer;
use crate::caller::Gone;

/// Bytes in a page, the unit of a page blob and the smallest aligned I/O.
pub const PAGE: u64 = 512;

/// What a device is, fixed while it is open except for [`Geometry::size`],
/// which may grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Usable size in bytes, a multiple of [`PAGE`].
    pub size: u64,
    /// The I/O size in bytes that avoids read-modify-write; a power of two.
    pub preferred_block: u32,
    /// The largest payload of one read or write in bytes.
    pub max_payload: u32,
    /// Writes are refused with [`DeviceError::ReadOnly`].
    pub read_only: bool,
}

/// A run of bytes with one allocation state, as `base:allocation` reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, never 0.
    pub len: u64,
    /// The range occupies pages in the store.
    pub allocated: bool,
    /// The range is known to read as zeroes.
    pub zero: bool,
}

/// A failed request, as exact as the block layer can take it.
///
/// The cause belongs into the log of the side that saw it; what is left here
/// is what the peer on the other end of the protocol can be told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The store refused or lost the data for good, or the volume is fenced.
    #[error("i/o error: {0}")]
    Io(String),
    /// Offset or length is out of what the device takes.
    #[error("invalid request: {0}")]
    Invalid(String),
    /// A write beyond the end of the device.
    #[error("beyond the end of the device")]
    NoSpace,
    /// A write to a read-only device.
    #[error("read-only device")]
    ReadOnly,
    /// The device is closing, or nobody waits for the answer.
    #[error("shutting down")]
    Shutdown,
    /// The operation cannot be done fast, and only fast was wanted.
    #[error("not supported")]
    NotSupported,
}

impl From<Gone> for DeviceError {
    fn from(_: Gone) -> Self {
        Self::Shutdown
    }
}

/// One piece of a read's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// Data as it came from the store, uncopied.
    Data(Bytes),
    /// This many zero bytes that nobody had to fetch.
    Zeroes(usize),
}

/// A read's answer: segments whose lengths add up to the requested length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReadData {
    segments: Vec<Segment>,
    len: usize,
}

impl ReadData {
    /// An empty answer to append to.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// `len` zero bytes.
    #[must_use]
    pub fn zeroes(len: usize) -> Self {
        let mut data = Self::new();
        data.push_zeroes(len);
        data
    }

    /// Appends `bytes`; an empty piece is dropped.
    pub fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.len += bytes.len();
            self.segments.push(Segment::Data(bytes));
        }
    }

    /// Appends `len` zero bytes.
    pub fn push_zeroes(&mut self, len: usize) {
        if len > 0 {
            self.len += len;
            self.segments.push(Segment::Zeroes(len));
        }
    }

    /// Appends all of `other`.
    pub fn append(&mut self, other: Self) {
        self.len += other.len;
        self.segments.extend(other.segments);
    }

    /// Total length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when nothing was appended.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces, in order.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The part `[start, start + len)` without copying.
    ///
    /// # Panics
    /// When the part does not lie within the data: the caller asked for it.
    #[must_use]
    pub fn slice(&self, start: usize, len: usize) -> Self {
        assert!(
            start + len <= self.len,
            "slice {start}+{len} of {} bytes",
            self.len
        );
        let mut part = Self::new();
        let (mut skip, mut want) = (start, len);
        for segment in &self.segments {
            let whole = match segment {
                Segment::Data(bytes) => bytes.len(),
                Segment::Zeroes(n) => *n,
            };
            let from = skip.min(whole);
            skip -= from;
            let take = want.min(whole - from);
            want -= take;
            match segment {
                Segment::Data(bytes) => part.push(bytes.slice(from..from + take)),
                Segment::Zeroes(_) => part.push_zeroes(take),
            }
        }
        part
    }

    /// One contiguous buffer; copies unless the answer is a single piece.
    #[must_use]
    pub fn to_bytes(&self) -> Bytes {
        if let [Segment::Data(bytes)] = self.segments.as_slice() {
            return bytes.clone();
        }
        let mut buffer = Buffer::with_room(self.len);
        for segment in &self.segments {
            match segment {
                Segment::Data(bytes) => buffer.extend_from_slice(bytes),
                Segment::Zeroes(n) => {
                    let len = buffer.len() + n;
                    buffer.resize(len, 0);
                }
            }
        }
        buffer.share()
    }
}

impl From<Bytes> for ReadData {
    fn from(bytes: Bytes) -> Self {
        let mut data = Self::new();
        data.push(bytes);
        data
    }
}

/// A disk. All methods may run concurrently; the device orders what overlaps.
///
/// Ranges are in bytes and may be unaligned: the device does the
/// read-modify-write. Every method checks its range against the size itself.
/// A method's answer means what the block layer means: a finished write is
/// visible to every later read; a finished flush makes every write that was
/// *finished before the flush began* durable; `fua` makes this one write
/// durable before its answer. Dropping a returned future may leave the effect
/// half done in the store but never breaks the device's own state.
pub trait BlockDevice: Send + Sync + 'static {
    /// Size, block sizes and whether it may be written.
    fn geometry(&self) -> Geometry;

    /// Reads exactly `len` bytes.
    ///
    /// # Errors
    /// [`DeviceError::Invalid`] beyond the end.
    fn read(
        &self,
        offset: u64,
        len: u32,
    ) -> impl Future<Output = Result<ReadData, DeviceError>> + Send;

    /// Writes `data`.
    ///
    /// # Errors
    /// [`DeviceError::NoSpace`] beyond the end, [`DeviceError::ReadOnly`].
    fn write(
        &self,
        offset: u64,
        data: Bytes,
        fua: bool,
    ) -> impl Future<Output = Result<(), DeviceError>> + Send;

    /// Makes every finished write durable.
    ///
    /// # Errors
    /// [`DeviceError::Io`] when that cannot be had.
    fn flush(&self) -> impl Future<Output = Result<(), DeviceError>> + Send;

    /// Gives the range back to the store; it reads as zeroes afterwards. Pages
    /// only partly in the range are left as they are.
    ///
    /// # Errors
    /// As [`BlockDevice::write`].
    fn trim(
        &self,
        offset: u64,
        len: u64,
        fua: bool,
    ) -> impl Future<Output = Result<(), DeviceError>> + Send;

    /// Makes the range read as zeroes. `no_hole` asks that it stay allocated.
    ///
    /// # Errors
    /// As [`BlockDevice::write`].
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        fua: bool,
        no_hole: bool,
    ) -> impl Future<Output = Result<(), DeviceError>> + Send;

    /// Allocation of the range: consecutive extents from `offset` that cover
    /// at least one byte and at most `len`. May stop early.
    ///
    /// # Errors
    /// [`DeviceError::Invalid`] beyond the end.
    fn extents(
        &self,
        offset: u64,
        len: u64,
    ) -> impl Future<Output = Result<Vec<Extent>, DeviceError>> + Send;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_across_segments_without_losing_a_byte() {
        let mut data = ReadData::from(Bytes::from_static(b"abc"));
        data.push_zeroes(2);
        data.push(Bytes::from_static(b"defg"));
        let whole = data.to_bytes();
        assert_eq!(&whole[..], b"abc\0\0defg");
        for start in 0..=whole.len() {
            for len in 0..=whole.len() - start {
                assert_eq!(
                    data.slice(start, len).to_bytes(),
                    whole.slice(start..start + len)
                );
            }
        }
    }
}
