//! The handshake, message by message: what is granted, what is refused and
//! how, and what a hostile client gets.

use std::time::Duration;

use crate::support::memory_disk::MemoryDisk;
use crate::support::nbd_peer::{HANG, Peer, soon};
use dysk::device::BlockDevice;
use dysk::nbd::negotiation::{
    Agreement, Export, MAX_OPTION, MAX_OPTIONS, MAX_SKIPPED, Negotiated, NegotiationError,
    negotiate,
};
use dysk::nbd::wire::handshake::{
    ContextRequest, InfoRequest, OPTION_HEADER_LEN, OPTION_REPLY_HEADER_LEN, OptionHeader,
    OptionReplyHeader, info, option, option_reply, transmission_flag as flag,
};
use proptest::prelude::*;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

const NAME: &str = "vol-1";
const SIZE: u64 = 1 << 20;
const FIXED: u32 = 1;
const NO_ZEROES: u32 = 2;

struct Handshake {
    peer: Peer,
    server: JoinHandle<Result<Negotiated, NegotiationError>>,
}

impl Handshake {
    async fn with(disk: MemoryDisk, limit: Duration, flags: u32) -> Self {
        let (mut stream, client) = UnixStream::pair().expect("a socket pair");
        let export = Export {
            name: NAME.into(),
            geometry: disk.geometry(),
        };
        let server = tokio::spawn(async move { negotiate(&mut stream, &export, limit).await });
        let mut peer = Peer { stream: client };
        assert_eq!(&peer.receive(18).await[..], b"NBDMAGICIHAVEOPT\0\x03");
        peer.send_raw(&flags.to_be_bytes()).await;
        Self { peer, server }
    }

    async fn new() -> Self {
        Self::with(MemoryDisk::new(SIZE), HANG, FIXED | NO_ZEROES).await
    }

    async fn send(&mut self, option: u32, data: &[u8]) {
        let length = u32::try_from(data.len()).expect("short");
        let header = OptionHeader { option, length };
        self.peer.send_raw(&header.encode()).await;
        self.peer.send_raw(data).await;
    }

    /// One reply, which has to be to `option`: its type and its data.
    async fn reply(&mut self, option: u32) -> (u32, Vec<u8>) {
        let bytes = self.peer.receive(OPTION_REPLY_HEADER_LEN).await;
        let header = OptionReplyHeader::parse(bytes[..].try_into().expect("20 bytes"))
            .expect("a reply header");
        assert_eq!(header.option, option);
        let data = self.peer.receive(header.length as usize).await;
        (header.kind, data.to_vec())
    }

    /// Sends an option and returns the type of the one reply to it.
    async fn ask(&mut self, option: u32, data: &[u8]) -> u32 {
        self.send(option, data).await;
        self.reply(option).await.0
    }

    async fn end(self) -> Result<Negotiated, NegotiationError> {
        soon("the handshake", self.server).await.expect("no panic")
    }
}

fn info_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = Vec::new();
    let wanted = wanted.to_vec();
    InfoRequest { name, wanted }.put(&mut data);
    data
}

fn context_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = Vec::new();
    let queries = queries.to_vec();
    ContextRequest { name, queries }.put(&mut data);
    data
}

fn export_info(flags: u16) -> Vec<u8> {
    [
        &info::EXPORT.to_be_bytes()[..],
        &SIZE.to_be_bytes(),
        &flags.to_be_bytes(),
    ]
    .concat()
}

const WRITABLE: u16 = flag::HAS_FLAGS
    | flag::SEND_FLUSH
    | flag::SEND_FUA
    | flag::SEND_TRIM
    | flag::SEND_WRITE_ZEROES
    | flag::CAN_MULTI_CONN
    | flag::SEND_FAST_ZERO;

