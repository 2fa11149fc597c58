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
//! What is locked and merely kept for the next time is lost to the node, so large
//! buffers are given back when they are freed: the C library would soon keep
//! all of them, and cannot let the kernel take locked pages out of its heaps.

use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::configure_io_flusher_behavior;

/// Buffers from this size on are given back when they are freed: payloads of
/// streams, not of single blocks.
const LARGE: u32 = 1 << 20;

/// Prepares the process; to be called before any thread starts, since threads
/// inherit it. What is refused is told and done without.
pub fn prepare() {
    let told = |what: &str, error: std::io::Error| {
        tracing::warn!(
            %error,
            "{what}: this node may stall when its memory is short; run dyskd as root with CAP_SYS_RESOURCE and CAP_IPC_LOCK"
        );
    };
    if !give_large_back() {
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

/// Has every buffer of [`LARGE`] bytes and more mapped by itself, whatever was
/// freed before; see mallopt(3).
#[cfg(target_env = "gnu")]
fn give_large_back() -> bool {
    let large = LARGE.cast_signed();
    // SAFETY: it takes two numbers and no pointer, and the C library locks what
    // it changes.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, large) == 1 }
}

/// Other C libraries have no such way of their own.
#[cfg(not(target_env = "gnu"))]
fn give_large_back() -> bool {
    true
}

#[cfg(all(test, target_env = "gnu"))]
mod tests {
    use super::*;
    use std::process::Command;

    const BUFFER: usize = 2 << 20;
    const BUFFERS: usize = 64;
    const THIS: &str = "node::memory::tests::large_buffers_are_given_back_where_they_would_be_kept";
    /// Tells the test that it runs in a process of its own, and what to look at.
    const ALONE: &str = "DYSK_TEST_LARGE_BUFFERS";

    /// Bytes that the C library keeps for the next time.
    fn kept() -> usize {
        // SAFETY: it takes nothing, and returns numbers.
        unsafe { libc::mallinfo2() }.fordblks
    }

    /// What stays when large buffers are freed that were in use at once.
    fn left_over() -> usize {
        // What the C library takes for a sign that such sizes are usual.
        drop(std::hint::black_box(vec![1u8; BUFFER]));
        let before = kept();
        let pair = |_| (vec![1u8; BUFFER], vec![1u8; 64]);
        let pairs: Vec<_> = (0..BUFFERS).map(pair).collect();
        let (large, small): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        drop(std::hint::black_box(large));
        let left = kept().saturating_sub(before);
        drop(std::hint::black_box(small));
        left
    }

    /// Looks at heaps in which nobody was before: those of a process of its own,
    /// whose environment does not speak to the C library.
    fn alone(what: &str) {
        let mut command = Command::new(std::env::current_exe().expect("this test's path"));
        command.args(["--exact", THIS]).env(ALONE, what);
        for (name, _) in std::env::vars_os() {
            let name_text = name.to_string_lossy();
            if name_text.starts_with("MALLOC_") || name_text == "GLIBC_TUNABLES" {
                command.env_remove(name);
            }
        }
        let output = command.output().expect("the test runs again");
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && told.contains("1 passed"),
            "{what}: {told}"
        );
    }

    #[test]
    fn large_buffers_are_given_back_where_they_would_be_kept() {
        let all = BUFFER * BUFFERS;
        match std::env::var(ALONE).ok().as_deref() {
            Some("kept") => assert!(left_over() > all / 2),
            Some("given back") => {
                assert!(give_large_back());
                assert!(left_over() < all / 2);
            }
            _ => ["kept", "given back"].into_iter().for_each(alone),
        }
    }
}
