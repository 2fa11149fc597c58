//! A small blocking client: one connection, one request at a time.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dysk::emulator::{Config, DEFAULT_ACCOUNT, DEFAULT_KEY, Emulator, Running};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

pub const VERSION: &str = "2023-11-03";

/// An emulator in memory with the container `dysks`.
pub fn memory() -> (Running, Client) {
    let running = Emulator::start(Config::default()).expect("emulator");
    let client = Client::new(running.address());
    client
        .put("dysks?restype=container")
        .send()
        .expect_status(201);
    (running, client)
}

#[derive(Clone)]
pub struct Client {
    pub address: SocketAddr,
    pub account: String,
    pub key: String,
    pub skew: i64,
}

#[derive(Clone)]
pub struct Call {
    client: Client,
    method: &'static str,
    target: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    signed: bool,
    host: Option<String>,
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Client {
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            account: DEFAULT_ACCOUNT.into(),
            key: DEFAULT_KEY.into(),
            skew: 0,
        }
    }

    pub fn call(&self, method: &'static str, target: &str) -> Call {
        Call {
            client: self.clone(),
            method,
            target: format!("/{}/{target}", self.account),
            headers: vec![("x-ms-version".into(), VERSION.into())],
            body: Vec::new(),
            signed: true,
            host: None,
        }
    }

    pub fn put(&self, target: &str) -> Call {
        self.call("PUT", target)
    }

    pub fn get(&self, target: &str) -> Call {
        self.call("GET", target)
    }

    pub fn head(&self, target: &str) -> Call {
        self.call("HEAD", target)
    }

    pub fn delete(&self, target: &str) -> Call {
        self.call("DELETE", target)
    }

    /// A request to the emulator's own interface.
    pub fn admin(&self, method: &'static str, path: &str, body: &str) -> Answer {
        let mut call = self.call(method, "");
        call.target = format!("/-/{path}");
        call.signed = false;
        call.body(body.as_bytes()).send()
    }

    /// Creates a page blob.
    pub fn create(&self, blob: &str, size: u64) -> Answer {
        self.put(&format!("dysks/{blob}"))
            .with("x-ms-blob-type", "PageBlob")
            .with("x-ms-blob-content-length", size)
            .send()
            .expect_status(201)
    }

    /// Put Page, update.
    pub fn page(&self, blob: &str, offset: u64, data: &[u8]) -> Call {
        self.put(&format!("dysks/{blob}?comp=page"))
            .with("x-ms-page-write", "update")
            .range(offset, data.len() as u64)
            .body(data)
    }

    /// Put Page, clear.
    pub fn clear(&self, blob: &str, offset: u64, len: u64) -> Call {
        self.put(&format!("dysks/{blob}?comp=page"))
            .with("x-ms-page-write", "clear")
            .range(offset, len)
    }

    /// The bytes of a range.
    pub fn read(&self, blob: &str, offset: u64, len: u64) -> Vec<u8> {
        let call = self.get(&format!("dysks/{blob}")).range(offset, len);
        call.send().expect_status(206).body
    }

    /// A lease operation.
    pub fn lease(&self, blob: &str, action: &str) -> Call {
        self.put(&format!("dysks/{blob}?comp=lease"))
            .with("x-ms-lease-action", action)
    }

    /// The page ranges as text, such as `0-511 c1024-1535`.
    pub fn ranges(&self, target: &str) -> String {
        let answer = self.get(target).send().expect_status(200);
        compact_ranges(&answer.text())
    }

    /// HMAC-SHA256 under the account key.
    pub fn hmac(&self, text: &str) -> String {
        let key = STANDARD.decode(&self.key).expect("a key in base64");
        let mut mac = Hmac::<Sha256>::new_from_slice(&key).expect("any length");
        mac.update(text.as_bytes());
        STANDARD.encode(mac.finalize().into_bytes())
    }

    pub fn url(&self, target: &str) -> String {
        format!("http://{}/{}/{target}", self.address, self.account)
    }
}

/// `PageRange` as `first-last`, `ClearRange` as `cfirst-last`, then the marker.
pub fn compact_ranges(xml: &str) -> String {
    let mut out = Vec::new();
    for part in xml.split('<') {
        match part.split_once('>') {
            Some(("ClearRange", _)) => out.push("c".to_owned()),
            Some(("PageRange", _)) => out.push(String::new()),
            Some(("Start", value)) => out.last_mut().expect("in a range").push_str(value),
            Some(("End", value)) => {
                let last = out.last_mut().expect("in a range");
                last.push('-');
                last.push_str(value);
            }
            Some(("NextMarker", value)) => out.push(format!("next={value}")),
            _ => {}
        }
    }
    out.join(" ")
}

