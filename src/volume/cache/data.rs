//! A cached volume's reads, writes, trims and flushes: what is answered from
//! the cache, what goes to the store, and who waits for whom.

use std::io;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::future::try_join_all;

use super::Cache;
use super::core::{Copied, Core, SECTION, Staged};
use super::layout::BLOCK;
use super::through::{Changing, overtake};
use crate::blob::Range;
use crate::buffers::Buffer;
use crate::caller::unless_gone;
use crate::device::{DeviceError, PAGE, ReadData, Segment};
use crate::volume::Volume;
use crate::volume::disk::{split, usize_from, whole_pages_around};
use crate::volume::io::LARGEST_PIECE;
use crate::volume::store::PageStore;

/// Gaps up to this long between missing parts are read along with them.
const READ_ALONG: u64 = 64 << 10;

/// A registration of a read, ended when dropped. As all that is undone by a
/// drop, it is made within the section that does it: a section runs to its end
/// though nobody waits for it any more, and what it answers is dropped then.
struct Watching {
    cache: Arc<Cache>,
    id: u64,
}

impl Drop for Watching {
    fn drop(&mut self) {
        let id = self.id;
        self.cache.soon(move |core| core.unregister(id));
    }
}

pub(super) fn staging_failed(error: &io::Error) -> DeviceError {
    DeviceError::Io(format!("staging file: {error}"))
}

pub(super) fn sections(range: Range) -> impl Iterator<Item = Range> {
    let first = range.start / BLOCK * BLOCK;
    let starts = (first..range.end).step_by(usize_from(SECTION));
    starts.map(move |start| Range {
        start: start.max(range.start),
        end: range.end.min(start + SECTION),
    })
}

pub(in crate::volume) fn blocks_around(range: Range) -> Range {
    Range {
        start: range.start / BLOCK * BLOCK,
        end: range.end.next_multiple_of(BLOCK),
    }
}

/// Missing parts joined over small gaps, none longer than one read may be.
fn reads(missing: &[Range]) -> Vec<Range> {
    let mut joined: Vec<Range> = Vec::new();
    for part in missing {
        match joined.last_mut() {
            Some(last)
                if part.start - last.end <= READ_ALONG
                    && part.end - last.start <= LARGEST_PIECE =>
            {
                last.end = part.end;
            }
            _ => joined.push(*part),
        }
    }
    joined
}

impl Cache {
    /// Whole pages that are all cached, if there is no need to wait for them.
    /// Anything else, failure included, is for `Volume::read_cached`.
    pub(in crate::volume) fn hit(&self, pages: Range) -> Option<ReadData> {
        if !self.memory || pages.len() > SECTION {
            return None;
        }
        let bytes = self.section(|core| core.hit(pages))?;
        Some(Bytes::from(bytes).into())
    }

    /// Stages whole pages if there is no need to wait for that; false leaves
    /// it to `Volume::write_cached`, which may stage them again.
    pub(in crate::volume) fn stage_at_once(&self, range: Range, data: &[u8]) -> bool {
        if !self.memory
            || !self.stages()
            || range.len() > SECTION
            || whole_pages_around(range) != range
        {
            return false;
        }
        let staged = self.section(|core| {
            if core.waiting > 0 {
                return Staged::default();
            }
            core.stage(range.start, data)
        });
        if staged.wake {
            self.work.notify_one();
        }
        staged.bytes == data.len()
    }
}

impl<S: PageStore> Volume<S> {
    pub(super) fn unfenced(&self) -> Result<(), DeviceError> {
        match self.io.standing.fenced() {
            Some(fenced) => Err(self.io.fenced(&fenced)),
            None => Ok(()),
        }
    }

