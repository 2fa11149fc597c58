//! Clients that send the socket's path as `:authority`.
//!
//! Some gRPC clients name a UNIX socket there (`/csi/csi.sock`, or with `%2F`),
//! which is no authority by RFC 3986, so the HTTP/2 library ends the stream.
//! What a client calls the server on its own socket decides nothing, so here,
//! before the library sees it, such a value gets `-` in place of `/` and `%`
//! and `B` in place of `:`: characters whose Huffman codes are as long (RFC
//! 7541, appendix B). The header block keeps its length, and so does the entry
//! in the compression's table, on both sides.
//!
//! Everything else passes as it is, also what is not understood.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tonic::transport::server::Connected;

/// Bytes of a connection's preface, RFC 9113, 3.4.
const PREFACE: usize = 24;
/// Bytes of a frame's head, RFC 9113, 4.1.
const HEAD: usize = 9;
/// The longest header block that is looked into: the frame size that holds
/// unless a server offers more, and ours does not.
const LARGEST: usize = 16 << 10;
const HEADERS: u8 = 1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// `:authority` in the static table, RFC 7541, appendix A.
const AUTHORITY: usize = 1;

/// Where in the stream of frames it is.
#[derive(Debug)]
enum At {
    /// This many bytes pass as they are.
    Passing(usize),
    /// A frame's head, as far as it came.
    Head,
    /// A header block, as far as it came, of this many bytes in all.
    Block(usize),
}

/// Repairs a client's side of a connection, piece by piece.
#[derive(Debug)]
struct Repair {
    at: At,
    /// What cannot pass before more has come.
    held: Vec<u8>,
}

impl Repair {
    fn new() -> Self {
        Self {
            at: At::Passing(PREFACE),
            held: Vec::new(),
        }
    }

    /// Takes the next bytes and appends what may pass to `out`.
    fn feed(&mut self, mut input: &[u8], out: &mut Vec<u8>) {
        while !input.is_empty() {
            match self.at {
                At::Passing(left) => {
                    let now = left.min(input.len());
                    out.extend_from_slice(&input[..now]);
                    input = &input[now..];
                    self.at = match left - now {
                        0 => At::Head,
                        left => At::Passing(left),
                    };
                }
                At::Head => {
                    self.hold(&mut input, HEAD);
                    if self.held.len() == HEAD {
                        self.begin_frame(out);
                    }
                }
                At::Block(whole) => {
                    self.hold(&mut input, whole);
                    if self.held.len() == whole {
                        repair_block(&mut self.held);
                        out.append(&mut self.held);
                        self.at = At::Head;
                    }
                }
            }
        }
    }

    fn hold(&mut self, input: &mut &[u8], whole: usize) {
        let now = (whole - self.held.len()).min(input.len());
        self.held.extend_from_slice(&input[..now]);
        *input = &input[now..];
    }

    fn begin_frame(&mut self, out: &mut Vec<u8>) {
        let head = &self.held;
        let len = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let whole = head[3] == HEADERS && head[4] & END_HEADERS != 0;
        if whole && len <= LARGEST && len > 0 {
            self.at = At::Block(HEAD + len);
            return;
        }
        out.append(&mut self.held);
        self.at = match len {
            0 => At::Head,
            len => At::Passing(len),
        };
    }
}

/// Repairs a HEADERS frame; one that is not understood stays as it is.
fn repair_block(frame: &mut [u8]) {
    let flags = frame[4];
    let mut begin = HEAD;
    let mut end = frame.len();
    if flags & PADDED != 0 {
        let padding = frame.get(begin).copied().map_or(0, usize::from);
        begin += 1;
        end = end.saturating_sub(padding);
    }
    if flags & PRIORITY != 0 {
        begin += 5;
    }
    if let Some(block) = frame.get_mut(begin..end) {
        while_understood(block);
    }
}

/// Walks the fields of a header block, RFC 7541, 6.
fn while_understood(block: &mut [u8]) -> Option<()> {
    let mut at = 0;
    while at < block.len() {
        let first = block[at];
        let bits = match first {
            0x80.. => 7,
            0x40..=0x7f => 6,
            0x20..=0x3f => 5,
            _ => 4,
        };
        let name = integer(block, &mut at, bits)?;
        if first & 0xe0 == 0x20 || first & 0x80 != 0 {
            continue;
        }
        if name == 0 {
            string(block, &mut at)?;
        }
        let (value, huffman) = string(block, &mut at)?;
        if name == AUTHORITY {
            let value = block.get_mut(value)?;
            if huffman {
                repair_huffman(value);
            } else {
                repair_plain(value);
            }
        }
    }
    Some(())
}

