//! The request message of the transmission phase (proto.md, "Request
//! message").

use super::{Cursor, WireError};

/// `NBD_REQUEST_MAGIC`.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;

/// Length of [`RequestHeader`] on the wire in bytes.
pub const REQUEST_LEN: usize = 28;

/// Command flags (proto.md, "Command flags").
pub mod flag {
    /// The write is durable before its reply.
    pub const FUA: u16 = 1 << 0;
    /// Write zeroes: keep the range allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// Read: answer with one content chunk.
    pub const DF: u16 = 1 << 2;
    /// Block status: answer with one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Write zeroes: fail rather than be as slow as a write.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Request types (proto.md, "Request types") this crate knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// `NBD_CMD_READ`.
    Read = 0,
    /// `NBD_CMD_WRITE`, the only one with a payload.
    Write = 1,
    /// `NBD_CMD_DISC`, the only one without a reply.
    Disconnect = 2,
    /// `NBD_CMD_FLUSH`.
    Flush = 3,
    /// `NBD_CMD_TRIM`.
    Trim = 4,
    /// `NBD_CMD_CACHE`, known by name only: it is never offered.
    Cache = 5,
    /// `NBD_CMD_WRITE_ZEROES`.
    WriteZeroes = 6,
    /// `NBD_CMD_BLOCK_STATUS`.
    BlockStatus = 7,
}

impl Command {
    /// The command with this number, if it is one of those above.
    #[must_use]
    pub fn from_code(code: u16) -> Option<Self> {
        Some(match code {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            _ => return None,
        })
    }

    /// The number on the wire.
    #[must_use]
    pub fn code(self) -> u16 {
        self as u16
    }
}

/// A request without its payload. The command stays a number: an unknown one
/// has to be answered, so it has to be representable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// Bits of [`flag`].
    pub flags: u16,
    /// A [`Command`], or something else.
    pub command: u16,
    /// Chosen by the client, returned in the reply.
    pub cookie: u64,
    /// Bytes from the start of the export.
    pub offset: u64,
    /// Length in bytes of the range, and of the payload of a write.
    pub length: u32,
}

impl RequestHeader {
    /// Parses the 28 bytes of a header.
    ///
    /// # Errors
    /// [`WireError::Magic`] when the stream is out of step.
    pub fn parse(bytes: &[u8; REQUEST_LEN]) -> Result<Self, WireError> {
        let mut cursor = Cursor::new(bytes, "request");
        let magic = cursor.u32()?;
        if magic != REQUEST_MAGIC {
            return Err(WireError::Magic {
                what: "request",
                found: magic.into(),
            });
        }
        Ok(Self {
            flags: cursor.u16()?,
            command: cursor.u16()?,
            cookie: cursor.u64()?,
            offset: cursor.u64()?,
            length: cursor.u32()?,
        })
    }

    /// The 28 bytes of the header.
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let mut out = [0; REQUEST_LEN];
        out[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.command.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..28].copy_from_slice(&self.length.to_be_bytes());
        out
    }

    /// Length in bytes of the payload that follows this header.
    #[must_use]
    pub fn payload_len(&self) -> usize {
        if self.command == Command::Write.code() {
            self.length as usize
        } else {
            0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn encodes_the_bytes_of_the_document() {
        let header = RequestHeader {
            flags: flag::FUA,
            command: Command::Write.code(),
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1000,
            length: 0x200,
        };
        let bytes = [
            0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0,
            0, 0, 2, 0,
        ];
        assert_eq!(header.encode(), bytes);
        assert_eq!(RequestHeader::parse(&bytes), Ok(header));
        assert_eq!(header.payload_len(), 0x200);
    }

    #[test]
    fn refuses_another_magic() {
        let error = RequestHeader::parse(&[0x11; REQUEST_LEN]).expect_err("wrong magic");
        assert_eq!(error.to_string(), "request opens with magic 0x11111111");
    }

    proptest! {
        #[test]
        fn round_trips(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) {
            let header = RequestHeader { flags, command, cookie, offset, length };
            prop_assert_eq!(RequestHeader::parse(&header.encode()), Ok(header));
            if let Some(known) = Command::from_code(command) {
                prop_assert_eq!(known.code(), command);
            }
        }

        #[test]
        fn never_panics(bytes: [u8; REQUEST_LEN]) {
            if let Ok(header) = RequestHeader::parse(&bytes) {
                prop_assert_eq!(header.encode(), bytes);
            }
        }
    }
}
