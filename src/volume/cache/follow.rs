//! The cache follows changes that are made in the store directly, under the
//! range lock: write-through and clear.

use std::io;

use super::core::{Core, entry_of, len_of, mask, parts, runs};
use super::index::Block;
use super::layout::{BLOCK, SECTOR};
use super::staging::Stretch;
use crate::blob::Range;

impl Core {
    /// A change of `range` in the store begins.
    pub fn begin_change(&mut self, range: Range) -> u64 {
        let id = self.id();
        self.changing.push((id, range));
        self.spoil(&range);
        self.index
            .begin_change(range.start / BLOCK..range.end.div_ceil(BLOCK));
        id
    }

    /// The store has `data` at `offset` (within the change's range, at most
    /// [`SECTION`] long) since the change: what is cached of it follows,
    /// unless it was staged anew.
    ///
    /// # Errors
    /// The staging file failed: an older write may come back.
    pub fn wrote(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let range = Range::at(offset, data.len() as u64);
        self.spoil(&range);
        for part in parts(range) {
            let Some(block) = self.index.get(part.block).copied() else {
                continue;
            };
            let mut lost = 0;
            for (first, count) in runs(part.mask & !block.touched & block.valid) {
                let from = part.from + first * SECTOR - part.at;
                let stretch = Stretch {
                    slot: block.slot,
                    at: first * SECTOR,
                    bytes: from..from + count * SECTOR,
                };
                if let Err((_, error)) = self.staging.write(&[stretch], data) {
                    self.no_room(&error);
                    lost |= mask(first, count);
                }
            }
            self.settle(part.block, &block, part.mask & !block.touched, lost)?;
        }
        Ok(())
    }

    /// The store has zeroes in `range` since the change. Deals with some of
    /// it; returns what is left.
    ///
    /// # Errors
    /// As [`Core::wrote`].
    pub fn cleared(&mut self, range: Range) -> io::Result<Range> {
        const AT_ONCE: usize = 64;
        self.spoil(&range);
        let numbers = range.start / BLOCK..range.end.div_ceil(BLOCK);
        let cached = self.index.range(numbers).take(AT_ONCE);
        let cached: Vec<(u64, Block)> = cached.map(|(number, block)| (number, *block)).collect();
        for (number, block) in &cached {
            let start = range.start.max(number * BLOCK);
            let end = range.end.min((number + 1) * BLOCK);
            let first = len_of(start - number * BLOCK) / SECTOR;
            let gone = mask(first, len_of(end - start) / SECTOR) & !block.touched;
            self.settle(*number, block, gone, gone)?;
        }
        let done = match cached.last() {
            Some((last, _)) if cached.len() == AT_ONCE => range.end.min((last + 1) * BLOCK),
            _ => range.end,
        };
        Ok(Range {
            start: done,
            end: range.end,
        })
    }

    /// `clean` of the block is the store's now, `gone` is cached no more.
    fn settle(&mut self, number: u64, block: &Block, clean: u8, gone: u8) -> io::Result<()> {
        if block.dirty & clean != 0 {
            let entry = entry_of(number, block, block.dirty & !clean);
            self.staging
                .commit(&[entry])
                .inspect_err(|error| self.complain(error))?;
        }
        self.index.clean(number, clean);
        self.index.forget(number, gone);
        Ok(())
    }

    /// The change is over. When its outcome is not known, what is cached
    /// clean of the range may not be what the store has.
    pub fn end_change(&mut self, id: u64, known: bool) {
        let Some(at) = self.changing.iter().position(|(change, _)| *change == id) else {
            return;
        };
        let (_, range) = self.changing.swap_remove(at);
        self.spoil(&range);
        if known {
            return;
        }
        let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK);
        let cached: Vec<(u64, u8)> = self
            .index
            .range(blocks)
            .map(|(number, block)| (number, !block.dirty))
            .collect();
        for (number, clean) in cached {
            self.index.forget(number, clean);
        }
    }
}
