//! The synchronous heart of the cache: index and staging file changed
//! together. Every method is one short section under the cache's mutex.

use std::collections::VecDeque;
use std::io;

use tokio::time::Instant;

use super::block::{ALL, Block};
use super::budget::Share;
use super::index::{Index, Source};
use super::layout::{BLOCK, Entry, SECTOR, SECTORS, sum};
use super::staging::{Staging, Stretch};
use crate::blob::Range;
use crate::buffers::Buffer;
use crate::device::PAGE;

/// Bytes handled in one section.
pub const SECTION: u64 = 32 * BLOCK;

/// Part of one block, and where its bytes are in the caller's buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub block: u64,
    pub mask: u8,
    /// First byte within the block.
    pub at: usize,
    /// First byte in the buffer.
    pub from: usize,
    pub len: usize,
}

impl Part {
    fn stretch(&self, slot: u32) -> Stretch {
        Stretch {
            slot,
            at: self.at,
            bytes: self.from..self.from + self.len,
        }
    }
}

/// Somebody who reads from the store what the cache lacks.
#[derive(Debug)]
struct Fill {
    id: u64,
    range: Range,
    /// The range was, or is being, changed since: what was read may be old.
    spoiled: bool,
}

/// What became of bytes to be staged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Staged {
    /// How many, from the first, are staged: they may be acknowledged.
    pub bytes: usize,
    /// The staging file failed; the rest has to go to the store.
    pub failed: bool,
    /// The write-back has something new to consider.
    pub wake: bool,
}

/// A copy of what is in the cache of a range.
#[derive(Debug, Default)]
pub struct Copied {
    /// The range's bytes; zeroes where they are missing.
    pub bytes: Buffer,
    /// What is missing, in order, neighbours joined.
    pub missing: Vec<Range>,
    /// The registration under which what is missing may be filled in.
    pub fill: Option<u64>,
}

/// Index, file and everybody under way.
#[derive(Debug)]
pub struct Core {
    pub index: Index,
    pub staging: Staging,
    pub(super) share: Share,
    fills: Vec<Fill>,
    /// Changes in the store under way.
    pub(super) changing: Vec<(u64, Range)>,
    next_id: u64,
    /// The file system had room the last time.
    pub(super) roomy: bool,
    /// Writers that wait for a slot.
    pub waiting: usize,
    /// Everything up to here is wanted in the store.
    pub(super) flush_to: u64,
    /// What had been written at past ticks, oldest first.
    pub(super) ages: VecDeque<(Instant, u64)>,
    pub hits: u64,
    pub misses: u64,
    /// The staging file failed once: it may disagree with the index.
    failed: std::cell::Cell<bool>,
}

pub(super) fn parts(range: Range) -> impl Iterator<Item = Part> {
    debug_assert!(range.start.is_multiple_of(PAGE) && range.end.is_multiple_of(PAGE));
    let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK);
    blocks.map(move |block| {
        let start = range.start.max(block * BLOCK);
        let end = range.end.min((block + 1) * BLOCK);
        let (at, len) = (len_of(start - block * BLOCK), len_of(end - start));
        Part {
            block,
            mask: mask(at / SECTOR, len / SECTOR),
            at,
            from: len_of(start - range.start),
            len,
        }
    })
}

pub(super) fn mask(first: usize, sectors: usize) -> u8 {
    debug_assert!(first + sectors <= SECTORS && sectors > 0);
    (ALL >> (SECTORS - sectors)) << first
}

/// The runs of set bits in `bits`: first and count.
pub(super) fn runs(bits: u8) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = u16::from(bits) >> at;
        if rest == 0 {
            return None;
        }
        let first = at + rest.trailing_zeros() as usize;
        let count = (u16::from(bits) >> first).trailing_ones() as usize;
        at = first + count;
        Some((first, count))
    })
}

fn overlap(a: &Range, b: &Range) -> bool {
    a.start < b.end && b.start < a.end
}

/// Lengths here are within a request's payload.
pub(super) fn len_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a payload's length fits memory")
}

impl Core {
    pub fn new(index: Index, staging: Staging, share: Share) -> Self {
        Self {
            index,
            staging,
            share,
            fills: Vec::new(),
            changing: Vec::new(),
            next_id: 0,
            roomy: true,
            waiting: 0,
            flush_to: 0,
            ages: VecDeque::new(),
            hits: 0,
            misses: 0,
            failed: std::cell::Cell::new(false),
        }
    }

