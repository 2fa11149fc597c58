//! Netlink messages as bytes, with no I/O: requests of a generic netlink
//! family are built, answers taken apart (`linux/netlink.h`,
//! `linux/genetlink.h`). Everything is in the byte order of the machine.

/// `NLMSG_ERROR`: an acknowledgement when its errno is 0.
pub(super) const ERROR: u16 = 2;

const REQUEST_AND_ACK: u16 = 0x1 | 0x4;
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;
const HEADER: usize = 16;
const GENERIC_HEADER: usize = 4;
const ATTRIBUTE_HEADER: usize = 4;

/// An answer that is not what the kernel's headers say it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed netlink message: {0}")]
pub(super) struct Malformed(pub(super) &'static str);

const fn align(len: usize) -> usize {
    (len + 3) & !3
}

/// A request under construction.
#[derive(Debug)]
pub(super) struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// A request that wants an acknowledgement. `version` is the family's.
    pub(super) fn new(family: u16, command: u8, version: u8, sequence: u32) -> Self {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend_from_slice(&0u32.to_ne_bytes());
        bytes.extend_from_slice(&family.to_ne_bytes());
        bytes.extend_from_slice(&REQUEST_AND_ACK.to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        // Port 0: the kernel fills in the socket's.
        bytes.extend_from_slice(&0u32.to_ne_bytes());
        bytes.extend_from_slice(&[command, version, 0, 0]);
        Self { bytes }
    }

    fn attribute(&mut self, kind: u16, payload: &[u8]) {
        let len = u16::try_from(ATTRIBUTE_HEADER + payload.len())
            .expect("callers bound an attribute's length far below 64 KiB");
        self.bytes.extend_from_slice(&len.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(payload);
        self.bytes.resize(align(self.bytes.len()), 0);
    }

    /// Appends a number of 32 bits.
    pub(super) fn u32(mut self, kind: u16, value: u32) -> Self {
        self.attribute(kind, &value.to_ne_bytes());
        self
    }

    /// Appends a number of 64 bits.
    pub(super) fn u64(mut self, kind: u16, value: u64) -> Self {
        self.attribute(kind, &value.to_ne_bytes());
        self
    }

    /// Appends a string with the closing NUL the kernel wants.
    pub(super) fn string(mut self, kind: u16, value: &str) -> Self {
        let mut payload = value.as_bytes().to_vec();
        payload.push(0);
        self.attribute(kind, &payload);
        self
    }

    /// Appends an attribute that holds what `fill` appends.
    pub(super) fn nested(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self.attribute(kind | NESTED, &[]);
        let mut filled = fill(self);
        let len = u16::try_from(filled.bytes.len() - start)
            .expect("callers bound an attribute's length far below 64 KiB");
        filled.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        filled
    }

    /// The whole message.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let len = u32::try_from(self.bytes.len()).expect("attributes are bounded, so is their sum");
        self.bytes[..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes
    }
}

/// One message of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message<'a> {
    /// [`ERROR`], or the family.
    pub(super) kind: u16,
    /// The request's.
    pub(super) sequence: u32,
    body: &'a [u8],
}

impl<'a> Message<'a> {
    /// The errno an [`ERROR`] message carries, positive; 0 acknowledges.
    pub(super) fn errno(&self) -> Result<i32, Malformed> {
        match self.body.first_chunk() {
            Some(code) => Ok(i32::from_ne_bytes(*code).wrapping_neg()),
            None => Err(Malformed("error message without an errno")),
        }
    }

    /// The attributes behind the generic netlink header.
    pub(super) fn attributes(&self) -> Result<Attributes<'a>, Malformed> {
        match self.body.get(GENERIC_HEADER..) {
            Some(rest) => Ok(Attributes(rest)),
            None => Err(Malformed("no generic netlink header")),
        }
    }
}

/// Takes the next message off the front of a datagram.
pub(super) fn next_message<'a>(datagram: &mut &'a [u8]) -> Result<Option<Message<'a>>, Malformed> {
    if datagram.is_empty() {
        return Ok(None);
    }
    let header: &[u8; HEADER] = datagram
        .first_chunk()
        .ok_or(Malformed("shorter than its header"))?;
    let [l0, l1, l2, l3, k0, k1, _, _, s0, s1, s2, s3, ..] = *header;
    let len = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
    let body = datagram
        .get(HEADER..len)
        .ok_or(Malformed("length beyond the datagram"))?;
    *datagram = datagram.get(align(len)..).unwrap_or_default();
    Ok(Some(Message {
        kind: u16::from_ne_bytes([k0, k1]),
        sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
        body,
    }))
}

/// The attributes of a message, or of a nested attribute.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attributes<'a>(pub(super) &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, &'a [u8]), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let item = self.split();
        if item.is_err() {
            self.0 = &[];
        }
        Some(item)
    }
}

