//! Replies of the transmission phase: the simple reply, the chunks of a
//! structured reply, and the error values they carry (proto.md, "Simple reply
//! message", "Structured reply chunk message", "Error values").

use bytes::{BufMut, Bytes, BytesMut};

use super::{Cursor, MAX_STRING, WireError, text};

/// `NBD_SIMPLE_REPLY_MAGIC`.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// `NBD_STRUCTURED_REPLY_MAGIC`.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Length of [`SimpleReply`] on the wire in bytes.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Length of [`ChunkHeader`] on the wire in bytes.
pub const CHUNK_HEADER_LEN: usize = 20;
/// Length of an OFFSET_DATA chunk up to its data.
pub const OFFSET_DATA_LEN: usize = CHUNK_HEADER_LEN + 8;
/// Length of a whole OFFSET_HOLE chunk.
pub const OFFSET_HOLE_LEN: usize = CHUNK_HEADER_LEN + 12;

/// `NBD_REPLY_FLAG_DONE`: the last chunk of a reply.
pub const FLAG_DONE: u16 = 1;

/// Status flags of the `base:allocation` context.
pub mod state {
    /// Not allocated in the store.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// Structured reply types.
pub mod chunk {
    /// `NBD_REPLY_TYPE_NONE`.
    pub const NONE: u16 = 0;
    /// `NBD_REPLY_TYPE_OFFSET_DATA`.
    pub const OFFSET_DATA: u16 = 1;
    /// `NBD_REPLY_TYPE_OFFSET_HOLE`.
    pub const OFFSET_HOLE: u16 = 2;
    /// `NBD_REPLY_TYPE_BLOCK_STATUS`.
    pub const BLOCK_STATUS: u16 = 5;
    /// `NBD_REPLY_TYPE_ERROR`.
    pub const ERROR: u16 = (1 << 15) + 1;
    /// `NBD_REPLY_TYPE_ERROR_OFFSET`.
    pub const ERROR_OFFSET: u16 = (1 << 15) + 2;
}

/// The error values a reply may carry, whatever `errno` is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Errno {
    /// `NBD_EPERM`: a write to a read-only export.
    Perm = 1,
    /// `NBD_EIO`.
    Io = 5,
    /// `NBD_ENOMEM`.
    NoMem = 12,
    /// `NBD_EINVAL`: the request is not one this export takes.
    Inval = 22,
    /// `NBD_ENOSPC`: a write beyond the end.
    NoSpace = 28,
    /// `NBD_EOVERFLOW`: too large to send unfragmented.
    Overflow = 75,
    /// `NBD_ENOTSUP`: not fast, and only fast was wanted.
    NotSup = 95,
    /// `NBD_ESHUTDOWN`: the server is going away.
    Shutdown = 108,
}

impl Errno {
    /// Every value, in the order of the document.
    pub const ALL: [Self; 8] = [
        Self::Perm,
        Self::Io,
        Self::NoMem,
        Self::Inval,
        Self::NoSpace,
        Self::Overflow,
        Self::NotSup,
        Self::Shutdown,
    ];

    /// The number on the wire.
    #[must_use]
    pub fn code(self) -> u32 {
        self as u32
    }

    /// The error with this number; `None` for success and for numbers the
    /// document does not list (a client treats those as `EINVAL`).
    #[must_use]
    pub fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|errno| errno.code() == code)
    }
}

/// A simple reply; the data of a successful read follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimpleReply {
    /// 0, or an [`Errno`].
    pub error: u32,
    /// The cookie of the request.
    pub cookie: u64,
}

impl SimpleReply {
    /// The 16 bytes of the reply.
    #[must_use]
    pub fn encode(&self) -> [u8; SIMPLE_REPLY_LEN] {
        let mut out = [0; SIMPLE_REPLY_LEN];
        out[0..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        out[4..8].copy_from_slice(&self.error.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out
    }

    /// Parses the 16 bytes of a reply.
    ///
    /// # Errors
    /// [`WireError::Magic`].
    pub fn parse(bytes: &[u8; SIMPLE_REPLY_LEN]) -> Result<Self, WireError> {
        let mut cursor = Cursor::new(bytes, "simple reply");
        expect_magic(&mut cursor, SIMPLE_REPLY_MAGIC, "simple reply")?;
        Ok(Self {
            error: cursor.u32()?,
            cookie: cursor.u64()?,
        })
    }
}

/// The header of one chunk of a structured reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// [`FLAG_DONE`] or nothing.
    pub flags: u16,
    /// A number of [`chunk`].
    pub kind: u16,
    /// The cookie of the request.
    pub cookie: u64,
    /// Length in bytes of the payload that follows.
    pub length: u32,
}

impl ChunkHeader {
    /// The 20 bytes of the header.
    #[must_use]
    pub fn encode(&self) -> [u8; CHUNK_HEADER_LEN] {
        let mut out = [0; CHUNK_HEADER_LEN];
        out[0..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.kind.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..20].copy_from_slice(&self.length.to_be_bytes());
        out
    }