    pub(super) fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Asserts the invariants, as long as little enough is cached for that to
    /// take no time to speak of.
    #[cfg(any(test, debug_assertions))]
    pub fn check(&self) {
        const LITTLE: usize = 64;
        if self.index.cached_blocks() > LITTLE {
            return;
        }
        self.index.check();
        // A simulation breaks its files on purpose, and judges for itself.
        if self.failed.get() || self.staging.path().is_none() || !self.staging.may_wait() {
            return;
        }
        for (number, block) in self.index.range(0..u64::MAX) {
            let (slot, ours) = entry_of(number, block, block.dirty);
            let Ok(theirs) = self.staging.entry(slot) else {
                continue;
            };
            let names = |entry: &Entry| (entry.block, entry.sequence, entry.dirty);
            debug_assert_eq!(
                theirs.map(|entry| entry.as_ref().map(names)),
                Ok(ours.as_ref().map(names)),
                "the table's entry of slot {slot}"
            );
        }
    }

    // Staging.

    /// Stages as much of `data` as there are slots for, at most [`SECTION`].
    pub fn stage(&mut self, offset: u64, data: &[u8]) -> Staged {
        let end = (offset + data.len() as u64).min((offset / BLOCK * BLOCK) + SECTION);
        let range = Range { start: offset, end };
        let parts: Vec<(Part, u32, bool)> = self.slots_for(range);
        let stretches: Vec<Stretch> = parts
            .iter()
            .map(|(part, slot, _)| part.stretch(*slot))
            .collect();
        let mut staged = Staged::default();
        let mut written = parts.len();
        if let Err((first, error)) = self.staging.write(&stretches, data) {
            written = first;
            staged.failed = !self.no_room(&error);
            self.unplace(&parts[first..]);
        }
        let before = self.index.dirty_blocks();
        let mut entries = Vec::with_capacity(written);
        for (part, slot, _) in &parts[..written] {
            let sums = self.sums(&data[part.from..part.from + part.len], part.at);
            let block = self.index.stage(part.block, *slot, part.mask, &sums);
            entries.push(entry_of(part.block, block, block.dirty));
            staged.bytes = part.from + part.len;
        }
        self.spoil(&Range::at(offset, staged.bytes as u64));
        if let Err(error) = self.staging.commit(&entries) {
            // In memory it is staged, but a crash would lose it: do not acknowledge.
            self.complain(&error);
            staged.bytes = 0;
            staged.failed = true;
        }
        let high = self.high_water();
        let after = self.index.dirty_blocks();
        staged.wake = before == 0 || before <= high && after > high;
        staged
    }

    /// A slot for each block of `range`, as far as they go: which, and
    /// whether memory was taken for it just now. The index does not know the
    /// new ones yet.
    fn slots_for(&mut self, range: Range) -> Vec<(Part, u32, bool)> {
        let keep = range.start / BLOCK..range.end.div_ceil(BLOCK);
        let mut placed = Vec::with_capacity(len_of(keep.end - keep.start));
        for part in parts(range) {
            let slot = match self.index.get(part.block) {
                Some(block) => (block.slot, false),
                None => {
                    let (roomy, share) = (self.roomy, &mut self.share);
                    match self.index.take_slot(&keep, || roomy && share.take()) {
                        Some(Source::Backed(slot)) => (slot, false),
                        Some(Source::Bare(slot)) => (slot, true),
                        None => break,
                    }
                }
            };
            placed.push((part, slot.0, slot.1));
        }
        placed
    }

    /// Undoes [`Core::slots_for`] after the slots could not be written.
    fn unplace(&mut self, parts: &[(Part, u32, bool)]) {
        for (part, slot, bare) in parts {
            match self.index.get(part.block) {
                // What was clean there may be half overwritten.
                Some(block) => {
                    let lost = part.mask & !block.dirty;
                    self.index.forget(part.block, lost);
                }
                None => {
                    if *bare {
                        self.share.give();
                    }
                    self.index.return_slot(*slot, !bare);
                }
            }
        }
    }

    /// Takes note of a full file system; false for any other error.
    pub(super) fn no_room(&mut self, error: &io::Error) -> bool {
        let full = matches!(
            error.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        );
        if full && self.roomy {
            tracing::warn!("the staging file system is full: caching no more than fits");
        }
        self.roomy &= !full;
        if !full {
            self.complain(error);
        }
        full
    }

