//! The runtime that disks are served on, and how many of the machine's cores it
//! takes.
//!
//! One worker carries some 50,000 requests a second or 2 GiB/s, which is more
//! than any page blob lets through. A second one that is not needed costs a
//! fifth of the CPU time: the two hand the sockets and each other's tasks to and
//! fro (`docs/performance.md`). What blocks has threads of its own.

use std::io;
use std::num::NonZero;

use tokio::runtime::{Builder, Runtime};

/// Workers for one export.
pub const ONE_EXPORT: NonZero<usize> = NonZero::<usize>::MIN;

/// Workers for all disks of a node: for half of the cores that this process may
/// use, the others belong to those who use the disks.
#[must_use]
pub fn all_disks() -> NonZero<usize> {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    NonZero::new(cores / 2).unwrap_or(NonZero::<usize>::MIN)
}

/// Starts a runtime with so many workers.
///
/// # Errors
/// The kernel refuses a thread or an event queue.
pub fn start(workers: NonZero<usize>) -> io::Result<Runtime> {
    Builder::new_multi_thread()
        .worker_threads(workers.get())
        .enable_all()
        .build()
}
