//! Foreign NBD clients against the server: everything they know to ask, byte
//! for byte.

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use crate::support::memory_disk::{Kind, MemoryDisk};
use dysk::device::BlockDevice;
use dysk::nbd::server::Server;
use dysk::nbd::transmission::Stop;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;

const MIB: u64 = 1 << 20;
const NAME: &str = "vol-1";

/// A server on a UNIX socket, stopped and checked when dropped.
struct Served {
    folder: TempDir,
    disk: Arc<MemoryDisk>,
    stop: watch::Sender<Stop>,
    runtime: Runtime,
    server: Option<JoinHandle<()>>,
    uri: String,
}

impl Served {
    fn new(disk: MemoryDisk) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let runtime = Runtime::new().expect("a runtime");
        let (stop, stopped) = watch::channel(Stop::Run);
        let disk = Arc::new(disk);
        let served = Arc::clone(&disk);
        let server = runtime
            .block_on(async { Server::bind_unix(folder.path().join("nbd.sock")) })
            .expect("the server listens");
        let uri = server.uri(NAME);
        let server = runtime.spawn(async move { server.run(served, NAME, stopped).await });
        Self {
            folder,
            disk,
            stop,
            runtime,
            server: Some(server),
            uri,
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file of `size` bytes: data, with the third quarter a hole.
    fn source(&self, size: u64) -> PathBuf {
        let path = self.file("source");
        let mut file = std::fs::File::create(&path).expect("a file");
        let quarter = size / 4;
        let data: Vec<u8> = (0..2 * quarter)
            .map(|at| (at * 31 / 7 % 251) as u8)
            .collect();
        file.write_all(&data).expect("written");
        file.seek(SeekFrom::Start(3 * quarter)).expect("sought");
        file.write_all(&data[..quarter as usize]).expect("written");
        path
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.send_replace(Stop::Close);
        let server = self.server.take().expect("dropped once");
        let ended = self.runtime.block_on(server);
        if !std::thread::panicking() {
            ended.expect("the server ends well");
            assert!(!self.socket().exists(), "the socket was left behind");
        }
    }
}

/// Runs a tool that `package` brings.
fn output(package: &str, tool: &str, args: &[&str]) -> Output {
    Command::new(tool)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {tool} (apt-get install {package}): {error}"))
}

/// As [`output`], and it has to succeed.
fn run(package: &str, tool: &str, args: &[&str]) -> String {
    let output = output(package, tool, args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{tool} {args:?}: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

fn nbdinfo(args: &[&str]) -> String {
    run("libnbd-bin", "nbdinfo", args)
}

fn nbdcopy(args: &[&str]) -> String {
    run("libnbd-bin", "nbdcopy", args)
}

fn qemu_img(args: &[&str]) -> String {
    run("qemu-utils", "qemu-img", args)
}

/// Runs commands of qemu-io; fails when one of them does.
fn qemu_io(uri: &str, commands: &[&str]) -> String {
    let mut args = vec!["-f", "raw", "-t", "none"];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    args.push(uri);
    let text = run("qemu-utils", "qemu-io", &args);
    let failed = ["failed", "rror"].iter().any(|word| text.contains(word));
    assert!(!failed, "qemu-io {commands:?}: {text}");
    text
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

fn assert_same_bytes(disk: &MemoryDisk, path: &Path) {
    let expected = std::fs::read(path).expect("readable");
    let found = disk.contents(0, expected.len());
    let wrong = expected.iter().zip(&found).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "first wrong byte");
}

#[test]
fn nbdinfo_sees_what_the_export_is() {
    let served = Served::new(MemoryDisk::new(64 * MIB));
    let uri = &served.uri;
    assert_eq!(nbdinfo(&["--size", uri]).trim(), "67108864");
    for able in [
        "connect",
        "flush",
        "fua",
        "trim",
        "zero",
        "fast-zero",
        "multi-conn",
        "df",
    ] {
        nbdinfo(&["--can", able, uri]);
    }
    nbdinfo(&["--can", "structured-reply", uri]);
    for unable in [
        ["--can", "cache"],
        ["--is", "read-only"],
        ["--is", "rotational"],
    ] {
        let answer = output("libnbd-bin", "nbdinfo", &[unable[0], unable[1], uri]);
        assert_eq!(answer.status.code(), Some(2), "{unable:?}");
    }
    let report = nbdinfo(&["--json", "--no-content", uri]);
    let report: serde_json::Value = serde_json::from_str(&report).expect("json");
    let export = &report["exports"][0];
    assert_eq!(report["protocol"], "newstyle-fixed");
    assert_eq!(export["block_size_minimum"], 512);
    assert_eq!(export["block_size_preferred"], 4096);
    assert_eq!(export["block_size_maximum"], 4 << 20);
    assert_eq!(export["contexts"][0], "base:allocation");
}

#[test]
fn nbdinfo_lists_the_export_and_takes_the_default_name() {
    let served = Served::new(MemoryDisk::new(MIB));
    let base = format!("nbd+unix:///?socket={}", text(&served.socket()));
    assert!(nbdinfo(&["--list", "--no-content", &base]).contains(&format!("export=\"{NAME}\"")));
    assert_eq!(nbdinfo(&["--size", &base]).trim(), "1048576");
    let wrong = format!("nbd+unix:///other?socket={}", text(&served.socket()));
    let answer = output("libnbd-bin", "nbdinfo", &["--size", &wrong]);
    assert!(!answer.status.success(), "a wrong name was accepted");
}

#[test]
fn nbdinfo_maps_data_and_holes() {
    let served = Served::new(MemoryDisk::new(MIB));
    qemu_io(&served.uri, &["write -P 7 64k 128k"]);
    let map = nbdinfo(&["--map", "--json", &served.uri]);
    let map: serde_json::Value = serde_json::from_str(&map).expect("json");
    let extents: Vec<(u64, u64, u64)> = map
        .as_array()
        .expect("a list")
        .iter()
        .map(|extent| {
            let number = |name: &str| extent[name].as_u64().expect("a number");
            (number("offset"), number("length"), number("type"))
        })
        .collect();
    assert_eq!(
        extents,
        [
            (0, 64 << 10, 3),
            (64 << 10, 128 << 10, 0),
            (192 << 10, 832 << 10, 3)
        ]
    );
}

#[test]
fn nbdcopy_brings_every_byte_there_and_back() {
    for connections in ["--connections=1", "--connections=4"] {
        let served = Served::new(MemoryDisk::new(32 * MIB));
        let source = served.source(32 * MIB);
        let back = served.file("back");
        nbdcopy(&[
            connections,
            "--requests=64",
            "--flush",
            text(&source),
            &served.uri,
        ]);
        assert_same_bytes(&served.disk, &source);
        nbdcopy(&[connections, "--requests=64", &served.uri, text(&back)]);
        assert_same_bytes(&served.disk, &back);
        let hole = served.disk.contents(16 << 20, 8 << 20);
        assert!(hole.iter().all(|&byte| byte == 0));
    }
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    let served = Served::new(MemoryDisk::new(32 * MIB));
    let source = served.source(32 * MIB);
    let back = served.file("back.qcow2");
    let uri = &served.uri;
    let info = qemu_img(&["info", "--output=json", uri]);
    let info: serde_json::Value = serde_json::from_str(&info).expect("json");
    assert_eq!(info["virtual-size"], 32 << 20);

    let source = text(&source);
    qemu_img(&[
        "convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "16", source, uri,
    ]);
    qemu_img(&["compare", "-f", "raw", "-F", "raw", source, uri]);
    assert_same_bytes(&served.disk, Path::new(source));
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", uri, text(&back)]);
    qemu_img(&["compare", "-f", "raw", "-F", "qcow2", source, text(&back)]);

    let map = qemu_img(&["map", "--output=json", "-f", "raw", uri]);
    let map: serde_json::Value = serde_json::from_str(&map).expect("json");
    let hole = map
        .as_array()
        .expect("a list")
        .iter()
        .find(|extent| extent["start"] == 16 << 20)
        .expect("an extent where the hole begins");
    assert_eq!(
        (&hole["zero"], &hole["length"]),
        (&true.into(), &(8 << 20).into())
    );
}

#[test]
fn qemu_io_writes_zeroes_discards_flushes_and_forces_unit_access() {
    let served = Served::new(MemoryDisk::new(4 * MIB).recording());
    qemu_io(
        &served.uri,
        &[
            "write -P 0xab 0 1M",
            "write -f -P 0xcd 1M 64k",
            "write -z 128k 64k",
            "write -z -u 256k 64k",
            "discard 512k 128k",
            "flush",
            "read -P 0xab 0 128k",
            "read -P 0 128k 64k",
            "read -P 0xab 192k 64k",
            "read -P 0 256k 64k",
            "read -P 0 512k 128k",
            "read -P 0xcd 1M 64k",
        ],
    );
    let asked = served.disk.asked();
    let of = |kind| asked.iter().filter(move |asked| asked.kind == kind);
    assert!(of(Kind::Flush).count() >= 1);
    assert_eq!(of(Kind::WriteZeroes).count(), 2);
    let trims: Vec<_> = of(Kind::Trim)
        .map(|asked| (asked.offset, asked.len))
        .collect();
    assert_eq!(trims, [(512 << 10, 128 << 10)]);
    let forced: Vec<_> = of(Kind::Write)
        .filter(|asked| asked.fua)
        .map(|asked| (asked.offset, asked.len))
        .collect();
    assert_eq!(forced, [(1 << 20, 64 << 10)]);
}

#[test]
fn qemu_io_reads_and_writes_unaligned() {
    let served = Served::new(MemoryDisk::new(MIB));
    qemu_io(
        &served.uri,
        &[
            "write -P 0x11 0 8k",
            "write -P 0x22 513 1000",
            "write -z 4097 3",
            "read -P 0x11 0 513",
            "read -P 0x22 513 1000",
            "read -P 0x11 1513 2584",
            "read -P 0 4097 3",
            "read -P 0x11 4100 4092",
        ],
    );
}

#[test]
fn a_read_only_export_refuses_writes() {
    let served = Served::new(MemoryDisk::new(MIB).read_only());
    nbdinfo(&["--is", "read-only", &served.uri]);
    let args = ["-r", "-f", "raw", "-c", "read -P 0 0 4k", &served.uri];
    run("qemu-utils", "qemu-io", &args);
    let args = ["-f", "raw", "-c", "write 0 4k", &served.uri];
    let answer = output("qemu-utils", "qemu-io", &args);
    assert!(
        !answer.status.success(),
        "a write to a read-only export went through"
    );
}

#[test]
fn fio_verifies_what_it_wrote() {
    let served = Served::new(MemoryDisk::new(64 * MIB));
    let uri = format!("--uri={}", served.uri);
    run(
        "fio",
        "fio",
        &[
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randwrite",
            "--bsrange=512-128k",
            "--bs_unaligned=0",
            "--iodepth=32",
            "--size=64M",
            "--io_size=128M",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_state_save=0",
            "--verify_fatal=1",
            "--fsync=64",
        ],
    );
}

#[test]
fn the_nbd_crate_reads_what_it_wrote() {
    let served = Served::new(MemoryDisk::new(MIB));
    let mut stream = UnixStream::connect(served.socket()).expect("connected");
    let export = nbd::client::handshake(&mut stream, NAME.as_bytes()).expect("a handshake");
    assert_eq!((export.size, export.readonly), (MIB, false));
    assert!(export.send_flush && export.send_trim && !export.rotational);
    let mut client = nbd::client::NbdClient::new(&mut stream, &export);
    let data: Vec<u8> = (0..8192u32).map(|at| (at % 253) as u8).collect();
    client.seek(SeekFrom::Start(4096)).expect("sought");
    client.write_all(&data).expect("written");
    client.flush().expect("flushed");
    client.seek(SeekFrom::Start(4096)).expect("sought");
    let mut back = vec![0; data.len()];
    client.read_exact(&mut back).expect("read");
    assert_eq!(back, data);
    assert_eq!(served.disk.contents(4096, data.len()), data);
}

#[test]
fn tcp_serves_as_well() {
    let runtime = Runtime::new().expect("a runtime");
    let address = "127.0.0.1:0".parse().expect("an address");
    let server = runtime
        .block_on(Server::bind_tcp(address))
        .expect("listens");
    let uri = server.uri(NAME);
    let disk = Arc::new(MemoryDisk::new(8 * MIB));
    let (stop, stopped) = watch::channel(Stop::Run);
    let served = Arc::clone(&disk);
    let running = runtime.spawn(async move { server.run(served, NAME, stopped).await });
    assert_eq!(
        nbdinfo(&["--size", &uri]).trim(),
        disk.geometry().size.to_string()
    );
    qemu_io(&uri, &["write -P 9 1M 2M", "read -P 9 1M 2M"]);
    stop.send_replace(Stop::Close);
    runtime.block_on(running).expect("the server ends well");
}
