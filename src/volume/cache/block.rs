//! A cached block: where it is, and what of it is whose.

use super::layout::SECTORS;

/// All sectors of a block.
pub const ALL: u8 = u8::MAX;

/// A cached block.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// Where its bytes are.
    pub slot: u32,
    /// Sectors whose bytes in the slot are the volume's.
    pub valid: u8,
    /// Sectors that the store may not have.
    pub dirty: u8,
    /// Sectors staged since the last change of this block in the store began.
    pub touched: u8,
    /// Sectors under way to the store in a write-back.
    pub sent: u8,
    /// A write-back has taken charge of it.
    pub picked: bool,
    /// Its last staged write.
    pub sequence: u64,
    /// The oldest write that the store may not have; 0 when clean.
    pub oldest: u64,
    /// The oldest write since the write-back took its copy; 0 for none.
    pub since: u64,
    /// Checksums of its dirty sectors.
    pub sums: [u32; SECTORS],
}

impl Block {
    /// Nothing is in it yet.
    pub fn empty(slot: u32) -> Self {
        Self {
            slot,
            valid: 0,
            dirty: 0,
            touched: 0,
            sent: 0,
            picked: false,
            sequence: 0,
            oldest: 0,
            since: 0,
            sums: [0; SECTORS],
        }
    }

    /// Sectors that the store may not have, staged before its change began.
    #[must_use]
    pub fn older(&self) -> u8 {
        self.dirty & !self.touched
    }
}
