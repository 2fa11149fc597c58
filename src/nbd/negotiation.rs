//! The server's side of the fixed newstyle handshake, from the greeting to the
//! transmission phase (proto.md, "Fixed newstyle negotiation").
//!
//! One export, known by its name and as the default export. An option is
//! answered before the next is read, its data bounded before it is received;
//! nothing is read beyond the last option, so the stream that comes out is at
//! the first byte of the first request.

use std::io;
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::wire::handshake::{
    self, BASE_ALLOCATION, ContextRequest, EXPORT_NAME_PADDING, InfoRequest, OPTION_HEADER_LEN,
    OptionHeader, client_flag, handshake_flag, info, option, option_reply, transmission_flag,
};
use super::wire::{MAX_STRING, WireError};
use crate::device::{Geometry, PAGE};

/// The most data of one option that is looked at, in bytes: a name and a few
/// queries of the longest the protocol allows.
pub const MAX_OPTION: usize = 4 * MAX_STRING;

/// The most data of one option that is passed over, in bytes; a client that
/// sends more is cut off.
pub const MAX_SKIPPED: usize = 1 << 20;

/// Options in one handshake, so that none goes on for ever.
pub const MAX_OPTIONS: usize = 256;

/// The id under which `base:allocation` is offered.
const ALLOCATION_ID: u32 = 1;

/// What a client can choose.
#[derive(Clone, Debug)]
pub struct Export {
    /// The name, at most 4096 bytes. The empty name is accepted for it too.
    pub name: String,
    /// The device, as it is now.
    pub geometry: Geometry,
}

impl Export {
    /// Transmission flags (proto.md, "Transmission flags").
    #[must_use]
    pub fn flags(&self, structured: bool) -> u16 {
        use transmission_flag as flag;
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::CAN_MULTI_CONN;
        if self.geometry.read_only {
            flags |= flag::READ_ONLY;
        } else {
            flags |= flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
        }
        if structured {
            flags |= flag::SEND_DF;
        }
        flags
    }

    fn answers_to(&self, name: &str) -> bool {
        name.is_empty() || name == self.name
    }

    /// Minimum, preferred and maximum block size in bytes. The minimum is a
    /// page: smaller requests are served, but cost a read.
    fn block_sizes(&self) -> [u32; 3] {
        const MINIMUM: u32 = 512;
        const { assert!(MINIMUM as u64 == PAGE) };
        let Geometry {
            preferred_block,
            max_payload,
            ..
        } = self.geometry;
        let maximum = (max_payload - max_payload % MINIMUM).max(MINIMUM);
        [MINIMUM, preferred_block.max(MINIMUM), maximum]
    }
}

/// What the client chose to speak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreement {
    /// Structured replies.
    pub structured: bool,
    /// The id of `base:allocation`, when block status was asked for.
    pub base_allocation: Option<u32>,
}

/// How a handshake ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Negotiated {
    /// The transmission phase begins.
    Transmission(Agreement),
    /// The client only wanted to look and said goodbye.
    Aborted,
}

/// How a handshake failed; the connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum NegotiationError {
    /// The socket failed, or the client went away.
    #[error("nbd handshake broke off: {0}")]
    Io(#[from] io::Error),
    /// The client does not speak the protocol.
    #[error("nbd handshake violates the protocol: {0}")]
    Protocol(#[from] WireError),
    /// The client set flags the server did not offer.
    #[error("nbd client set unknown flags {0:#x}")]
    ClientFlags(u32),
    /// EXPORT_NAME, which cannot be refused otherwise, named another export.
    #[error("nbd client asked for export {0:?}, which is not served here")]
    UnknownExport(String),
    /// More data, or more options, than any client has use for.
    #[error("nbd client sent {0}, which is more than is allowed")]
    TooMuch(&'static str),
    /// The client took too long.
    #[error("nbd handshake not finished within {} ms", .0.as_millis())]
    Timeout(Duration),
}

/// Negotiates `export` with a client that has just connected, within `limit`
/// for all of it.
///
/// # Errors
/// [`NegotiationError`]; the stream is then to be dropped.
pub async fn negotiate<S>(
    stream: &mut S,
    export: &Export,
    limit: Duration,
) -> Result<Negotiated, NegotiationError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    tokio::time::timeout(limit, Handshake::new(stream, export).run())
        .await
        .map_err(|_| NegotiationError::Timeout(limit))?
}

struct Handshake<'a, S> {
    stream: &'a mut S,
    export: &'a Export,
    agreed: Agreement,
    padded: bool,
    out: BytesMut,
}

