//! The UNIX stream socket pairs between the kernel's nbd client and our
//! server: one end handed to the kernel, the other read by us.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair, sockopt};

use super::error::KernelError;

/// Send buffer asked for on both ends, in bytes. nbd sends a request page by
/// page: a small buffer makes it sleep between them, and before 6.14 a send
/// that stops half way can end in a lost connection.
pub const SEND_BUFFER: usize = 8 << 20;

/// One connection between kernel and server.
#[derive(Debug)]
pub struct SocketPair {
    /// For the kernel; to be closed once it has it, or its death would go
    /// unnoticed.
    pub kernel: OwnedFd,
    /// For the server, non-blocking (as `tokio::net::UnixStream::from_std`
    /// wants it).
    pub server: UnixStream,
}

impl SocketPair {
    /// Makes a pair, close-on-exec on both ends, with send buffers of
    /// [`SEND_BUFFER`] or what an unprivileged process may have.
    ///
    /// # Errors
    /// [`KernelError::Sockets`], above all when out of file descriptors.
    pub fn new() -> Result<Self, KernelError> {
        let (kernel, server) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|errno| KernelError::Sockets(errno.into()))?;
        for end in [kernel.as_fd(), server.as_fd()] {
            set_send_buffer(end).map_err(|errno| KernelError::Sockets(errno.into()))?;
        }
        let server = UnixStream::from(server);
        server.set_nonblocking(true).map_err(KernelError::Sockets)?;
        Ok(Self { kernel, server })
    }

    /// Makes `count` pairs: the ends for the kernel, and ours in the same
    /// order.
    ///
    /// # Errors
    /// As [`SocketPair::new`].
    pub fn many(count: usize) -> Result<(Vec<OwnedFd>, Vec<UnixStream>), KernelError> {
        let pairs: Result<Vec<_>, _> = (0..count).map(|_| Self::new()).collect();
        Ok(pairs?
            .into_iter()
            .map(|pair| (pair.kernel, pair.server))
            .unzip())
    }
}

fn set_send_buffer(end: BorrowedFd<'_>) -> Result<(), Errno> {
    match sockopt::set_socket_send_buffer_size_force(end, SEND_BUFFER) {
        // Without CAP_NET_ADMIN net.core.wmem_max bounds it.
        Err(Errno::PERM) => sockopt::set_socket_send_buffer_size(end, SEND_BUFFER),
        other => other,
    }
}

/// True when nobody holds the other end of `server` any more and all it sent
/// was read. After a reconfigure this tells a socket the kernel did not want
/// (none of its own was dead) from one it took; the caller must have closed
/// its copy of the kernel's end.
///
/// # Errors
/// Whatever `recv` reports except that nothing has arrived.
pub fn is_abandoned(server: BorrowedFd<'_>) -> io::Result<bool> {
    let mut byte = [0u8; 1];
    match recv(server, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((_, length)) => Ok(length == 0),
        Err(Errno::AGAIN | Errno::INTR) => Ok(false),
        Err(Errno::CONNRESET) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use rustix::io::{FdFlags, fcntl_getfd};

    use super::*;

    #[test]
    fn both_ends_close_on_exec_and_ours_does_not_block() {
        let mut pair = SocketPair::new().unwrap();
        for end in [pair.kernel.as_fd(), pair.server.as_fd()] {
            assert!(fcntl_getfd(end).unwrap().contains(FdFlags::CLOEXEC));
            // The kernel doubles what it is asked for; the least is wmem_max.
            assert!(sockopt::socket_send_buffer_size(end).unwrap() >= 200_000);
        }
        let error = pair.server.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn an_end_is_abandoned_only_when_closed_and_read_empty() {
        let mut pair = SocketPair::new().unwrap();
        assert!(!is_abandoned(pair.server.as_fd()).unwrap());
        let mut kernel = UnixStream::from(pair.kernel);
        kernel.write_all(b"x").unwrap();
        drop(kernel);
        assert!(!is_abandoned(pair.server.as_fd()).unwrap());
        assert_eq!(pair.server.read(&mut [0]).unwrap(), 1);
        assert!(is_abandoned(pair.server.as_fd()).unwrap());
    }
}
