//! What runs inside the guest: see the module above.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use dysk::nbd::kernel::{
    Busy, Connect, KernelError, KernelNbd, NbdFamily, QueueLimits, SocketPair, Sysfs,
};
use rustix::fs::OFlags;

use super::server::Disk;

const MIB: usize = 1 << 20;
/// HAS_FLAGS, SEND_FLUSH, CAN_MULTI_CONN (proto.md).
const FLAGS: u16 = 1 | 1 << 2 | 1 << 8;
const READ_ONLY: u16 = 1 << 1;
/// Bounds a wait for something that must happen; never part of a result.
const PATIENCE: Duration = Duration::from_secs(30);

#[repr(align(4096))]
struct Block([u8; 4096]);

fn in_guest() {
    assert!(
        std::env::var_os("DYSK_KERNEL").is_some(),
        "runs inside the kernel lane only: cargo test --test kernel_netlink boots it"
    );
}

fn sh(script: &str) {
    let status = Command::new("sh").args(["-ec", script]).status().unwrap();
    assert!(status.success(), "{script}: {status}");
}

/// Waits for a condition, and fails if it never comes true.
fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// An attached disk in memory; detached when dropped.
struct Attached {
    nbd: NbdFamily,
    index: u32,
    backend: String,
    disk: Arc<Disk>,
    node: PathBuf,
}

