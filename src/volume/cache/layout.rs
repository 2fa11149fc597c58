//! The bytes of a staging file: two copies of a header, a table with one entry
//! a slot, then the slots. All numbers are little-endian.
//!
//! | at | what |
//! |---|---|
//! | 0, 4096 | the header, written in turn; the valid one of the higher generation counts |
//! | 8192 | the table: [`ENTRY`] bytes a slot, all zero for a slot that holds nothing unflushed |
//! | next multiple of 4096 | the slots, [`BLOCK`] bytes each |

use sha2::{Digest as _, Sha256};

use crate::device::PAGE;

/// Bytes in a block, the unit of the cache: one slot.
pub const BLOCK: u64 = 4096;
/// Pages of a page blob in a block; each has its bit in a mask.
pub const SECTORS: usize = 8;
/// [`PAGE`] as a length in memory.
pub const SECTOR: usize = 512;
/// [`BLOCK`] as a length in memory.
pub const BLOCK_LEN: usize = SECTORS * SECTOR;
/// Bytes in an entry of the table; divides a page, so an entry never lies in two.
pub const ENTRY: usize = 64;
/// Where the table begins.
pub const TABLE_AT: u64 = 2 * BLOCK;
/// Bytes in a copy of the header.
pub const HEADER: usize = BLOCK_LEN;

const _: () = assert!(SECTOR as u64 == PAGE && BLOCK_LEN as u64 == BLOCK);

const MAGIC: &[u8; 8] = b"DYSKSTG1";
/// The address is there for people; longer ones are cut (the digest identifies).
const LONGEST_ADDRESS: usize = 2048;

/// Whose unflushed writes these are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Grows with each header written.
    pub generation: u64,
    /// Slots in the file.
    pub slots: u32,
    /// The blob's sequence number as of this holder.
    pub epoch: u64,
    /// After a power cut, only writes past this sequence are still news.
    pub flushed: u64,
    /// SHA-256 of the volume's address.
    pub volume: [u8; 32],
    /// The address in words, perhaps cut.
    pub address: String,
    /// The lease id under which the writes were taken.
    pub lease: String,
    /// The boot in which the file was last written.
    pub boot: String,
}

/// What identifies a volume in a header and in a file's name.
#[must_use]
pub fn digest(address: &str) -> [u8; 32] {
    Sha256::digest(address.as_bytes()).into()
}

impl Header {
    /// The header as it lies in the file.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER] {
        let mut address = self.address.as_str();
        while address.len() > LONGEST_ADDRESS {
            let mut end = LONGEST_ADDRESS;
            while !address.is_char_boundary(end) {
                end -= 1;
            }
            address = &address[..end];
        }
        let mut body = Vec::with_capacity(HEADER);
        body.extend_from_slice(MAGIC);
        body.extend_from_slice(&self.generation.to_le_bytes());
        body.extend_from_slice(&self.slots.to_le_bytes());
        body.extend_from_slice(&self.epoch.to_le_bytes());
        body.extend_from_slice(&self.flushed.to_le_bytes());
        body.extend_from_slice(&self.volume);
        for text in [address, &self.lease, &self.boot] {
            let len = u16::try_from(text.len()).expect("an address is cut, ids are short");
            body.extend_from_slice(&len.to_le_bytes());
            body.extend_from_slice(text.as_bytes());
        }
        let mut header = [0; HEADER];
        header[..body.len()].copy_from_slice(&body);
        let sum = crc(&header[..HEADER - 8], 0);
        header[HEADER - 8..].copy_from_slice(&sum.to_le_bytes());
        header
    }

    /// The header in `bytes`, unless they are none.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; HEADER] = bytes.try_into().ok()?;
        let mut at = Reader(&bytes[..HEADER - 8]);
        if at.take(8)? != MAGIC || number(&bytes[HEADER - 8..]) != crc(&bytes[..HEADER - 8], 0) {
            return None;
        }
        Some(Self {
            generation: number(at.take(8)?),
            slots: u32::from_le_bytes(at.take(4)?.try_into().ok()?),
            epoch: number(at.take(8)?),
            flushed: number(at.take(8)?),
            volume: at.take(32)?.try_into().ok()?,
            address: at.text()?,
            lease: at.text()?,
            boot: at.text()?,
        })
    }
}

/// What one slot holds that the store may not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Which block of the volume.
    pub block: u64,
    /// The last write to it.
    pub sequence: u64,
    /// Which of its sectors are unflushed; never 0.
    pub dirty: u8,
    /// [`sum`] of each dirty sector; 0 for the others, and in a file that
    /// cannot outlive a power cut.
    pub sums: [u32; SECTORS],
}