/// RFC 7541, 5.1.
fn integer(block: &[u8], at: &mut usize, bits: u32) -> Option<usize> {
    let most = (1_usize << bits) - 1;
    let mut value = usize::from(*block.get(*at)?) & most;
    *at += 1;
    if value < most {
        return Some(value);
    }
    for shift in [0, 7, 14] {
        let byte = *block.get(*at)?;
        *at += 1;
        value += usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// RFC 7541, 5.2: where the string is, and whether it is Huffman-coded.
fn string(block: &[u8], at: &mut usize) -> Option<(std::ops::Range<usize>, bool)> {
    let huffman = block.get(*at)? & 0x80 != 0;
    let len = integer(block, at, 7)?;
    let begin = *at;
    *at = begin.checked_add(len)?;
    (*at <= block.len()).then_some((begin..*at, huffman))
}

fn repair_plain(value: &mut [u8]) {
    if !value.iter().any(|byte| b"/%".contains(byte)) {
        return;
    }
    for byte in value {
        match *byte {
            b'/' | b'%' => *byte = b'-',
            b':' => *byte = b'B',
            _ => {}
        }
    }
}

/// How many codes there are of 5, 6, ... bits, RFC 7541, appendix B. Codes of
/// one length follow each other, and longer ones follow shorter ones.
const CODES: [u32; 26] = [
    10, 26, 32, 6, 0, 5, 3, 2, 6, 2, 3, 0, 0, 0, 3, 8, 13, 26, 29, 12, 4, 15, 19, 29, 0, 4,
];
const SHORTEST: u32 = 5;
/// Codes and their lengths: `/`, `%`, `:` and what takes their places.
const SLASH: (u32, u32) = (0x18, 6);
const PERCENT: (u32, u32) = (0x15, 6);
const HYPHEN: u32 = 0x16;
const COLON: (u32, u32) = (0x5c, 7);
const CAPITAL_B: u32 = 0x5d;

fn repair_huffman(value: &mut [u8]) {
    let bits = value.len() * 8;
    let bit = |value: &[u8], at: usize| u32::from(value[at / 8] >> (7 - at % 8) & 1);
    let mut found = Vec::new();
    let mut at = 0;
    'codes: while at < bits {
        let begin = at;
        let (mut code, mut first) = (0_u32, 0_u32);
        let mut len = 0;
        while at < bits {
            code = code << 1 | bit(value, at);
            at += 1;
            len += 1;
            if len < SHORTEST {
                continue;
            }
            let index = usize::try_from(len - SHORTEST).unwrap_or(usize::MAX);
            let Some(count) = CODES.get(index) else {
                // Padding, or nonsense.
                break 'codes;
            };
            if code < first + count {
                found.push((begin, (code, len)));
                continue 'codes;
            }
            first = (first + count) << 1;
        }
    }
    if !found
        .iter()
        .any(|(_, code)| [SLASH, PERCENT].contains(code))
    {
        return;
    }
    for (begin, code) in found {
        let other = match code {
            SLASH | PERCENT => HYPHEN,
            COLON => CAPITAL_B,
            _ => continue,
        };
        let len = usize::try_from(code.1).unwrap_or(0);
        for offset in 0..len {
            let at = begin + offset;
            let mask = 1 << (7 - at % 8);
            if other >> (len - 1 - offset) & 1 == 1 {
                value[at / 8] |= mask;
            } else {
                value[at / 8] &= !mask;
            }
        }
    }
}

/// A client's connection, repaired.
#[derive(Debug)]
pub struct Repaired {
    stream: UnixStream,
    repair: Repair,
    ready: Vec<u8>,
    taken: usize,
}

impl Repaired {
    /// Over `stream`, from its first byte.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            repair: Repair::new(),
            ready: Vec::new(),
            taken: 0,
        }
    }
}

