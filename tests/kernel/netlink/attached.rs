//! What the scenarios share: a disk in memory attached through the driver,
//! and waits that end.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use dysk::nbd::kernel::{Connect, KernelError, NbdFamily, SocketPair, Sysfs};
use rustix::fs::OFlags;

use crate::netlink::server::Disk;

pub const MIB: usize = 1 << 20;
/// HAS_FLAGS, SEND_FLUSH, CAN_MULTI_CONN (proto.md).
pub const FLAGS: u16 = 1 | 1 << 2 | 1 << 8;
pub const READ_ONLY: u16 = 1 << 1;
/// Bounds a wait for something that must happen; never part of a result.
pub const PATIENCE: Duration = Duration::from_secs(30);

#[repr(align(4096))]
pub struct Block(pub [u8; 4096]);

pub fn in_guest() {
    assert!(
        std::env::var_os("DYSK_KERNEL").is_some(),
        "runs inside the kernel lane only: cargo test --test kernel netlink boots it"
    );
}

pub fn sh(script: &str) {
    let status = Command::new("sh").args(["-ec", script]).status().unwrap();
    assert!(status.success(), "{script}: {status}");
}

/// Waits for a condition, and fails if it never comes true.
pub fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// An attached disk in memory; detached when dropped.
pub struct Attached {
    pub nbd: NbdFamily,
    pub index: u32,
    pub backend: String,
    pub disk: Arc<Disk>,
    pub node: PathBuf,
    /// From the call to a device that is there and has its size.
    pub took: Duration,
}

pub fn request(backend: &str, size: usize) -> Connect {
    Connect {
        index: None,
        size_bytes: size as u64,
        block_size: 4096,
        timeout: Duration::from_secs(30),
        dead_connection_timeout: Duration::from_secs(60),
        server_flags: FLAGS,
        client_flags: 0,
        backend: backend.to_owned(),
    }
}

impl Attached {
    pub fn new(connect: &Connect, sockets: usize) -> Self {
        let nbd = NbdFamily::open().unwrap();
        let disk = Disk::new(connect.size_bytes as usize);
        let (kernel, server) = SocketPair::many(sockets).unwrap();
        disk.serve(server);
        let began = Instant::now();
        let index = nbd.connect(connect, &kernel).unwrap().index;
        drop(kernel);
        let node = Sysfs::default()
            .wait_ready(index, connect.size_bytes, PATIENCE)
            .unwrap();
        let took = began.elapsed();
        let backend = connect.backend.clone();
        Self {
            nbd,
            index,
            backend,
            disk,
            node,
            took,
        }
    }

    pub fn open(&self) -> File {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .custom_flags(OFlags::DIRECT.bits() as i32);
        options.open(&self.node).unwrap()
    }

    /// Offers new connections until the kernel has taken `count`. It takes
    /// one only once it has seen that an old one is dead.
    pub fn revive(&self, count: usize) {
        until("the kernel takes new connections", || {
            let (kernel, server) = SocketPair::many(count - self.disk.live()).unwrap();
            self.nbd
                .reconfigure(self.index, &self.backend, &kernel)
                .unwrap();
            drop(kernel);
            self.disk.serve(server);
            self.disk.live() == count
        });
    }

    pub fn detach(&self) -> Result<(), KernelError> {
        self.nbd.disconnect(self.index, &self.backend)?;
        Sysfs::default().wait_gone(self.index, PATIENCE)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let detached = self.detach();
        if !thread::panicking() {
            detached.unwrap();
        }
    }
}

pub fn read_text(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path).unwrap().trim().to_owned()
}

pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(future)
}
