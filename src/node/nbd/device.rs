//! One nbd device, and how it is taken from the kernel.
//!
//! A detach that is not forced claims the device exclusively, as mount does,
//! and holds the claim until it is disconnected: nobody can begin to use it
//! in between.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::openers;
use super::sessions::Sessions;
use crate::nbd::kernel::{KernelError, KernelNbd, Sysfs};
use crate::node::transport::{BoxFuture, Device, Parked, TransportError};

/// How long a device that only has probers may take to be left alone by them.
const PROBER_PATIENCE: Duration = Duration::from_secs(2);
/// How often to look again for that.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How long a resize waits for connections, and for the kernel.
const RESIZE_PATIENCE: Duration = Duration::from_secs(10);
/// How long it waits for a moment without I/O, which a busy device may not have.
const QUIET_PATIENCE: Duration = Duration::from_millis(500);
/// How long the driver may take to let go once nobody uses the device.
const GONE_PATIENCE: Duration = Duration::from_secs(10);
/// The same when forced: whoever has it open keeps it from going.
const FORCED_GONE_PATIENCE: Duration = Duration::from_secs(1);

/// A connected nbd device.
pub(super) struct NbdDevice {
    kernel: KernelNbd,
    sysfs: Sysfs,
    index: u32,
    backend: String,
    path: PathBuf,
    /// None for a device that an earlier daemon left.
    sessions: Option<Sessions>,
    /// When it was taken up from a daemon that died.
    crashed: Option<Instant>,
}

impl NbdDevice {
    pub fn new(
        kernel: KernelNbd,
        sysfs: Sysfs,
        index: u32,
        backend: String,
        path: PathBuf,
        sessions: Option<Sessions>,
    ) -> Self {
        Self {
            kernel,
            sysfs,
            index,
            backend,
            path,
            sessions,
            crashed: None,
        }
    }

    /// It was taken up after a crash, a moment ago.
    pub fn after_a_crash(mut self) -> Self {
        self.crashed = Some(Instant::now());
        self
    }

    /// How long to wait for a moment without I/O: while requests of a daemon
    /// that died may still have to be sent again, until they have been.
    fn quiet_patience(&self) -> Duration {
        let settled = self.crashed.map(|crashed| crashed + 2 * super::REPLAY);
        let left = settled.map(|at| at.saturating_duration_since(Instant::now()));
        left.unwrap_or_default().max(QUIET_PATIENCE)
    }

    /// Some kernels stop the device's queue to change its size, and wait for
    /// all that is under way with a lock held that every call of the driver
    /// needs: also the one that would replace a dead connection, on which just
    /// that may wait. So the connections are whole before, and what a daemon
    /// that died took with it has been sent again.
    async fn grow(&self, size: u64) -> Result<(), TransportError> {
        let (sysfs, index, backend) = (self.sysfs.clone(), self.index, self.backend.clone());
        let state = super::blocking(move || sysfs.expect_ours(index, &backend)).await?;
        if state.size_bytes == size {
            return Ok(());
        }
        let failed =
            |reason: String| TransportError::Failed(format!("{}: {reason}", self.path.display()));
        if state.size_bytes > size {
            let reason = format!("it has {} bytes and never shrinks", state.size_bytes);
            return Err(failed(reason));
        }
        let whole = match &self.sessions {
            Some(sessions) => tokio::time::timeout(RESIZE_PATIENCE, sessions.whole())
                .await
                .is_ok(),
            None => false,
        };
        if !whole {
            let reason = "its connections are being replaced: repeat the resize".to_owned();
            return Err(failed(reason));
        }
        let (sysfs, patience) = (self.sysfs.clone(), self.quiet_patience());
        super::blocking(move || sysfs.wait_quiet(index, patience)).await?;
        let resized = self.kernel.resize(self.index, &self.backend, size);
        let waits =
            || failed("the kernel waits for i/o that is under way: repeat the resize".into());
        tokio::time::timeout(RESIZE_PATIENCE, resized)
            .await
            .map_err(|_| waits())??;
        let sysfs = self.sysfs.clone();
        super::blocking(move || sysfs.wait_ready(index, size, RESIZE_PATIENCE)).await?;
        Ok(())
    }

    pub async fn take(&self, force: bool) -> Result<(), TransportError> {
        let claim = if force { None } else { self.claim().await? };
        if let (Some(claim), Some(sessions)) = (&claim, &self.sessions) {
            self.flush(claim, sessions).await?;
        }
        if let Some(sessions) = &self.sessions {
            sessions.leaving();
        }
        match self.kernel.disconnect(self.index, &self.backend).await {
            // Somebody was faster: nbd-client -d, or an overtaken detach.
            Ok(()) | Err(KernelError::NotOurs { .. } | KernelError::NoSuchDevice(_)) => {}
            Err(error) => return Err(error.into()),
        }
        drop(claim);
        if let Some(sessions) = &self.sessions {
            sessions.end().await;
        }
        self.wait_gone(force).await
    }