impl AsyncRead for Repaired {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let own = self.get_mut();
        while own.taken == own.ready.len() {
            own.ready.clear();
            own.taken = 0;
            let mut bytes = [0; 8 << 10];
            let mut read = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut own.stream).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            own.repair.feed(read.filled(), &mut own.ready);
        }
        let now = buffer.remaining().min(own.ready.len() - own.taken);
        buffer.put_slice(&own.ready[own.taken..own.taken + now]);
        own.taken += now;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Repaired {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

impl Connected for Repaired {
    type ConnectInfo = ();

    fn connect_info(&self) -> Self::ConnectInfo {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let len = u32::try_from(payload.len()).expect("short").to_be_bytes();
        let mut frame = vec![len[1], len[2], len[3], kind, flags, 0, 0, 0, 1];
        frame.extend_from_slice(payload);
        frame
    }

    fn literal(first: u8, value: &[u8], huffman: bool) -> Vec<u8> {
        let len = u8::try_from(value.len()).expect("short");
        let mut field = vec![first, len | if huffman { 0x80 } else { 0 }];
        field.extend_from_slice(value);
        field
    }

    fn repaired(frame: &[u8], piece: usize) -> Vec<u8> {
        let mut bytes = vec![b'P'; PREFACE];
        bytes.extend_from_slice(frame);
        let (mut repair, mut out) = (Repair::new(), Vec::new());
        for piece in bytes.chunks(piece) {
            repair.feed(piece, &mut out);
        }
        out.split_off(PREFACE)
    }

    #[test]
    fn paths_become_authorities_of_the_same_length() {
        for first in [0x41, 0x01, 0x11] {
            for (sent, got) in [
                ("/csi/csi.sock", "-csi-csi.sock"),
                ("%2Fcsi%2Fcsi.sock", "-2Fcsi-2Fcsi.sock"),
                ("unix:///csi/csi.sock", "unixB---csi-csi.sock"),
                ("localhost", "localhost"),
                ("localhost:80", "localhost:80"),
            ] {
                // :method POST before it, and a literal of another name after.
                let mut block = vec![0x83];
                block.extend(literal(first, sent.as_bytes(), false));
                block.extend(literal(0x44, b"/csi.v1.Node/x", false));
                let mut wanted = vec![0x83];
                wanted.extend(literal(first, got.as_bytes(), false));
                wanted.extend(literal(0x44, b"/csi.v1.Node/x", false));
                for piece in [1, 7, 1000] {
                    let sent = frame(HEADERS, END_HEADERS, &block);
                    assert_eq!(repaired(&sent, piece), frame(HEADERS, END_HEADERS, &wanted));
                }
            }
        }
    }

    #[test]
    fn huffman_codes_too() {
        // RFC 7541, C.4.1: www.example.com stays.
        let example = [
            0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff,
        ];
        let block = literal(0x41, &example, true);
        let sent = frame(HEADERS, END_HEADERS, &block);
        assert_eq!(repaired(&sent, 1000), sent);
        // "/c:" is 011000 00100 1011100, padded with ones; "-cB" takes its place.
        let path = [0b0110_0000, 0b1001_0111, 0b0011_1111];
        let other = [0b0101_1000, 0b1001_0111, 0b0111_1111];
        let sent = frame(HEADERS, END_HEADERS, &literal(0x41, &path, true));
        let wanted = frame(HEADERS, END_HEADERS, &literal(0x41, &other, true));
        assert_eq!(repaired(&sent, 1000), wanted);
    }

    #[test]
    fn the_codes_fill_the_code() {
        // Kraft: every code of RFC 7541 is there, and the end of strings.
        let sum: u64 = (5..)
            .zip(CODES)
            .map(|(len, n)| u64::from(n) << (30 - len))
            .sum();
        assert_eq!(sum, 1 << 30);
        assert_eq!(CODES.iter().sum::<u32>(), 257);
    }

    proptest! {
        #[test]
        fn other_bytes_pass_whole(
            payload in proptest::collection::vec(any::<u8>(), 0..300),
            kind in any::<u8>(),
            flags in any::<u8>(),
            piece in 1_usize..40,
        ) {
            let sent = frame(kind, flags, &payload);
            let got = repaired(&sent, piece);
            prop_assert_eq!(got.len(), sent.len());
            if kind != HEADERS || flags & END_HEADERS == 0 {
                prop_assert_eq!(got, sent);
            }
        }
    }
}
