//! Messages of the fixed newstyle handshake: options, their replies and the
//! information they carry (proto.md, "Fixed newstyle negotiation", "Option
//! types", "Option reply types").

use bytes::BufMut;

use super::{Cursor, WireError};

/// `NBDMAGIC`, the first eight bytes a server sends.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, the next eight, and the opening of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Opens every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Length of [`OptionHeader`] on the wire in bytes.
pub const OPTION_HEADER_LEN: usize = 16;
/// Length of [`OptionReplyHeader`] on the wire in bytes.
pub const OPTION_REPLY_HEADER_LEN: usize = 20;
/// Zeroes after the answer to EXPORT_NAME, unless negotiated away.
pub const EXPORT_NAME_PADDING: usize = 124;
/// The only metadata context there is here.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Handshake flags, sent by the server.
pub mod handshake_flag {
    /// `NBD_FLAG_FIXED_NEWSTYLE`.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// `NBD_FLAG_NO_ZEROES`.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Client flags, the same bits in 32.
pub mod client_flag {
    /// `NBD_FLAG_C_FIXED_NEWSTYLE`.
    pub const FIXED_NEWSTYLE: u32 = 1 << 0;
    /// `NBD_FLAG_C_NO_ZEROES`.
    pub const NO_ZEROES: u32 = 1 << 1;
}

/// Transmission flags: what an export can do.
pub mod transmission_flag {
    /// `NBD_FLAG_HAS_FLAGS`, always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// `NBD_FLAG_READ_ONLY`.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `NBD_FLAG_SEND_FLUSH`.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// `NBD_FLAG_SEND_FUA`.
    pub const SEND_FUA: u16 = 1 << 3;
    /// `NBD_FLAG_ROTATIONAL`.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// `NBD_FLAG_SEND_TRIM`.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `NBD_FLAG_SEND_WRITE_ZEROES`.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// `NBD_FLAG_SEND_DF`.
    pub const SEND_DF: u16 = 1 << 7;
    /// `NBD_FLAG_CAN_MULTI_CONN`.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// `NBD_FLAG_SEND_CACHE`.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// `NBD_FLAG_SEND_FAST_ZERO`.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Option types.
pub mod option {
    /// `NBD_OPT_EXPORT_NAME`.
    pub const EXPORT_NAME: u32 = 1;
    /// `NBD_OPT_ABORT`.
    pub const ABORT: u32 = 2;
    /// `NBD_OPT_LIST`.
    pub const LIST: u32 = 3;
    /// `NBD_OPT_STARTTLS`.
    pub const STARTTLS: u32 = 5;
    /// `NBD_OPT_INFO`.
    pub const INFO: u32 = 6;
    /// `NBD_OPT_GO`.
    pub const GO: u32 = 7;
    /// `NBD_OPT_STRUCTURED_REPLY`.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// `NBD_OPT_LIST_META_CONTEXT`.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// `NBD_OPT_SET_META_CONTEXT`.
    pub const SET_META_CONTEXT: u32 = 10;
    /// `NBD_OPT_EXTENDED_HEADERS`.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Option reply types; those with bit 31 are errors.
pub mod option_reply {
    /// `NBD_REP_ACK`.
    pub const ACK: u32 = 1;
    /// `NBD_REP_SERVER`.
    pub const SERVER: u32 = 2;
    /// `NBD_REP_INFO`.
    pub const INFO: u32 = 3;
    /// `NBD_REP_META_CONTEXT`.
    pub const META_CONTEXT: u32 = 4;
    /// `NBD_REP_ERR_UNSUP`.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// `NBD_REP_ERR_POLICY`.
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    /// `NBD_REP_ERR_INVALID`.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// `NBD_REP_ERR_PLATFORM`.
    pub const ERR_PLATFORM: u32 = (1 << 31) + 4;
    /// `NBD_REP_ERR_TLS_REQD`.
    pub const ERR_TLS_REQD: u32 = (1 << 31) + 5;
    /// `NBD_REP_ERR_UNKNOWN`.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// `NBD_REP_ERR_SHUTDOWN`.
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    /// `NBD_REP_ERR_BLOCK_SIZE_REQD`.
    pub const ERR_BLOCK_SIZE_REQD: u32 = (1 << 31) + 8;
    /// `NBD_REP_ERR_TOO_BIG`.
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Information types of INFO and GO.
pub mod info {
    /// `NBD_INFO_EXPORT`.
    pub const EXPORT: u16 = 0;
    /// `NBD_INFO_NAME`.
    pub const NAME: u16 = 1;
    /// `NBD_INFO_DESCRIPTION`.
    pub const DESCRIPTION: u16 = 2;
    /// `NBD_INFO_BLOCK_SIZE`.
    pub const BLOCK_SIZE: u16 = 3;
}

/// What a server says before anything else: both magics and its flags.
#[must_use]
pub fn greeting(flags: u16) -> [u8; 18] {
    let mut out = [0; 18];
    out[0..8].copy_from_slice(&INIT_MAGIC.to_be_bytes());
    out[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    out[16..18].copy_from_slice(&flags.to_be_bytes());
    out
}

/// The header of an option; `length` bytes of data follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// A number of [`option`], or something else.
    pub option: u32,
    /// Length of the data in bytes, as the client claims it.
    pub length: u32,
}

impl OptionHeader {
    /// Parses the 16 bytes of a header.
    ///
    /// # Errors
    /// [`WireError::Magic`].
    pub fn parse(bytes: &[u8; OPTION_HEADER_LEN]) -> Result<Self, WireError> {
        let mut cursor = Cursor::new(bytes, "option");
        let found = cursor.u64()?;
        if found != OPTION_MAGIC {
            return Err(WireError::Magic {
                what: "option",
                found,
            });
        }
        Ok(Self {
            option: cursor.u32()?,
            length: cursor.u32()?,
        })
    }