    /// Parses the 20 bytes of a header.
    ///
    /// # Errors
    /// [`WireError::Magic`].
    pub fn parse(bytes: &[u8; CHUNK_HEADER_LEN]) -> Result<Self, WireError> {
        let mut cursor = Cursor::new(bytes, "chunk");
        expect_magic(&mut cursor, STRUCTURED_REPLY_MAGIC, "chunk")?;
        Ok(Self {
            flags: cursor.u16()?,
            kind: cursor.u16()?,
            cookie: cursor.u64()?,
            length: cursor.u32()?,
        })
    }
}

/// One extent of a BLOCK_STATUS chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Length in bytes, never 0.
    pub length: u32,
    /// Bits of [`state`].
    pub status: u32,
}

/// What one chunk says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// Nothing more; the request succeeded unless an error came before.
    None,
    /// Content at `offset`.
    OffsetData {
        /// Bytes from the start of the export.
        offset: u64,
        /// At least one byte.
        data: Bytes,
    },
    /// Zeroes at `offset`.
    OffsetHole {
        /// Bytes from the start of the export.
        offset: u64,
        /// Bytes, never 0.
        length: u32,
    },
    /// Consecutive extents from the request's offset.
    BlockStatus {
        /// The context as negotiated.
        context: u32,
        /// At least one.
        extents: Vec<StatusExtent>,
    },
    /// The request failed.
    Error {
        /// An [`Errno`], never 0.
        error: u32,
        /// For a human; may be empty.
        message: String,
        /// Where, if the chunk is an ERROR_OFFSET.
        offset: Option<u64>,
    },
}

impl Chunk {
    /// The chunk's number on the wire.
    #[must_use]
    pub fn kind(&self) -> u16 {
        match self {
            Self::None => chunk::NONE,
            Self::OffsetData { .. } => chunk::OFFSET_DATA,
            Self::OffsetHole { .. } => chunk::OFFSET_HOLE,
            Self::BlockStatus { .. } => chunk::BLOCK_STATUS,
            Self::Error { offset: None, .. } => chunk::ERROR,
            Self::Error { .. } => chunk::ERROR_OFFSET,
        }
    }

    /// The whole chunk in one buffer, header first. An error's message is cut
    /// at the protocol's limit. The data path does not come through here with
    /// data: it takes [`offset_data_header`] and sends the data uncopied.
    #[must_use]
    pub fn encode(&self, cookie: u64, done: bool) -> Bytes {
        let mut payload = BytesMut::new();
        match self {
            Self::None => {}
            Self::OffsetData { offset, data } => {
                payload.put_u64(*offset);
                payload.put_slice(data);
            }
            Self::OffsetHole { offset, length } => {
                payload.put_u64(*offset);
                payload.put_u32(*length);
            }
            Self::BlockStatus { context, extents } => {
                payload.put_u32(*context);
                for extent in extents {
                    payload.put_u32(extent.length);
                    payload.put_u32(extent.status);
                }
            }
            Self::Error {
                error,
                message,
                offset,
            } => {
                let message = shorten(message);
                payload.put_u32(*error);
                payload.put_u16(u16::try_from(message.len()).unwrap_or(0));
                payload.put_slice(message.as_bytes());
                if let Some(offset) = offset {
                    payload.put_u64(*offset);
                }
            }
        }
        let header = ChunkHeader {
            flags: if done { FLAG_DONE } else { 0 },
            kind: self.kind(),
            cookie,
            length: u32::try_from(payload.len()).expect("a chunk is far below 4 GiB"),
        };
        let mut out = BytesMut::with_capacity(CHUNK_HEADER_LEN + payload.len());
        out.put_slice(&header.encode());
        out.put_slice(&payload);
        out.freeze()
    }