#[tokio::test]
async fn go_grants_the_export_and_says_no_more_than_was_asked() {
    for name in ["", NAME] {
        let mut client = Handshake::new().await;
        client.send(option::GO, &info_data(name, &[])).await;
        let granted = client.reply(option::GO).await;
        assert_eq!(granted, (option_reply::INFO, export_info(WRITABLE)));
        assert_eq!(client.reply(option::GO).await, (option_reply::ACK, vec![]));
        assert_eq!(
            client.end().await.expect("granted"),
            Negotiated::Transmission(Agreement::default())
        );
    }
}

#[tokio::test]
async fn info_tells_name_and_block_sizes_and_the_handshake_goes_on() {
    let disk = MemoryDisk::new(SIZE).max_payload((1 << 20) + 100);
    let mut client = Handshake::with(disk, HANG, FIXED).await;
    let wanted = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE, 77];
    client.send(option::INFO, &info_data("", &wanted)).await;
    client.reply(option::INFO).await;
    let (kind, name) = client.reply(option::INFO).await;
    assert_eq!((kind, &name[..]), (option_reply::INFO, &b"\0\x01vol-1"[..]));
    let sizes: Vec<u8> = [512u32, 4096, 1 << 20]
        .iter()
        .flat_map(|size| size.to_be_bytes())
        .collect();
    let (kind, data) = client.reply(option::INFO).await;
    assert_eq!(
        (kind, &data[..2], &data[2..]),
        (option_reply::INFO, &b"\0\x03"[..], &sizes[..])
    );
    assert_eq!(client.reply(option::INFO).await.0, option_reply::ACK);
    assert_eq!(
        client.ask(option::ABORT, b"why not").await,
        option_reply::ACK
    );
    assert_eq!(client.end().await.expect("aborted"), Negotiated::Aborted);
}

#[tokio::test]
async fn export_name_is_answered_with_padding_unless_declined() {
    for (flags, padding) in [(FIXED, 124), (FIXED | NO_ZEROES, 0)] {
        let mut client = Handshake::with(MemoryDisk::new(SIZE), HANG, flags).await;
        client.send(option::EXPORT_NAME, NAME.as_bytes()).await;
        let answer = client.peer.receive(10 + padding).await;
        assert_eq!(answer[..8], SIZE.to_be_bytes());
        assert_eq!(answer[8..10], WRITABLE.to_be_bytes());
        assert!(answer[10..].iter().all(|&byte| byte == 0));
        client.peer.ended().await;
        client.end().await.expect("granted");
    }
}

#[tokio::test]
async fn a_wrong_export_name_is_unknown() {
    let mut client = Handshake::new().await;
    for code in [option::INFO, option::GO] {
        let answer = client.ask(code, &info_data("other", &[])).await;
        assert_eq!(answer, option_reply::ERR_UNKNOWN);
    }
    client.send(option::EXPORT_NAME, b"other").await;
    client.peer.ended().await;
    let error = client.end().await.expect_err("refused");
    assert_eq!(
        error.to_string(),
        r#"nbd client asked for export "other", which is not served here"#
    );
}

#[tokio::test]
async fn list_names_the_one_export() {
    let mut client = Handshake::new().await;
    client.send(option::LIST, b"").await;
    let (kind, data) = client.reply(option::LIST).await;
    assert_eq!(
        (kind, &data[..]),
        (option_reply::SERVER, &b"\0\0\0\x05vol-1"[..])
    );
    assert_eq!(client.reply(option::LIST).await.0, option_reply::ACK);
}