    /// The 16 bytes of the header.
    #[must_use]
    pub fn encode(&self) -> [u8; OPTION_HEADER_LEN] {
        let mut out = [0; OPTION_HEADER_LEN];
        out[0..8].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        out[8..12].copy_from_slice(&self.option.to_be_bytes());
        out[12..16].copy_from_slice(&self.length.to_be_bytes());
        out
    }
}

/// The header of an option's reply; `length` bytes of data follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option this answers.
    pub option: u32,
    /// A number of [`option_reply`].
    pub kind: u32,
    /// Length of the data in bytes.
    pub length: u32,
}

impl OptionReplyHeader {
    /// Parses the 20 bytes of a header.
    ///
    /// # Errors
    /// [`WireError::Magic`].
    pub fn parse(bytes: &[u8; OPTION_REPLY_HEADER_LEN]) -> Result<Self, WireError> {
        let mut cursor = Cursor::new(bytes, "option reply");
        let found = cursor.u64()?;
        if found != OPTION_REPLY_MAGIC {
            return Err(WireError::Magic {
                what: "option reply",
                found,
            });
        }
        Ok(Self {
            option: cursor.u32()?,
            kind: cursor.u32()?,
            length: cursor.u32()?,
        })
    }
}

/// Appends a whole option reply to `out`.
///
/// # Panics
/// When `data` is above 4 GiB: no reply comes near.
pub fn put_option_reply(out: &mut impl BufMut, option: u32, kind: u32, data: &[u8]) {
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(u32::try_from(data.len()).expect("option replies are short"));
    out.put_slice(data);
}

/// The data of INFO and GO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// The export's name; empty for the default export.
    pub name: &'a str,
    /// Numbers of [`info`], and unknown ones to be ignored.
    pub wanted: Vec<u16>,
}

impl<'a> InfoRequest<'a> {
    /// Parses the data of the option.
    ///
    /// # Errors
    /// [`WireError::Length`], [`WireError::Text`].
    pub fn parse(data: &'a [u8]) -> Result<Self, WireError> {
        let mut cursor = Cursor::new(data, "export request");
        let name = cursor.string()?;
        let count: usize = cursor.u16()?.into();
        if cursor.remaining() != count * 2 {
            return Err(WireError::Length("list of information requests"));
        }
        let wanted = (0..count).map(|_| cursor.u16()).collect::<Result<_, _>>()?;
        Ok(Self { name, wanted })
    }

