//! What the client makes of a store that misbehaves on the wire: each outcome
//! must be judged right, and the next request must find a working connection.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use dysk::blob::{
    Account, AccountConfig, Advice, Checksum, Conditions, Credential, Effect, Failure, PageBlob,
    Range, RangeRead, SharedKey, StorageError, Written,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;

/// Long enough never to pass in these tests.
const LONG: Duration = Duration::from_secs(60);
/// Short, for attempts that must run into it.
const SHORT: Duration = Duration::from_millis(300);

const CREATED: &str = "HTTP/1.1 201 Created\r\nETag: \"1\"\r\n\
    x-ms-blob-sequence-number: 3\r\nContent-Length: 0\r\n\r\n";

/// A store of the test's own, on 127.0.0.1.
struct Peer {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
}

impl Peer {
    /// Handles each connection, numbered from 0, by `script`.
    async fn start<F>(script: impl Fn(usize, TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its address");
        let connections = Arc::new(AtomicUsize::new(0));
        let count = connections.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.expect("a connection");
                tokio::spawn(script(count.fetch_add(1, Ordering::SeqCst), stream));
            }
        });
        Self {
            address,
            connections,
        }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    fn blob(&self, max_connections: usize) -> PageBlob {
        blob(&format!("http://{}", self.address), max_connections)
    }
}

fn blob(endpoint: &str, max_connections: usize) -> PageBlob {
    let account = Account::new(AccountConfig {
        name: "acct".into(),
        endpoint: endpoint.into(),
        credential: Credential::SharedKey(SharedKey::from_base64("a2V5").expect("a key")),
        ca_file: None,
        connect_timeout: Duration::from_secs(10),
        max_connections,
        idle_timeout: LONG,
    })
    .expect("a configuration");
    account.page_blob("dysks", "vol1.vhd")
}

/// Reads one request, body included; `None` when the client has closed.
async fn request(stream: &mut TcpStream) -> Option<String> {
    let head = head(stream).await?;
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .map_or(0, |text| text.parse().expect("a length"));
    stream.read_exact(&mut vec![0; length]).await.ok()?;
    Some(head)
}

/// Reads the head of a request and not a byte more.
async fn head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    Some(String::from_utf8(head).expect("text"))
}

async fn say(stream: &mut TcpStream, text: impl AsRef<[u8]>) {
    stream.write_all(text.as_ref()).await.expect("written");
}

/// Answers every request of the connection with `answer`.
async fn answer_all(mut stream: TcpStream, answer: impl AsRef<[u8]>) {
    while request(&mut stream).await.is_some() {
        say(&mut stream, &answer).await;
    }
}

