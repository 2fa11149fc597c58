//! What a bench runs on: a block device, a volume that this process serves, or
//! a file that has no name any more. Nothing is written before it is proven
//! that nothing is there to be lost.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::fio::{self, On};
use super::{MIB, Options};
use crate::cli::Global;
use crate::cli::error::{CliError, note};
use crate::cli::serve::{Access, open};
use crate::cli::signals::Signals;
use crate::cli::target::Target;
use crate::device::BlockDevice;
use crate::nbd::server::Server;
use crate::nbd::transmission::Stop;
use crate::node::name::AttachmentName;
use crate::size::ByteSize;
use crate::volume::Volume;

/// Any filesystem, partition table, volume manager or encryption has something
/// within this of one of the ends.
const ENDS: u64 = MIB;
/// In between this many looks are taken.
const LOOKS: u64 = 64;
const LOOK: u64 = 4096;
const TRIM: u64 = 1 << 30;

const SCRATCH: &str = "bench a file on its filesystem with --scratch-file DIR";

/// Where the jobs run.
pub enum Ground {
    Device(Device),
    Volume(Exported),
    Scratch(Scratch),
}

/// A block device that nobody can mount meanwhile.
pub struct Device {
    path: PathBuf,
    file: File,
    size: u64,
}

/// A volume on a socket of its own.
pub struct Exported {
    address: String,
    volume: Arc<Volume>,
    folder: PathBuf,
    socket: PathBuf,
    size: u64,
    stop: watch::Sender<Stop>,
    running: JoinHandle<()>,
}

/// A file without a name: it is gone with this process, however that ends.
pub struct Scratch {
    folder: String,
    file: File,
    size: u64,
}

impl Ground {
    /// Finds it, and makes sure that nothing is lost there.
    pub async fn find(
        global: &Global,
        options: &Options,
        signals: &mut Signals,
    ) -> Result<Self, CliError> {
        let device = match &options.target {
            Some(text) if text.starts_with('/') => Some(PathBuf::from(text)),
            Some(text) if !text.contains('/') => Some(attached(global, text).await?),
            _ => None,
        };
        if let Some(folder) = &options.scratch_file {
            return Scratch::make(folder, device.as_deref(), options).map(Self::Scratch);
        }
        if let Some(path) = device {
            return Device::claim(path, options.size).map(Self::Device);
        }
        let text = options.target.as_deref().unwrap_or_default();
        let target = Target::find(text, None, &options.account)?;
        let exported = Exported::open(&target, options, signals).await?;
        Ok(Self::Volume(exported))
    }

    /// What a report calls it.
    pub fn name(&self) -> &str {
        match self {
            Self::Device(device) => device.path.to_str().unwrap_or("device"),
            Self::Volume(exported) => &exported.address,
            Self::Scratch(scratch) => &scratch.folder,
        }
    }

    /// How fio is to use it.
    pub async fn fio(&self) -> Result<On, CliError> {
        const KERNEL: [&str; 3] = ["libaio", "io_uring", "psync"];
        Ok(match self {
            Self::Device(device) => On {
                place: format!("--filename={}", device.path.display()),
                engine: fio::engine(&KERNEL).await?,
                direct: true,
                size: device.size,
            },
            Self::Volume(exported) => On {
                place: format!("--uri=nbd+unix:///?socket={}", exported.socket.display()),
                engine: fio::engine(&["nbd"]).await?,
                direct: false,
                size: exported.size,
            },
            Self::Scratch(scratch) => On {
                place: format!("--filename={}", scratch.path()),
                engine: fio::engine(&KERNEL).await?,
                direct: scratch.takes_direct(),
                size: scratch.size,
            },
        })
    }

    /// Takes away what was written, and lets go.
    pub async fn clear(self) -> Result<(), CliError> {
        match self {
            Self::Device(device) => device.clear().await,
            Self::Volume(exported) => exported.clear().await,
            Self::Scratch(_) => Ok(()),
        }
    }
}

async fn attached(global: &Global, name: &str) -> Result<PathBuf, CliError> {
    let name: AttachmentName = name.parse()?;
    let attachment = global.client().status(&name).await?;
    attachment.device.ok_or_else(|| {
        CliError::failed(format!(
            "{name} has no device yet: see `dyskctl status {name}`"
        ))
    })
}

/// Whole MiB of at most `wanted` that a disk of `size` bytes has.
fn part(size: u64, wanted: ByteSize, name: &str) -> Result<u64, CliError> {
    let part = size.min(wanted.0) / MIB * MIB;
    if part == 0 {
        return Err(CliError::failed(format!(
            "{name} has {size} bytes: too small to bench"
        )));
    }
    Ok(part)
}

