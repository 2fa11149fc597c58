//! Which pages of a blob hold data: one bit per 512-byte page, kept in memory
//! as sparse chunks and, for blobs on disk, mirrored into a sparse file.
//!
//! Invariants: a chunk in the map has at least one bit set; bits past the
//! blob's end are clear; the mirror equals the memory after every call that
//! returned `Ok`.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::sparse::SparseFile;

/// Bytes in a page of a page blob.
pub(super) const PAGE: u64 = 512;

const WORDS: usize = 512;
const BITS: u64 = 64 * WORDS as u64;
const CHUNK_BYTES: u64 = BITS / 8;

type Chunk = Box<[u64; WORDS]>;

/// A mirror: a file and where in it this map's bits begin.
#[derive(Clone, Debug)]
struct Mirror {
    file: Arc<SparseFile>,
    base: u64,
}

/// A set of page numbers.
#[derive(Debug, Default)]
pub(super) struct PageMap {
    chunks: BTreeMap<u64, Chunk>,
    mirror: Option<Mirror>,
}

impl PageMap {
    /// An empty map that is mirrored into `file` from byte `base` on, where the
    /// file must hold nothing.
    pub(super) fn mirrored(file: Arc<SparseFile>, base: u64) -> Self {
        Self {
            chunks: BTreeMap::new(),
            mirror: Some(Mirror { file, base }),
        }
    }

    /// Reads the mirror in `file` from byte `base` up to `end`.
    pub(super) fn load(file: Arc<SparseFile>, base: u64, end: u64) -> io::Result<Self> {
        let mut chunks = BTreeMap::new();
        let mut at = base;
        while let Some(data) = file.next_data(at, end)? {
            let first = (data.start - base) / CHUNK_BYTES;
            let last = (data.end - base).div_ceil(CHUNK_BYTES);
            for index in first..last {
                let mut bytes = [0; 8 * WORDS];
                file.read_exact_at(&mut bytes, base + index * CHUNK_BYTES)?;
                let mut chunk = Box::new([0; WORDS]);
                for (word, bytes) in chunk.iter_mut().zip(bytes.as_chunks::<8>().0) {
                    *word = u64::from_le_bytes(*bytes);
                }
                if chunk.iter().any(|word| *word != 0) {
                    chunks.insert(index, chunk);
                }
            }
            at = base + last * CHUNK_BYTES;
        }
        Ok(Self {
            chunks,
            mirror: Some(Mirror { file, base }),
        })
    }

    /// Makes this map equal to `other`.
    pub(super) fn copy_from(&mut self, other: &Self) -> io::Result<()> {
        self.clear(0..u64::MAX / PAGE)?;
        for (index, chunk) in &other.chunks {
            self.chunks.insert(*index, chunk.clone());
            self.write_words(*index, 0..WORDS)?;
        }
        Ok(())
    }

    /// Adds `pages`.
    pub(super) fn set(&mut self, pages: Range<u64>) -> io::Result<()> {
        for (index, bits) in split(pages) {
            let chunk = self
                .chunks
                .entry(index)
                .or_insert_with(|| Box::new([0; WORDS]));
            if let Some(words) = change(chunk, bits, |word, mask| word | mask) {
                self.write_words(index, words)?;
            }
        }
        Ok(())
    }

    /// Adds all pages of `other`.
    pub(super) fn set_all(&mut self, other: &Self) -> io::Result<()> {
        let mut at = 0;
        while let Some(run) = other.next_run(at, u64::MAX / PAGE) {
            at = run.end;
            self.set(run)?;
        }
        Ok(())
    }

    /// Takes `pages` out; costs nothing where there are none.
    pub(super) fn clear(&mut self, pages: Range<u64>) -> io::Result<()> {
        if pages.is_empty() {
            return Ok(());
        }
        let touched: Vec<u64> = self
            .chunks
            .range(pages.start / BITS..=(pages.end - 1) / BITS)
            .map(|(index, _)| *index)
            .collect();
        for index in touched {
            let start = pages.start.max(index * BITS) - index * BITS;
            let end = pages.end.min((index + 1) * BITS) - index * BITS;
            let Some(chunk) = self.chunks.get_mut(&index) else {
                continue;
            };
            let changed = change(chunk, start..end, |word, mask| word & !mask);
            let empty = chunk.iter().all(|word| *word == 0);
            if empty {
                self.chunks.remove(&index);
                if let Some(mirror) = &self.mirror {
                    let at = mirror.base + index * CHUNK_BYTES;
                    mirror.file.punch(at..at + CHUNK_BYTES)?;
                }
            } else if let Some(words) = changed {
                self.write_words(index, words)?;
            }
        }
        Ok(())
    }

    /// The first run of set pages at or after `from` and before `limit`, as
    /// long as it gets below `limit`.
    pub(super) fn next_run(&self, from: u64, limit: u64) -> Option<Range<u64>> {
        let start = self.find(from, limit, true)?;
        let end = self.find(start, limit, false).unwrap_or(limit);
        Some(start..end)
    }

    /// Is `page` in the map?
    #[cfg(test)]
    fn contains(&self, page: u64) -> bool {
        self.next_run(page, page + 1).is_some()
    }

