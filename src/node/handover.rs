//! A running daemon hands its devices to a new one, over a socket in the run
//! directory.
//!
//! | step | the old one | the new one |
//! |---|---|---|
//! | 1 | | connects and says `Hello` |
//! | 2 | refuses attaches and detaches; parks each device: requests taken are answered, no more are read; lets go of staging files | |
//! | 3 | sends each attachment's id, sockets and unread bytes; `End` | |
//! | 4 | | opens each volume again under its lease, which raises the fence; `Ready` |
//! | 5 | `Go`, and ends at once, releasing nothing | |
//! | 6 | | claims the run directory, goes on where the old one stopped |
//!
//! Until it has sent `Go` the old one can go on by itself, and does when the
//! new one fails, dies or dawdles. After it, the old one does nothing more.
//! The new one serves only after `Go`: should the old one die before that,
//! nobody knows how far it had read, and the new one treats it as a crash. So
//! at no time do two read from one socket. Nor do two write back what is
//! staged: the new one begins with it after `Go`, and the old one, should it go
//! on, first takes the file back, whose lock it gets only when the new one has
//! let go of it or is dead. What cannot be parked in time,
//! because the store does not answer, is not sent and taken up as after a
//! crash, once the old one has ended.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
    accept_with, bind, connect, listen, recvmsg, sendmsg, socket_with, sockopt,
};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::entry::{Entry, Phase};
use super::policy::Staging;
use super::record::Record;
use super::recover::{Inherited, open_again};
use super::registry::Registry;
use super::transport::Parked;
use crate::blob::retry::Backoff;
use crate::volume::Volume;

/// The socket's name within the run directory.
const SOCKET: &str = "handover.sock";
/// The format of the messages.
const FORMAT: u32 = 1;
/// How long a device may take to answer what it has taken, and how long if the
/// store answers, however slowly: a connection that is not handed over costs its
/// disk the replay threshold. Twice that is less than [`PEER_PATIENCE`].
const PARK_PATIENCE: Duration = Duration::from_secs(2);
const PARK_AT_MOST: Duration = Duration::from_secs(4);
/// How long a resize or snapshot that is under way may take to end.
const CHANGE_PATIENCE: Duration = Duration::from_secs(5);
/// How long either side waits for the other. The devices wait too.
const PEER_PATIENCE: Duration = Duration::from_secs(10);
/// Between two attempts at a staging file that is not free yet.
const PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Most bytes of a message; each is a datagram.
const MAX_MESSAGE: usize = 4096;
/// Most descriptors of a message: the kernel takes 253.
const MAX_FDS: usize = 64;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Message {
    Hello {
        format: u32,
    },
    /// With one descriptor for each socket and a last one, a file with all
    /// their unread bytes; `unread` says how many are whose.
    Attachment {
        id: String,
        unread: Vec<u64>,
    },
    End,
    Ready,
    Go,
    Refused {
        reason: String,
    },
}

/// A connection between the two.
struct Peer(OwnedFd);

impl Peer {
    fn new(socket: OwnedFd) -> io::Result<Self> {
        for timeout in [sockopt::Timeout::Recv, sockopt::Timeout::Send] {
            sockopt::set_socket_timeout(&socket, timeout, Some(PEER_PATIENCE))?;
        }
        Ok(Self(socket))
    }

    fn send(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("too many connections for one message"));
        }
        sendmsg(
            &self.0,
            &[IoSlice::new(&text)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }

    /// The next message; `UnexpectedEof` when the peer is gone.
    fn receive(&self) -> io::Result<(Message, Vec<OwnedFd>)> {
        let mut text = [0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            recvmsg(
                &self.0,
                &mut [IoSliceMut::new(&mut text)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )
        })?;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok((serde_json::from_slice(&text[..received.bytes])?, fds))
    }

    fn send_attachment(&self, id: &str, parked: &[Parked]) -> io::Result<()> {
        let mut unread = File::from(memfd_create("unread", MemfdFlags::CLOEXEC)?);
        for connection in parked {
            unread.write_all(&connection.unread)?;
        }
        let message = Message::Attachment {
            id: id.to_owned(),
            unread: parked.iter().map(|p| p.unread.len() as u64).collect(),
        };
        let mut fds: Vec<_> = parked.iter().map(|p| p.socket.as_fd()).collect();
        fds.push(unread.as_fd());
        self.send(&message, &fds)
    }
}