    pub(super) fn complain(&self, error: &io::Error) {
        self.failed.set(true);
        let path = self
            .staging
            .path()
            .unwrap_or(std::path::Path::new("(unnamed)"));
        tracing::error!("staging file {}: {error}", path.display());
    }

    fn sums(&self, data: &[u8], at: usize) -> [u32; SECTORS] {
        let mut sums = [0; SECTORS];
        if !self.staging.in_memory() {
            for (slot, sector) in sums[at / SECTOR..].iter_mut().zip(data.chunks(SECTOR)) {
                *slot = sum(sector);
            }
        }
        sums
    }

    // Reading.

    /// Copies what is cached of `range` (at most [`SECTION`] long), part of
    /// `whole`, behind `copied`.
    ///
    /// # Errors
    /// The staging file failed.
    pub fn copy(&mut self, range: Range, whole: Range, copied: &mut Copied) -> io::Result<()> {
        let base = copied.bytes.len();
        copied.bytes.resize(base + len_of(range.len()), 0);
        let mut stretches = Vec::new();
        for part in parts(range) {
            let from = base + part.from;
            let block = self.index.get(part.block);
            let (valid, slot) = block.map_or((0, 0), |block| {
                let clean_under_change = self.under_change(part.block) & !block.dirty;
                (block.valid & part.mask & !clean_under_change, block.slot)
            });
            if valid != 0 {
                self.index.refer(slot);
            }
            for (first, count) in runs(valid) {
                let start = from + first * SECTOR - part.at;
                stretches.push(Stretch {
                    slot,
                    at: first * SECTOR,
                    bytes: start..start + count * SECTOR,
                });
            }
            for (first, count) in runs(part.mask & !valid) {
                let start = part.block * BLOCK + (first * SECTOR) as u64;
                let end = start + (count * SECTOR) as u64;
                match copied.missing.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => copied.missing.push(Range { start, end }),
                }
            }
        }
        self.staging
            .read(&stretches, &mut copied.bytes)
            .inspect_err(|error| self.complain(error))?;
        if range.end == whole.end {
            let counter = if copied.missing.is_empty() {
                &mut self.hits
            } else {
                &mut self.misses
            };
            *counter += 1;
        }
        if copied.fill.is_none() && (!copied.missing.is_empty() || range != whole) {
            copied.fill = Some(self.register(whole));
        }
        Ok(())
    }

    /// The bytes of `range` (at most [`SECTION`] long), if all of it is cached
    /// and can be read; counts nothing and registers nothing otherwise.
    pub fn hit(&mut self, range: Range) -> Option<Vec<u8>> {
        let mut stretches = Vec::with_capacity(len_of(range.len().div_ceil(BLOCK)) + 1);
        for part in parts(range) {
            let block = self.index.get(part.block)?;
            let clean_under_change = self.under_change(part.block) & !block.dirty;
            if part.mask & (!block.valid | clean_under_change) != 0 {
                return None;
            }
            stretches.push(part.stretch(block.slot));
        }
        for stretch in &stretches {
            self.index.refer(stretch.slot);
        }
        let mut bytes = vec![0; len_of(range.len())];
        // Said by whoever reads it again.
        self.staging.read(&stretches, &mut bytes).ok()?;
        self.hits += 1;
        Some(bytes)
    }

    /// Sectors of the block that are changed in the store just now: it may have
    /// the change already, and who has seen it there must see it ever after.
    fn under_change(&self, number: u64) -> u8 {
        let block = Range::at(number * BLOCK, BLOCK);
        let changes = self.changing.iter().map(|(_, range)| range);
        changes
            .filter(|range| overlap(range, &block))
            .map(|range| {
                let start = range.start.max(block.start) - block.start;
                let end = range.end.min(block.end) - block.start;
                let first = len_of(start) / SECTOR;
                mask(first, len_of(end).div_ceil(SECTOR) - first)
            })
            .fold(0, |all, one| all | one)
    }

    /// Begins to watch `range` for changes; ended by [`Core::unregister`].
    pub fn register(&mut self, range: Range) -> u64 {
        let spoiled = self
            .changing
            .iter()
            .any(|(_, changing)| overlap(changing, &range));
        let id = self.id();
        self.fills.push(Fill { id, range, spoiled });
        id
    }

    /// Ends a registration.
    pub fn unregister(&mut self, id: u64) {
        self.fills.retain(|fill| fill.id != id);
    }

    /// Nothing changed the range since it was registered, nor is about to.
    pub fn undisturbed(&self, id: u64) -> bool {
        self.fills.iter().any(|fill| fill.id == id && !fill.spoiled)
    }

    pub(super) fn spoil(&mut self, range: &Range) {
        for fill in &mut self.fills {
            fill.spoiled |= overlap(&fill.range, range);
        }
    }

    /// Keeps `data`, which the store has at `range` (at most [`SECTION`]
    /// long), as far as it is not cached, under the registration `id`.
    pub fn fill(&mut self, id: u64, range: Range, data: &[u8]) {
        if !self.undisturbed(id) {
            return;
        }
        let parts = self.slots_for(range);
        let mut stretches = Vec::new();
        let mut filled = Vec::new();
        for (part, slot, _) in &parts {
            let valid = self.index.get(part.block).map_or(0, |block| block.valid);
            let lacking = part.mask & !valid;
            for (first, count) in runs(lacking) {
                let from = part.from + first * SECTOR - part.at;
                stretches.push(Stretch {
                    slot: *slot,
                    at: first * SECTOR,
                    bytes: from..from + count * SECTOR,
                });
            }
            filled.push((part.block, *slot, lacking));
        }
        if let Err((_, error)) = self.staging.write(&stretches, data) {
            // What lacks stays lacking, whatever the slots hold now.
            self.no_room(&error);
            for (part, slot, bare) in parts {
                if self.index.get(part.block).is_none() {
                    if bare {
                        self.share.give();
                    }
                    self.index.return_slot(slot, !bare);
                }
            }
            return;
        }
        for (block, slot, lacking) in filled {
            if lacking != 0 {
                self.index.fill(block, slot, lacking);
            }
        }
    }
}

