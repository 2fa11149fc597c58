//! s3backer: a file in FUSE whose blocks are objects of an S3 bucket.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where `tests/setup bench` has put the service.
const STORE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/build/s3");
const BUCKET: &str = "dysks";

/// It can be mounted here.
pub fn is_possible() -> bool {
    Path::new("/dev/fuse").exists()
}

/// Its store, with as long a latency as the others'.
pub fn store(latency_ms: u32) -> Command {
    let mut command = Command::new(STORE);
    command.args(["-bucket", BUCKET, "-latency"]);
    command.arg(format!("{latency_ms}ms"));
    command
}

/// The command that mounts it in `folder`, and the file that is there then.
/// Without its caches: with them it acknowledges what a crash loses.
pub fn mount(folder: &Path, store: SocketAddr, size: u64) -> (Command, PathBuf) {
    let (mountpoint, access) = (folder.join("s3backer"), folder.join("s3backer.access"));
    std::fs::create_dir(&mountpoint).expect("a folder");
    std::fs::write(&access, "bench:bench\n").expect("a file");
    let mut command = Command::new("s3backer");
    command.args("-f --quiet --blockSize=4k --filename=disk -o direct_io".split(' '));
    command
        .args("--blockCacheSize=0 --md5CacheSize=0 --md5CacheTime=0 --minWriteDelay=0".split(' '));
    command.arg(format!("--size={size}"));
    command.arg(format!("--baseURL=http://{store}/"));
    command.arg(format!("--accessFile={}", access.display()));
    command.arg(BUCKET).arg(&mountpoint);
    (command, mountpoint.join("disk"))
}
