//! Which block is cached in which slot, what of it is dirty, and which block
//! is to be written back next. Bookkeeping only: no file, no lock, no clock.
//! The states and invariants are those of [`super`].

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use super::block::Block;
use super::layout::{Entry, SECTORS};

const NOBODY: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
struct Slot {
    block: u64,
    referenced: bool,
    /// It is in `clean`, perhaps no longer rightly.
    listed: bool,
}

/// A run of blocks that one write-back takes charge of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picked {
    /// Which blocks.
    pub blocks: Range<u64>,
    id: u64,
}

/// Cached blocks in order, and the slots they lie in.
#[derive(Debug)]
pub struct Index {
    blocks: BTreeMap<u64, Block>,
    slots: Vec<Slot>,
    capacity: u32,
    /// Slots with memory behind them that hold nothing.
    free: Vec<u32>,
    /// Slots with no memory behind them, below `slots.len()`.
    bare: Vec<u32>,
    /// Slots that were clean when they were put here: the eviction queue.
    clean: VecDeque<u32>,
    /// Dirty blocks that nobody has picked, by their oldest write.
    queue: BTreeMap<u64, u64>,
    /// Oldest write of each write-back under way, by its number.
    picks: BTreeMap<u64, u64>,
    next_pick: u64,
    sequence: u64,
    dirty_blocks: u32,
    dirty_sectors: u64,
}

/// Where a slot for a new block came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// It has memory already.
    Backed(u32),
    /// Memory has to be taken for it.
    Bare(u32),
}

impl Index {
    /// An empty index over `capacity` slots; writes are numbered after `sequence`.
    pub fn new(capacity: u32, sequence: u64) -> Self {
        Self {
            blocks: BTreeMap::new(),
            slots: Vec::new(),
            capacity,
            free: Vec::new(),
            bare: Vec::new(),
            clean: VecDeque::new(),
            queue: BTreeMap::new(),
            picks: BTreeMap::new(),
            next_pick: 0,
            sequence,
            dirty_blocks: 0,
            dirty_sectors: 0,
        }
    }

    /// The last write's number.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Blocks with anything unflushed.
    pub fn dirty_blocks(&self) -> u32 {
        self.dirty_blocks
    }

    /// Sectors that the store may not have.
    pub fn dirty_sectors(&self) -> u64 {
        self.dirty_sectors
    }

    /// Dirty blocks that no write-back has taken charge of.
    pub fn waiting_blocks(&self) -> usize {
        self.queue.len()
    }

    /// Blocks with anything in them.
    pub fn cached_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Slots in all.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// A cached block.
    pub fn get(&self, block: u64) -> Option<&Block> {
        self.blocks.get(&block)
    }

    /// The cached blocks in `blocks`, in order.
    pub fn range(&self, blocks: Range<u64>) -> impl DoubleEndedIterator<Item = (u64, &Block)> {
        self.blocks
            .range(blocks)
            .map(|(number, block)| (*number, block))
    }

    /// Marks the block's slot as used lately.
    pub fn refer(&mut self, slot: u32) {
        self.slots[slot as usize].referenced = true;
    }

    /// A slot that holds nothing: a free one, else one more if `more` allows
    /// it, else the least used clean one, though none of `keep`.
    pub fn take_slot(&mut self, keep: &Range<u64>, more: impl FnOnce() -> bool) -> Option<Source> {
        if let Some(slot) = self.free.pop() {
            return Some(Source::Backed(slot));
        }
        let fresh = self.slots.len();
        let room = !self.bare.is_empty() || fresh < self.capacity as usize;
        if room && more() {
            let slot = self.bare.pop().unwrap_or_else(|| {
                self.slots.push(Slot {
                    block: NOBODY,
                    referenced: false,
                    listed: false,
                });
                u32::try_from(fresh).expect("below the capacity")
            });
            return Some(Source::Bare(slot));
        }
        self.evict(keep).map(Source::Backed)
    }

    /// Second chance over the clean slots.
    pub fn evict(&mut self, keep: &Range<u64>) -> Option<u32> {
        // Twice round: once to take the marks away, once to take a slot.
        for _ in 0..2 * self.clean.len() {
            let number = self.clean.pop_front()?;
            let slot = &mut self.slots[number as usize];
            let owner = slot.block;
            slot.listed = false;
            let Some(block) = self.blocks.get(&owner).filter(|block| block.dirty == 0) else {
                continue;
            };
            debug_assert_eq!(block.slot, number);
            if std::mem::take(&mut slot.referenced) || keep.contains(&owner) {
                slot.listed = true;
                self.clean.push_back(number);
                continue;
            }
            slot.block = NOBODY;
            self.blocks.remove(&owner);
            return Some(number);
        }
        None
    }

    /// Returns a slot that was taken and not used.
    pub fn return_slot(&mut self, slot: u32, backed: bool) {
        debug_assert_eq!(self.slots[slot as usize].block, NOBODY);
        if backed {
            self.free.push(slot);
        } else {
            self.bare.push(slot);
        }
    }