    /// Makes sure that nobody uses the device and nobody can. None when it is
    /// not connected any more.
    async fn claim(&self) -> Result<Option<Arc<File>>, TransportError> {
        let (sysfs, index, backend) = (self.sysfs.clone(), self.index, self.backend.clone());
        let path = self.path.clone();
        let work = move || match sysfs.expect_ours(index, &backend) {
            Ok(_) => claim(&sysfs, index, &path).map(|file| Some(Arc::new(file))),
            Err(KernelError::NotOurs { .. } | KernelError::NoSuchDevice(_)) => Ok(None),
            Err(error) => Err(error.into()),
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            Err(error) => Err(TransportError::Failed(format!(
                "looking at {} died: {error}",
                self.path.display()
            ))),
        }
    }

    /// Everything that was written is in the store: what the volume has staged,
    /// then what the kernel may still have.
    ///
    /// In this order, for a thread that waits for the store inside of the
    /// kernel cannot be ended, nor can its process: a daemon told to stop would
    /// stay as long as the store is away, and keep its successor out.
    async fn flush(&self, claim: &Arc<File>, sessions: &Sessions) -> Result<(), TransportError> {
        let path = &self.path;
        let flushed = sessions.flush().await;
        flushed.map_err(|error| cannot_flush(path, &error))?;
        let claim = claim.clone();
        match tokio::task::spawn_blocking(move || claim.sync_all()).await {
            Ok(synced) => synced.map_err(|error| cannot_flush(path, &error)),
            Err(error) => Err(cannot_flush(path, &error)),
        }
    }

    async fn wait_gone(&self, force: bool) -> Result<(), TransportError> {
        let patience = if force {
            FORCED_GONE_PATIENCE
        } else {
            GONE_PATIENCE
        };
        let (sysfs, index) = (self.sysfs.clone(), self.index);
        match super::blocking(move || {
            let gone = sysfs.wait_gone(index, patience);
            sysfs.announce(index);
            gone
        })
        .await
        {
            Ok(()) => {}
            // It is disconnected; the number alone stays taken until the last
            // file is closed.
            Err(error) => tracing::warn!(device = %self.path.display(), %error, "disconnected"),
        }
        Ok(())
    }
}

impl Device for NbdDevice {
    fn path(&self) -> &Path {
        &self.path
    }

    fn detach(&self, force: bool) -> BoxFuture<'_, Result<(), TransportError>> {
        Box::pin(self.take(force))
    }

    fn resize(&self, size: u64) -> BoxFuture<'_, Result<(), TransportError>> {
        Box::pin(self.grow(size))
    }

    fn park(&self) -> BoxFuture<'_, Vec<Parked>> {
        Box::pin(async {
            match &self.sessions {
                Some(sessions) => sessions.park().await,
                None => Vec::new(),
            }
        })
    }

    fn go_on(&self) {
        if let Some(sessions) = &self.sessions {
            sessions.go_on();
        }
    }

    fn gone(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            match &self.sessions {
                Some(sessions) => sessions.ended().await,
                None => std::future::pending().await,
            }
        })
    }
}

fn claim(sysfs: &Sysfs, index: u32, path: &Path) -> Result<File, TransportError> {
    let deadline = Instant::now() + PROBER_PATIENCE;
    let device = || path.display().to_string();
    loop {
        if let Some(busy) = sysfs.busy(index)? {
            let in_use = TransportError::InUse {
                device: device(),
                places: vec![busy.to_string()],
            };
            // mkfs may just be closing it.
            if !matches!(busy, crate::nbd::kernel::Busy::Claimed) || Instant::now() >= deadline {
                return Err(in_use);
            }
            std::thread::sleep(LOOK_AGAIN);
            continue;
        }
        let exclusive = i32::try_from(OFlags::EXCL.bits()).unwrap_or_default();
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(exclusive)
            .open(path);
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => {
                std::thread::sleep(LOOK_AGAIN);
                continue;
            }
            Err(error) => {
                return Err(TransportError::Failed(format!(
                    "cannot open {}: {error}",
                    device()
                )));
            }
        };
        let openers = openers::of(&sysfs.proc, &sysfs.numbers(index)?);
        if openers.is_empty() {
            return Ok(file);
        }
        if Instant::now() >= deadline {
            return Err(TransportError::InUse {
                device: device(),
                places: openers,
            });
        }
        drop(file);
        std::thread::sleep(LOOK_AGAIN);
    }
}

fn cannot_flush(path: &Path, error: &dyn std::fmt::Display) -> TransportError {
    TransportError::Failed(format!(
        "cannot flush {}: {error}: see dyskd's log for the cause; --force detaches anyway \
         and loses what was not flushed",
        path.display()
    ))
}
