//! Listening: who may connect, which paths are taken, how many connections
//! there are, and how all of it ends.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::support::memory_disk::MemoryDisk;
use crate::support::nbd_peer::{Peer, request, soon, until};
use dysk::nbd::server::{BindError, Server, ServerLimits};
use dysk::nbd::transmission::Stop;
use dysk::nbd::wire::handshake::{OptionHeader, option};
use dysk::nbd::wire::request::Command;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;

const NAME: &str = "vol-1";

fn run(server: Server, disk: &Arc<MemoryDisk>) -> (watch::Sender<Stop>, JoinHandle<()>) {
    let (stop, stopped) = watch::channel(Stop::Run);
    let disk = Arc::clone(disk);
    let running = tokio::spawn(async move { server.run(disk, NAME, stopped).await });
    (stop, running)
}

fn disk() -> Arc<MemoryDisk> {
    Arc::new(MemoryDisk::new(1 << 20))
}

/// A client in the transmission phase, by EXPORT_NAME.
async fn connect(path: &Path) -> Peer {
    let stream = UnixStream::connect(path).await.expect("connected");
    let mut peer = Peer { stream };
    peer.receive(18).await;
    let header = OptionHeader {
        option: option::EXPORT_NAME,
        length: 0,
    };
    peer.send_raw(&[&3u32.to_be_bytes()[..], &header.encode()].concat())
        .await;
    peer.receive(10).await;
    peer
}

#[tokio::test]
async fn only_the_user_may_connect_and_the_socket_goes_with_the_server() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("nbd.sock");
    let server = Server::bind_unix(&path).expect("listens");
    let meta = std::fs::metadata(&path).expect("the socket");
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    let (stop, running) = run(server, &disk());
    stop.send_replace(Stop::Close);
    soon("the server", running).await.expect("no panic");
    assert!(!path.exists());
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("nbd.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).expect("bound"));
    assert!(path.exists(), "the socket of a dead server");
    let server = Server::bind_unix(&path).expect("replaces it");

    let error = Server::bind_unix(&path).expect_err("in use");
    assert!(matches!(error, BindError::InUse(_)), "{error}");
    let (stop, running) = run(server, &disk());
    let mut peer = connect(&path).await;
    peer.send(request(Command::Flush, 1, 0, 0), b"").await;
    assert_eq!(peer.simple().await.error, 0);
    stop.send_replace(Stop::Close);
    soon("the server", running).await.expect("no panic");
}

#[tokio::test]
async fn other_files_are_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("precious");
    std::fs::write(&path, "data").expect("written");
    let error = Server::bind_unix(&path).expect_err("no socket");
    assert!(matches!(error, BindError::NotASocket(_)), "{error}");
    assert_eq!(std::fs::read(&path).expect("still there"), b"data");

    let error = Server::bind_unix(folder.path().join("no/such")).expect_err("no folder");
    assert!(matches!(error, BindError::Io { .. }), "{error}");

    // A server whose socket was replaced by another's does not remove that.
    let path = folder.path().join("nbd.sock");
    let first = Server::bind_unix(&path).expect("listens");
    std::fs::remove_file(&path).expect("removed by somebody");
    let second = Server::bind_unix(&path).expect("listens");
    drop(first);
    assert!(path.exists());
    drop(second);
    assert!(!path.exists());
}

#[tokio::test]
async fn connections_are_bounded_and_the_next_is_served_when_one_ends() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("nbd.sock");
    let limits = ServerLimits {
        connections: 2,
        ..ServerLimits::default()
    };
    let server = Server::bind_unix(&path)
        .expect("listens")
        .with_limits(limits);
    let (stop, running) = run(server, &disk());
    let first = connect(&path).await;
    let second = connect(&path).await;
    let mut third = UnixStream::connect(&path).await.expect("in the backlog");
    let greeting = third.read_u64();
    let early = tokio::time::timeout(Duration::from_millis(100), greeting).await;
    assert!(early.is_err(), "a third connection was served");
    drop(first);
    let greeting = soon("the greeting", third.read_u64()).await;
    assert_eq!(greeting.expect("served"), u64::from_be_bytes(*b"NBDMAGIC"));
    stop.send_replace(Stop::Close);
    soon("the server", running).await.expect("no panic");
    drop(second);
}

#[tokio::test]
async fn a_client_that_never_negotiates_is_cut_off() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("nbd.sock");
    let limits = ServerLimits {
        handshake: Duration::from_millis(20),
        ..ServerLimits::default()
    };
    let server = Server::bind_unix(&path)
        .expect("listens")
        .with_limits(limits);
    let (stop, running) = run(server, &disk());
    let stream = UnixStream::connect(&path).await.expect("connected");
    let mut peer = Peer { stream };
    peer.receive(18).await;
    peer.ended().await;
    stop.send_replace(Stop::Close);
    soon("the server", running).await.expect("no panic");
}

#[tokio::test]
async fn stopping_answers_what_runs_on_every_connection() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("nbd.sock");
    let server = Server::bind_unix(&path).expect("listens");
    let disk = Arc::new(MemoryDisk::new(1 << 20).hold(|_| true));
    let (stop, running) = run(server, &disk);
    let mut peers = vec![connect(&path).await, connect(&path).await];
    for (cookie, peer) in (0..).zip(&mut peers) {
        let header = request(Command::Write, cookie, cookie * 512, 512);
        peer.send(header, &[4; 512]).await;
    }
    until("both writes", || disk.running() == 2).await;
    // A client still in its handshake does not hold the server up.
    let _undecided = UnixStream::connect(&path).await.expect("connected");
    stop.send_replace(Stop::Close);
    until("the socket to go", || !path.exists()).await;
    assert!(!running.is_finished(), "stopped with requests running");
    disk.release(2);
    for peer in &mut peers {
        assert_eq!(peer.simple().await.error, 0);
        peer.ended().await;
    }
    soon("the server", running).await.expect("no panic");
    assert_eq!(disk.contents(0, 1024), [4; 1024]);
}

#[tokio::test]
async fn the_uri_escapes_what_has_to_be() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a b&c.sock");
    let server = Server::bind_unix(&path).expect("listens");
    let uri = server.uri("acct/vol 1");
    let folder = folder.path().display();
    assert_eq!(
        uri,
        format!("nbd+unix:///acct%2Fvol%201?socket={folder}/a%20b%26c.sock")
    );
    assert_eq!(server.tcp_address(), None);
    let tcp = Server::bind_tcp("127.0.0.1:0".parse().expect("an address")).await;
    let tcp = tcp.expect("listens");
    let address = tcp.tcp_address().expect("a tcp server");
    assert_eq!(tcp.uri("v"), format!("nbd://{address}/v"));
}