    /// A free slot that is to lose its memory.
    pub fn free_slot(&mut self) -> Option<u32> {
        self.free.pop()
    }

    /// Puts the blocks of an earlier daemon back, into an index that is empty.
    pub fn restore(&mut self, entries: &[(u32, Entry)]) {
        debug_assert!(self.slots.is_empty());
        let used = entries.iter().map(|(slot, _)| *slot as usize + 1).max();
        let empty = Slot {
            block: NOBODY,
            referenced: false,
            listed: false,
        };
        self.slots.resize(used.unwrap_or(0), empty);
        for (slot, entry) in entries {
            debug_assert!(entry.sequence <= self.sequence && entry.dirty != 0);
            self.slots[*slot as usize].block = entry.block;
            self.queue.insert(entry.sequence, entry.block);
            self.dirty_blocks += 1;
            self.dirty_sectors += u64::from(entry.dirty.count_ones());
            let block = Block {
                valid: entry.dirty,
                dirty: entry.dirty,
                sequence: entry.sequence,
                oldest: entry.sequence,
                sums: entry.sums,
                ..Block::empty(*slot)
            };
            let before = self.blocks.insert(entry.block, block);
            debug_assert!(before.is_none(), "one slot a block");
        }
        for (slot, number) in self.slots.iter().zip(0..) {
            if slot.block == NOBODY {
                self.bare.push(number);
            }
        }
    }

    /// `mask` of the block was staged in `slot`; returns the block as it is now.
    pub fn stage(&mut self, number: u64, slot: u32, mask: u8, sums: &[u32; SECTORS]) -> &Block {
        self.sequence += 1;
        let sequence = self.sequence;
        self.slots[slot as usize].block = number;
        let block = self
            .blocks
            .entry(number)
            .or_insert_with(|| Block::empty(slot));
        debug_assert_eq!(block.slot, slot);
        if block.dirty == 0 {
            block.oldest = sequence;
            self.queue.insert(sequence, number);
            self.dirty_blocks += 1;
        } else if block.picked && block.since == 0 {
            block.since = sequence;
        }
        self.dirty_sectors += u64::from((mask & !block.dirty).count_ones());
        block.sequence = sequence;
        block.valid |= mask;
        block.dirty |= mask;
        block.touched |= mask;
        for (at, sum) in sums.iter().enumerate() {
            if mask & (1 << at) != 0 {
                block.sums[at] = *sum;
            }
        }
        block
    }

    /// `mask` of the block was filled into `slot` with what the store has.
    pub fn fill(&mut self, number: u64, slot: u32, mask: u8) {
        self.slots[slot as usize].block = number;
        let block = self
            .blocks
            .entry(number)
            .or_insert_with(|| Block::empty(slot));
        debug_assert_eq!(block.slot, slot);
        debug_assert_eq!(block.dirty & mask, 0);
        block.valid |= mask;
        if block.dirty == 0 {
            self.list(slot);
        }
    }

    fn list(&mut self, slot: u32) {
        let entry = &mut self.slots[slot as usize];
        if !std::mem::replace(&mut entry.listed, true) {
            self.clean.push_back(slot);
        }
    }

    /// A change of the blocks in the store begins, under their range lock.
    pub fn begin_change(&mut self, blocks: Range<u64>) {
        for (_, block) in self.blocks.range_mut(blocks) {
            block.touched = 0;
        }
    }

    /// What was staged in `mask` of the block counts as older than the change
    /// that has begun.
    pub fn untouch(&mut self, number: u64, mask: u8) {
        if let Some(block) = self.blocks.get_mut(&number) {
            block.touched &= !mask;
        }
    }

    /// The store has what `mask` of the block holds; its table entry says so.
    pub fn clean(&mut self, number: u64, mask: u8) {
        let Some(block) = self.blocks.get_mut(&number) else {
            return;
        };
        if block.dirty == 0 {
            return;
        }
        self.dirty_sectors -= u64::from((block.dirty & mask).count_ones());
        block.dirty &= !mask;
        if block.dirty == 0 {
            if !block.picked {
                self.queue.remove(&block.oldest);
            }
            block.picked = false;
            (block.oldest, block.since, block.sent) = (0, 0, 0);
            self.dirty_blocks -= 1;
            let slot = block.slot;
            self.list(slot);
        }
    }

    /// What `mask` of the block holds is not the volume's any more; its table
    /// entry says so. Returns true when that freed its slot.
    pub fn forget(&mut self, number: u64, mask: u8) -> bool {
        self.clean(number, mask);
        let Some(block) = self.blocks.get_mut(&number) else {
            return false;
        };
        block.valid &= !mask;
        if block.valid != 0 {
            return false;
        }
        let slot = block.slot;
        self.blocks.remove(&number);
        self.slots[slot as usize].block = NOBODY;
        self.free.push(slot);
        true
    }