fn parked(unread: &[u64], mut fds: Vec<OwnedFd>) -> io::Result<Vec<Parked>> {
    let wrong = || io::Error::other("descriptors do not fit the message");
    let mut file = File::from(fds.pop().ok_or_else(wrong)?);
    file.seek(SeekFrom::Start(0))?;
    if fds.len() != unread.len() {
        return Err(wrong());
    }
    let mut connections = Vec::new();
    for (socket, length) in fds.into_iter().zip(unread) {
        let mut bytes = Vec::new();
        Read::by_ref(&mut file)
            .take(*length)
            .read_to_end(&mut bytes)?;
        if bytes.len() as u64 != *length {
            return Err(wrong());
        }
        connections.push(Parked {
            socket,
            unread: Bytes::from(bytes),
        });
    }
    Ok(connections)
}

// The old daemon's side.

/// Listens for a new daemon, in a thread of its own. The receiver hears when
/// everything was handed over: this process has to end then, without touching
/// anything.
pub(super) fn offer(run_dir: &Path, registry: Registry) -> io::Result<oneshot::Receiver<()>> {
    let path = run_dir.join(SOCKET);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // The directory is 0700: whoever comes may do this.
    let listener = new_socket()?;
    bind(&listener, &SocketAddrUnix::new(&path)?)?;
    listen(&listener, 1)?;
    let (gone, handed_over) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    std::thread::Builder::new()
        .name("dysk-handover".into())
        .spawn(move || {
            loop {
                let done = accept_with(&listener, SocketFlags::CLOEXEC)
                    .map_err(io::Error::from)
                    .and_then(Peer::new)
                    .and_then(|peer| hand_over(&peer, &registry, &runtime));
                match done {
                    // Without a receiver the daemon is ending already.
                    Ok(()) => return gone.send(()).unwrap_or_default(),
                    Err(error) => {
                        tracing::error!(%error, "not handed over: going on");
                        registry.set_handing_over(false);
                    }
                }
            }
        })?;
    Ok(handed_over)
}

fn hand_over(peer: &Peer, registry: &Registry, runtime: &tokio::runtime::Handle) -> io::Result<()> {
    match peer.receive()?.0 {
        Message::Hello { format: FORMAT } => {}
        other => {
            let reason = format!("{other:?} is not understood by this dyskd");
            peer.send(
                &Message::Refused {
                    reason: reason.clone(),
                },
                &[],
            )?;
            return Err(io::Error::other(reason));
        }
    }
    tracing::info!("handing over to a new dyskd");
    registry.set_handing_over(true);
    runtime.block_on(changes_end(registry))?;
    let entries = registry.entries();
    let devices: Vec<_> = entries.iter().filter_map(served).collect();
    let parked = runtime.block_on(async {
        let parked = park_all(&entries).await?;
        // A staging file has one owner at a time.
        for (id, _) in &parked {
            if let Some((.., volume)) = devices.iter().find(|device| device.0 == *id) {
                volume.let_go().await?;
            }
        }
        Ok(parked)
    });
    let done = parked.and_then(|parked| {
        for (id, connections) in &parked {
            peer.send_attachment(id, connections)?;
        }
        peer.send(&Message::End, &[])?;
        match peer.receive()?.0 {
            Message::Ready => peer.send(&Message::Go, &[]),
            other => Err(io::Error::other(format!("the new dyskd said {other:?}"))),
        }
    });
    if done.is_err() {
        // A new one that hangs reads it here and gives up its files.
        rustix::net::shutdown(&peer.0, Shutdown::Both).ok();
        for (_, device, volume) in devices {
            runtime.block_on(take_back(&volume));
            device.go_on();
        }
        return done;
    }
    for (_, _, volume) in devices {
        // Its end would release the lease, which is the new one's by now.
        std::mem::forget(volume);
    }
    tracing::info!("handed over");
    Ok(())
}