/// Where data would be, on a disk of `size` bytes: offsets and lengths.
fn looks(size: u64) -> Vec<(u64, u64)> {
    let end = size.saturating_sub(ENDS);
    let mut looks = vec![(0, size.min(ENDS))];
    let between = (1..=LOOKS).map(|number| {
        let at = size / (LOOKS + 1) * number / LOOK * LOOK;
        (at, LOOK.min(size - at))
    });
    looks.extend(between);
    looks.push((end, size - end));
    looks
}

fn holds_data(name: &str, at: u64) -> CliError {
    CliError::failed(format!(
        "{name} holds data at byte {at}, which a bench would overwrite: {SCRATCH}, \
         or empty it first (blkdiscard)"
    ))
}

impl Device {
    fn claim(path: PathBuf, wanted: ByteSize) -> Result<Self, CliError> {
        let name = path.display().to_string();
        let failed = |error: io::Error| CliError::failed(format!("{name}: {error}"));
        let kind = std::fs::metadata(&path).map_err(failed)?.file_type();
        if !kind.is_block_device() {
            return Err(CliError::failed(format!(
                "{name} is no block device: name one, an attachment, or a volume"
            )));
        }
        // Held by us alone: refused while it is mounted, and no mount is let in.
        let flags = i32::try_from(OFlags::EXCL.bits()).unwrap_or(0);
        let mut open = OpenOptions::new();
        open.read(true).write(true).custom_flags(flags);
        let file = open.open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => {
                CliError::failed(format!("{name} is mounted or otherwise in use: {SCRATCH}"))
            }
            _ => failed(error),
        })?;
        let size = (&file)
            .seek_end()
            .map_err(|error| CliError::failed(format!("{name}: {error}")))?;
        for (at, len) in looks(size) {
            let mut data = vec![0; usize::try_from(len).unwrap_or(0)];
            file.read_exact_at(&mut data, at).map_err(|error| {
                CliError::failed(format!("cannot read {name} at {at}: {error}"))
            })?;
            if let Some(found) = data.iter().position(|byte| *byte != 0) {
                return Err(holds_data(&name, at + found as u64));
            }
        }
        let size = part(size, wanted, &name)?;
        Ok(Self { path, file, size })
    }

    async fn clear(self) -> Result<(), CliError> {
        let Self { path, file, size } = self;
        let cleared = tokio::process::Command::new("blkdiscard")
            .args(["--force", "--zeroout", "--offset", "0", "--length"])
            .arg(size.to_string())
            .arg(&path)
            .output()
            .await;
        drop(file);
        let reason = match cleared {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
            Err(error) => error.to_string(),
        };
        Err(CliError::failed(format!(
            "the bench's data is left in the first {size} bytes of {}: {reason}",
            path.display()
        )))
    }
}

trait SeekEnd {
    fn seek_end(self) -> io::Result<u64>;
}

impl SeekEnd for &File {
    /// The size of a device too.
    fn seek_end(mut self) -> io::Result<u64> {
        io::Seek::seek(&mut self, io::SeekFrom::End(0))
    }
}

impl Exported {
    async fn open(
        target: &Target,
        options: &Options,
        signals: &mut Signals,
    ) -> Result<Self, CliError> {
        fio::engine(&["nbd"]).await?;
        let folder = std::env::temp_dir().join(format!("dysk-bench-{}", uuid::Uuid::new_v4()));
        let socket = folder.join("socket");
        let access = Access {
            read_only: false,
            break_lease: false,
            policy: options.policy.policy()?,
            recover: options.policy.recover(),
        };
        let (volume, address) = open(target, access, signals).await?;
        let checked = Self::check(&volume, &address, options.size).await;
        let served = checked.and_then(|size| {
            let failed = |error: &dyn std::fmt::Display| {
                CliError::failed(format!("{}: {error}", folder.display()))
            };
            let mut builder = std::fs::DirBuilder::new();
            builder.mode(0o700);
            builder.create(&folder).map_err(|error| failed(&error))?;
            let server = Server::bind_unix(&socket).map_err(|error| failed(&error))?;
            Ok((size, server))
        });
        let (size, server) = match served {
            Ok(served) => served,
            Err(error) => {
                remove(&folder);
                if let Err(left) = volume.close().await {
                    note(&format!(
                        "lease not released: {left}: it ends by itself within a minute"
                    ));
                }
                return Err(error);
            }
        };
        let (stop, stopped) = watch::channel(Stop::Run);
        let running = tokio::spawn({
            let volume = Arc::clone(&volume);
            async move { server.run(volume, "", stopped).await }
        });
        Ok(Self {
            address,
            volume,
            folder,
            socket,
            size,
            stop,
            running,
        })
    }

