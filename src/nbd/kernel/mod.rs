//! The Linux kernel's nbd client: how a set of sockets becomes `/dev/nbdN`,
//! by generic netlink and without `nbd-client`. Attaching and its errors live
//! here, and what `/sys` and `/proc` know of a device; the protocol on the
//! sockets does not.
//!
//! | file | what it holds |
//! |---|---|
//! | [`attach`] | the asynchronous handle, [`KernelNbd`], and its one thread |
//! | [`family`] | the five calls of the `nbd` family, blocking |
//! | `message` | netlink messages as bytes, no I/O |
//! | [`sockets`] | the UNIX socket pairs between kernel and server |
//! | [`sysfs`] | a device's state, size and queue limits |
//! | [`busy`] | who uses a device |
//! | [`error`] | everything that goes wrong, with its remedy |

pub mod attach;
pub mod busy;
pub mod error;
pub mod family;
mod message;
pub mod sockets;
pub mod sysfs;

pub use attach::KernelNbd;
pub use busy::Busy;
pub use error::KernelError;
pub use family::{Connect, Device, DeviceStatus, NbdFamily};
pub use sockets::SocketPair;
pub use sysfs::{DeviceState, QueueLimits, Sysfs};
