//! A block device in memory, with requests that can be held, delayed or made
//! to fail, and counters of what it was asked.

#![allow(dead_code, reason = "every test file uses another part of it")]

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use dysk::device::{BlockDevice, DeviceError, Extent, Geometry, PAGE, ReadData};
use tokio::sync::Semaphore;

/// Bytes allocated together.
const BLOCK: usize = 4096;

/// What a request was, for those who count or fail them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Flush,
    Trim,
    WriteZeroes,
    Extents,
}

/// A request as the device got it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    pub kind: Kind,
    pub offset: u64,
    pub len: u64,
    pub fua: bool,
}

type Decide<T> = Box<dyn Fn(Asked) -> T + Send + Sync>;

pub struct MemoryDisk {
    geometry: Geometry,
    size: AtomicU64,
    blocks: Mutex<Vec<Option<Box<[u8; BLOCK]>>>>,
    asked: Option<Mutex<Vec<Asked>>>,
    delay: Option<Decide<Duration>>,
    fail: Option<Decide<Option<DeviceError>>>,
    hold: Option<Decide<bool>>,
    gate: Semaphore,
    running: AtomicUsize,
    peak: AtomicUsize,
}

impl MemoryDisk {
    pub fn new(size: u64) -> Self {
        assert!(size.is_multiple_of(PAGE));
        let count = usize::try_from(size.div_ceil(BLOCK as u64)).expect("fits memory");
        Self {
            geometry: Geometry {
                size,
                preferred_block: 4096,
                max_payload: 4 << 20,
                read_only: false,
            },
            size: AtomicU64::new(size),
            blocks: Mutex::new((0..count).map(|_| None).collect()),
            asked: None,
            delay: None,
            fail: None,
            hold: None,
            gate: Semaphore::new(0),
            running: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
        }
    }

    pub fn read_only(mut self) -> Self {
        self.geometry.read_only = true;
        self
    }

    pub fn max_payload(mut self, bytes: u32) -> Self {
        self.geometry.max_payload = bytes;
        self
    }

    /// Records every request; see [`MemoryDisk::asked`].
    pub fn recording(mut self) -> Self {
        self.asked = Some(Mutex::default());
        self
    }

    /// Every request takes what `delay` says.
    pub fn delay(mut self, delay: impl Fn(Asked) -> Duration + Send + Sync + 'static) -> Self {
        self.delay = Some(Box::new(delay));
        self
    }

    /// A request fails, without effect, with what `fail` returns.
    pub fn fail(
        mut self,
        fail: impl Fn(Asked) -> Option<DeviceError> + Send + Sync + 'static,
    ) -> Self {
        self.fail = Some(Box::new(fail));
        self
    }

    /// Requests that `hold` picks wait for [`MemoryDisk::release`].
    pub fn hold(mut self, hold: impl Fn(Asked) -> bool + Send + Sync + 'static) -> Self {
        self.hold = Some(Box::new(hold));
        self
    }

    /// Lets `count` held requests go on, now or when they come.
    pub fn release(&self, count: usize) {
        self.gate.add_permits(count);
    }

    /// Requests so far, in the order the device got them.
    pub fn asked(&self) -> Vec<Asked> {
        let asked = self.asked.as_ref().expect("the disk is recording");
        asked.lock().expect("no test panicked in here").clone()
    }

    /// Requests running now.
    pub fn running(&self) -> usize {
        self.running.load(Ordering::SeqCst)
    }

    /// The most requests that ever ran together.
    pub fn peak(&self) -> usize {
        self.peak.load(Ordering::SeqCst)
    }

    /// The device's bytes, beside all requests.
    pub fn contents(&self, offset: u64, len: usize) -> Vec<u8> {
        self.copy_out(offset, len).to_bytes().to_vec()
    }