    /// Reads whole pages, at most [`LARGEST_PIECE`].
    pub(in crate::volume) async fn read_cached(
        &self,
        cache: &Arc<Cache>,
        range: Range,
    ) -> Result<ReadData, DeviceError> {
        self.unfenced()?;
        let mut copied = Copied {
            bytes: Buffer::with_room(usize_from(range.len())),
            ..Copied::default()
        };
        let mut watching = None;
        for section in sections(range) {
            let guarded = Arc::clone(cache);
            let copy = cache.with(move |core| {
                let result = core.copy(section, range, &mut copied);
                if let Some(id) = copied.fill
                    && watching.is_none()
                {
                    watching = Some(Watching { cache: guarded, id });
                }
                (result, copied, watching)
            });
            let result;
            (result, copied, watching) = copy.await;
            result.map_err(|error| staging_failed(&error))?;
        }
        if copied.missing.is_empty() {
            return Ok(copied.bytes.share().into());
        }
        let watching = watching.expect("a read that misses is registered");
        if copied.missing == [range] {
            // The answer has buffers of its own.
            drop(copied.bytes);
            let data = self.io.read(range).await?;
            if let [Segment::Zeroes(_)] = data.segments() {
                // It costs nothing to have it again, so it needs no room.
                return Ok(data);
            }
            let bytes = data.to_bytes();
            self.fill(&watching, range.start, vec![range], bytes.clone())
                .await;
            return Ok(bytes.into());
        }
        let fetches = reads(&copied.missing).into_iter().map(|span| async move {
            let data = self.io.read(span).await?;
            Ok::<_, DeviceError>((span, data))
        });
        let mut bytes = copied.bytes;
        for (span, data) in try_join_all(fetches).await? {
            for part in copied
                .missing
                .iter()
                .filter(|part| part.start >= span.start && part.end <= span.end)
            {
                let from = usize_from(part.start - span.start);
                let to = usize_from(part.start - range.start);
                let len = usize_from(part.len());
                copy_data(&data.slice(from, len), &mut bytes[to..to + len]);
            }
        }
        let bytes = bytes.share();
        self.fill(&watching, range.start, copied.missing, bytes.clone())
            .await;
        Ok(bytes.into())
    }

    /// Keeps what a read fetched; `bytes` begin at `start`.
    async fn fill(&self, watching: &Watching, start: u64, parts: Vec<Range>, bytes: Bytes) {
        let id = watching.id;
        for section in parts.into_iter().flat_map(sections) {
            let from = usize_from(section.start - start);
            let data = bytes.slice(from..from + usize_from(section.len()));
            watching
                .cache
                .with(move |core| core.fill(id, section, &data))
                .await;
        }
    }

    /// Writes any range.
    pub(in crate::volume) async fn write_cached(
        &self,
        cache: &Arc<Cache>,
        range: Range,
        data: Bytes,
        fua: bool,
    ) -> Result<(), DeviceError> {
        self.unfenced()?;
        let work = self.write_parts(cache, range, data, fua);
        self.io.within_deadline("write", range, work).await
    }

    async fn write_parts(
        &self,
        cache: &Arc<Cache>,
        range: Range,
        data: Bytes,
        fua: bool,
    ) -> Result<(), DeviceError> {
        let stages = cache.stages() && !fua;
        if stages && whole_pages_around(range) == range {
            return self.stage(cache, range.start, data).await;
        }
        let locked = unless_gone(self.locks.lock(blocks_around(range))).await?;
        let (head, body, tail) = split(range);
        let part = |part: Range| {
            let at = usize_from(part.start - range.start);
            data.slice(at..at + usize_from(part.len()))
        };
        for edge in [head, tail] {
            if !edge.is_empty() {
                self.patch_cached(cache, edge, part(edge), stages).await?;
            }
        }
        if !body.is_empty() {
            if stages {
                drop(locked);
                return self.stage(cache, body.start, part(body)).await;
            }
            self.write_through(cache, body.start, part(body)).await?;
        }
        self.make_durable(cache, fua).await
    }

    /// Stages whole pages, waiting for room; what the cache cannot take goes
    /// through to the store.
    async fn stage(
        &self,
        cache: &Arc<Cache>,
        mut offset: u64,
        mut data: Bytes,
    ) -> Result<(), DeviceError> {
        while !data.is_empty() {
            let mut staged = self.try_stage(cache, offset, &data, false).await;
            if staged.bytes == 0 && !staged.failed {
                staged = self.stage_in_turn(cache, offset, &data).await?;
            }
            if staged.bytes == 0 {
                let len = data.len().min(usize_from(LARGEST_PIECE));
                let range = Range::at(offset, len as u64);
                let _locked = unless_gone(self.locks.lock(blocks_around(range))).await?;
                self.write_through(cache, offset, data.slice(..len)).await?;
                staged.bytes = len;
            }
            offset += staged.bytes as u64;
            data = data.slice(staged.bytes..);
        }
        Ok(())
    }