impl<'a, S> Handshake<'a, S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    fn new(stream: &'a mut S, export: &'a Export) -> Self {
        Self {
            stream,
            export,
            agreed: Agreement::default(),
            padded: true,
            out: BytesMut::new(),
        }
    }

    async fn run(mut self) -> Result<Negotiated, NegotiationError> {
        let offered = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        self.stream.write_all(&handshake::greeting(offered)).await?;
        let flags = self.stream.read_u32().await?;
        if flags & !(client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES) != 0 {
            return Err(NegotiationError::ClientFlags(flags));
        }
        self.padded = flags & client_flag::NO_ZEROES == 0;

        for _ in 0..MAX_OPTIONS {
            let mut header = [0; OPTION_HEADER_LEN];
            self.stream.read_exact(&mut header).await?;
            let header = OptionHeader::parse(&header)?;
            let end = match self.receive(&header).await? {
                Some(data) => self.handle(header.option, &data)?,
                None => {
                    self.refuse(header.option, option_reply::ERR_TOO_BIG, "option too long");
                    None
                }
            };
            let sent = self.stream.write_all(&self.out).await;
            self.out.clear();
            // A client may abort and leave without waiting for the answer.
            if end == Some(Negotiated::Aborted) {
                return Ok(Negotiated::Aborted);
            }
            sent?;
            self.stream.flush().await?;
            if let Some(end) = end {
                return Ok(end);
            }
        }
        Err(NegotiationError::TooMuch("options without end"))
    }

    /// The data of an option; `None` when it was too long and is gone.
    async fn receive(
        &mut self,
        header: &OptionHeader,
    ) -> Result<Option<Vec<u8>>, NegotiationError> {
        let length = header.length as usize;
        if length <= MAX_OPTION {
            let mut data = vec![0; length];
            self.stream.read_exact(&mut data).await?;
            return Ok(Some(data));
        }
        // EXPORT_NAME cannot be answered with an error.
        if length > MAX_SKIPPED || header.option == option::EXPORT_NAME {
            return Err(NegotiationError::TooMuch("an option of excessive length"));
        }
        let mut rest = (&mut *self.stream).take(length as u64);
        let passed = tokio::io::copy(&mut rest, &mut tokio::io::sink()).await?;
        if passed < length as u64 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok(None)
    }

    /// Answers one option into `out`.
    fn handle(&mut self, code: u32, data: &[u8]) -> Result<Option<Negotiated>, NegotiationError> {
        match code {
            option::EXPORT_NAME => return self.export_name(data).map(Some),
            option::ABORT => {
                self.acknowledge(code);
                return Ok(Some(Negotiated::Aborted));
            }
            option::GO | option::INFO => {
                if self.inform(code, data) && code == option::GO {
                    return Ok(Some(Negotiated::Transmission(self.agreed)));
                }
            }
            option::LIST | option::STRUCTURED_REPLY if !data.is_empty() => {
                self.refuse(code, option_reply::ERR_INVALID, "this option has no data");
            }
            option::LIST => {
                let mut server = BytesMut::new();
                handshake::put_string(&mut server, &self.export.name);
                self.reply(code, option_reply::SERVER, &server);
                self.acknowledge(code);
            }
            option::STRUCTURED_REPLY => {
                self.agreed.structured = true;
                self.acknowledge(code);
            }
            option::LIST_META_CONTEXT => self.list_contexts(data),
            option::SET_META_CONTEXT => self.set_contexts(data),
            _ => self.refuse(code, option_reply::ERR_UNSUP, "option not supported"),
        }
        Ok(None)
    }

    fn export_name(&mut self, data: &[u8]) -> Result<Negotiated, NegotiationError> {
        let name = super::wire::text(data, "export name")?;
        if !self.export.answers_to(name) {
            return Err(NegotiationError::UnknownExport(name.to_owned()));
        }
        self.out.put_u64(self.export.geometry.size);
        self.out.put_u16(self.export.flags(self.agreed.structured));
        if self.padded {
            self.out.put_bytes(0, EXPORT_NAME_PADDING);
        }
        Ok(Negotiated::Transmission(self.agreed))
    }

    /// INFO and GO; true when the export was granted.
    fn inform(&mut self, code: u32, data: &[u8]) -> bool {
        let request = match InfoRequest::parse(data) {
            Ok(request) => request,
            Err(error) => {
                self.refuse(code, option_reply::ERR_INVALID, &error.to_string());
                return false;
            }
        };
        if !self.export.answers_to(request.name) {
            self.refuse(code, option_reply::ERR_UNKNOWN, "no such export");
            return false;
        }
        let mut data = BytesMut::new();
        data.put_u16(info::EXPORT);
        data.put_u64(self.export.geometry.size);
        data.put_u16(self.export.flags(self.agreed.structured));
        self.reply(code, option_reply::INFO, &data);
        if request.wanted.contains(&info::NAME) {
            let mut data = BytesMut::new();
            data.put_u16(info::NAME);
            data.put_slice(self.export.name.as_bytes());
            self.reply(code, option_reply::INFO, &data);
        }
        if request.wanted.contains(&info::BLOCK_SIZE) {
            let mut data = BytesMut::new();
            data.put_u16(info::BLOCK_SIZE);
            for size in self.export.block_sizes() {
                data.put_u32(size);
            }
            self.reply(code, option_reply::INFO, &data);
        }
        self.acknowledge(code);
        true
    }

    fn list_contexts(&mut self, data: &[u8]) {
        let code = option::LIST_META_CONTEXT;
        let Some(request) = self.context_request(code, data) else {
            return;
        };
        let listed = request.queries.is_empty()
            || request
                .queries
                .iter()
                .any(|query| matches!(*query, "base:" | BASE_ALLOCATION));
        if listed {
            self.reply_context(code, 0);
        }
        self.acknowledge(code);
    }

    fn set_contexts(&mut self, data: &[u8]) {
        let code = option::SET_META_CONTEXT;
        // Also when it fails, it replaces what was selected before.
        self.agreed.base_allocation = None;
        let Some(request) = self.context_request(code, data) else {
            return;
        };
        if request.queries.contains(&BASE_ALLOCATION) {
            self.agreed.base_allocation = Some(ALLOCATION_ID);
            self.reply_context(code, ALLOCATION_ID);
        }
        self.acknowledge(code);
    }

    /// Checks what both context options have in common; answers if it is
    /// wrong.
    fn context_request<'d>(&mut self, code: u32, data: &'d [u8]) -> Option<ContextRequest<'d>> {
        if !self.agreed.structured {
            let remedy = "negotiate structured replies first";
            self.refuse(code, option_reply::ERR_INVALID, remedy);
            return None;
        }
        let request = match ContextRequest::parse(data) {
            Ok(request) => request,
            Err(error) => {
                self.refuse(code, option_reply::ERR_INVALID, &error.to_string());
                return None;
            }
        };
        if !self.export.answers_to(request.name) {
            self.refuse(code, option_reply::ERR_UNKNOWN, "no such export");
            return None;
        }
        if request.queries.iter().any(|query| !query.contains(':')) {
            let remedy = "a query is a namespace, a colon and a name";
            self.refuse(code, option_reply::ERR_INVALID, remedy);
            return None;
        }
        Some(request)
    }

    fn reply_context(&mut self, code: u32, id: u32) {
        let mut data = BytesMut::new();
        data.put_u32(id);
        data.put_slice(BASE_ALLOCATION.as_bytes());
        self.reply(code, option_reply::META_CONTEXT, &data);
    }

    fn acknowledge(&mut self, code: u32) {
        self.reply(code, option_reply::ACK, &[]);
    }

    fn refuse(&mut self, code: u32, kind: u32, message: &str) {
        self.reply(code, kind, message.as_bytes());
    }

    fn reply(&mut self, code: u32, kind: u32, data: &[u8]) {
        handshake::put_option_reply(&mut self.out, code, kind, data);
    }
}