    /// Takes charge of the block with the oldest unflushed write, if that is
    /// at most `due`, and of its neighbours that make one run with it, within
    /// the same `stripe` blocks of the volume. Runs that could begin anywhere
    /// would leave behind what a stream wrote a little out of order, to be
    /// picked bit by bit.
    pub fn pick(&mut self, due: u64, stripe: u64) -> Option<Picked> {
        let (&oldest, &first) = self.queue.first_key_value()?;
        if oldest > due {
            return None;
        }
        let ready = |block: &Block| block.dirty != 0 && !block.picked;
        let (mut start, mut end) = (first, first + 1);
        let bottom = first / stripe * stripe;
        let mut last = self.blocks[&first].dirty;
        for (number, block) in self.range(first + 1..bottom.saturating_add(stripe)) {
            if number != end || !ready(block) || last & 0x80 == 0 || block.dirty & 1 == 0 {
                break;
            }
            (end, last) = (number + 1, block.dirty);
        }
        let mut next = self.blocks[&first].dirty;
        for (number, block) in self.range(bottom..first).rev() {
            if number + 1 != start || !ready(block) || block.dirty & 0x80 == 0 || next & 1 == 0 {
                break;
            }
            (start, next) = (number, block.dirty);
        }
        for (_, block) in self.blocks.range_mut(start..end) {
            block.picked = true;
            self.queue.remove(&block.oldest);
        }
        let id = self.next_pick;
        self.next_pick += 1;
        self.picks.insert(id, oldest);
        Some(Picked {
            blocks: start..end,
            id,
        })
    }

    /// A picked block's dirty sectors are being copied, to be sent. Returns
    /// the block, unless it has been dealt with otherwise.
    pub fn send(&mut self, number: u64) -> Option<Block> {
        let block = self.blocks.get_mut(&number).filter(|block| block.picked)?;
        debug_assert_ne!(block.dirty, 0);
        block.sent = block.dirty;
        (block.touched, block.since) = (0, 0);
        Some(*block)
    }

    /// What of a sent block the store has now, if the write-back succeeded.
    pub fn arrived(&self, number: u64) -> u8 {
        self.get(number).map_or(0, |block| {
            if block.picked {
                block.sent & !block.touched
            } else {
                0
            }
        })
    }

    /// The write-back is over with this block; `delivered` says whether what
    /// was sent of it is in the store (and its table entry says so).
    pub fn finish(&mut self, number: u64, delivered: bool) {
        let arrived = self.arrived(number);
        let Some(block) = self.blocks.get_mut(&number).filter(|block| block.picked) else {
            return;
        };
        if delivered && block.sent == 0 {
            // Written and picked anew since: another write-back's.
            return;
        }
        if delivered && block.dirty & !arrived != 0 {
            // What is left was written since the copy was taken.
            debug_assert_ne!(block.since, 0);
            block.oldest = block.since;
        }
        (block.picked, block.since, block.sent) = (false, 0, 0);
        self.queue.insert(block.oldest, number);
        if delivered {
            self.clean(number, arrived);
        }
    }

    /// The write-back is over with all its blocks.
    pub fn finished(&mut self, picked: &Picked) {
        self.picks.remove(&picked.id);
    }

    /// Every write up to `sequence` is in the store.
    pub fn clean_through(&self, sequence: u64) -> bool {
        let queued = self.queue.first_key_value().map(|(oldest, _)| *oldest);
        let picked = self.picks.values().min().copied();
        queued.is_none_or(|oldest| oldest > sequence)
            && picked.is_none_or(|oldest| oldest > sequence)
    }

    /// Checks every invariant that is about the index alone; takes a time that
    /// grows with what is cached.
    #[cfg(any(test, debug_assertions))]
    pub fn check(&self) {
        let (mut dirty, mut sectors) = (0, 0);
        for (number, block) in &self.blocks {
            assert_ne!(block.valid, 0, "{number} holds nothing");
            assert_eq!(block.dirty & !block.valid, 0);
            assert_eq!(block.dirty != 0, block.oldest != 0);
            assert!(block.oldest <= block.sequence && block.sequence <= self.sequence);
            assert!(!block.picked || block.dirty != 0);
            assert_eq!(self.slots[block.slot as usize].block, *number);
            let queued = self.queue.get(&block.oldest) == Some(number);
            assert_eq!(
                queued,
                block.dirty != 0 && !block.picked,
                "{number}: {block:?}"
            );
            assert!(block.dirty != 0 || self.slots[block.slot as usize].listed);
            dirty += u32::from(block.dirty != 0);
            sectors += u64::from(block.dirty.count_ones());
        }
        assert_eq!(sectors, self.dirty_sectors);
        assert_eq!(dirty, self.dirty_blocks);
        let owned = self
            .slots
            .iter()
            .filter(|slot| slot.block != NOBODY)
            .count();
        assert_eq!(owned, self.blocks.len());
        assert_eq!(owned + self.free.len() + self.bare.len(), self.slots.len());
        assert!(self.slots.len() <= self.capacity as usize);
    }
}