impl<'a> Attributes<'a> {
    fn split(&mut self) -> Result<(u16, &'a [u8]), Malformed> {
        let [l0, l1, k0, k1] = *self
            .0
            .first_chunk::<ATTRIBUTE_HEADER>()
            .ok_or(Malformed("attribute shorter than its header"))?;
        let len = usize::from(u16::from_ne_bytes([l0, l1]));
        let payload = self
            .0
            .get(ATTRIBUTE_HEADER..len)
            .ok_or(Malformed("attribute length beyond its message"))?;
        self.0 = self.0.get(align(len)..).unwrap_or_default();
        Ok((u16::from_ne_bytes([k0, k1]) & TYPE_MASK, payload))
    }

    /// The payload of the first attribute of this kind.
    pub(super) fn find(mut self, kind: u16) -> Result<Option<&'a [u8]>, Malformed> {
        self.find_map(|item| match item {
            Ok((found, payload)) if found == kind => Some(Ok(payload)),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        })
        .transpose()
    }

    /// The first attribute of this kind as a number of 32 bits.
    pub(super) fn u32(self, kind: u16) -> Result<Option<u32>, Malformed> {
        self.number(kind).map(|found| found.map(u32::from_ne_bytes))
    }

    /// The first attribute of this kind as a number of 16 bits.
    pub(super) fn u16(self, kind: u16) -> Result<Option<u16>, Malformed> {
        self.number(kind).map(|found| found.map(u16::from_ne_bytes))
    }

    /// The first attribute of this kind as a number of 8 bits.
    pub(super) fn u8(self, kind: u16) -> Result<Option<u8>, Malformed> {
        self.number(kind).map(|found| found.map(u8::from_ne_bytes))
    }

    fn number<const N: usize>(self, kind: u16) -> Result<Option<[u8; N]>, Malformed> {
        self.find(kind)?
            .map(|payload| {
                payload
                    .try_into()
                    .map_err(|_| Malformed("attribute of an unexpected width"))
            })
            .transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn a_request_is_laid_out_as_the_kernel_headers_say() {
        let bytes = Request::new(0x1c, 1, 1, 7)
            .u64(2, 0x0001_0000_0000)
            .nested(7, |list| list.nested(1, |item| item.u32(1, 9)))
            .string(10, "abc")
            .finish();
        let expected = [
            // nlmsghdr: 56 bytes, family 0x1c, REQUEST|ACK, sequence 7, port 0
            56, 0, 0, 0, 0x1c, 0, 5, 0, 7, 0, 0, 0, 0, 0, 0, 0, // genlmsghdr
            1, 1, 0, 0, // attribute 2, 12 bytes
            12, 0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, // nested 7 of 16 bytes
            16, 0, 7, 0x80, // nested 1 of 12 bytes
            12, 0, 1, 0x80, // attribute 1: 9
            8, 0, 1, 0, 9, 0, 0, 0, // attribute 10: "abc\0"
            8, 0, 10, 0, b'a', b'b', b'c', 0,
        ];
        assert_eq!(bytes, expected);
    }

    #[test]
    fn odd_payloads_are_padded_but_not_counted() {
        let bytes = Request::new(1, 0, 0, 0).string(3, "ab").u32(4, 5).finish();
        let mut datagram = &bytes[..];
        let message = next_message(&mut datagram).unwrap().unwrap();
        let attributes = message.attributes().unwrap();
        assert_eq!(attributes.find(3).unwrap(), Some(&b"ab\0"[..]));
        assert_eq!(attributes.u32(4).unwrap(), Some(5));
        assert_eq!(attributes.u32(9).unwrap(), None);
        assert!(attributes.u16(4).is_err());
        assert_eq!(next_message(&mut datagram).unwrap(), None);
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn an_error_message_carries_a_positive_errno() {
        // As the kernel answers an unknown family: -ENOENT and the request's header.
        let bytes = [
            36, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0xfe, 0xff, 0xff, 0xff, 20, 0, 0, 0,
            16, 0, 5, 0, 3, 0, 0, 0, 0, 0, 0, 0,
        ];
        let mut datagram = &bytes[..];
        let message = next_message(&mut datagram).unwrap().unwrap();
        assert_eq!((message.kind, message.sequence), (ERROR, 3));
        assert_eq!(message.errno().unwrap(), 2);
    }

    proptest::proptest! {
        #[test]
        fn no_answer_makes_the_parser_panic_or_loop(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)
        ) {
            let mut datagram = &bytes[..];
            while let Ok(Some(message)) = next_message(&mut datagram) {
                if let Ok(attributes) = message.attributes() {
                    proptest::prop_assert!(attributes.count() <= bytes.len());
                }
            }
            for (_, payload) in Attributes(&bytes).flatten() {
                proptest::prop_assert!(Attributes(payload).count() <= bytes.len());
            }
        }
    }
}