    /// Parses the payload that belongs to `header`.
    ///
    /// # Errors
    /// [`WireError`] when the payload is not what the kind asks for.
    pub fn parse(header: &ChunkHeader, payload: &Bytes) -> Result<Self, WireError> {
        if payload.len() != header.length as usize {
            return Err(WireError::Length("chunk"));
        }
        let mut cursor = Cursor::new(payload, "chunk");
        let parsed = match header.kind {
            chunk::NONE => Self::None,
            chunk::OFFSET_DATA => {
                let offset = cursor.u64()?;
                if cursor.remaining() == 0 {
                    return Err(WireError::Length("data chunk"));
                }
                return Ok(Self::OffsetData {
                    offset,
                    data: payload.slice(8..),
                });
            }
            chunk::OFFSET_HOLE => Self::OffsetHole {
                offset: cursor.u64()?,
                length: nonzero(cursor.u32()?, "hole chunk")?,
            },
            chunk::BLOCK_STATUS => {
                let context = cursor.u32()?;
                let mut extents = Vec::with_capacity(cursor.remaining() / 8);
                while cursor.remaining() > 0 {
                    extents.push(StatusExtent {
                        length: nonzero(cursor.u32()?, "status extent")?,
                        status: cursor.u32()?,
                    });
                }
                if extents.is_empty() {
                    return Err(WireError::Length("status chunk"));
                }
                Self::BlockStatus { context, extents }
            }
            chunk::ERROR | chunk::ERROR_OFFSET => {
                let error = nonzero(cursor.u32()?, "error chunk")?;
                let len = cursor.u16()?.into();
                let message = text(cursor.bytes(len)?, "error message")?.to_owned();
                let offset = match header.kind {
                    chunk::ERROR_OFFSET => Some(cursor.u64()?),
                    _ => None,
                };
                Self::Error {
                    error,
                    message,
                    offset,
                }
            }
            kind => {
                return Err(WireError::Unknown {
                    what: "chunk type",
                    found: kind.into(),
                });
            }
        };
        cursor.end()?;
        Ok(parsed)
    }
}

/// An OFFSET_DATA chunk up to its `len` bytes of data.
///
/// # Panics
/// When `len` is above 4 GiB - 9: no request is.
#[must_use]
pub fn offset_data_header(
    cookie: u64,
    done: bool,
    offset: u64,
    len: usize,
) -> [u8; OFFSET_DATA_LEN] {
    let header = ChunkHeader {
        flags: if done { FLAG_DONE } else { 0 },
        kind: chunk::OFFSET_DATA,
        cookie,
        length: u32::try_from(len + 8).expect("a read is bounded by the payload limit"),
    };
    let mut out = [0; OFFSET_DATA_LEN];
    out[..CHUNK_HEADER_LEN].copy_from_slice(&header.encode());
    out[CHUNK_HEADER_LEN..].copy_from_slice(&offset.to_be_bytes());
    out
}

/// A whole OFFSET_HOLE chunk.
#[must_use]
pub fn offset_hole(cookie: u64, done: bool, offset: u64, length: u32) -> [u8; OFFSET_HOLE_LEN] {
    let header = ChunkHeader {
        flags: if done { FLAG_DONE } else { 0 },
        kind: chunk::OFFSET_HOLE,
        cookie,
        length: 12,
    };
    let mut out = [0; OFFSET_HOLE_LEN];
    out[..CHUNK_HEADER_LEN].copy_from_slice(&header.encode());
    out[CHUNK_HEADER_LEN..OFFSET_DATA_LEN].copy_from_slice(&offset.to_be_bytes());
    out[OFFSET_DATA_LEN..].copy_from_slice(&length.to_be_bytes());
    out
}

fn expect_magic(cursor: &mut Cursor<'_>, magic: u32, what: &'static str) -> Result<(), WireError> {
    let found = cursor.u32()?;
    if found == magic {
        Ok(())
    } else {
        Err(WireError::Magic {
            what,
            found: found.into(),
        })
    }
}

fn nonzero(value: u32, what: &'static str) -> Result<u32, WireError> {
    if value == 0 {
        Err(WireError::Unknown { what, found: 0 })
    } else {
        Ok(value)
    }
}

