//! The cache follows changes that are made in the store directly, under the
//! range lock: write-through and clear.

use std::io;

use super::block::Block;
use super::core::{Core, entry_of, len_of, mask, parts, runs};
use super::layout::{BLOCK, BLOCK_LEN, SECTOR};
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

    /// A change has begun that puts `data` (at most [`SECTION`] long) at `offset`
    /// in the store: what was staged there before becomes `data` first. Otherwise
    /// who takes the file up after a crash might read the older write, and the
    /// newer one if the file is lost in turn.
    ///
    /// [`SECTION`]: super::core::SECTION
    pub fn overtake(&mut self, offset: u64, data: &[u8]) {
        for part in parts(Range::at(offset, data.len() as u64)) {
            let older = self.index.get(part.block).map_or(0, Block::older);
            for (first, count) in runs(part.mask & older) {
                let from = part.from + first * SECTOR - part.at;
                let data = &data[from..from + count * SECTOR];
                self.overtake_in(part.block, first, data);
            }
        }
    }

    /// As [`Core::overtake`], for a change that clears `range`. Deals with some
    /// of it; returns what is left.
    pub fn overtake_with_zeroes(&mut self, range: Range) -> Range {
        let (cached, rest) = self.cached(range);
        for (number, block, mask) in cached {
            for (first, count) in runs(mask & block.older()) {
                self.overtake_in(number, first, &[0; BLOCK_LEN][..count * SECTOR]);
            }
        }
        rest
    }

    fn overtake_in(&mut self, number: u64, first: usize, data: &[u8]) {
        // If the file fails it keeps the older write, as it would without this.
        self.stage(number * BLOCK + (first * SECTOR) as u64, data);
        // The change that has begun is no older than this.
        self.index.untouch(number, mask(first, data.len() / SECTOR));
    }

    /// Some of the cached blocks in `range`, each with the part of it that is in
    /// there, and what is left of `range` behind them.
    fn cached(&self, range: Range) -> (Vec<(u64, Block, u8)>, Range) {
        const AT_ONCE: usize = 64;
        let numbers = range.start / BLOCK..range.end.div_ceil(BLOCK);
        let cached = self.index.range(numbers).take(AT_ONCE);
        let cached: Vec<(u64, Block, u8)> = cached
            .map(|(number, block)| {
                let start = range.start.max(number * BLOCK);
                let end = range.end.min((number + 1) * BLOCK);
                let first = len_of(start - number * BLOCK) / SECTOR;
                (number, *block, mask(first, len_of(end - start) / SECTOR))
            })
            .collect();
        let done = match cached.last() {
            Some((last, ..)) if cached.len() == AT_ONCE => range.end.min((last + 1) * BLOCK),
            _ => range.end,
        };
        let rest = Range {
            start: done,
            end: range.end,
        };
        (cached, rest)
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
        self.spoil(&range);
        let (cached, rest) = self.cached(range);
        for (number, block, mask) in &cached {
            let gone = mask & !block.touched;
            self.settle(*number, block, gone, gone)?;
        }
        Ok(rest)
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
