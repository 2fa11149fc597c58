//! The bytes of the NBD protocol (`proto.md` of the NBD project): constants,
//! headers and payloads as plain values that are parsed from slices and
//! encoded to buffers. Nothing here reads or writes a socket, and no input,
//! however wrong, makes a parser panic. Extended headers are not spoken.

pub mod handshake;
pub mod reply;
pub mod request;

/// Bytes that are not what the protocol says they must be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A message opened with another number than its magic.
    #[error("{what} opens with magic {found:#x}")]
    Magic {
        /// The message that was expected.
        what: &'static str,
        /// What was found, zero-extended when the magic is 32 bits.
        found: u64,
    },
    /// A field says there is more, or less, than the message holds.
    #[error("{0} does not fit its length")]
    Length(&'static str),
    /// A string is no UTF-8, or longer than the protocol's 4096 bytes.
    #[error("{0} is not a valid string")]
    Text(&'static str),
    /// A number that the protocol does not define at this place.
    #[error("{what} has the unknown value {found}")]
    Unknown {
        /// The field.
        what: &'static str,
        /// Its value.
        found: u32,
    },
}

/// The longest string the protocol allows, in bytes (proto.md, "Protocol
/// phases").
pub const MAX_STRING: usize = 4096;

/// Takes numbers and strings off the front of a message, never past its end.
pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { rest: bytes, what }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(WireError::Length(self.what))?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_be_bytes)
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (head, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(WireError::Length(self.what))?;
        self.rest = rest;
        Ok(head)
    }

    /// A string whose length in bytes stands before it in 32 bits.
    pub(crate) fn string(&mut self) -> Result<&'a str, WireError> {
        let len = self.u32()? as usize;
        text(self.bytes(len)?, self.what)
    }

    pub(crate) fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Nothing may be left over.
    pub(crate) fn end(&self) -> Result<(), WireError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(WireError::Length(self.what))
        }
    }
}

/// Checks a protocol string: UTF-8, no NUL, at most [`MAX_STRING`] bytes.
pub(crate) fn text<'a>(bytes: &'a [u8], what: &'static str) -> Result<&'a str, WireError> {
    if bytes.len() > MAX_STRING || bytes.contains(&0) {
        return Err(WireError::Text(what));
    }
    str::from_utf8(bytes).map_err(|_| WireError::Text(what))
}
