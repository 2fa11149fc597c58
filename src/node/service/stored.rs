//! Connections that are parked with the service manager while one daemon ends
//! and the next begins: `systemctl restart`.
//!
//! An attachment has a descriptor for each connection, named `ID.0`, `ID.1`,
//! and last of all a memory file `ID.state` with what was read from them and
//! not taken. Invariants:
//!
//! - What is stored is parked for good: who stored it never reads from it
//!   again, so its state stays true until somebody takes it up.
//! - Before the next daemon reads a byte, the state is emptied: the manager's
//!   copy is the same file. So a state is used once, even if the manager
//!   should keep its copies and hand them out again.
//! - Before that as well, the manager's copies of the connections go. With
//!   them a daemon that dies would not be noticed by the kernel.
//! - A connection without its state, or too few of them, is closed; the kernel
//!   then sends again what was on its way, as after a crash.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use serde::{Deserialize, Serialize};

use super::Notifier;
use crate::node::transport::Parked;

/// The first descriptor that is handed over, `SD_LISTEN_FDS_START`.
const FIRST: RawFd = 3;
const FORMAT: u32 = 1;
/// Most bytes of a state: 16 connections with a buffer of 64 KiB and a large
/// request's beginning each stay well below.
const MAX_STATE: u64 = 64 << 20;

/// A descriptor and the name it was left under.
#[derive(Debug)]
pub struct Received {
    name: String,
    fd: OwnedFd,
}

/// The first line of a state; the unread bytes follow.
#[derive(Serialize, Deserialize)]
struct State {
    format: u32,
    /// Bytes of each connection, in the order of their names.
    unread: Vec<u64>,
}

/// The descriptors of `LISTEN_FDS`, with their names.
pub(super) fn receive(count: Option<&OsStr>, names: Option<&OsStr>) -> Vec<Received> {
    let count = count.and_then(OsStr::to_str).and_then(|n| n.parse().ok());
    let names = names.and_then(OsStr::to_str).unwrap_or_default();
    let mut names = names.split(':');
    (FIRST..)
        .take(count.unwrap_or(0))
        .map(|fd| {
            // SAFETY: the manager opened it for this process before it began,
            // and nothing else has been told of it.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            let name = names.next().unwrap_or("stored").to_owned();
            Received { name, fd }
        })
        .collect()
}

/// Leaves an attachment's parked connections with the manager.
///
/// # Errors
/// What was left is incomplete, and the next daemon closes it.
pub(in crate::node) fn keep(notifier: &Notifier, id: &str, parked: &[Parked]) -> io::Result<()> {
    let mut state = File::from(memfd_create("dysk-unread", MemfdFlags::CLOEXEC)?);
    let head = State {
        format: FORMAT,
        unread: parked.iter().map(|p| p.unread.len() as u64).collect(),
    };
    state.write_all(&serde_json::to_vec(&head)?)?;
    state.write_all(b"\n")?;
    for (number, connection) in parked.iter().enumerate() {
        state.write_all(&connection.unread)?;
        notifier.store(&format!("{id}.{number}"), connection.socket.as_fd())?;
    }
    notifier.store(&format!("{id}.state"), state.as_fd())
}

/// Parked connections by attachment id: what an earlier daemon left, as far as
/// it is whole. Nobody else can use it any more. Blocks.
pub(in crate::node) fn take_up(
    received: Vec<Received>,
    notifier: Option<&Notifier>,
) -> HashMap<String, Vec<Parked>> {
    if received.is_empty() {
        return HashMap::new();
    }
    let mut sets: BTreeMap<String, BTreeMap<String, OwnedFd>> = BTreeMap::new();
    for Received { name, fd } in received {
        if let Err(error) = fcntl_setfd(&fd, FdFlags::CLOEXEC) {
            tracing::error!(name, %error, "a stored descriptor is unusable");
            continue;
        }
        let (id, part) = name.split_once('.').unwrap_or((&name, ""));
        let set = sets.entry(id.to_owned()).or_default();
        set.insert(part.to_owned(), fd);
        if let Some(notifier) = notifier
            && let Err(error) = notifier.remove(&name)
        {
            tracing::warn!(name, %error, "the service manager keeps a copy");
        }
    }
    if let Some(notifier) = notifier
        && let Err(error) = notifier.barrier()
    {
        tracing::warn!(%error, "the service manager may keep copies of connections");
    }
    let mut whole = HashMap::new();
    for (id, set) in sets {
        match restore(set) {
            Ok(parked) => drop(whole.insert(id, parked)),
            Err(error) => {
                tracing::warn!(id, %error, "stored connections are of no use: as after a crash");
            }
        }
    }
    whole
}

