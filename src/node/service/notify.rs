//! Messages to the service manager, sd_notify(3): datagrams of `NAME=VALUE`
//! lines. A message that cannot be sent is logged: the manager draws its own
//! conclusions, and a disk is never worse off for it.

use std::ffi::OsStr;
use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, sendmsg, socket_with,
};

/// How long the manager may take to work off its queue.
const BARRIER_PATIENCE: Duration = Duration::from_secs(5);

/// The manager's socket.
#[derive(Debug)]
pub struct Notifier {
    socket: OwnedFd,
}

impl Notifier {
    /// Connects to `$NOTIFY_SOCKET`: a path, or an abstract name after `@`.
    #[must_use]
    pub fn new(address: &OsStr) -> Option<Self> {
        Self::connect(address)
            .inspect_err(|error| tracing::warn!(?address, %error, "no service manager to notify"))
            .ok()
    }

    fn connect(address: &OsStr) -> io::Result<Self> {
        let address = match address.as_bytes() {
            [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name)?,
            _ => SocketAddrUnix::new(Path::new(address))?,
        };
        let kind = SocketType::DGRAM;
        let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        connect(&socket, &address)?;
        Ok(Self { socket })
    }

    /// Sends `text`, one assignment a line.
    pub fn say(&self, text: &str) {
        if let Err(error) = self.send(text, &[]) {
            let what = text.lines().next().unwrap_or_default();
            tracing::warn!(what, %error, "cannot notify the service manager");
        }
    }

    /// Leaves a copy of `fd` with the manager, under a name of its own.
    ///
    /// # Errors
    /// It was not sent. Whether it was kept is not known.
    pub fn store(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.send(&format!("FDSTORE=1\nFDNAME={name}"), &[fd])
    }

    /// Drops every descriptor that the manager keeps under `name`.
    ///
    /// # Errors
    /// It was not sent.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])
    }

    /// Waits until the manager has acted on everything sent before. Blocks.
    ///
    /// # Errors
    /// It has not within 5 s.
    pub fn barrier(&self) -> io::Result<()> {
        let (mut ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(BARRIER_PATIENCE))?;
        self.send("BARRIER=1", &[theirs.as_fd()])?;
        drop(theirs);
        // Its end: the manager has closed the other one.
        match ours.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn send(&self, text: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // Words alone must hold up no thread that serves disks; with a
        // descriptor, the caller may wait.
        let flags = match fds {
            [] => SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            _ => SendFlags::NOSIGNAL,
        };
        rustix::io::retry_on_intr(|| {
            sendmsg(
                &self.socket,
                &[IoSlice::new(text.as_bytes())],
                &mut control,
                flags,
            )
        })?;
        Ok(())
    }
}