/// Waits until nothing is being resized: the kernel takes a size once it has
/// its answers, which it would not get from parked connections.
async fn changes_end(registry: &Registry) -> io::Result<()> {
    let ended = registry.wait_until(|table| table.changes == 0);
    tokio::time::timeout(CHANGE_PATIENCE, ended)
        .await
        .map_err(|_| io::Error::other("a disk is being resized: try again"))
}

/// The staging file is ours again once the new daemon has let go of it, as it
/// does when it fails or dies.
async fn take_back(volume: &Arc<Volume>) {
    let mut backoff = Backoff::new(PAUSE, LONGEST_PAUSE);
    while let Err(error) = volume.take_back().await {
        tracing::warn!(%error, "the staging file is not ours again yet: i/o waits");
        tokio::time::sleep(backoff.pause(None)).await;
    }
}

pub(super) type Served = (String, Arc<dyn super::transport::Device>, Arc<Volume>);

pub(super) fn served(entry: &Entry) -> Option<Served> {
    let Phase::Attached(parts) = &entry.phase else {
        return None;
    };
    Some((
        entry.id.clone(),
        parts.device.clone()?,
        parts.volume.clone()?,
    ))
}

/// Parks every device. Refused while anything is on its way in or out.
async fn park_all(entries: &[Entry]) -> io::Result<Vec<(String, Vec<Parked>)>> {
    if let Some(busy) = entries.iter().find(|e| {
        matches!(
            e.phase,
            Phase::Attaching { .. } | Phase::Recovering(_) | Phase::Detaching(_)
        )
    }) {
        let name = &busy.request.name;
        return Err(io::Error::other(format!("{name} is on its way: try again")));
    }
    park(entries).await
}

/// Parks what is served of `entries`; what the store keeps busy for too long
/// is left out. What stands still already goes first, so that the others do not
/// stand still for as long as that takes.
pub(super) async fn park(entries: &[Entry]) -> io::Result<Vec<(String, Vec<Parked>)>> {
    let served = entries.iter().filter_map(served);
    let (stuck, moving): (Vec<_>, Vec<_>) =
        served.partition(|(.., volume)| volume.is_stuck(PARK_PATIENCE));
    let mut parked = park_at_once(stuck).await?;
    parked.extend(park_at_once(moving).await?);
    Ok(parked)
}

async fn park_at_once(served: Vec<Served>) -> io::Result<Vec<(String, Vec<Parked>)>> {
    let mut parking = JoinSet::new();
    for (id, device, volume) in served {
        parking.spawn(async move {
            let park = async {
                let parked = device.park().await;
                // What connections that broke left behind must end as well.
                volume.idle().await;
                parked
            };
            let parked = patiently(park, volume.stuck(PARK_PATIENCE)).await;
            (id, parked)
        });
    }
    let mut all = Vec::new();
    while let Some(parked) = parking.join_next().await {
        match parked.map_err(io::Error::other)? {
            (id, Some(parked)) => all.push((id, parked)),
            (id, None) => tracing::warn!(id, "the store does not answer: left to recovery"),
        }
    }
    Ok(all)
}

/// What `park` comes to, unless it takes too long: longer than what is granted
/// to everybody only while the volume is not `stuck`.
async fn patiently<T>(park: impl Future<Output = T>, stuck: impl Future<Output = ()>) -> Option<T> {
    let given_up = async {
        tokio::time::sleep(PARK_PATIENCE).await;
        let rest = PARK_AT_MOST.saturating_sub(PARK_PATIENCE);
        tokio::time::timeout(rest, stuck).await
    };
    tokio::select! {
        biased;
        parked = park => Some(parked),
        _ = given_up => None,
    }
}

// The new daemon's side.

