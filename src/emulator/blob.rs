//! One blob or snapshot: its record, its bytes and the maps of its pages.
//!
//! What survives the death of the process (`--dir` mode): every change is in
//! the page cache before its call returns. Within a change the order is
//! version, then page map, then data for a write, and version, then data, then
//! page map for a clear; so whatever instant the process dies at, a page the
//! map calls empty reads as zeroes, a changed page never keeps its old entity
//! tag, and each page is old or new.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::pages::{PAGE, PageMap};
use super::record::{Kind, Record};
use super::sparse::SparseFile;

/// Where in the map file the bits of the written pages begin; the version is
/// at its start.
const WRITTEN: u64 = 4096;
/// Where those of the pages touched since the last snapshot begin. 8 TiB of
/// pages need 2 GiB of bits.
const TOUCHED: u64 = WRITTEN + (4 << 30);
const MAP_END: u64 = TOUCHED + (4 << 30);

/// Largest page blob.
pub(super) const MAX_PAGE_BLOB: u64 = 8 << 40;

/// A blob or a snapshot.
#[derive(Debug)]
pub(super) struct Blob {
    /// What is known about it. `record.version` may run ahead of the stored
    /// record; the map file's is then the right one.
    pub record: Record,
    data: SparseFile,
    written: PageMap,
    touched: PageMap,
    map: Option<Arc<SparseFile>>,
    /// Whether changes are noted in `touched`: only once there is a snapshot.
    pub tracking: bool,
}

impl Blob {
    /// An empty blob of `record.size` bytes on new files.
    pub(super) fn create(
        record: Record,
        data: SparseFile,
        map: Option<SparseFile>,
    ) -> io::Result<Self> {
        data.resize(record.size)?;
        let map = map.map(Arc::new);
        let mirror = |base| {
            map.as_ref().map_or_else(PageMap::default, |map| {
                PageMap::mirrored(Arc::clone(map), base)
            })
        };
        let (written, touched) = (mirror(WRITTEN), mirror(TOUCHED));
        let blob = Self {
            record,
            data,
            written,
            touched,
            map,
            tracking: false,
        };
        blob.stamp(blob.record.version)?;
        Ok(blob)
    }

    /// A blob from its files.
    pub(super) fn load(mut record: Record, data: SparseFile, map: SparseFile) -> io::Result<Self> {
        // A resize dies between the record and the file: the record decides.
        data.resize(record.size)?;
        let map = Arc::new(map);
        let mut version = [0; 8];
        map.read_exact_at(&mut version, 0)?;
        record.version = record.version.max(u64::from_le_bytes(version));
        let mut written = PageMap::load(Arc::clone(&map), WRITTEN, TOUCHED)?;
        let mut touched = PageMap::load(Arc::clone(&map), TOUCHED, MAP_END)?;
        // Pages that a shrink was about to drop when the process died.
        let end = record.size.div_ceil(PAGE);
        while let Some(run) = written.next_run(end, u64::MAX / PAGE) {
            touched.set(run.clone())?;
            written.clear(run)?;
        }
        Ok(Self {
            record,
            data,
            written,
            touched,
            map: Some(map),
            tracking: false,
        })
    }

    fn stamp(&self, version: u64) -> io::Result<()> {
        self.map
            .as_ref()
            .map_or(Ok(()), |map| map.write_all_at(&version.to_le_bytes(), 0))
    }

    /// Reads `len` bytes from `offset`, within the size.
    pub(super) fn read(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        self.data.read(offset, len)
    }

