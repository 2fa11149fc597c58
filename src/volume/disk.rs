//! The block-device face of a volume: bounds, alignment, and which requests
//! must wait for each other.

use std::future::Future;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::future::try_join_all;

use super::Volume;
use super::io::{Change, LARGEST_PIECE};
use super::store::PageStore;
use crate::blob::Range;
use crate::caller::unless_gone;
use crate::device::{BlockDevice, DeviceError, Extent, Geometry, PAGE, ReadData};
use crate::metrics::Meter;

/// The largest payload taken in one request: what clients assume when they do
/// not ask (NBD's recommended 32 MiB).
const LARGEST_PAYLOAD: u32 = 32 << 20;
const PREFERRED_BLOCK: u32 = 4096;
/// Most ranges asked of one Get Page Ranges.
const MOST_RANGES: u32 = 1000;
const RANGES_DEADLINE: Duration = Duration::from_secs(30);

impl<S: PageStore> Volume<S> {
    /// Runs one request, unless the volume is fenced, is closing or gives up.
    async fn request<T>(
        &self,
        (meter, bytes): (&Meter, u64),
        work: impl Future<Output = Result<T, DeviceError>>,
    ) -> Result<T, DeviceError> {
        let begun = Instant::now();
        let inside = self.gate.enter().ok_or(DeviceError::Shutdown)?;
        if let Some(fenced) = self.io.standing.fenced() {
            return Err(self.io.fenced(&fenced));
        }
        let mut abandoned = self.abandoned.subscribe();
        let result = tokio::select! {
            biased;
            result = work => result,
            _ = abandoned.wait_for(|abandoned| *abandoned) => Err(DeviceError::Shutdown),
        };
        // In this order nobody counts it twice, as under way and as completed.
        drop(inside);
        self.completed.fetch_add(1, Ordering::Release);
        meter.ended(begun, bytes, result.is_err());
        result
    }

    fn within(&self, offset: u64, len: u64) -> Option<Range> {
        let end = offset.checked_add(len).filter(|end| *end <= self.size())?;
        Some(Range { start: offset, end })
    }

    fn for_reading(&self, offset: u64, len: u64) -> Result<Range, DeviceError> {
        self.within(offset, len).ok_or_else(|| {
            DeviceError::Invalid(format!(
                "{offset}+{len} is beyond the end at {}",
                self.size()
            ))
        })
    }

    fn for_writing(&self, offset: u64, len: u64) -> Result<Range, DeviceError> {
        if self.io.lease.is_none() {
            return Err(DeviceError::ReadOnly);
        }
        self.within(offset, len).ok_or(DeviceError::NoSpace)
    }

    /// Reads a page-aligned range of any length.
    async fn read_pages(&self, range: Range) -> Result<ReadData, DeviceError> {
        if range.len() <= LARGEST_PIECE {
            return self.read_piece(range).await;
        }
        let reads = try_join_all(pieces(range).map(|piece| self.read_piece(piece)));
        let pieces = Box::pin(reads).await?;
        let mut whole = ReadData::new();
        pieces.into_iter().for_each(|piece| whole.append(piece));
        Ok(whole)
    }

    async fn read_piece(&self, range: Range) -> Result<ReadData, DeviceError> {
        match &self.cache {
            Some(cache) => Box::pin(self.read_cached(cache, range)).await,
            None => self.io.read(range).await,
        }
    }

    /// Writes whole pages that the caller has locked.
    pub(super) async fn write_pages(&self, offset: u64, data: Bytes) -> Result<(), DeviceError> {
        if data.len() as u64 <= LARGEST_PIECE {
            return self.io.change(&Change::Put { offset, data }).await;
        }
        let range = Range::at(offset, data.len() as u64);
        let puts = pieces(range).map(|piece| {
            let start = usize_from(piece.start - offset);
            let data = data.slice(start..start + usize_from(piece.len()));
            async move {
                self.io
                    .change(&Change::Put {
                        offset: piece.start,
                        data,
                    })
                    .await
            }
        });
        Box::pin(try_join_all(puts)).await.map(drop)
    }

    /// Writes any range to the store.
    async fn write_uncached(&self, range: Range, data: Bytes) -> Result<(), DeviceError> {
        let pages = whole_pages_around(range);
        let _locked = unless_gone(self.locks.lock(pages)).await?;
        if pages == range {
            self.write_pages(range.start, data).await
        } else {
            self.write_unaligned(range, data).await
        }
    }

    /// Zeroes any range in the store.
    async fn zero_uncached(&self, range: Range) -> Result<(), DeviceError> {
        let _locked = unless_gone(self.locks.lock(whole_pages_around(range))).await?;
        let (head, body, tail) = split(range);
        for edge in [head, tail] {
            if !edge.is_empty() {
                self.patch(edge, None).await?;
            }
        }
        if body.is_empty() {
            return Ok(());
        }
        self.io.change(&Change::Clear(body)).await
    }