pub(super) fn entry_of(number: u64, block: &Block, dirty: u8) -> (u32, Option<Entry>) {
    let entry = (dirty != 0).then_some(Entry {
        block: number,
        sequence: block.sequence,
        dirty,
        sums: block.sums,
    });
    (block.slot, entry)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use tokio::time::Duration;

    use super::*;
    use crate::volume::cache::budget::Budget;
    use crate::volume::cache::files::{StagingFiles, System};
    use crate::volume::cache::index::Picked;
    use crate::volume::cache::layout::{BLOCK_LEN, Header};

    fn core(folder: &std::path::Path, slots: u32) -> Core {
        let header = Header {
            generation: 0,
            slots,
            epoch: 1,
            flushed: 0,
            volume: [0; 32],
            address: "acct/dysks/vol1.vhd".into(),
            lease: "l".into(),
            boot: "b".into(),
        };
        let files: Arc<dyn StagingFiles> = Arc::new(System);
        let path = folder.join("v.staging");
        let staging = Staging::create(&files, &path, true, header, Some(true)).unwrap();
        Core::new(
            Index::new(slots, 0),
            staging,
            Share::join(Budget::unlimited()),
        )
    }

    fn read(core: &mut Core, range: Range) -> Copied {
        let mut copied = Copied::default();
        core.copy(range, range, &mut copied).unwrap();
        copied
    }

    /// The table in the file, next to what the index would have there.
    fn check(core: &Core) {
        core.index.check();
        let (mut table, torn) = core.staging.table().unwrap();
        let mut expected: Vec<(u32, Entry)> = core
            .index
            .range(0..u64::MAX)
            .filter_map(|(number, block)| {
                let (slot, entry) = entry_of(number, block, block.dirty);
                Some((slot, entry?))
            })
            .collect();
        expected.sort_by_key(|(slot, _)| *slot);
        // Sums of clean sectors are left over in memory and mean nothing.
        for (_, entry) in table.iter_mut().chain(&mut expected) {
            for sector in 0..SECTORS {
                if entry.dirty & (1 << sector) == 0 {
                    entry.sums[sector] = 0;
                }
            }
        }
        assert_eq!((table, torn), (expected, 0));
    }

    #[test]
    fn a_full_file_system_stages_no_more_than_fits() {
        let folder = tempfile::tempdir().unwrap();
        let mut core = core(folder.path(), 64);
        core.staging.full_from = Some(3);
        let data = vec![7; 8 * BLOCK_LEN];
        let mut staged = 0;
        while staged < data.len() {
            let step = core.stage(staged as u64, &data[staged..]);
            assert!(!step.failed, "full is no failure");
            check(&core);
            if step.bytes == 0 {
                break;
            }
            staged += step.bytes;
        }
        // A run that hits the end is not staged, but single blocks are.
        for block in 0..8u64 {
            core.stage(block * BLOCK, &data[..BLOCK_LEN]);
        }
        check(&core);
        assert!(core.index.dirty_blocks() <= 3);
        let before = core.index.dirty_blocks();
        // With room again, growth goes on after the next look at the clock.
        core.staging.full_from = None;
        core.stage(40 * BLOCK, &data[..BLOCK_LEN]);
        core.tick(Instant::now(), Duration::from_secs(5));
        assert_eq!(core.stage(41 * BLOCK, &data[..BLOCK_LEN]).bytes, BLOCK_LEN);
        assert!(core.index.dirty_blocks() > before);
        check(&core);
    }

    #[test]
    fn a_read_beside_a_change_keeps_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut core = core(folder.path(), 64);
        let range = Range::at(0, BLOCK);
        let before = core.register(range);
        let id = core.begin_change(range);
        let during = core.register(range);
        for read in [before, during] {
            core.fill(read, range, &[1; BLOCK_LEN]);
            assert_eq!(core.index.cached_blocks(), 0);
            core.unregister(read);
        }
        core.end_change(id, true);
        let after = core.register(range);
        core.fill(after, range, &[2; BLOCK_LEN]);
        assert_eq!(core.index.cached_blocks(), 1);
        // Not sure what the store has: nothing clean is believed.
        let id = core.begin_change(range);
        core.end_change(id, false);
        assert_eq!(core.index.cached_blocks(), 0);
        check(&core);
    }

    /// One read may have seen the change in the store already: none may see
    /// what was before it in the cache any more. What is staged is newer than
    /// both, or comes after the change.
    #[test]
    fn a_read_beside_a_change_finds_nothing_clean() {
        let folder = tempfile::tempdir().unwrap();
        let mut core = core(folder.path(), 64);
        let block = Range::at(0, BLOCK);
        let filling = core.register(block);
        core.fill(filling, block, &[1; BLOCK_LEN]);
        core.unregister(filling);
        core.stage(PAGE, &[2; SECTOR]);
        assert!(read(&mut core, block).missing.is_empty());
        let changed = Range::at(0, 3 * PAGE);
        let id = core.begin_change(changed);
        let beside = read(&mut core, block);
        let expected = [Range::at(0, PAGE), Range::at(2 * PAGE, PAGE)];
        assert_eq!(beside.missing, expected);
        core.unregister(beside.fill.expect("it is watched"));
        core.wrote(0, &[3; 3 * SECTOR]).unwrap();
        core.end_change(id, true);
        let after = read(&mut core, block);
        assert!(after.missing.is_empty());
        let firsts: Vec<u8> = (0..4).map(|page| after.bytes[page * SECTOR]).collect();
        assert_eq!(firsts, [3, 3, 3, 1]);
        check(&core);
    }

    #[test]
    fn a_stream_a_little_out_of_order_is_written_back_in_whole_stripes() {
        const STRIPE: u64 = 4 << 20;
        let folder = tempfile::tempdir().unwrap();
        let mut core = core(folder.path(), 4096);
        let data = vec![7; len_of(SECTION)];
        let (mut sections, mut runs) = ((0..4 * STRIPE / SECTION).collect::<Vec<_>>(), 0);
        // As requests on several connections arrive.
        sections.chunks_mut(3).for_each(<[u64]>::reverse);
        for pair in sections.chunks(3 * 11) {
            for section in pair {
                let staged = core.stage(section * SECTION, &data);
                assert_eq!(staged.bytes, data.len());
            }
            // The first stripe is due while the second is being written.
            if core.index.dirty_blocks() >= 1200 && runs == 0 {
                runs += u32::from(core.index.pick(1, 1024).is_some());
            }
        }
        core.want_flushed();
        while let Some(picked) = core.pick() {
            assert_eq!(picked.blocks.start * BLOCK % STRIPE, 0);
            assert_eq!((picked.blocks.end - picked.blocks.start) * BLOCK, STRIPE);
            runs += 1;
        }
        assert_eq!(runs, 4);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Stage(Range),
        Fill(Range),
        Through(Range, bool),
        Clear(Range),
        Pick,
        Send,
        Finish(bool),
        Full(Option<u32>),
        Tick,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let range =
            || (0u64..400, 1u64..40).prop_map(|(page, pages)| Range::at(page * PAGE, pages * PAGE));
        let step = prop_oneof![
            6 => range().prop_map(Step::Stage),
            3 => range().prop_map(Step::Fill),
            2 => (range(), any::<bool>()).prop_map(|(range, known)| Step::Through(range, known)),
            1 => range().prop_map(Step::Clear),
            3 => Just(Step::Pick),
            3 => Just(Step::Send),
            3 => any::<bool>().prop_map(Step::Finish),
            1 => proptest::option::of(0u32..32).prop_map(Step::Full),
            1 => Just(Step::Tick),
        ];
        proptest::collection::vec(step, 1..120)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        /// Bookkeeping and file agree after every step, and a write-back that
        /// counts as delivered delivered the last bytes staged before its copy.
        #[test]
        fn index_and_file_agree(steps in steps()) {
            let folder = tempfile::tempdir().unwrap();
            let mut core = core(folder.path(), 32);
            let mut model = vec![0u8; 440 * SECTOR];
            let mut store = model.clone();
            let mut stamp = 0u8;
            let mut picked: Option<Picked> = None;
            let mut sent: Option<Vec<(u64, Buffer)>> = None;
            let at = |range: &Range| len_of(range.start)..len_of(range.end);
            // Within the range lock, changes of the picked blocks wait.
            let free = |picked: &Option<Picked>, range: &Range| picked.as_ref().is_none_or(|picked| {
                let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK);
                picked.blocks.end <= blocks.start || blocks.end <= picked.blocks.start
            });
            for step in steps {
                stamp = stamp.wrapping_add(1).max(1);
                match step {
                    Step::Stage(range) => {
                        let staged = core.stage(range.start, &vec![stamp; len_of(range.len())]);
                        let end = range.start + staged.bytes as u64;
                        model[at(&Range { start: range.start, end })].fill(stamp);
                    }
                    Step::Fill(range) => {
                        let copied = read(&mut core, range);
                        if let Some(id) = copied.fill {
                            for part in copied.missing {
                                core.fill(id, part, &store[at(&part)]);
                            }
                            core.unregister(id);
                        }
                    }
                    Step::Through(range, known) if free(&picked, &range) => {
                        let id = core.begin_change(range);
                        if known {
                            let bytes = vec![stamp; len_of(range.len())];
                            core.wrote(range.start, &bytes).unwrap();
                            store[at(&range)].fill(stamp);
                            model[at(&range)].fill(stamp);
                        }
                        core.end_change(id, known);
                    }
                    Step::Clear(range) if free(&picked, &range) => {
                        let id = core.begin_change(range);
                        let mut rest = range;
                        while !rest.is_empty() {
                            rest = core.cleared(rest).unwrap();
                        }
                        store[at(&range)].fill(0);
                        model[at(&range)].fill(0);
                        core.end_change(id, true);
                    }
                    Step::Pick if picked.is_none() => {
                        core.want_flushed();
                        picked = core.pick();
                    }
                    Step::Send => if let (Some(picked), None) = (&picked, &sent) {
                        let mut pieces = Vec::new();
                        core.send(picked.blocks.clone(), picked.blocks.end, &mut pieces).unwrap();
                        for (offset, data) in &pieces {
                            let range = Range::at(*offset, data.len() as u64);
                            prop_assert_eq!(&model[at(&range)], &data[..]);
                        }
                        sent = Some(pieces);
                    },
                    Step::Finish(delivered) => if let Some(run) = picked.take() {
                        let delivered = delivered && sent.is_some();
                        for (offset, data) in sent.take().into_iter().flatten() {
                            let range = Range::at(offset, data.len() as u64);
                            if delivered {
                                store[at(&range)].copy_from_slice(&data);
                            }
                        }
                        core.finish(run.blocks.clone(), delivered);
                        core.index.finished(&run);
                    },
                    Step::Full(from) => core.staging.full_from = from,
                    Step::Tick => core.tick(Instant::now(), Duration::from_secs(5)),
                    _ => {}
                }
                check(&core);
                let whole = Range::at(0, model.len() as u64);
                for section in (whole.start..whole.end).step_by(len_of(SECTION)) {
                    let section = Range { start: section, end: whole.end.min(section + SECTION) };
                    let mut copied = read(&mut core, section);
                    core.unregister(copied.fill.unwrap_or(0));
                    for part in copied.missing {
                        let to = len_of(part.start - section.start);
                        copied.bytes[to..to + len_of(part.len())].copy_from_slice(&store[at(&part)]);
                    }
                    prop_assert_eq!(&copied.bytes[..], &model[at(&section)]);
                }
            }
        }
    }
}