    /// Appends the data of the option to `out`.
    ///
    /// # Panics
    /// When the name or the list is above what its length field can say.
    pub fn put(&self, out: &mut impl BufMut) {
        put_string(out, self.name);
        out.put_u16(u16::try_from(self.wanted.len()).expect("few information types exist"));
        for &wanted in &self.wanted {
            out.put_u16(wanted);
        }
    }
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextRequest<'a> {
    /// The export's name; empty for the default export.
    pub name: &'a str,
    /// `namespace:leaf` each.
    pub queries: Vec<&'a str>,
}

impl<'a> ContextRequest<'a> {
    /// Parses the data of the option.
    ///
    /// # Errors
    /// [`WireError::Length`], [`WireError::Text`].
    pub fn parse(data: &'a [u8]) -> Result<Self, WireError> {
        let mut cursor = Cursor::new(data, "metadata context request");
        let name = cursor.string()?;
        let count = cursor.u32()? as usize;
        // Each query takes four bytes at least, so a lie is found before
        // anything is reserved for it.
        if cursor.remaining() / 4 < count {
            return Err(WireError::Length("list of metadata queries"));
        }
        let queries = (0..count)
            .map(|_| cursor.string())
            .collect::<Result<_, _>>()?;
        cursor.end()?;
        Ok(Self { name, queries })
    }

    /// Appends the data of the option to `out`.
    ///
    /// # Panics
    /// When a string or the list is above 4 GiB.
    pub fn put(&self, out: &mut impl BufMut) {
        put_string(out, self.name);
        out.put_u32(u32::try_from(self.queries.len()).expect("few queries are sent"));
        for query in &self.queries {
            put_string(out, query);
        }
    }
}

/// Appends a string with its length in 32 bits before it.
pub(crate) fn put_string(out: &mut impl BufMut, text: &str) {
    out.put_u32(u32::try_from(text.len()).expect("names are short"));
    out.put_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn encodes_the_bytes_of_the_document() {
        assert_eq!(&greeting(3), b"NBDMAGICIHAVEOPT\0\x03");
        let header = OptionHeader {
            option: option::GO,
            length: 6,
        };
        assert_eq!(&header.encode(), b"IHAVEOPT\0\0\0\x07\0\0\0\x06");
        let mut out = Vec::new();
        put_option_reply(&mut out, option::LIST, option_reply::ERR_INVALID, b"no");
        assert_eq!(
            out,
            b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x03\x80\0\0\x03\0\0\0\x02no"
        );
    }

    #[test]
    fn requests_that_lie_about_their_length_are_refused() {
        // Two information requests announced, one sent.
        assert!(InfoRequest::parse(b"\0\0\0\x01v\0\x02\0\x03").is_err());
        // A name longer than the data.
        assert!(InfoRequest::parse(b"\xff\xff\xff\xffv\0\0").is_err());
        // Four thousand million queries announced.
        assert!(ContextRequest::parse(b"\0\0\0\0\xff\xff\xff\xff").is_err());
        // A query that is no UTF-8.
        assert!(ContextRequest::parse(b"\0\0\0\0\0\0\0\x01\0\0\0\x01\xff").is_err());
    }

    proptest! {
        #[test]
        fn requests_round_trip(
            name in "[a-z0-9/.-]{0,40}",
            wanted in prop::collection::vec(any::<u16>(), 0..8),
            queries in prop::collection::vec("[a-z]{1,8}:[a-z]{0,12}", 0..6),
        ) {
            let request = InfoRequest { name: &name, wanted };
            let mut data = Vec::new();
            request.put(&mut data);
            prop_assert_eq!(InfoRequest::parse(&data), Ok(request));

            let queries = queries.iter().map(String::as_str).collect();
            let request = ContextRequest { name: &name, queries };
            let mut data = Vec::new();
            request.put(&mut data);
            prop_assert_eq!(ContextRequest::parse(&data), Ok(request));
        }

        #[test]
        fn headers_round_trip(option: u32, kind: u32, data in prop::collection::vec(any::<u8>(), 0..16)) {
            let length = u32::try_from(data.len()).expect("short");
            let header = OptionHeader { option, length };
            prop_assert_eq!(OptionHeader::parse(&header.encode()), Ok(header));
            let mut out = Vec::new();
            put_option_reply(&mut out, option, kind, &data);
            let head = out[..OPTION_REPLY_HEADER_LEN].try_into().expect("20 bytes");
            prop_assert_eq!(OptionReplyHeader::parse(head), Ok(OptionReplyHeader { option, kind, length }));
        }

        #[test]
        fn never_panics(data in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(request) = InfoRequest::parse(&data) {
                let mut again = Vec::new();
                request.put(&mut again);
                prop_assert_eq!(&again, &data);
            }
            if let Ok(request) = ContextRequest::parse(&data) {
                let mut again = Vec::new();
                request.put(&mut again);
                prop_assert_eq!(&again, &data);
            }
        }
    }
}