    /// The volume is empty; how much of it to use.
    async fn check(volume: &Volume, address: &str, wanted: ByteSize) -> Result<u64, CliError> {
        let size = volume.geometry().size;
        for (at, len) in looks(size) {
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            let data = volume
                .read(at, len)
                .await
                .map_err(|error| CliError::failed(format!("cannot read {address}: {error}")))?;
            if let Some(found) = data.to_bytes().iter().position(|byte| *byte != 0) {
                return Err(holds_data(address, at + found as u64));
            }
        }
        part(size, wanted, address)
    }

    async fn clear(self) -> Result<(), CliError> {
        self.stop.send_replace(Stop::Close);
        let ended = self.running.await;
        let mut cleared = Ok(());
        for at in (0..self.size).step_by(usize::try_from(TRIM).unwrap_or(usize::MAX)) {
            let len = TRIM.min(self.size - at);
            cleared = cleared.and(self.volume.trim(at, len, true).await);
        }
        let closed = self.volume.close().await;
        remove(&self.folder);
        let address = &self.address;
        ended.map_err(|error| CliError::failed(format!("serving {address} died: {error}")))?;
        cleared.map_err(|error| {
            CliError::failed(format!("the bench's data is left in {address}: {error}"))
        })?;
        closed.map_err(|error| {
            CliError::failed(format!(
                "lease not released: {error}: it ends by itself within a minute"
            ))
        })
    }
}

fn remove(folder: &Path) {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            note(&format!("cannot remove {}: {error}", folder.display()));
        }
        _ => {}
    }
}

impl Scratch {
    fn make(folder: &Path, device: Option<&Path>, options: &Options) -> Result<Self, CliError> {
        let name = folder.display().to_string();
        let failed = |error: io::Error| CliError::failed(format!("{name}: {error}"));
        if let Some(device) = device {
            let wanted = std::fs::metadata(device)
                .map_err(|error| CliError::failed(format!("{}: {error}", device.display())))?;
            if std::fs::metadata(folder).map_err(failed)?.dev() != wanted.rdev() {
                return Err(CliError::failed(format!(
                    "{name} is not on {}: name a folder of its filesystem, or leave the device out",
                    device.display()
                )));
            }
        }
        let room = rustix::fs::statvfs(folder).map_err(|error| failed(error.into()))?;
        let free = room.f_bavail.saturating_mul(room.f_frsize);
        let size = part(options.size.0, options.size, &name)?;
        if size > free / 10 * 9 {
            return Err(CliError::failed(format!(
                "{name} has {} free, too little for {}: give less with --size",
                ByteSize(free / MIB * MIB),
                ByteSize(size)
            )));
        }
        let path = folder.join(format!(".dysk-bench-{}", uuid::Uuid::new_v4()));
        let mut open = OpenOptions::new();
        open.read(true).write(true).create_new(true).mode(0o600);
        let file = open.open(&path).map_err(failed)?;
        std::fs::remove_file(&path).map_err(failed)?;
        // One that is too short fio would make anew, by name.
        file.set_len(size).map_err(failed)?;
        Ok(Self {
            folder: name,
            file,
            size,
        })
    }

    /// The file, for as long as this process has it open.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    fn takes_direct(&self) -> bool {
        let flags = i32::try_from(OFlags::DIRECT.bits()).unwrap_or(0);
        let mut open = OpenOptions::new();
        let direct = open.read(true).custom_flags(flags).open(self.path());
        if let Err(error) = &direct {
            note(&format!(
                "{} takes no direct i/o ({error}): this measures the page cache too",
                self.folder
            ));
        }
        direct.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_see_both_ends_and_stay_within() {
        for size in [512, 4096, MIB, 3 * MIB, 1 << 30, (8 << 40) - 512] {
            let looks = looks(size);
            assert_eq!(looks[0], (0, size.min(ENDS)));
            let (at, len) = looks[looks.len() - 1];
            assert_eq!(at + len, size);
            assert!(len == size.min(ENDS));
            assert!(
                looks
                    .iter()
                    .all(|(at, len)| at + len <= size && *len <= ENDS)
            );
        }
    }
}