    /// Gives whole pages back to the store.
    async fn trim_uncached(&self, change: &Change) -> Result<(), DeviceError> {
        let _locked = unless_gone(self.locks.lock(change.range())).await?;
        self.io.change(change).await
    }

    /// Writes part of a page, or zeroes when `data` is `None`, by reading the
    /// page first. The caller has locked the page.
    async fn patch(&self, range: Range, data: Option<&[u8]>) -> Result<(), DeviceError> {
        let page = whole_pages_around(range);
        let old = self.io.read_to_change(page).await?;
        let mut new = BytesMut::from(old.to_bytes());
        let at = usize_from(range.start - page.start);
        let part = &mut new[at..at + usize_from(range.len())];
        match data {
            Some(data) => part.copy_from_slice(data),
            None => part.fill(0),
        }
        self.write_pages(page.start, new.freeze()).await
    }

    async fn write_unaligned(&self, range: Range, data: Bytes) -> Result<(), DeviceError> {
        let (head, body, tail) = split(range);
        for edge in [head, tail] {
            if !edge.is_empty() {
                let at = usize_from(edge.start - range.start);
                self.patch(edge, Some(&data[at..at + usize_from(edge.len())]))
                    .await?;
            }
        }
        if !body.is_empty() {
            let at = usize_from(body.start - range.start);
            self.write_pages(body.start, data.slice(at..at + usize_from(body.len())))
                .await?;
        }
        Ok(())
    }
}

impl<S: PageStore> BlockDevice for Volume<S> {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.size(),
            preferred_block: PREFERRED_BLOCK,
            max_payload: LARGEST_PAYLOAD,
            read_only: self.io.lease.is_none(),
        }
    }

    async fn read(&self, offset: u64, len: u32) -> Result<ReadData, DeviceError> {
        let range = self.for_reading(offset, len.into())?;
        self.request((&self.served.read, range.len()), async {
            if range.is_empty() {
                return Ok(ReadData::new());
            }
            let pages = whole_pages_around(range);
            let cache = self.cache.as_ref();
            let data = match cache.and_then(|cache| cache.hit(pages)) {
                Some(hit) => hit,
                // Nothing of a read can come late.
                None => unless_gone(Box::pin(self.read_pages(pages))).await??,
            };
            if pages == range {
                return Ok(data);
            }
            Ok(data.slice(
                usize_from(range.start - pages.start),
                usize_from(range.len()),
            ))
        })
        .await
    }

    /// Without a cache every finished write is committed, so `fua` asks for
    /// nothing more.
    async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), DeviceError> {
        let range = self.for_writing(offset, data.len() as u64)?;
        self.request((&self.served.write, range.len()), async {
            if range.is_empty() {
                return Ok(());
            }
            if let Some(cache) = &self.cache {
                if !fua && cache.stage_at_once(range, &data) {
                    return Ok(());
                }
                return Box::pin(self.write_cached(cache, range, data, fua)).await;
            }
            Box::pin(self.write_uncached(range, data)).await
        })
        .await
    }

    /// Without a cache every finished write is committed; what is left to say
    /// is whether this is still our disk.
    async fn flush(&self) -> Result<(), DeviceError> {
        self.request((&self.served.flush, 0), async {
            match &self.cache {
                Some(cache) => unless_gone(Box::pin(self.flush_cached(cache))).await?,
                None => Ok(()),
            }
        })
        .await
    }

    async fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), DeviceError> {
        let range = self.for_writing(offset, len)?;
        let (_, body, _) = split(range);
        self.request((&self.served.trim, body.len()), async {
            if body.is_empty() {
                return Ok(());
            }
            let change = if fua {
                Change::Clear(body)
            } else {
                Change::Trim(body)
            };
            if let Some(cache) = &self.cache {
                return Box::pin(self.clear_cached(cache, &change, fua)).await;
            }
            Box::pin(self.trim_uncached(&change)).await
        })
        .await
    }

    /// Pages cannot be reserved in a page blob: cleared ones cost nothing and
    /// never run out, so `no_hole` is met by clearing too.
    async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        fua: bool,
        _no_hole: bool,
    ) -> Result<(), DeviceError> {
        let range = self.for_writing(offset, len)?;
        self.request((&self.served.zeroes, range.len()), async {
            if range.is_empty() {
                return Ok(());
            }
            if let Some(cache) = &self.cache {
                return Box::pin(self.zero_cached(cache, range, fua)).await;
            }
            Box::pin(self.zero_uncached(range)).await
        })
        .await
    }

    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, DeviceError> {
        let range = self.for_reading(offset, len)?;
        if range.is_empty() {
            return Err(DeviceError::Invalid("an empty range has no extents".into()));
        }
        self.request((&self.served.extents, 0), async {
            let pages = whole_pages_around(range);
            // Before the store is asked: what is written back in between is in
            // one of the two answers.
            let dirty = match &self.cache {
                Some(cache) => {
                    let dirty = self.dirty(cache, pages, MOST_RANGES as usize);
                    Some(Box::pin(dirty).await)
                }
                None => None,
            };
            let filled = self.io.filled(pages, MOST_RANGES, RANGES_DEADLINE);
            let mut filled = unless_gone(Box::pin(filled)).await??;
            if let Some((dirty, known_to)) = dirty {
                filled.add(dirty, known_to);
            }
            Ok(extents_of(range, &filled.ranges, filled.known_to))
        })
        .await
    }
}