/// Waits until the client has closed the connection.
async fn closed(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    // A reset is a close too.
    if let Err(error) = stream.read_to_end(&mut rest).await {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
}

async fn put(blob: &PageBlob, len: usize, deadline: Duration) -> Result<Written, StorageError> {
    let data = Bytes::from(vec![7; len]);
    blob.put_page(0, data, Checksum::Off, &Conditions::default(), deadline)
        .await
}

async fn get(blob: &PageBlob, checksum: Checksum) -> Result<RangeRead, StorageError> {
    blob.get_range(Range::at(512, 512), checksum, &Conditions::default(), LONG)
        .await
}

fn assert_unknown(error: &StorageError) {
    assert_eq!(error.effect(), Effect::Unknown, "{error}");
    assert_eq!(error.advice(), Advice::Retry, "{error}");
}

#[tokio::test]
async fn a_close_before_the_answer_leaves_the_outcome_unknown() {
    let peer = Peer::start(|n, mut stream| async move {
        if n > 0 {
            return answer_all(stream, CREATED).await;
        }
        request(&mut stream).await;
    })
    .await;
    let blob = peer.blob(1);
    let error = put(&blob, 4096, LONG).await.expect_err("no answer");
    assert_eq!(error.failure, Failure::Broken { written: true }, "{error}");
    assert_unknown(&error);
    assert!(
        error.to_string().contains(&peer.address.to_string()),
        "{error}"
    );
    put(&blob, 4096, LONG).await.expect("a new connection");
    assert_eq!(peer.connections(), 2);
}

#[tokio::test]
async fn a_reset_amid_the_body_leaves_the_outcome_unknown() {
    let peer = Peer::start(|n, mut stream| async move {
        if n > 0 {
            return answer_all(stream, CREATED).await;
        }
        head(&mut stream).await;
        // Closed with the body unread, this is a reset.
    })
    .await;
    let blob = peer.blob(1);
    let error = put(&blob, 4 << 20, LONG).await.expect_err("no answer");
    assert_eq!(error.failure, Failure::Broken { written: true }, "{error}");
    assert_unknown(&error);
    put(&blob, 4096, LONG).await.expect("a new connection");
}

#[tokio::test]
async fn garbage_leaves_the_outcome_unknown() {
    for garbage in ["220 smtp ready\r\n\r\n", "\0\0\0\0", "HTTP/1.1 2"] {
        let peer = Peer::start(move |n, mut stream| async move {
            if n > 0 {
                return answer_all(stream, CREATED).await;
            }
            request(&mut stream).await;
            say(&mut stream, garbage).await;
        })
        .await;
        let blob = peer.blob(1);
        let error = put(&blob, 4096, LONG).await.expect_err("no answer");
        assert_eq!(error.failure, Failure::Broken { written: true }, "{error}");
        assert_unknown(&error);
        put(&blob, 4096, LONG).await.expect("a new connection");
    }
}

#[tokio::test]
async fn a_stall_runs_into_the_deadline_and_the_connection_is_closed() {
    let (sender, mut gone) = mpsc::channel(1);
    let peer = Peer::start(move |n, mut stream| {
        let sender = sender.clone();
        async move {
            if n > 0 {
                return answer_all(stream, CREATED).await;
            }
            request(&mut stream).await;
            closed(&mut stream).await;
            sender.send(()).await.expect("the test waits");
        }
    })
    .await;
    let blob = peer.blob(1);
    let error = put(&blob, 4096, SHORT).await.expect_err("no answer");
    assert_eq!(
        error.failure,
        Failure::Deadline { written: true },
        "{error}"
    );
    assert_unknown(&error);
    gone.recv()
        .await
        .expect("the peer saw the connection close");
    put(&blob, 4096, LONG).await.expect("a new connection");
}

#[tokio::test]
async fn a_wait_for_the_pool_has_written_nothing() {
    let peer = Peer::start(|_, mut stream| async move {
        request(&mut stream).await;
        closed(&mut stream).await;
    })
    .await;
    let blob = peer.blob(1);
    let holder = tokio::spawn({
        let blob = blob.clone();
        async move { put(&blob, 512, LONG).await }
    });
    while peer.connections() == 0 {
        tokio::task::yield_now().await;
    }
    let error = put(&blob, 512, SHORT).await.expect_err("no connection");
    assert_eq!(
        error.failure,
        Failure::Deadline { written: false },
        "{error}"
    );
    assert_eq!(error.effect(), Effect::NotApplied);
    assert!(error.to_string().contains("pool"), "{error}");
    // An isolated handle has connections of its own.
    let isolated = blob.account().isolated(1).page_blob("dysks", "vol1.vhd");
    let error = put(&isolated, 512, SHORT).await.expect_err("a stall");
    assert_eq!(
        error.failure,
        Failure::Deadline { written: true },
        "{error}"
    );
    holder.abort();
}

#[tokio::test]
async fn an_early_refusal_is_reported_though_the_body_was_not_read() {
    let busy = "HTTP/1.1 503 Busy\r\nx-ms-error-code: ServerBusy\r\nRetry-After: 7\r\n\
        Connection: close\r\nContent-Length: 0\r\n\r\n";
    let peer = Peer::start(move |_, mut stream| async move {
        if head(&mut stream).await.is_some() {
            say(&mut stream, busy).await;
        }
        // Closed with the body unread: our writes fail and the answer is
        // followed by a reset.
    })
    .await;
    let blob = peer.blob(2);
    for _ in 0..50 {
        let error = put(&blob, 4 << 20, LONG).await.expect_err("busy");
        assert_eq!(
            (error.status(), error.code()),
            (Some(503), "ServerBusy"),
            "{error}"
        );
        assert_eq!(error.effect(), Effect::NotApplied);
        assert_eq!(error.advice(), Advice::SlowDown);
        assert_eq!(error.retry_after, Some(Duration::from_secs(7)));
    }
}

#[tokio::test]
async fn a_connection_with_an_unfinished_request_is_not_used_again() {
    let busy = "HTTP/1.1 503 Busy\r\nx-ms-error-code: ServerBusy\r\nContent-Length: 0\r\n\r\n";
    let peer = Peer::start(move |n, mut stream| async move {
        if n > 0 {
            return answer_all(stream, CREATED).await;
        }
        head(&mut stream).await;
        say(&mut stream, busy).await;
        // Stays open, never reads the body.
        std::future::pending::<()>().await;
    })
    .await;
    let blob = peer.blob(1);
    let error = put(&blob, 4 << 20, LONG).await.expect_err("busy");
    assert_eq!(error.status(), Some(503), "{error}");
    put(&blob, 4096, LONG).await.expect("a new connection");
    assert_eq!(peer.connections(), 2);
}

#[tokio::test]
async fn a_server_error_leaves_the_outcome_unknown() {
    for (status, advice) in [("500 Oops", Advice::Retry), ("504 Late", Advice::Retry)] {
        let peer = Peer::start(move |_, stream| {
            answer_all(
                stream,
                format!("HTTP/1.1 {status}\r\nContent-Length: 3\r\n\r\noh!"),
            )
        })
        .await;
        let blob = peer.blob(1);
        for _ in 0..2 {
            let error = put(&blob, 512, LONG).await.expect_err(status);
            assert_eq!((error.effect(), error.advice()), (Effect::Unknown, advice));
        }
        assert_eq!(peer.connections(), 1, "a whole answer keeps the connection");
    }
}

#[tokio::test]
async fn a_connection_closed_while_idle_is_replaced_unnoticed() {
    for reset in [false, true] {
        let (sender, mut gone) = mpsc::channel(1);
        let answered = Arc::new(Notify::new());
        let cut = answered.clone();
        let peer = Peer::start(move |_, mut stream| {
            let (sender, cut) = (sender.clone(), cut.clone());
            async move {
                request(&mut stream).await;
                say(&mut stream, CREATED).await;
                if reset {
                    stream.set_zero_linger().expect("a socket option");
                }
                // Not before the answer was read: a reset would destroy it.
                cut.notified().await;
                drop(stream);
                sender.send(()).await.expect("the test waits");
            }
        })
        .await;
        let blob = peer.blob(1);
        for n in 1..=20 {
            put(&blob, 512, LONG).await.expect("a new connection");
            answered.notify_one();
            gone.recv().await.expect("the peer closed it");
            assert_eq!(peer.connections(), n);
        }
    }
}

#[tokio::test]
async fn a_connection_closed_under_a_request_is_not_retried_in_secret() {
    let requests = Arc::new(AtomicUsize::new(0));
    let seen = requests.clone();
    let peer = Peer::start(move |_, mut stream| {
        let seen = seen.clone();
        async move {
            let mut first = true;
            while request(&mut stream).await.is_some() {
                seen.fetch_add(1, Ordering::SeqCst);
                if !std::mem::take(&mut first) {
                    return;
                }
                say(&mut stream, CREATED).await;
            }
        }
    })
    .await;
    let blob = peer.blob(1);
    put(&blob, 512, LONG).await.expect("written");
    let error = put(&blob, 512, LONG).await.expect_err("no answer");
    assert_unknown(&error);
    assert_eq!(requests.load(Ordering::SeqCst), 2);
    assert_eq!(peer.connections(), 1);
}

#[tokio::test]
async fn an_answer_nobody_asked_for_is_never_taken() {
    let peer = Peer::start(|n, mut stream| async move {
        if n > 0 {
            return answer_all(stream, CREATED.replace("\"1\"", "\"right\"")).await;
        }
        request(&mut stream).await;
        let extra = CREATED.replace("\"1\"", "\"wrong\"");
        say(&mut stream, format!("{CREATED}{extra}")).await;
        std::future::pending::<()>().await;
    })
    .await;
    let blob = peer.blob(1);
    assert_eq!(
        put(&blob, 512, LONG).await.expect("written").etag.0,
        "\"1\""
    );
    let second = put(&blob, 512, LONG).await.expect("written");
    assert_eq!(second.etag.0, "\"right\"");
}

#[tokio::test]
async fn a_dropped_attempt_leaves_no_answer_behind() {
    let (sender, mut received) = mpsc::channel(1);
    let peer = Peer::start(move |n, mut stream| {
        let sender = sender.clone();
        async move {
            if n > 0 {
                return answer_all(stream, CREATED.replace("\"1\"", "\"right\"")).await;
            }
            request(&mut stream).await;
            sender.send(()).await.expect("the test waits");
            closed(&mut stream).await;
            sender.send(()).await.expect("the test waits");
        }
    })
    .await;
    let blob = peer.blob(1);
    tokio::select! {
        result = put(&blob, 512, LONG) => panic!("{result:?}"),
        _ = received.recv() => {}
    }
    timeout(LONG, received.recv())
        .await
        .expect("the socket is closed with the future");
    let written = put(&blob, 512, LONG).await.expect("written");
    assert_eq!(written.etag.0, "\"right\"");
}

#[tokio::test]
async fn the_bound_on_connections_holds_and_they_are_reused() {
    let peer = Peer::start(|_, stream| answer_all(stream, CREATED)).await;
    let blob = peer.blob(3);
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..60 {
        let blob = blob.clone();
        tasks.spawn(async move { put(&blob, 4096, LONG).await });
    }
    while let Some(result) = tasks.join_next().await {
        result.expect("no panic").expect("written");
    }
    for _ in 0..20 {
        put(&blob, 4096, LONG).await.expect("written");
    }
    assert!(peer.connections() <= 3, "{}", peer.connections());
}

#[tokio::test]
async fn reads_are_exactly_what_was_asked_for() {
    let half = "x".repeat(256);
    let page = "x".repeat(512);
    let partial = |range: &str, more: &str, length: usize, body: &str| {
        format!(
            "HTTP/1.1 206 Partial\r\nETag: \"1\"\r\n{range}{more}Content-Length: {length}\r\n\r\n{body}"
        )
    };
    let right = "Content-Range: bytes 512-1023/4096\r\n";
    for (answer, checksum, words) in [
        (partial(right, "", 512, &half), Checksum::Off, "end of file"),
        (
            partial(right, "", 256, &half),
            Checksum::Off,
            "256 bytes where 512",
        ),
        (partial("", "", 512, &page), Checksum::Off, "content-range"),
        (
            partial("Content-Range: bytes 0-511/4096\r\n", "", 512, &page),
            Checksum::Off,
            "range 0+512",
        ),
        (
            partial(right, "", 512, &page).replace("206 Partial", "200 OK"),
            Checksum::Off,
            "200 in place of 206",
        ),
        (
            partial(right, "", 512, &page).replace("ETag", "X-Tag"),
            Checksum::Off,
            "etag",
        ),
        (
            partial(right, "", 512, &page),
            Checksum::Md5,
            "lacks the header content-md5",
        ),
        (
            partial(right, "", 512, &page),
            Checksum::Crc64,
            "lacks the header x-ms-content-crc64",
        ),
        (
            partial(
                right,
                "Content-MD5: 1B2M2Y8AsgTpgAmY7PhCfg==\r\n",
                512,
                &page,
            ),
            Checksum::Md5,
            "data received gives",
        ),
        (
            partial(right, "x-ms-content-crc64: AAAAAAAAAAA=\r\n", 512, &page),
            Checksum::Crc64,
            "data received gives",
        ),
    ] {
        let good = partial(right, "", 512, &page);
        let peer = Peer::start(move |n, mut stream| {
            let answer = if n == 0 { answer.clone() } else { good.clone() };
            async move {
                request(&mut stream).await;
                say(&mut stream, answer).await;
            }
        })
        .await;
        let blob = peer.blob(1);
        let error = get(&blob, checksum).await.expect_err(words);
        assert_eq!(error.failure, Failure::BadAnswer, "{error}");
        assert!(error.to_string().contains(words), "{words}: {error}");
        assert_eq!(error.advice(), Advice::Retry);
        let read = get(&blob, Checksum::Off).await.expect("a good answer");
        assert_eq!(
            (read.pieces.concat(), read.blob_size),
            (page.clone().into(), 4096)
        );
    }
}

#[tokio::test]
async fn a_write_that_was_answered_took_effect_whatever_follows() {
    let peer = Peer::start(|_, mut stream| async move {
        request(&mut stream).await;
        let answer = CREATED.replace("Content-Length: 0", "Content-Length: 9");
        say(&mut stream, format!("{answer}half")).await;
    })
    .await;
    let error = put(&peer.blob(1), 512, LONG)
        .await
        .expect_err("half a body");
    assert_eq!(error.effect(), Effect::Applied, "{error}");
}

#[tokio::test]
async fn refusals_come_with_their_remedies() {
    let document = |code: &str| {
        format!(
            "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>sig=secret</Message></Error>"
        )
    };
    for (status, code, date, advice, words) in [
        (
            403,
            "AuthenticationFailed",
            "Sun, 06 Nov 1994 08:49:37 GMT",
            Advice::Reauthenticate,
            "clock",
        ),
        (
            403,
            "AuthenticationFailed",
            "",
            Advice::Reauthenticate,
            "acct's keys",
        ),
        (
            403,
            "KeyBasedAuthenticationNotPermitted",
            "",
            Advice::GiveUp,
            "shared key access disabled",
        ),
        (
            403,
            "AuthorizationFailure",
            "",
            Advice::GiveUp,
            "resolved to 127.0.0.1",
        ),
        (
            400,
            "AccountRequiresHttps",
            "",
            Advice::GiveUp,
            "use an https endpoint",
        ),
        (
            409,
            "InvalidBlobType",
            "",
            Advice::GiveUp,
            "not a page blob",
        ),
        (
            404,
            "ContainerNotFound",
            "",
            Advice::GiveUp,
            "no container dysks",
        ),
    ] {
        // The code is found in the body where the header is missing.
        for in_header in [true, false] {
            let header = if in_header {
                format!("x-ms-error-code: {code}\r\n")
            } else {
                String::new()
            };
            let date = if date.is_empty() {
                String::new()
            } else {
                format!("Date: {date}\r\n")
            };
            let body = document(code);
            let answer = format!(
                "HTTP/1.1 {status} No\r\n{header}{date}x-ms-request-id: id-1\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            let peer = Peer::start(move |_, stream| answer_all(stream, answer.clone())).await;
            let error = put(&peer.blob(1), 512, LONG).await.expect_err(code);
            assert_eq!((error.status(), error.code()), (Some(status), code));
            assert_eq!(
                (error.advice(), error.effect()),
                (advice, Effect::NotApplied)
            );
            assert_eq!(error.request_id.as_deref(), Some("id-1"));
            let text = error.to_string();
            assert!(text.contains(words), "{words}: {text}");
            assert!(
                text.contains("acct/dysks/vol1.vhd") && !text.contains("secret"),
                "{text}"
            );
            assert!(!text.contains('\n'), "{text}");
        }
    }
}

#[tokio::test]
async fn failures_to_connect_are_told_apart() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("its address");
    drop(listener);
    let refused = put(&blob(&format!("http://{address}"), 1), 512, LONG).await;
    let unknown = put(&blob("http://acct.blob.invalid", 1), 512, LONG).await;
    let plain = Peer::start(|_, mut stream| async move {
        let mut byte = [0];
        stream.read_exact(&mut byte).await.expect("a hello");
        say(&mut stream, "HTTP/1.1 400 Bad Request\r\n\r\n").await;
        closed(&mut stream).await;
    })
    .await;
    let tls = put(&blob(&format!("https://{}", plain.address), 1), 512, LONG).await;
    for (result, failure, words) in [
        (refused, Failure::Connect, address.to_string()),
        (unknown, Failure::Dns, "acct.blob.invalid".to_owned()),
        (tls, Failure::Tls, "does not speak TLS".to_owned()),
    ] {
        let error = result.expect_err("no connection");
        assert_eq!(error.failure, failure, "{error}");
        assert!(error.to_string().contains(&words), "{error}");
        assert_eq!(error.effect(), Effect::NotApplied);
        assert_eq!(error.advice(), Advice::Retry);
    }
}