    /// The first page in `from..limit` that is set (or not).
    fn find(&self, from: u64, limit: u64, set: bool) -> Option<u64> {
        let mut at = from;
        while at < limit {
            let index = at / BITS;
            let Some(chunk) = self.chunks.get(&index) else {
                if !set {
                    return Some(at);
                }
                let (next, _) = self.chunks.range(index..).next()?;
                at = next * BITS;
                continue;
            };
            let offset = at % BITS;
            let mut word = usize::try_from(offset / 64).unwrap_or(0);
            let mut mask = u64::MAX << (offset % 64);
            while word < WORDS {
                let bits = if set { chunk[word] } else { !chunk[word] } & mask;
                if bits != 0 {
                    let found = index * BITS + word as u64 * 64 + u64::from(bits.trailing_zeros());
                    return (found < limit).then_some(found);
                }
                mask = u64::MAX;
                word += 1;
            }
            at = (index + 1) * BITS;
        }
        None
    }

    fn write_words(&self, index: u64, words: Range<usize>) -> io::Result<()> {
        let (Some(mirror), Some(chunk)) = (&self.mirror, self.chunks.get(&index)) else {
            return Ok(());
        };
        let mut bytes = [0; 8 * WORDS];
        let bytes = &mut bytes[..8 * words.len()];
        for (out, word) in bytes
            .as_chunks_mut::<8>()
            .0
            .iter_mut()
            .zip(&chunk[words.clone()])
        {
            *out = word.to_le_bytes();
        }
        mirror.file.write_all_at(
            bytes,
            mirror.base + index * CHUNK_BYTES + 8 * words.start as u64,
        )
    }
}

/// Cuts a range of pages at chunk borders: chunk number and bits in it.
fn split(pages: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> {
    let mut at = pages.start;
    std::iter::from_fn(move || {
        if at >= pages.end {
            return None;
        }
        let index = at / BITS;
        let end = pages.end.min((index + 1) * BITS);
        let bits = at - index * BITS..end - index * BITS;
        at = end;
        Some((index, bits))
    })
}

/// Applies `apply` to `bits`; gives the words that changed, if any did.
fn change(
    chunk: &mut [u64; WORDS],
    bits: Range<u64>,
    apply: impl Fn(u64, u64) -> u64,
) -> Option<Range<usize>> {
    let mut changed: Option<Range<usize>> = None;
    let mut at = bits.start;
    while at < bits.end {
        let word = usize::try_from(at / 64).unwrap_or(0);
        let low = at % 64;
        let high = (bits.end - (at - low)).min(64);
        let mask = (u64::MAX << low) & (u64::MAX >> (64 - high));
        let new = apply(chunk[word], mask);
        if new != chunk[word] {
            chunk[word] = new;
            changed = Some(changed.map_or(word..word + 1, |range| range.start..word + 1));
        }
        at += high - low;
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn runs(map: &PageMap, limit: u64) -> Vec<Range<u64>> {
        let mut at = 0;
        std::iter::from_fn(|| {
            let run = map.next_run(at, limit)?;
            at = run.end;
            Some(run)
        })
        .collect()
    }

    #[test]
    fn an_empty_map_of_eight_tebibytes_holds_nothing() {
        let mut map = PageMap::default();
        let pages = (8u64 << 40) / PAGE;
        assert_eq!(map.next_run(0, pages), None);
        map.set(pages - 1..pages).expect("in memory");
        assert_eq!(runs(&map, pages), vec![pages - 1..pages]);
        assert_eq!(map.chunks.len(), 1);
        map.clear(0..pages).expect("in memory");
        assert!(map.chunks.is_empty());
    }

    #[test]
    fn runs_cross_chunks() {
        let mut map = PageMap::default();
        map.set(BITS - 3..3 * BITS + 5).expect("in memory");
        assert_eq!(runs(&map, u64::MAX / PAGE), vec![BITS - 3..3 * BITS + 5]);
        map.clear(2 * BITS..2 * BITS + 1).expect("in memory");
        assert_eq!(
            runs(&map, u64::MAX / PAGE),
            [BITS - 3..2 * BITS, 2 * BITS + 1..3 * BITS + 5]
        );
        assert_eq!(map.next_run(BITS, BITS + 7), Some(BITS..BITS + 7));
    }

    proptest! {
        #[test]
        fn equals_a_set_of_numbers_also_when_loaded_again(
            steps in proptest::collection::vec((any::<bool>(), 0u64..70_000, 1u64..40_000), 1..20),
        ) {
            let file = Arc::new(SparseFile::memory().expect("memfd"));
            let mut map = PageMap::mirrored(Arc::clone(&file), 4096);
            let mut model = BTreeSet::new();
            for (set, start, len) in steps {
                let end = start + len;
                if set {
                    map.set(start..end).expect("set");
                    model.extend(start..end);
                } else {
                    map.clear(start..end).expect("clear");
                    model.retain(|page| !(start..end).contains(page));
                }
            }
            let loaded = PageMap::load(file, 4096, 4096 + 4 * CHUNK_BYTES).expect("load");
            for map in [&map, &loaded] {
                let pages: BTreeSet<u64> = runs(map, 200_000).into_iter().flatten().collect();
                prop_assert_eq!(&pages, &model);
                prop_assert!(map.chunks.values().all(|c| c.iter().any(|w| *w != 0)));
            }
            prop_assert_eq!(map.contains(5), model.contains(&5));
        }
    }
}