/// An entry that was cut short, or is no entry at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Torn;

impl Entry {
    /// The entry of `slot` as it lies in the table.
    #[must_use]
    pub fn encode(&self, slot: u32) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[..8].copy_from_slice(&self.block.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16] = self.dirty;
        for (at, sum) in self.sums.iter().enumerate() {
            bytes[24 + 4 * at..28 + 4 * at].copy_from_slice(&sum.to_le_bytes());
        }
        let sum = crc(&bytes[..ENTRY - 8], slot);
        bytes[ENTRY - 8..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// The entry of `slot`; `None` when the slot holds nothing.
    ///
    /// # Errors
    /// The bytes are no entry of this slot.
    pub fn decode(bytes: &[u8], slot: u32) -> Result<Option<Self>, Torn> {
        let bytes: &[u8; ENTRY] = bytes.try_into().map_err(|_| Torn)?;
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        if number(&bytes[ENTRY - 8..]) != crc(&bytes[..ENTRY - 8], slot) || bytes[16] == 0 {
            return Err(Torn);
        }
        let mut sums = [0; SECTORS];
        for (sum, four) in sums.iter_mut().zip(bytes[24..56].as_chunks::<4>().0) {
            *sum = u32::from_le_bytes(*four);
        }
        Ok(Some(Self {
            block: number(&bytes[..8]),
            sequence: number(&bytes[8..16]),
            dirty: bytes[16],
            sums,
        }))
    }
}

/// The checksum of one sector.
#[must_use]
pub fn sum(sector: &[u8]) -> u32 {
    let sum = crc(sector, 0);
    // Half of a CRC-64 is as good a 32-bit sum as any.
    u32::try_from(sum >> 32).expect("32 bits are left")
}

/// Where the slots of a file with so many begin.
#[must_use]
pub fn data_at(slots: u32) -> u64 {
    (TABLE_AT + u64::from(slots) * ENTRY as u64).next_multiple_of(BLOCK)
}

fn crc(bytes: &[u8], slot: u32) -> u64 {
    let mut digest = crc64fast_nvme::Digest::new();
    digest.write(bytes);
    if slot != 0 {
        digest.write(&slot.to_le_bytes());
    }
    digest.sum64()
}

fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("callers hand over eight bytes"))
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn text(&mut self) -> Option<String> {
        let len = u16::from_le_bytes(self.take(2)?.try_into().ok()?);
        String::from_utf8(self.take(len.into())?.to_vec()).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(address: String) -> Header {
        Header {
            generation: 3,
            slots: 65536,
            epoch: 7,
            flushed: 1 << 40,
            volume: digest(&address),
            address,
            lease: "3f2a".into(),
            boot: "9c1d".into(),
        }
    }

    #[test]
    fn a_header_survives_the_file_and_a_damaged_one_does_not() {
        let whole = header("acct/dysks/vol1.vhd".into());
        let mut bytes = whole.encode();
        assert_eq!(Header::decode(&bytes), Some(whole));
        bytes[20] ^= 1;
        assert_eq!(Header::decode(&bytes), None);
        let long = Header::decode(&header("\u{e4}".repeat(2000)).encode()).expect("a header");
        assert!(long.address.len() <= LONGEST_ADDRESS);
        assert_eq!(long.volume, digest(&"\u{e4}".repeat(2000)));
    }

    proptest! {
        #[test]
        fn an_entry_belongs_to_its_slot(
            block: u64, sequence: u64, dirty in 1u8.., sums: [u32; 8], slot: u32, bit in 0..ENTRY * 8,
        ) {
            let entry = Entry { block, sequence, dirty, sums };
            let mut bytes = entry.encode(slot);
            prop_assert_eq!(Entry::decode(&bytes, slot), Ok(Some(entry)));
            prop_assert_eq!(Entry::decode(&bytes, slot ^ 1), Err(Torn));
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Entry::decode(&bytes, slot), Err(Torn));
        }

        #[test]
        fn no_bytes_upset_the_decoders(bytes: Vec<u8>, slot: u32) {
            prop_assert_eq!(Header::decode(&bytes), None);
            prop_assert!(bytes.len() == ENTRY || Entry::decode(&bytes, slot) == Err(Torn));
        }
    }

    #[test]
    fn a_free_slot_is_no_entry() {
        assert_eq!(Entry::decode(&[0; ENTRY], 9), Ok(None));
    }
}
