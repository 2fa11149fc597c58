//! The index's and the file's part in writing back: what is due, its copy, and
//! what became of it.

use std::io;

use tokio::time::{Duration, Instant};

use super::core::{Core, entry_of, len_of, mask, runs};
use super::index::Picked;
use super::layout::{BLOCK, SECTOR, SECTORS};
use super::staging::Stretch;
use crate::blob::Range;
use crate::buffers::Buffer;

/// The stripes that runs keep within: as much as one Put Page takes.
const STRIPE: u64 = crate::volume::io::LARGEST_PIECE / BLOCK;

impl Core {
    /// Dirty blocks above which writing back does not wait.
    pub(super) fn high_water(&self) -> u32 {
        self.index.capacity() / 2
    }

    /// Everything written so far is wanted in the store.
    pub fn want_flushed(&mut self) -> u64 {
        self.flush_to = self.index.sequence();
        self.flush_to
    }

    /// The next run to write back, if any is due.
    pub fn pick(&mut self) -> Option<Picked> {
        let pressed = self.waiting > 0 || self.index.waiting_blocks() > self.high_water() as usize;
        let due = if pressed { u64::MAX } else { self.flush_to };
        self.index.pick(due, STRIPE)
    }

    /// Looks at the clock: what was written more than `age` ago becomes due,
    /// memory that others want is given back, and a file system that was full
    /// may have room again.
    pub fn tick(&mut self, now: Instant, age: Duration) {
        while let Some((then, sequence)) = self.ages.front().copied()
            && now.duration_since(then) >= age
        {
            self.flush_to = self.flush_to.max(sequence);
            self.ages.pop_front();
        }
        if self.index.dirty_blocks() > 0 {
            self.ages.push_back((now, self.index.sequence()));
        }
        self.roomy = true;
        for _ in 0..self.share.owed() {
            let nobody = 0..0;
            let Some(slot) = self.index.free_slot().or_else(|| self.index.evict(&nobody)) else {
                break;
            };
            self.staging.punch(slot);
            self.share.give();
            self.index.return_slot(slot, false);
        }
    }

    /// Copies the dirty sectors of the picked ones among `blocks` (at most
    /// [`SECTION`]), part of a run that ends before the block `end`, behind
    /// `pieces`, each an offset and what goes there.
    ///
    /// # Errors
    /// The staging file failed.
    pub fn send(
        &mut self,
        blocks: std::ops::Range<u64>,
        end: u64,
        pieces: &mut Vec<(u64, Buffer)>,
    ) -> io::Result<()> {
        // Of the last piece; neighbouring slots are read at once.
        let mut stretches = Vec::new();
        for number in blocks {
            let Some(block) = self.index.send(number) else {
                continue;
            };
            let hull = {
                let first = block.dirty.trailing_zeros() as usize;
                mask(
                    first,
                    SECTORS - block.dirty.leading_zeros() as usize - first,
                )
            };
            // Clean sectors between dirty ones are the store's own bytes:
            // sending them along saves a request.
            let sent = if hull & !block.valid == 0 {
                hull
            } else {
                block.dirty
            };
            for (first, count) in runs(sent) {
                let offset = number * BLOCK + (first * SECTOR) as u64;
                let joined = pieces
                    .last()
                    .is_some_and(|(at, data)| at + data.len() as u64 == offset);
                if !joined {
                    self.read_piece(&mut stretches, pieces)?;
                    let most = len_of(end * BLOCK - offset);
                    pieces.push((offset, Buffer::with_room(most)));
                }
                let (_, data) = pieces.last_mut().expect("pushed just now at the latest");
                let from = data.len();
                data.resize(from + count * SECTOR, 0);
                stretches.push(Stretch {
                    slot: block.slot,
                    at: first * SECTOR,
                    bytes: from..data.len(),
                });
            }
        }
        self.read_piece(&mut stretches, pieces)
    }

    /// Reads the stretches of the last piece.
    fn read_piece(
        &self,
        stretches: &mut Vec<Stretch>,
        pieces: &mut [(u64, Buffer)],
    ) -> io::Result<()> {
        let Some((_, data)) = pieces.last_mut() else {
            return Ok(());
        };
        let read = self.staging.read(stretches, data);
        stretches.clear();
        read.inspect_err(|error| self.complain(error))
    }

    /// The write-back of `blocks` (at most [`SECTION`]) is over; says whether
    /// what was delivered could be noted.
    pub fn finish(&mut self, blocks: std::ops::Range<u64>, delivered: bool) -> bool {
        let mut delivered = delivered;
        if delivered {
            let mut entries = Vec::with_capacity(len_of(blocks.end - blocks.start));
            for (number, block) in self.index.range(blocks.clone()) {
                let arrived = self.index.arrived(number);
                if arrived != 0 {
                    entries.push(entry_of(number, block, block.dirty & !arrived));
                }
            }
            // Before the slots can be used for anything else.
            if let Err(error) = self.staging.commit(&entries) {
                self.complain(&error);
                delivered = false;
            }
        }
        for number in blocks {
            self.index.finish(number, delivered);
        }
        delivered
    }

    /// The dirty parts of `within`, at most `most` runs, and up to where they
    /// are all of them.
    pub fn dirty(&self, within: Range, most: usize) -> (Vec<Range>, u64) {
        let mut found: Vec<Range> = Vec::new();
        for (number, block) in self
            .index
            .range(within.start / BLOCK..within.end.div_ceil(BLOCK))
        {
            for (first, count) in runs(block.dirty) {
                let start = number * BLOCK + (first * SECTOR) as u64;
                let end = start + (count * SECTOR) as u64;
                let full = found.len() == most;
                match found.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ if full => return (found, start),
                    _ => found.push(Range { start, end }),
                }
            }
        }
        (found, within.end)
    }
}
