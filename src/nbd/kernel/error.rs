//! What goes wrong between us and the kernel's nbd driver. Each text is one
//! line that names the object and what to do about it.

use std::io;
use std::path::PathBuf;

use super::busy::Busy;

/// A failed call to the nbd driver, or to what `/sys` says of its devices.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The kernel knows no nbd family and the module is not loaded.
    #[error("the kernel has no nbd driver loaded: run `modprobe nbd nbds_max=0`")]
    NoModule,
    /// The module is there but its family hides from this network namespace
    /// (kernels before 6.4).
    #[error(
        "nbd is loaded but not reachable from this network namespace: run in the initial one (hostNetwork: true), or use kernel 6.4 or later"
    )]
    NetworkNamespace,
    /// The driver lacks something dysk cannot do without.
    #[error("kernel too old: {0}; kernel 5.14 or later is needed")]
    TooOld(&'static str),
    /// The caller has not the capability.
    #[error("not permitted to {0}: run as root, CAP_SYS_ADMIN is needed")]
    NotPermitted(&'static str),
    /// The wanted index is connected already, or something holds it open.
    #[error("nbd{0} is in use: choose another index, or let the kernel choose")]
    InUse(u32),
    /// There is no such device.
    #[error("nbd{0} does not exist: `ls /sys/block` lists the devices there are")]
    NoSuchDevice(u32),
    /// The device is not connected, or belongs to somebody else.
    #[error("nbd{index} is not the device of {wanted}: its backend is {}", .found.as_deref().unwrap_or("not set"))]
    NotOurs {
        /// N of `/dev/nbdN`.
        index: u32,
        /// The backend identifier it should have.
        wanted: String,
        /// The backend identifier it has.
        found: Option<String>,
    },
    /// An argument the driver would refuse, or misread.
    #[error("invalid nbd connection: {0}")]
    Invalid(String),
    /// The driver refused; `dmesg` may say more than its errno.
    #[error("the nbd driver refused to {operation}: {source}; see `dmesg | grep nbd`")]
    Refused {
        /// What was asked for.
        operation: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// The netlink socket failed.
    #[error("netlink: {0}")]
    Netlink(#[source] io::Error),
    /// The kernel's answer makes no sense.
    #[error("netlink: {0}")]
    Answer(String),
    /// A file in `/sys`, `/proc` or `/dev` failed.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The device did not become what it should be in time.
    #[error("nbd{index} not ready: {what}")]
    NotReady {
        /// N of `/dev/nbdN`.
        index: u32,
        /// What is missing and, where known, the remedy.
        what: String,
    },
    /// The device is in use.
    #[error("nbd{index} is busy: {busy}")]
    Busy {
        /// N of `/dev/nbdN`.
        index: u32,
        /// By whom.
        busy: Busy,
    },
    /// Sockets could not be made.
    #[error("socket pair for the nbd driver: {0}")]
    Sockets(#[source] io::Error),
    /// The thread that talks to the kernel has ended.
    #[error("the nbd netlink thread has ended: restart the daemon")]
    Stopped,
}

impl KernelError {
    /// Wraps a failure on `path`, for `map_err`.
    pub(super) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}