    fn blocks(&self) -> MutexGuard<'_, Vec<Option<Box<[u8; BLOCK]>>>> {
        self.blocks.lock().expect("no request panics in here")
    }

    /// What every request passes first; the guard ends with it.
    async fn enter(&self, asked: Asked) -> Result<Running<'_>, DeviceError> {
        let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.peak.fetch_max(running, Ordering::SeqCst);
        let guard = Running(&self.running);
        if let Some(list) = &self.asked {
            list.lock().expect("no test panicked in here").push(asked);
        }
        if self.hold.as_ref().is_some_and(|hold| hold(asked)) {
            self.gate
                .acquire()
                .await
                .expect("the gate is never closed")
                .forget();
        }
        let delay = self.delay.as_ref().map(|delay| delay(asked));
        if let Some(delay) = delay.filter(|delay| !delay.is_zero()) {
            tokio::time::sleep(delay).await;
        }
        match self.fail.as_ref().and_then(|fail| fail(asked)) {
            Some(error) => Err(error),
            None => Ok(guard),
        }
    }

    fn within(&self, offset: u64, len: u64) -> bool {
        let size = self.size.load(Ordering::SeqCst);
        offset.checked_add(len).is_some_and(|end| end <= size)
    }

    fn writable(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        if self.geometry.read_only {
            Err(DeviceError::ReadOnly)
        } else if self.within(offset, len) {
            Ok(())
        } else {
            Err(DeviceError::NoSpace)
        }
    }

    fn copy_out(&self, offset: u64, len: usize) -> ReadData {
        let blocks = self.blocks();
        let mut data = ReadData::new();
        for (index, from, take) in pieces(offset, len) {
            match &blocks[index] {
                Some(block) => data.push(Bytes::copy_from_slice(&block[from..from + take])),
                None => data.push_zeroes(take),
            }
        }
        data
    }

    fn clear(&self, offset: u64, len: u64, keep: bool) {
        let mut blocks = self.blocks();
        let len = usize::try_from(len).expect("fits memory");
        for (index, from, take) in pieces(offset, len) {
            let block = &mut blocks[index];
            if take == BLOCK && !keep {
                *block = None;
            } else if keep {
                block.get_or_insert_with(|| Box::new([0; BLOCK]))[from..from + take].fill(0);
            } else if let Some(block) = block {
                block[from..from + take].fill(0);
            }
        }
    }
}

struct Running<'a>(&'a AtomicUsize);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The parts of a range by block: index, start within it, length.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    let start = usize::try_from(offset).expect("fits memory");
    let mut at = start;
    std::iter::from_fn(move || {
        let left = start + len - at;
        (left > 0).then(|| {
            let (index, from) = (at / BLOCK, at % BLOCK);
            let take = left.min(BLOCK - from);
            at += take;
            (index, from, take)
        })
    })
}

impl BlockDevice for MemoryDisk {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.size.load(Ordering::SeqCst),
            ..self.geometry
        }
    }

    async fn read(&self, offset: u64, len: u32) -> Result<ReadData, DeviceError> {
        let _running = self.enter(ask(Kind::Read, offset, len.into())).await?;
        if !self.within(offset, len.into()) {
            return Err(DeviceError::Invalid("beyond the end".into()));
        }
        Ok(self.copy_out(offset, len as usize))
    }

    async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), DeviceError> {
        let len = data.len() as u64;
        let asked = Asked {
            fua,
            ..ask(Kind::Write, offset, len)
        };
        let _running = self.enter(asked).await?;
        self.writable(offset, len)?;
        let mut blocks = self.blocks();
        let mut rest = BytesMut::from(data);
        for (index, from, take) in pieces(offset, rest.len()) {
            blocks[index].get_or_insert_with(|| Box::new([0; BLOCK]))[from..from + take]
                .copy_from_slice(&rest.split_to(take));
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        self.enter(ask(Kind::Flush, 0, 0)).await.map(drop)
    }

    async fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), DeviceError> {
        let asked = Asked {
            fua,
            ..ask(Kind::Trim, offset, len)
        };
        let _running = self.enter(asked).await?;
        self.writable(offset, len)?;
        let start = offset.next_multiple_of(PAGE);
        let end = (offset + len) / PAGE * PAGE;
        if start < end {
            self.clear(start, end - start, false);
        }
        Ok(())
    }

    async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        fua: bool,
        no_hole: bool,
    ) -> Result<(), DeviceError> {
        let asked = Asked {
            fua,
            ..ask(Kind::WriteZeroes, offset, len)
        };
        let _running = self.enter(asked).await?;
        self.writable(offset, len)?;
        self.clear(offset, len, no_hole);
        Ok(())
    }

    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, DeviceError> {
        let _running = self.enter(ask(Kind::Extents, offset, len)).await?;
        if !self.within(offset, len) {
            return Err(DeviceError::Invalid("beyond the end".into()));
        }
        let blocks = self.blocks();
        let mut extents: Vec<Extent> = Vec::new();
        for (index, _, take) in pieces(offset, usize::try_from(len).expect("fits memory")) {
            let allocated = blocks[index].is_some();
            match extents.last_mut() {
                Some(last) if last.allocated == allocated => last.len += take as u64,
                _ => extents.push(Extent {
                    len: take as u64,
                    allocated,
                    zero: !allocated,
                }),
            }
        }
        Ok(extents)
    }
}

fn ask(kind: Kind, offset: u64, len: u64) -> Asked {
    Asked {
        kind,
        offset,
        len,
        fua: false,
    }
}