fn request(backend: &str, size: usize) -> Connect {
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
    fn new(connect: &Connect, sockets: usize) -> Self {
        let nbd = NbdFamily::open().unwrap();
        let disk = Disk::new(connect.size_bytes as usize);
        let (kernel, server) = SocketPair::many(sockets).unwrap();
        disk.serve(server);
        let index = nbd.connect(connect, &kernel).unwrap().index;
        drop(kernel);
        let node = Sysfs::default()
            .wait_ready(index, connect.size_bytes, PATIENCE)
            .unwrap();
        let backend = connect.backend.clone();
        Self {
            nbd,
            index,
            backend,
            disk,
            node,
        }
    }

    fn open(&self) -> File {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .custom_flags(OFlags::DIRECT.bits() as i32);
        options.open(&self.node).unwrap()
    }

    /// Offers new connections until the kernel has taken `count`. It takes
    /// one only once it has seen that an old one is dead.
    fn revive(&self, count: usize) {
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

    fn detach(&self) -> Result<(), KernelError> {
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

fn read_text(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path).unwrap().trim().to_owned()
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(future)
}

mod with_nbd {
    use super::*;

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn attach_has_the_geometry_asked_for_and_carries_data() {
        in_guest();
        let began = Instant::now();
        let device = Attached::new(&request("acct/dysks/a.vhd", 64 * MIB), 2);
        println!("attach of one device: {:?}", began.elapsed());
        let sysfs = Sysfs::default();
        let state = sysfs.expect_ours(device.index, "acct/dysks/a.vhd").unwrap();
        assert_eq!((state.size_bytes, state.read_only), (64 << 20, false));
        sysfs
            .set_queue(device.index, QueueLimits::default())
            .unwrap();
        let queue = sysfs.block(device.index).join("queue");
        assert_eq!(read_text(queue.join("logical_block_size")), "4096");
        assert_eq!(read_text(queue.join("max_sectors_kb")), "4096");
        assert_eq!(read_text(queue.join("read_ahead_kb")), "4096");
        assert!(read_text(queue.join("scheduler")).contains("[none]"));

        let mut file = device.open();
        assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), 64 << 20);
        let block = Block([0xa5; 4096]);
        file.write_all_at(&block.0, 8192).unwrap();
        assert_eq!(device.disk.bytes(8192, 4096), block.0);
        assert_eq!(device.disk.bytes(4096, 4096), [0; 4096]);
        assert_eq!(device.disk.flushes.load(Ordering::SeqCst), 0);
        file.sync_all().unwrap();
        assert_eq!(device.disk.flushes.load(Ordering::SeqCst), 1);
        let mut back = Block([0; 4096]);
        file.read_exact_at(&mut back.0, 8192).unwrap();
        assert_eq!(back.0, block.0);
        drop(file);

        let began = Instant::now();
        device.detach().unwrap();
        println!("detach of one device: {:?}", began.elapsed());
        assert_eq!(sysfs.state(device.index).unwrap().backend, None);
        let error = device.detach().unwrap_err();
        assert!(
            matches!(error, KernelError::NotOurs { found: None, .. }),
            "{error}"
        );
        std::mem::forget(device);
    }

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn read_only_refuses_writes() {
        in_guest();
        let connect = Connect {
            server_flags: FLAGS | READ_ONLY,
            ..request("ro", MIB)
        };
        let device = Attached::new(&connect, 1);
        assert!(Sysfs::default().state(device.index).unwrap().read_only);
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .custom_flags(OFlags::DIRECT.bits() as i32);
        // Kernels differ in whether the open or the write is refused.
        let refused = options
            .open(&device.node)
            .and_then(|file| file.write_all_at(&Block([1; 4096]).0, 0));
        assert_eq!(
            refused.unwrap_err().kind(),
            std::io::ErrorKind::PermissionDenied
        );
        assert_eq!(device.disk.writes.load(Ordering::SeqCst), 0);
    }

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn mounts_swap_loops_and_claims_make_it_busy() {
        in_guest();
        let device = Attached::new(&request("busy", 128 * MIB), 2);
        let (sysfs, node) = (Sysfs::default(), device.node.display());
        let busy = || sysfs.busy(device.index).unwrap();
        assert_eq!(busy(), None);

        sh(&format!(
            "mkfs.ext4 -q {node}; mkdir '/mnt/a b'; mount {node} '/mnt/a b'"
        ));
        assert_eq!(busy(), Some(Busy::Mounted("/mnt/a b".into())));
        let error = sysfs.expect_idle(device.index).unwrap_err().to_string();
        let name = format!("nbd{}", device.index);
        assert_eq!(
            error,
            format!("{name} is busy: mounted at /mnt/a b: run `umount /mnt/a b`")
        );
        sh("umount '/mnt/a b'");
        assert_eq!(busy(), None);

        sh("mkdir /mnt/private");
        let mut other = Command::new("unshare")
            .args(["-m", "sh", "-ec"])
            .arg(format!(
                "mount {node} /mnt/private; touch /run/mounted; exec sleep 1000"
            ))
            .spawn()
            .unwrap();
        until("the other namespace mounts", || {
            Path::new("/run/mounted").exists()
        });
        let elsewhere = Busy::MountedElsewhere {
            mount_point: "/mnt/private".into(),
            pid: other.id(),
        };
        assert_eq!(busy(), Some(elsewhere));
        other.kill().unwrap();
        other.wait().unwrap();
        until("the namespace is gone", || busy().is_none());

        sh(&format!(
            "mkfs.btrfs -qf {node}; mkdir /mnt/btrfs; mount {node} /mnt/btrfs"
        ));
        assert_eq!(busy(), Some(Busy::Mounted("/mnt/btrfs".into())));
        sh("umount /mnt/btrfs");

        sh(&format!("mkswap {node} >/dev/null; swapon {node}"));
        assert_eq!(busy(), Some(Busy::Swap));
        sh(&format!("swapoff {node}"));

        sh(&format!("losetup /dev/loop7 {node}"));
        assert_eq!(busy(), Some(Busy::Loop("loop7".to_owned())));
        sh("losetup -d /dev/loop7");
        until("the loop device lets go", || busy().is_none());

        let claim = OpenOptions::new()
            .read(true)
            .custom_flags(OFlags::EXCL.bits() as i32)
            .open(&device.node)
            .unwrap();
        assert_eq!(busy(), Some(Busy::Claimed));
        drop(claim);
        assert_eq!(busy(), None);
    }

    /// Starts a write and returns once it sleeps in the kernel, and how it ends.
    fn waiting_write(device: &Attached, fill: u8) -> mpsc::Receiver<std::io::Result<()>> {
        let file = device.open();
        let (number, told) = mpsc::channel();
        let (done, outcome) = mpsc::channel();
        thread::spawn(move || {
            number
                .send(rustix::thread::gettid().as_raw_nonzero())
                .unwrap();
            done.send(file.write_all_at(&Block([fill; 4096]).0, 0))
                .unwrap();
        });
        let stat = format!("/proc/self/task/{}/stat", told.recv().unwrap());
        until("the write waits", || {
            std::fs::read_to_string(&stat).is_ok_and(|text| text.contains(") D "))
        });
        outcome
    }

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn io_waits_out_a_dead_server_and_completes_after_reconfigure() {
        in_guest();
        let device = Attached::new(&request("dead", MIB), 2);
        device.disk.die();
        let outcome = waiting_write(&device, 0x77);
        assert_eq!(outcome.try_recv().err(), Some(mpsc::TryRecvError::Empty));
        assert_eq!(device.disk.bytes(0, 1), [0]);
        device.revive(2);
        outcome.recv_timeout(PATIENCE).unwrap().unwrap();
        assert_eq!(device.disk.bytes(0, 4096), [0x77; 4096]);

        // None is dead now: the kernel says yes, and drops what it got.
        let (kernel, server) = SocketPair::many(1).unwrap();
        device
            .nbd
            .reconfigure(device.index, "dead", &kernel)
            .unwrap();
        drop(kernel);
        device.disk.serve(server);
        assert_eq!(device.disk.live(), 2);
    }

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn io_fails_at_the_dead_connection_timeout_and_flows_after_reconfigure() {
        in_guest();
        let short = Connect {
            dead_connection_timeout: Duration::from_millis(900),
            ..request("d", MIB)
        };
        let device = Attached::new(&short, 1);
        device.disk.die();
        let error = device
            .open()
            .write_all_at(&Block([1; 4096]).0, 0)
            .unwrap_err();
        assert_eq!(
            error.raw_os_error(),
            Some(rustix::io::Errno::IO.raw_os_error())
        );
        device.revive(1);
        device.open().write_all_at(&Block([2; 4096]).0, 0).unwrap();
        assert_eq!(device.disk.bytes(0, 1), [2]);
    }

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn a_lost_reply_is_asked_for_again_on_another_connection() {
        in_guest();
        let quick = Connect {
            timeout: Duration::from_secs(1),
            ..request("t", MIB)
        };
        let device = Attached::new(&quick, 2);
        device.disk.swallow.store(1, Ordering::SeqCst);
        device.open().write_all_at(&Block([3; 4096]).0, 0).unwrap();
        assert_eq!(device.disk.writes.load(Ordering::SeqCst), 2);
        until("the silent connection is shut", || device.disk.live() == 1);
    }

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn resize_while_open() {
        in_guest();
        let device = Attached::new(&request("grow", MIB), 2);
        let mut file = device.open();
        assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), 1 << 20);
        let refused = file.write_all_at(&Block([1; 4096]).0, 2 << 20).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::StorageFull);
        device.disk.resize(4 * MIB);
        device.nbd.resize(device.index, "grow", 4 << 20).unwrap();
        Sysfs::default()
            .wait_ready(device.index, 4 << 20, PATIENCE)
            .unwrap();
        assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), 4 << 20);
        file.write_all_at(&Block([9; 4096]).0, 2 << 20).unwrap();
        assert_eq!(device.disk.bytes(2 << 20, 4096), [9; 4096]);
    }

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn fifty_devices_at_once() {
        in_guest();
        let began = Instant::now();
        let devices: Vec<_> = (0..50)
            .map(|n| Attached::new(&request(&format!("fifty/{n}"), MIB), 1))
            .collect();
        println!(
            "attach of 50 devices, one after the other: {:?}",
            began.elapsed()
        );
        let listed = Sysfs::default().list().unwrap();
        for (n, device) in devices.iter().enumerate() {
            let backend = format!("fifty/{n}");
            let ours: Vec<_> = listed
                .iter()
                .filter(|found| found.backend.as_ref() == Some(&backend))
                .map(|found| found.index)
                .collect();
            assert_eq!(ours, [device.index]);
            device
                .open()
                .write_all_at(&Block([n as u8 + 1; 4096]).0, 0)
                .unwrap();
        }
        for (n, device) in devices.iter().enumerate() {
            assert_eq!(device.disk.bytes(0, 4096), [n as u8 + 1; 4096]);
        }
        let began = Instant::now();
        drop(devices);
        println!("detach of 50 devices: {:?}", began.elapsed());
    }

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn bad_arguments_and_foreign_devices_are_refused() {
        in_guest();
        let nbd = NbdFamily::open().unwrap();
        let (kernel, _server) = SocketPair::many(1).unwrap();
        let missing = nbd.reconfigure(4000, "x", &kernel).unwrap_err();
        assert!(
            matches!(missing, KernelError::NoSuchDevice(4000)),
            "{missing}"
        );
        let missing = nbd.resize(4000, "x", 4096).unwrap_err();
        assert!(
            matches!(missing, KernelError::NoSuchDevice(4000)),
            "{missing}"
        );
        let missing = nbd.disconnect(4000, "x").unwrap_err();
        assert!(
            matches!(missing, KernelError::NoSuchDevice(4000)),
            "{missing}"
        );
        let missing = Sysfs::default().busy(4000).unwrap_err();
        assert!(
            matches!(missing, KernelError::NoSuchDevice(4000)),
            "{missing}"
        );

        let beyond = Connect {
            index: Some(1 << 22),
            ..request("x", MIB)
        };
        let refused = nbd.connect(&beyond, &kernel).unwrap_err();
        assert!(matches!(refused, KernelError::Refused { .. }), "{refused}");
        let null = File::open("/dev/null").unwrap();
        let refused = nbd.connect(&request("x", MIB), &[null]).unwrap_err();
        assert!(matches!(refused, KernelError::Refused { .. }), "{refused}");

        let device = Attached::new(&request("mine", MIB), 1);
        for error in [
            nbd.reconfigure(device.index, "yours", &kernel).unwrap_err(),
            nbd.resize(device.index, "yours", 4096).unwrap_err(),
            nbd.disconnect(device.index, "yours").unwrap_err(),
        ] {
            let KernelError::NotOurs { found, .. } = &error else {
                panic!("{error}");
            };
            assert_eq!(found.as_deref(), Some("mine"));
        }
        assert_eq!(
            Sysfs::default().state(device.index).unwrap().size_bytes,
            1 << 20
        );
    }

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn a_held_index_is_in_use_and_the_kernel_chooses_another() {
        in_guest();
        let device = Attached::new(&request("first", MIB), 1);
        let (index, node) = (device.index, device.node.clone());
        let (kernel, _server) = SocketPair::many(1).unwrap();
        let same = Connect {
            index: Some(index),
            ..request("second", MIB)
        };
        let nbd = NbdFamily::open().unwrap();
        let error = nbd.connect(&same, &kernel).unwrap_err();
        assert!(
            matches!(error, KernelError::InUse(found) if found == index),
            "{error}"
        );
        drop(device);

        // As a prober does: an open file on a device that is not connected.
        let prober = File::open(&node).unwrap();
        let error = nbd.connect(&same, &kernel).unwrap_err();
        assert!(
            matches!(error, KernelError::InUse(found) if found == index),
            "{error}"
        );
        let other = Attached::new(&request("second", MIB), 1);
        assert_ne!(other.index, index);
        drop(prober);
        let given = Connect {
            index: Some(index),
            ..request("third", MIB)
        };
        assert_eq!(Attached::new(&given, 1).index, index);
    }

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn status_lists_devices() {
        in_guest();
        let devices: Vec<_> = (0..3)
            .map(|n| Attached::new(&request(&format!("s{n}"), MIB), 1))
            .collect();
        block_on(async {
            let nbd = KernelNbd::open().unwrap();
            let all = nbd.status(None).await.unwrap();
            for device in &devices {
                let one = nbd.status(Some(device.index)).await.unwrap();
                assert_eq!(one.len(), 1);
                assert!(one[0].connected && one[0].index == device.index);
                assert!(all.contains(&one[0]));
            }
        });
    }

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn abandoned_attach_leaves_no_device() {
        in_guest();
        block_on(async {
            let nbd = KernelNbd::open().unwrap();
            for n in 0..20 {
                let disk = Disk::new(MIB);
                let (kernel, server) = SocketPair::many(1).unwrap();
                disk.serve(server);
                let attach = nbd.connect(request(&format!("gone/{n}"), MIB), kernel);
                // Polled once, so that the call is on its way, then dropped:
                // at once, or while the kernel is at it.
                let patience = Duration::from_micros(n * 50);
                if let Ok(done) = tokio::time::timeout(patience, attach).await {
                    let index = done.unwrap().index;
                    nbd.disconnect(index, &format!("gone/{n}")).await.unwrap();
                }
            }
            // Calls are made in order: whatever was left of those is done.
            nbd.status(None).await.unwrap();
        });
        let left = Sysfs::default().list().unwrap();
        assert_eq!(left.iter().find(|device| device.backend.is_some()), None);
    }

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn sockets_do_not_leak_into_children() {
        in_guest();
        let device = Attached::new(&request("leak", MIB), 2);
        let output = Command::new("ls")
            .args(["-l", "/proc/self/fd"])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(!text.contains("socket:"), "{text}");
        drop(device);
    }

    /// Runs one scenario of [`super::inner`] by `wrapper`.
    fn wrapped(wrapper: &[&str], scenario: &str) {
        let output = Command::new(wrapper[0])
            .args(&wrapper[1..])
            .arg(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", &format!("guest::inner::{scenario}")])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}"
        );
    }

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn nobody_but_root_may_connect() {
        in_guest();
        // A copy: the path to the build may be closed to others than root.
        std::fs::copy(std::env::current_exe().unwrap(), "/run/as_nobody").unwrap();
        let output = Command::new("setpriv")
            .args([
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
                "/run/as_nobody",
            ])
            .args([
                "--ignored",
                "--exact",
                "guest::inner::connect_names_the_capability",
            ])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}"
        );
    }

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn a_network_namespace_is_named_where_the_family_hides() {
        in_guest();
        let hides = std::env::var("DYSK_KERNEL").unwrap() == "6.1";
        let scenario = if hides {
            "open_names_the_namespace"
        } else {
            "open_succeeds"
        };
        wrapped(&["unshare", "-n"], scenario);
    }
}

/// Run by scenarios above, under other circumstances.
mod inner {
    use super::*;

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn connect_names_the_capability() {
        in_guest();
        let (kernel, _server) = SocketPair::many(1).unwrap();
        let nbd = NbdFamily::open().unwrap();
        let error = nbd.connect(&request("x", MIB), &kernel).unwrap_err();
        assert!(error.to_string().contains("CAP_SYS_ADMIN"), "{error}");
    }

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn open_names_the_namespace() {
        in_guest();
        let error = NbdFamily::open().unwrap_err();
        assert!(matches!(error, KernelError::NetworkNamespace), "{error}");
    }

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn open_succeeds() {
        in_guest();
        NbdFamily::open().unwrap();
    }
}

mod without_nbd {
    use super::*;

    #[test]
    #[ignore = "runs inside the kernel lane"]
    fn open_names_modprobe() {
        in_guest();
        let error = KernelNbd::open().unwrap_err();
        assert!(matches!(error, KernelError::NoModule), "{error}");
        assert!(error.to_string().contains("modprobe nbd"), "{error}");
    }
}
