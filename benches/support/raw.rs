//! A raw client: one signed request at a time on a connection that stays, and
//! nothing else. What it reaches is the ceiling for everybody else.

use std::net::SocketAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dysk::emulator::{DEFAULT_ACCOUNT, DEFAULT_KEY};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A signed request, head and body in one; it may be repeated for 15 minutes.
pub fn request(method: &str, target: &str, headers: &[(&str, String)], body: &[u8]) -> Vec<u8> {
    let date = jiff::Timestamp::now()
        .strftime("%a, %d %b %Y %H:%M:%S GMT")
        .to_string();
    let mut own: Vec<(&str, String)> = headers.to_vec();
    own.extend([("x-ms-date", date), ("x-ms-version", "2023-11-03".into())]);
    own.sort();
    let length = match body.len() {
        0 => String::new(),
        length => length.to_string(),
    };
    let mut text = format!("{method}\n\n\n{length}\n\n\n\n\n\n\n\n\n");
    for (name, value) in &own {
        text.push_str(&format!("{name}:{value}\n"));
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    text.push_str(&format!("/{DEFAULT_ACCOUNT}/{DEFAULT_ACCOUNT}/{path}"));
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        text.push_str(&format!("\n{}", pair.replace('=', ":")));
    }
    let key = STANDARD.decode(DEFAULT_KEY).expect("base64");
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).expect("any length");
    mac.update(text.as_bytes());
    let signature = STANDARD.encode(mac.finalize().into_bytes());
    let mut head = format!("{method} /{DEFAULT_ACCOUNT}/{target} HTTP/1.1\r\nHost: localhost\r\n");
    for (name, value) in &own {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if method == "PUT" {
        head.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    head.push_str(&format!(
        "Authorization: SharedKey {DEFAULT_ACCOUNT}:{signature}\r\n\r\n"
    ));
    [head.as_bytes(), body].concat()
}

/// A connection that stays.
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    pub async fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.expect("connect");
        stream.set_nodelay(true).expect("nodelay");
        let buffer = vec![0; 1 << 20];
        Self { stream, buffer }
    }

    /// Sends and reads the answer whole; gives the length of its body.
    pub async fn call(&mut self, request: &[u8]) -> usize {
        self.stream.write_all(request).await.expect("write");
        let mut filled = 0;
        let (head, length) = loop {
            let read = self
                .stream
                .read(&mut self.buffer[filled..])
                .await
                .expect("read");
            assert!(read > 0, "the connection was closed");
            filled += read;
            let seen = &self.buffer[..filled];
            if let Some(end) = seen.windows(4).position(|window| window == b"\r\n\r\n") {
                let head = std::str::from_utf8(&seen[..end]).expect("ascii");
                assert_eq!(&head[9..10], "2", "{head}");
                let length = head.split("\r\n").find_map(|line| {
                    let value = line.strip_prefix("content-length: ")?;
                    value.parse::<usize>().ok()
                });
                break (end + 4, length.unwrap_or(0));
            }
        };
        let mut left = (head + length) - filled;
        while left > 0 {
            let want = left.min(self.buffer.len());
            let read = self
                .stream
                .read(&mut self.buffer[..want])
                .await
                .expect("read");
            assert!(read > 0, "the connection was closed");
            left -= read;
        }
        length
    }
}