#[tokio::test]
async fn wrong_options_are_refused_and_the_stream_stays_in_step() {
    let mut client = Handshake::new().await;
    assert_eq!(
        client.ask(option::STARTTLS, b"").await,
        option_reply::ERR_UNSUP
    );
    assert_eq!(
        client.ask(option::EXTENDED_HEADERS, b"").await,
        option_reply::ERR_UNSUP
    );
    assert_eq!(client.ask(4, b"peek").await, option_reply::ERR_UNSUP);
    assert_eq!(
        client.ask(option::LIST, b"x").await,
        option_reply::ERR_INVALID
    );
    assert_eq!(
        client.ask(option::STRUCTURED_REPLY, b"x").await,
        option_reply::ERR_INVALID
    );
    assert_eq!(client.ask(option::GO, b"").await, option_reply::ERR_INVALID);
    assert_eq!(
        client.ask(option::GO, b"\0\0\0\x09short\0\0").await,
        option_reply::ERR_INVALID
    );
    let long = vec![0; MAX_OPTION + 1];
    for code in [option::GO, option::LIST, 99] {
        assert_eq!(client.ask(code, &long).await, option_reply::ERR_TOO_BIG);
    }
    assert_eq!(
        client.ask(option::STRUCTURED_REPLY, b"").await,
        option_reply::ACK
    );
    client.send(option::GO, &info_data("", &[])).await;
    let granted = client.reply(option::GO).await;
    assert_eq!(granted.1, export_info(WRITABLE | flag::SEND_DF));
    client.reply(option::GO).await;
    let Negotiated::Transmission(agreed) = client.end().await.expect("granted") else {
        panic!("aborted");
    };
    assert_eq!((agreed.structured, agreed.base_allocation), (true, None));
}

#[tokio::test]
async fn a_read_only_export_says_so() {
    let disk = MemoryDisk::new(SIZE).read_only();
    let mut client = Handshake::with(disk, HANG, FIXED).await;
    client.send(option::GO, &info_data("", &[])).await;
    let flags = flag::HAS_FLAGS
        | flag::READ_ONLY
        | flag::SEND_FLUSH
        | flag::SEND_FUA
        | flag::CAN_MULTI_CONN;
    assert_eq!(client.reply(option::GO).await.1, export_info(flags));
}

#[tokio::test]
async fn contexts_are_listed_and_selected_as_the_base_namespace_says() {
    let mut client = Handshake::new().await;
    let list = option::LIST_META_CONTEXT;
    let set = option::SET_META_CONTEXT;
    for code in [list, set] {
        let answer = client
            .ask(code, &context_data("", &["base:allocation"]))
            .await;
        assert_eq!(
            answer,
            option_reply::ERR_INVALID,
            "before structured replies"
        );
    }
    client.ask(option::STRUCTURED_REPLY, b"").await;

    let context = |id: u8| [&[0, 0, 0, id][..], b"base:allocation"].concat();
    for queries in [
        &[][..],
        &["base:"],
        &["base:allocation"],
        &["qemu:x", "base:"],
    ] {
        client.send(list, &context_data(NAME, queries)).await;
        let (kind, data) = client.reply(list).await;
        assert_eq!(
            (kind, data),
            (option_reply::META_CONTEXT, context(0)),
            "{queries:?}"
        );
        assert_eq!(client.reply(list).await.0, option_reply::ACK);
    }
    for queries in [&["base:other"][..], &["qemu:dirty-bitmap:x"]] {
        assert_eq!(
            client.ask(list, &context_data("", queries)).await,
            option_reply::ACK
        );
    }
    // The wildcard selects nothing, nor does an empty list.
    for queries in [&[][..], &["base:"], &["x-mine:y"]] {
        assert_eq!(
            client.ask(set, &context_data("", queries)).await,
            option_reply::ACK
        );
    }
    assert_eq!(
        client.ask(set, &context_data("", &["nocolon"])).await,
        option_reply::ERR_INVALID
    );
    assert_eq!(
        client.ask(set, &context_data("other", &[])).await,
        option_reply::ERR_UNKNOWN
    );
    assert_eq!(client.ask(set, b"\0\0").await, option_reply::ERR_INVALID);

    client
        .send(set, &context_data("", &["x:y", "base:allocation"]))
        .await;
    let (kind, data) = client.reply(set).await;
    assert_eq!((kind, data), (option_reply::META_CONTEXT, context(1)));
    assert_eq!(client.reply(set).await.0, option_reply::ACK);
    client.send(option::GO, &info_data("", &[])).await;
    client.reply(option::GO).await;
    client.reply(option::GO).await;
    let Negotiated::Transmission(agreed) = client.end().await.expect("granted") else {
        panic!("aborted");
    };
    assert_eq!(agreed.base_allocation, Some(1));
}