impl Call {
    #[expect(
        clippy::needless_pass_by_value,
        reason = "literals and numbers at every call"
    )]
    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }

    pub fn range(self, offset: u64, len: u64) -> Self {
        self.with("x-ms-range", format!("bytes={offset}-{}", offset + len - 1))
    }

    pub fn body(mut self, body: &[u8]) -> Self {
        self.body = body.to_vec();
        self
    }

    /// Sends no Authorization header.
    pub fn unsigned(mut self) -> Self {
        self.signed = false;
        self
    }

    pub fn send(&self) -> Answer {
        self.try_send().expect("an answer")
    }

    /// The status and error code.
    pub fn code(&self) -> String {
        let answer = self.send();
        format!("{} {}", answer.status, answer.header("x-ms-error-code"))
            .trim_end()
            .to_owned()
    }

    /// Names the account in the host instead of the path.
    pub fn in_host(&mut self) {
        let account = format!("/{}", self.client.account);
        self.target = self.target[account.len()..].to_owned();
        self.host = Some(format!("{}.blob.localhost", self.client.account));
    }

    /// Sends it and closes the connection without waiting for an answer.
    pub fn send_and_leave(&self) {
        let mut stream = TcpStream::connect(self.client.address).expect("connect");
        self.write(&mut stream).expect("sent");
        // Closing earlier might cut it off.
        let client = &self.client;
        eventually("the request is taken in", || {
            client.admin("GET", "stats", "").text().contains("put-page")
        });
    }

    /// Sends it on a connection of its own.
    pub fn try_send(&self) -> io::Result<Answer> {
        let mut stream = TcpStream::connect(self.client.address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        self.write(&mut stream)?;
        read_answer(&mut BufReader::new(stream), self.method == "HEAD")
    }

    fn write(&self, stream: &mut TcpStream) -> io::Result<()> {
        let mut headers = self.headers.clone();
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("after 1970")
            .as_secs();
        let seconds = i64::try_from(now).expect("fits") + self.client.skew;
        let date = jiff::Timestamp::from_second(seconds).expect("in range");
        headers.push((
            "x-ms-date".into(),
            date.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string(),
        ));
        if self.method != "GET" && self.method != "HEAD" {
            headers.push(("Content-Length".into(), self.body.len().to_string()));
        }
        if self.signed {
            let text = self.string_to_sign(&headers);
            let signature = self.client.hmac(&text);
            let account = &self.client.account;
            headers.push((
                "Authorization".into(),
                format!("SharedKey {account}:{signature}"),
            ));
        }
        let mut head = format!("{} {} HTTP/1.1\r\n", self.method, self.target);
        let host = self.host.clone();
        let host = host.unwrap_or_else(|| self.client.address.to_string());
        head.push_str(&format!("Host: {host}\r\n"));
        for (name, value) in &headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let mut message = head.into_bytes();
        message.extend_from_slice(&self.body);
        stream.write_all(&message)
    }

    fn string_to_sign(&self, headers: &[(String, String)]) -> String {
        let find = |wanted: &str| {
            headers
                .iter()
                .find(|(name, _)| name.eq_ignore_ascii_case(wanted))
                .map_or("", |(_, value)| value.as_str())
        };
        let length = match find("content-length") {
            "0" => "",
            length => length,
        };
        let mut lines = vec![
            self.method.to_owned(),
            find("content-encoding").into(),
            find("content-language").into(),
            length.into(),
            find("content-md5").into(),
            find("content-type").into(),
            String::new(),
            find("if-modified-since").into(),
            find("if-match").into(),
            find("if-none-match").into(),
            find("if-unmodified-since").into(),
            find("range").into(),
        ];
        let mut own: Vec<(String, &str)> = headers
            .iter()
            .map(|(name, value)| (name.to_ascii_lowercase(), value.as_str()))
            .filter(|(name, _)| name.starts_with("x-ms-"))
            .collect();
        own.sort();
        lines.extend(own.iter().map(|(name, value)| format!("{name}:{value}")));
        let (path, query) = self.target.split_once('?').unwrap_or((&self.target, ""));
        lines.push(format!("/{}{path}", self.client.account));
        let mut parameters: Vec<String> = query
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                format!("{}:{}", name.to_ascii_lowercase(), decode(value))
            })
            .collect();
        parameters.sort();
        lines.extend(parameters);
        lines.join("\n")
    }
}

fn decode(text: &str) -> String {
    percent_encoding::percent_decode_str(text)
        .decode_utf8()
        .expect("utf-8")
        .into_owned()
}

fn read_answer(reader: &mut BufReader<TcpStream>, head: bool) -> io::Result<Answer> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let status = line[9..12].parse().map_err(io::Error::other)?;
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            break;
        };
        headers.push((name.to_ascii_lowercase(), value.to_owned()));
    }
    let mut answer = Answer {
        status,
        headers,
        body: Vec::new(),
    };
    let bodiless = head || status == 204 || status == 304;
    if !bodiless {
        let length = answer.header("content-length").parse().unwrap_or(0);
        answer.body = vec![0; length];
        reader.read_exact(&mut answer.body)?;
    }
    Ok(answer)
}

impl Answer {
    /// A header's value, "" when absent.
    pub fn header(&self, wanted: &str) -> &str {
        self.headers
            .iter()
            .find(|(name, _)| name == wanted)
            .map_or("", |(_, value)| value)
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("utf-8")
    }

    #[track_caller]
    pub fn expect_status(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{:?} {}", self.headers, self.text());
        self
    }
}

/// Asks again and again until `what` holds; fails after a generous while.
#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