/// Extents of `range` up to where the answer is known.
fn extents_of(range: Range, filled: &[Range], known_to: u64) -> Vec<Extent> {
    let end = range.end.min(known_to);
    let mut extents = Vec::new();
    let mut at = range.start;
    let mut push = |to: u64, allocated: bool| {
        if to > at {
            extents.push(Extent {
                len: to - at,
                allocated,
                zero: !allocated,
            });
            at = to;
        }
    };
    for data in filled {
        push(data.start.min(end), false);
        push(data.end.min(end), true);
    }
    push(end, false);
    extents
}

/// The pieces of at most [`LARGEST_PIECE`] that make up `range`.
fn pieces(range: Range) -> impl Iterator<Item = Range> {
    let starts = (range.start..range.end).step_by(usize_from(LARGEST_PIECE));
    starts.map(move |start| Range {
        start,
        end: range.end.min(start + LARGEST_PIECE),
    })
}

pub(super) fn whole_pages_around(range: Range) -> Range {
    Range {
        start: range.start / PAGE * PAGE,
        end: range.end.next_multiple_of(PAGE),
    }
}

/// The part of `range` before its first whole page, its whole pages, and the
/// part after them; each may be empty. A range within one page is all head.
pub(super) fn split(range: Range) -> (Range, Range, Range) {
    let first = range.start.next_multiple_of(PAGE);
    let last = range.end / PAGE * PAGE;
    if first > last {
        let nothing = Range {
            start: range.end,
            end: range.end,
        };
        return (range, nothing, nothing);
    }
    (
        Range {
            start: range.start,
            end: first,
        },
        Range {
            start: first,
            end: last,
        },
        Range {
            start: last,
            end: range.end,
        },
    )
}

/// Lengths here are at most a request's payload, which fits a `u32`.
pub(super) fn usize_from(len: u64) -> usize {
    usize::try_from(len).expect("a payload's length fits memory")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn split_covers_the_range_exactly(start in 0u64..5000, len in 1u64..5000) {
            let range = Range::at(start, len);
            let (head, body, tail) = split(range);
            prop_assert_eq!(head.len() + body.len() + tail.len(), len);
            prop_assert!(body.is_empty() || body.start % PAGE == 0 && body.end % PAGE == 0);
            prop_assert!(head.len() < PAGE && tail.len() < PAGE);
            prop_assert!(head.is_empty() || head.start == start);
            prop_assert!(tail.is_empty() || tail.end == range.end);
        }

        #[test]
        fn extents_cover_what_is_known(
            start in 0u64..64, len in 1u64..64, known in 0u64..128,
            marks in proptest::collection::btree_set(0u64..128, 0..12),
        ) {
            let marks: Vec<u64> = marks.into_iter().collect();
            let filled: Vec<Range> =
                marks.chunks_exact(2).map(|pair| Range { start: pair[0], end: pair[1] }).collect();
            let range = Range::at(start, len);
            let known = known.max(start + 1);
            let extents = extents_of(range, &filled, known);
            let mut at = start;
            for extent in extents {
                prop_assert!(extent.len > 0);
                for byte in at..at + extent.len {
                    let data = filled.iter().any(|r| r.start <= byte && byte < r.end);
                    prop_assert_eq!(extent.allocated, data);
                    prop_assert_eq!(extent.zero, !data);
                }
                at += extent.len;
            }
            prop_assert_eq!(at, range.end.min(known));
        }
    }

    #[test]
    fn pieces_are_whole_and_bounded() {
        let range = Range::at(512, 2 * LARGEST_PIECE + 512);
        let pieces: Vec<Range> = pieces(range).collect();
        assert_eq!(pieces.len(), 3);
        assert_eq!(pieces[0].start, range.start);
        assert_eq!(pieces[2].end, range.end);
        assert!(pieces.windows(2).all(|pair| pair[0].end == pair[1].start));
    }
}
