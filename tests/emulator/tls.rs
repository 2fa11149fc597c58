//! HTTPS, with a certificate made for these tests alone.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

use dysk::emulator::{Config, DEFAULT_ACCOUNT, Emulator, SettingsChange, TlsFiles};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

fn files() -> TlsFiles {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator/tls");
    TlsFiles {
        cert: dir.join("cert.pem"),
        key: dir.join("key.pem"),
    }
}

#[test]
fn it_serves_https_and_knows_that_it_does() {
    let files = files();
    let mut roots = rustls::RootCertStore::empty();
    let cert = CertificateDer::from_pem_file(&files.cert).expect("certificate");
    roots.add(cert).expect("a root");
    let config = Config {
        tls: Some(files),
        ..Config::default()
    };
    let running = Emulator::start(config).expect("emulator");
    assert!(running.url().starts_with("https://"), "{}", running.url());
    let change = SettingsChange {
        https_required: Some(true),
        ..SettingsChange::default()
    };
    running.change(&change).expect("no key in it");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = "localhost".try_into().expect("a name");
    let mut session = rustls::ClientConnection::new(Arc::new(client), name).expect("session");
    let mut socket = TcpStream::connect(running.address()).expect("connect");
    let mut stream = rustls::Stream::new(&mut session, &mut socket);
    let request = format!(
        "GET /{DEFAULT_ACCOUNT}/dysks/a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).expect("sent");
    let mut answer = String::new();
    // The service may close without a TLS farewell once it has answered.
    stream.read_to_string(&mut answer).unwrap_or_default();
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    assert!(answer.contains("NoAuthenticationInformation"), "{answer}");
}

#[test]
fn a_missing_certificate_is_named() {
    let config = Config {
        tls: Some(TlsFiles {
            cert: "/nowhere/cert.pem".into(),
            key: files().key,
        }),
        ..Config::default()
    };
    let error = Emulator::start(config)
        .expect_err("no certificate")
        .to_string();
    assert!(error.contains("/nowhere/cert.pem"), "{error}");
}