    async fn try_stage(
        &self,
        cache: &Arc<Cache>,
        offset: u64,
        data: &Bytes,
        in_turn: bool,
    ) -> Staged {
        let staged = if cache.memory {
            cache.section(|core| {
                if core.waiting > 0 && !in_turn {
                    return Staged::default();
                }
                core.stage(offset, data)
            })
        } else {
            let data = data.clone();
            let stage = move |core: &mut Core| {
                if core.waiting > 0 && !in_turn {
                    return Staged::default();
                }
                core.stage(offset, &data)
            };
            cache.with(stage).await
        };
        if staged.wake {
            cache.work.notify_one();
        }
        staged
    }

    /// Waits for room behind those that wait already. Nothing staged means
    /// that waiting would not help.
    async fn stage_in_turn(
        &self,
        cache: &Arc<Cache>,
        offset: u64,
        data: &Bytes,
    ) -> Result<Staged, DeviceError> {
        let _waiting = Waiting::begin(cache).await;
        let _turn = unless_gone(cache.turn.acquire())
            .await?
            .expect("the semaphore is never closed");
        loop {
            let progress = cache.progress.notified();
            tokio::pin!(progress);
            progress.as_mut().enable();
            self.unfenced()?;
            let staged = self.try_stage(cache, offset, data, true).await;
            let dirty = cache.with(|core| core.index.dirty_blocks()).await;
            if staged.bytes > 0 || staged.failed || dirty == 0 {
                return Ok(staged);
            }
            cache.work.notify_one();
            unless_gone(progress).await?;
        }
    }

    /// Writes part of a page by reading it first. The caller has locked its
    /// block, so no other such write is under way; one that is staged
    /// meanwhile, which takes no lock, is noticed.
    async fn patch_cached(
        &self,
        cache: &Arc<Cache>,
        range: Range,
        part: Bytes,
        stages: bool,
    ) -> Result<(), DeviceError> {
        let page = whole_pages_around(range);
        let at = usize_from(range.start - page.start);
        let patched = |old: &ReadData| {
            let mut new = BytesMut::from(old.to_bytes());
            new[at..at + part.len()].copy_from_slice(&part);
            new.freeze()
        };
        // What is merged here is written back: no late write may get in between.
        let owed = unless_gone(self.io.standing.nothing_owed()).await?;
        owed.map_err(|fenced| self.io.fenced(&fenced))?;
        if stages && self.patch_staged(cache, page, &patched).await? {
            return Ok(());
        }
        // What is staged from here on counts as later, and wins.
        let changing = Changing::begin(cache, page).await;
        let new = patched(&self.read_cached(cache, page).await?);
        overtake(cache, page.start, &new).await;
        self.write_pages(page.start, new.clone()).await?;
        self.written(cache, page.start, &new).await?;
        changing.done();
        Ok(())
    }

    /// Stages a patched page; false when there is no room, and no waiting for
    /// it with a lock held.
    async fn patch_staged(
        &self,
        cache: &Arc<Cache>,
        page: Range,
        patched: impl Fn(&ReadData) -> Bytes,
    ) -> Result<bool, DeviceError> {
        loop {
            let guarded = Arc::clone(cache);
            let register = move |core: &mut Core| Watching {
                id: core.register(page),
                cache: guarded,
            };
            let watching = cache.with(register).await;
            let id = watching.id;
            let new = patched(&self.read_cached(cache, page).await?);
            let stage =
                move |core: &mut Core| core.undisturbed(id).then(|| core.stage(page.start, &new));
            let staged = cache.with(stage).await;
            drop(watching);
            let Some(staged) = staged else {
                continue;
            };
            if staged.wake {
                cache.work.notify_one();
            }
            return Ok(staged.bytes > 0);
        }
    }
}

/// A writer that waits for room, until dropped.
struct Waiting(Arc<Cache>);

impl Waiting {
    async fn begin(cache: &Arc<Cache>) -> Self {
        let guarded = Arc::clone(cache);
        let begin = move |core: &mut Core| {
            core.waiting += 1;
            Self(guarded)
        };
        cache.with(begin).await
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.soon(|core| core.waiting -= 1);
    }
}

fn copy_data(data: &ReadData, mut to: &mut [u8]) {
    for segment in data.segments() {
        let len = match segment {
            Segment::Data(bytes) => {
                to[..bytes.len()].copy_from_slice(bytes);
                bytes.len()
            }
            Segment::Zeroes(len) => {
                to[..*len].fill(0);
                *len
            }
        };
        to = &mut to[len..];
    }
    debug_assert!(to.is_empty());
}

const _: () = assert!(PAGE == super::layout::SECTOR as u64);
