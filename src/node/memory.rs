//! A process that serves the disks of its own node: when memory is short, the
//! kernel writes to those disks to get some back, and waits for us. So we must
//! not wait for it.
//!
//! | measure | against |
//! |---|---|
//! | `PR_SET_IO_FLUSHER` | an allocation of ours that writes to our own disk and waits; throttling for dirty pages |
//! | `mlockall` | our code and data being given up, and read back when it is too late |
//! | `oom_score_adj` | being the one that is killed: everybody who waits for a disk would wait for ever |
//!
//! What is mapped at the start is locked whole. What comes later is locked
//! when it is touched (`MCL_ONFAULT`): each thread maps a stack of 2 MiB and
//! the runtime may have hundreds of threads; locking all of that would take a
//! gigabyte for a few kilobytes in use. A page touched for the first time
//! under pressure is an allocation like any other, which the first measure
//! covers.
//!
//! What is locked and merely kept for the next time is lost to the node: see
//! [`crate::buffers`].

use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::configure_io_flusher_behavior;

use crate::buffers;

/// Prepares the process; to be called before any thread starts, since threads
/// inherit it. What is refused is told and done without.
pub fn prepare() {
    let told = |what: &str, error: std::io::Error| {
        tracing::warn!(
            %error,
            "{what}: this node may stall when its memory is short; run dyskd as root with CAP_SYS_RESOURCE and CAP_IPC_LOCK"
        );
    };
    if !buffers::set_up_allocator() {
        tracing::warn!(
            "the C library keeps its own way with large buffers: dyskd keeps what a busy disk took"
        );
    }
    if let Err(error) = configure_io_flusher_behavior(true) {
        told("not exempt from memory reclaim", error.into());
    }
    let locked = mlockall(MlockAllFlags::CURRENT)
        .and_then(|()| mlockall(MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT));
    if let Err(error) = locked {
        told("memory is not locked", error.into());
    }
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        told("not protected from the OOM killer", error);
    }
}