/// The connections of one attachment; empties their state.
fn restore(mut set: BTreeMap<String, OwnedFd>) -> io::Result<Vec<Parked>> {
    let wrong = |text: &str| io::Error::other(text.to_owned());
    let mut file = File::from(set.remove("state").ok_or_else(|| wrong("no state"))?);
    if file.metadata()?.len() > MAX_STATE {
        return Err(wrong("a state that is too long"));
    }
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    // From here on nobody can use it again.
    file.set_len(0)?;
    if file.read_at(&mut [0], 0)? != 0 {
        return Err(wrong("a state that cannot be emptied"));
    }
    let end = bytes.iter().position(|b| *b == b'\n');
    let end = end.ok_or_else(|| wrong("used already"))?;
    let state: State = serde_json::from_slice(&bytes[..end])?;
    let unread = Bytes::from(bytes).slice(end + 1..);
    let expected: u64 = state.unread.iter().sum();
    if state.format != FORMAT || expected != unread.len() as u64 || state.unread.len() != set.len()
    {
        return Err(wrong("state and connections do not fit"));
    }
    let mut at = 0;
    let mut parked = Vec::new();
    for (number, length) in state.unread.iter().enumerate() {
        let socket = set
            .remove(&number.to_string())
            .ok_or_else(|| wrong("a connection is missing"))?;
        let length = usize::try_from(*length).map_err(io::Error::other)?;
        parked.push(Parked {
            socket,
            unread: unread.slice(at..at + length),
        });
        at += length;
    }
    Ok(parked)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    use super::*;

    /// A service manager: what it was sent.
    struct Manager(UnixDatagram, tempfile::TempDir);

    impl Manager {
        fn new() -> (Self, Notifier) {
            let folder = tempfile::tempdir().expect("a folder");
            let path = folder.path().join("notify");
            let socket = UnixDatagram::bind(&path).expect("binds");
            socket.set_nonblocking(true).expect("set");
            let notifier = Notifier::new(path.as_os_str()).expect("connects");
            (Self(socket, folder), notifier)
        }

        fn hear(&self) -> Vec<(String, Option<OwnedFd>)> {
            let mut heard = Vec::new();
            loop {
                let mut text = [0; 1000];
                let mut space =
                    [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let received = recvmsg(
                    &self.0,
                    &mut [io::IoSliceMut::new(&mut text)],
                    &mut control,
                    RecvFlags::CMSG_CLOEXEC,
                );
                let Ok(received) = received else { return heard };
                let fd = control.drain().find_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                    _ => None,
                });
                let text = String::from_utf8_lossy(&text[..received.bytes]).into_owned();
                heard.push((text, fd));
            }
        }

        /// What it would hand to the next process.
        fn stored(&self) -> Vec<Received> {
            let stored = self.hear().into_iter().filter_map(|(text, fd)| {
                let name = text.strip_prefix("FDSTORE=1\nFDNAME=")?.to_owned();
                Some(Received { name, fd: fd? })
            });
            stored.collect()
        }
    }

    fn parked() -> (Vec<Parked>, Vec<UnixStream>) {
        let texts: [&[u8]; 3] = [b"", b"ab\ncd", b"e"];
        texts
            .into_iter()
            .map(|unread| {
                let (socket, kernel) = UnixStream::pair().expect("a pair");
                let unread = Bytes::from_static(unread);
                (
                    Parked {
                        socket: socket.into(),
                        unread,
                    },
                    kernel,
                )
            })
            .unzip()
    }

    #[test]
    fn what_is_left_with_the_manager_comes_back_in_any_order_and_once() {
        let (manager, notifier) = Manager::new();
        let (left, kernel) = parked();
        keep(&notifier, "some-id", &left).expect("stored");
        drop(left);
        let mut stored = manager.stored();
        assert_eq!(stored.len(), 4);
        assert_eq!(stored[3].name, "some-id.state", "the state comes last");
        stored.reverse();
        let again = stored
            .iter()
            .map(|r| Received {
                name: r.name.clone(),
                fd: r.fd.try_clone().expect("a copy"),
            })
            .collect();
        let mut taken = take_up(
            stored,
            Some(&Notifier::new(manager.1.path().join("notify").as_os_str()).expect("connects")),
        );
        let parked = taken.remove("some-id").expect("it is whole");
        assert!(taken.is_empty());
        for (connection, (expected, mut kernel)) in parked
            .into_iter()
            .zip([&b""[..], b"ab\ncd", b"e"].into_iter().zip(kernel))
        {
            assert_eq!(connection.unread, expected);
            kernel
                .write_all(b"x")
                .expect("its other end is the kernel's");
            let mut byte = [0];
            UnixStream::from(connection.socket)
                .read_exact(&mut byte)
                .expect("a byte");
        }
        let said: Vec<_> = manager.hear().into_iter().map(|(text, _)| text).collect();
        for part in ["0", "1", "2", "state"] {
            let removed = format!("FDSTOREREMOVE=1\nFDNAME=some-id.{part}");
            assert!(said.contains(&removed), "{said:?}");
        }
        assert_eq!(said.last().map(String::as_str), Some("BARRIER=1"));
        assert!(take_up(again, None).is_empty(), "a state is used once");
    }

    #[test]
    fn what_is_not_whole_is_closed() {
        for missing in 0..4 {
            let (manager, notifier) = Manager::new();
            let (left, mut kernel) = parked();
            keep(&notifier, "id", &left).expect("stored");
            drop(left);
            let mut stored = manager.stored();
            stored.remove(missing);
            assert!(take_up(stored, None).is_empty(), "without {missing}");
            let end = kernel[0].read(&mut [0]).expect("readable");
            assert_eq!(end, 0, "the kernel sees its end");
        }
    }
}