/// Takes over from the daemon that runs in `run_dir`, if one does; what it
/// served, by attachment id. Ends when that one is about to end.
///
/// # Errors
/// The other one goes on as if nothing had happened.
pub(super) async fn take_over(
    run_dir: PathBuf,
    records: Vec<Record>,
    staging: &Staging,
) -> io::Result<HashMap<String, Inherited>> {
    let (peer, parked) = on_thread(move || request(&run_dir)).await?;
    let Some(peer) = peer else {
        return Ok(HashMap::new());
    };
    let mut opening = JoinSet::new();
    for (id, parked) in parked {
        let record = records.iter().find(|record| record.id == id).cloned();
        let record = record.ok_or_else(|| io::Error::other(format!("{id} has no record")))?;
        let staging = staging.clone();
        opening.spawn(async move { (id, parked, open_again(&record, &staging, true).await) });
    }
    let mut inherited = Vec::new();
    let mut failure = None;
    while let Some(opened) = opening.join_next().await {
        match opened.map_err(io::Error::other)? {
            (id, parked, Ok(volume)) => inherited.push((id, volume, parked)),
            (_, _, Err(error)) => failure = Some(io::Error::other(error.to_string())),
        }
    }
    let agreed = match failure {
        Some(error) => Err(error),
        None => on_thread(move || agree(&peer)).await,
    };
    match agreed {
        Ok(()) => Ok(inherited
            .into_iter()
            .map(|(id, volume, parked)| {
                volume.go_on();
                let volume = Some(volume);
                (id, Inherited { volume, parked })
            })
            .collect()),
        Err(error) => {
            for (_, volume, _) in inherited {
                if let Err(error) = volume.let_go().await {
                    tracing::error!(%error, "a staging file is not given back");
                }
                // The lease is the other one's, or its successor's.
                std::mem::forget(volume);
            }
            Err(error)
        }
    }
}

type Offer = (Option<Peer>, Vec<(String, Vec<Parked>)>);

fn request(run_dir: &Path) -> io::Result<Offer> {
    let socket = new_socket()?;
    match connect(&socket, &SocketAddrUnix::new(run_dir.join(SOCKET))?) {
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => {
            return Ok((None, Vec::new()));
        }
        result => result?,
    }
    let peer = Peer::new(socket)?;
    peer.send(&Message::Hello { format: FORMAT }, &[])?;
    let mut attachments = Vec::new();
    loop {
        match peer.receive()? {
            (Message::Attachment { id, unread }, fds) => {
                attachments.push((id, parked(&unread, fds)?));
            }
            (Message::End, _) => return Ok((Some(peer), attachments)),
            (other, _) => return Err(io::Error::other(format!("it said {other:?}"))),
        }
    }
}

fn agree(peer: &Peer) -> io::Result<()> {
    peer.send(&Message::Ready, &[])?;
    match peer.receive()?.0 {
        Message::Go => Ok(()),
        other => Err(io::Error::other(format!("it said {other:?}"))),
    }
}

fn new_socket() -> io::Result<OwnedFd> {
    let kind = SocketType::SEQPACKET;
    Ok(socket_with(
        AddressFamily::UNIX,
        kind,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    super::detach::blocking(work).await
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use tokio::time::{Instant, sleep};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn slow_volumes_are_waited_for_and_stuck_ones_less() {
        let park = || async {
            sleep(PARK_PATIENCE * 3 / 2).await;
            "parked"
        };
        assert_eq!(patiently(park(), pending()).await, Some("parked"));
        let start = Instant::now();
        assert_eq!(patiently(park(), ready(())).await, None);
        assert_eq!(start.elapsed(), PARK_PATIENCE);
        let start = Instant::now();
        assert_eq!(patiently(pending::<()>(), pending()).await, None);
        assert_eq!(start.elapsed(), PARK_AT_MOST);
        // Stuck, and nobody waits for it.
        assert_eq!(patiently(ready("parked"), ready(())).await, Some("parked"));
    }
}