/// The longest prefix of `message` a protocol string may hold.
fn shorten(message: &str) -> &str {
    let mut end = message.len().min(MAX_STRING);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    let message = &message[..end];
    message.split('\0').next().unwrap_or(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn encodes_the_bytes_of_the_document() {
        let simple = SimpleReply {
            error: Errno::NoSpace.code(),
            cookie: 7,
        };
        assert_eq!(
            simple.encode(),
            [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 0, 0, 0, 0, 0, 0, 0, 7]
        );
        assert_eq!(
            Chunk::None.encode(7, true)[..],
            [
                0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0
            ]
        );
        let error = Chunk::Error {
            error: Errno::Io.code(),
            message: "lost".into(),
            offset: Some(512),
        };
        assert_eq!(
            error.encode(1, true)[..],
            [
                0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 18, 0, 0,
                0, 5, 0, 4, b'l', b'o', b's', b't', 0, 0, 0, 0, 0, 0, 2, 0
            ]
        );
    }

    #[test]
    fn the_header_builders_agree_with_the_whole_chunk() {
        let data = Bytes::from_static(b"page");
        let whole = Chunk::OffsetData { offset: 9, data }.encode(3, false);
        assert_eq!(whole[..OFFSET_DATA_LEN], offset_data_header(3, false, 9, 4));
        let whole = Chunk::OffsetHole {
            offset: 9,
            length: 5,
        }
        .encode(3, true);
        assert_eq!(whole[..], offset_hole(3, true, 9, 5));
    }

    #[test]
    fn errors_have_the_numbers_of_the_document() {
        let codes = Errno::ALL.map(Errno::code);
        assert_eq!(codes, [1, 5, 12, 22, 28, 75, 95, 108]);
        assert_eq!(Errno::from_code(0), None);
        assert_eq!(Errno::from_code(2), None);
        for errno in Errno::ALL {
            assert_eq!(Errno::from_code(errno.code()), Some(errno));
        }
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let message = format!("{}€€", "x".repeat(MAX_STRING - 4));
        let chunk = Chunk::Error {
            error: 5,
            message,
            offset: None,
        };
        let bytes = chunk.encode(0, true);
        assert_eq!(bytes.len(), CHUNK_HEADER_LEN + 6 + MAX_STRING - 1);
        assert!(
            matches!(reparse(&bytes), Ok(Chunk::Error { message, .. }) if message.ends_with('€'))
        );
    }

    fn reparse(bytes: &Bytes) -> Result<Chunk, WireError> {
        let header = ChunkHeader::parse(bytes[..CHUNK_HEADER_LEN].try_into().expect("20 bytes"))?;
        Chunk::parse(&header, &bytes.slice(CHUNK_HEADER_LEN..))
    }

    fn any_chunk() -> impl Strategy<Value = Chunk> {
        let extent =
            (1u32.., any::<u32>()).prop_map(|(length, status)| StatusExtent { length, status });
        prop_oneof![
            Just(Chunk::None),
            (any::<u64>(), prop::collection::vec(any::<u8>(), 1..64)).prop_map(|(offset, data)| {
                Chunk::OffsetData {
                    offset,
                    data: data.into(),
                }
            }),
            (any::<u64>(), 1u32..)
                .prop_map(|(offset, length)| Chunk::OffsetHole { offset, length }),
            (any::<u32>(), prop::collection::vec(extent, 1..9))
                .prop_map(|(context, extents)| Chunk::BlockStatus { context, extents }),
            (1u32.., "[a-z ]{0,40}", any::<Option<u64>>()).prop_map(|(error, message, offset)| {
                Chunk::Error {
                    error,
                    message,
                    offset,
                }
            }),
        ]
    }

    proptest! {
        #[test]
        fn chunks_round_trip(chunk in any_chunk(), cookie: u64, done: bool) {
            let bytes = chunk.encode(cookie, done);
            prop_assert_eq!(reparse(&bytes), Ok(chunk));
        }

        #[test]
        fn simple_replies_round_trip(error: u32, cookie: u64) {
            let reply = SimpleReply { error, cookie };
            prop_assert_eq!(SimpleReply::parse(&reply.encode()), Ok(reply));
        }

        #[test]
        fn never_panics(kind: u16, payload in prop::collection::vec(any::<u8>(), 0..128)) {
            let known = [
                kind,
                chunk::NONE,
                chunk::OFFSET_DATA,
                chunk::OFFSET_HOLE,
                chunk::BLOCK_STATUS,
                chunk::ERROR,
                chunk::ERROR_OFFSET,
            ];
            let payload = Bytes::from(payload);
            for kind in known {
                let length = u32::try_from(payload.len()).expect("short");
                let header = ChunkHeader { flags: 0, kind, cookie: 0, length };
                if let Ok(parsed) = Chunk::parse(&header, &payload) {
                    prop_assert_eq!(&parsed.encode(0, false)[CHUNK_HEADER_LEN..], &payload[..]);
                }
            }
        }
    }
}