    /// Writes whole pages within the size and takes on `version`.
    pub(super) fn write_pages(
        &mut self,
        offset: u64,
        pieces: &[Bytes],
        len: u64,
        version: u64,
    ) -> io::Result<()> {
        debug_assert!(offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE));
        debug_assert!(offset + len <= self.record.size);
        let pages = offset / PAGE..(offset + len) / PAGE;
        self.stamp(version)?;
        self.record.version = version;
        if self.tracking {
            self.touched.set(pages.clone())?;
        }
        self.written.set(pages)?;
        self.data.write_pieces(pieces, offset)
    }

    /// Clears whole pages within the size and takes on `version`.
    pub(super) fn clear_pages(&mut self, range: Range<u64>, version: u64) -> io::Result<()> {
        debug_assert!(range.start.is_multiple_of(PAGE) && range.end.is_multiple_of(PAGE));
        self.stamp(version)?;
        self.record.version = version;
        self.drop_pages(range)
    }

    fn drop_pages(&mut self, range: Range<u64>) -> io::Result<()> {
        let pages = range.start / PAGE..range.end.div_ceil(PAGE);
        if self.tracking {
            // Only what held data changes by being cleared.
            let mut at = pages.start;
            while let Some(run) = self.written.next_run(at, pages.end) {
                at = run.end;
                self.touched.set(run)?;
            }
        }
        self.data.punch(range)?;
        self.written.clear(pages)
    }

    /// Stores the whole content of a block or append blob.
    pub(super) fn write_content(&mut self, pieces: &[Bytes]) -> io::Result<()> {
        debug_assert!(self.record.kind != Kind::PageBlob);
        self.data.write_pieces(pieces, 0)
    }

    /// Brings the files to the size in the record, which was `old` before.
    pub(super) fn resized(&mut self, old: u64) -> io::Result<()> {
        let new = self.record.size;
        if new < old {
            self.drop_pages(new..old)?;
        }
        self.data.resize(new)
    }

    /// The first run of pages with data that begins in `from..limit`, in pages.
    pub(super) fn next_written(&self, from: u64, limit: u64) -> Option<Range<u64>> {
        self.written.next_run(from, limit)
    }

    /// The map of pages touched between the snapshot before and this one (or
    /// now, for the base blob).
    pub(super) fn touched(&self) -> &PageMap {
        &self.touched
    }

    /// Takes over what the snapshot before this one, now gone, had touched.
    pub(super) fn inherit_touched(&mut self, older: &Self) -> io::Result<()> {
        self.touched.set_all(&older.touched)
    }

    /// Fills this new blob, a snapshot, with the bytes of `base`.
    pub(super) fn copy_of(&mut self, base: &Self) -> io::Result<()> {
        base.data.clone_to(&self.data, base.record.size)?;
        self.written.copy_from(&base.written)?;
        self.touched.copy_from(&base.touched)
    }

    /// A snapshot of this blob is in place: from here on changes are noted anew.
    pub(super) fn snapshot_taken(&mut self) -> io::Result<()> {
        self.tracking = true;
        self.touched.clear(0..u64::MAX / PAGE)
    }

    /// The first bytes with data in `from..`, at most `most` of them.
    pub(super) fn next_bytes(&self, from: u64, most: u64) -> io::Result<Option<(u64, Bytes)>> {
        let run = if self.record.kind == Kind::PageBlob {
            self.written
                .next_run(from / PAGE, self.record.size.div_ceil(PAGE))
                .map(|run| run.start * PAGE..run.end * PAGE)
        } else {
            (from < self.record.size).then_some(from..self.record.size)
        };
        let Some(run) = run else {
            return Ok(None);
        };
        let len = usize::try_from((run.end - run.start).min(most)).map_err(io::Error::other)?;
        Ok(Some((run.start, self.read(run.start, len)?)))
    }

    /// Puts bytes of a copy in place; the version stays.
    pub(super) fn fill(&mut self, offset: u64, bytes: &Bytes) -> io::Result<()> {
        if self.record.kind == Kind::PageBlob {
            let pages = offset / PAGE..(offset + bytes.len() as u64) / PAGE;
            self.written.set(pages)?;
        }
        self.data.write_pieces(std::slice::from_ref(bytes), offset)
    }

    /// Bytes of storage in use by the data.
    pub(super) fn allocated(&self) -> io::Result<u64> {
        self.data.allocated()
    }
}