#[tokio::test]
async fn a_failed_selection_takes_the_old_one_back() {
    let mut client = Handshake::new().await;
    client.ask(option::STRUCTURED_REPLY, b"").await;
    let set = option::SET_META_CONTEXT;
    client
        .send(set, &context_data("", &["base:allocation"]))
        .await;
    client.reply(set).await;
    client.reply(set).await;
    assert_eq!(client.ask(set, b"").await, option_reply::ERR_INVALID);
    client.send(option::EXPORT_NAME, b"").await;
    let Negotiated::Transmission(agreed) = client.end().await.expect("granted") else {
        panic!("aborted");
    };
    assert_eq!(agreed.base_allocation, None);
}

#[tokio::test]
async fn clients_that_break_the_rules_are_cut_off() {
    let client = Handshake::with(MemoryDisk::new(SIZE), HANG, 4).await;
    let error = client.end().await.expect_err("unknown flags");
    assert!(matches!(error, NegotiationError::ClientFlags(4)), "{error}");

    let mut client = Handshake::new().await;
    client.peer.send_raw(&[b'x'; OPTION_HEADER_LEN]).await;
    let error = client.end().await.expect_err("wrong magic");
    assert!(matches!(error, NegotiationError::Protocol(_)), "{error}");

    for (option, length) in [(99, MAX_SKIPPED + 1), (option::EXPORT_NAME, MAX_OPTION + 1)] {
        let mut client = Handshake::new().await;
        let length = u32::try_from(length).expect("32 bits");
        client
            .peer
            .send_raw(&OptionHeader { option, length }.encode())
            .await;
        let error = client.end().await.expect_err("excessive length");
        assert!(matches!(error, NegotiationError::TooMuch(_)), "{error}");
    }

    let mut client = Handshake::new().await;
    for _ in 0..MAX_OPTIONS {
        assert_eq!(client.ask(99, b"").await, option_reply::ERR_UNSUP);
    }
    let error = client.end().await.expect_err("too many options");
    assert!(matches!(error, NegotiationError::TooMuch(_)), "{error}");
}

#[tokio::test]
async fn a_client_that_leaves_or_dawdles_ends_the_handshake() {
    let mut client = Handshake::new().await;
    client.peer.send_raw(b"IHAVE").await;
    client.peer.stream.shutdown().await.expect("shut down");
    let error = client.end().await.expect_err("left");
    assert!(matches!(error, NegotiationError::Io(_)), "{error}");

    let limit = Duration::from_millis(20);
    let client = Handshake::with(MemoryDisk::new(SIZE), limit, FIXED).await;
    let error = client.end().await.expect_err("dawdled");
    assert_eq!(error.to_string(), "nbd handshake not finished within 20 ms");

    // Aborting and leaving at once, as old clients do, is no error.
    let mut client = Handshake::new().await;
    client.send(option::ABORT, b"").await;
    drop(client.peer);
    let ended = soon("the handshake", client.server)
        .await
        .expect("no panic");
    assert_eq!(ended.expect("aborted"), Negotiated::Aborted);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Arbitrary options, then a hang-up: no panic, no hang.
    #[test]
    fn survives_anything(
        flags in 0u32..4,
        options in prop::collection::vec(
            (0u32..14, prop::collection::vec(any::<u8>(), 0..40)), 0..8),
        garbage in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let Handshake { mut peer, server } =
                Handshake::with(MemoryDisk::new(SIZE), HANG, flags).await;
            let mut bytes = Vec::new();
            for (option, data) in options {
                let length = u32::try_from(data.len()).expect("short");
                bytes.extend(OptionHeader { option, length }.encode());
                bytes.extend(data);
            }
            bytes.extend(garbage);
            // The server may have left before all was sent.
            if peer.stream.write_all(&bytes).await.is_ok() {
                drop(peer);
            }
            let ended = soon("the handshake", server).await;
            assert!(ended.is_ok(), "the handshake panicked");
        });
    }
}
