//! The footer of a fixed VHD, and which part of a blob is the disk.
//!
//! Follows "Virtual Hard Disk Image Format Specification" 1.0, "Hard Disk
//! Footer Format".

/// Bytes in the footer.
pub const FOOTER: usize = 512;

/// How a disk lies in its blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// The blob is the disk.
    Raw,
    /// Azure's layout: the disk, then the footer; its CurrentSize is the disk.
    Vhd,
    /// The predecessor's: its CurrentSize is the whole blob, footer included.
    LegacyVhd,
}

impl Layout {
    /// Usable bytes in a blob of `blob_size` bytes with this layout.
    #[must_use]
    pub fn usable(self, blob_size: u64) -> u64 {
        match self {
            Self::Raw => blob_size,
            Self::Vhd | Self::LegacyVhd => blob_size - FOOTER as u64,
        }
    }

    /// The blob size that holds a disk of `disk_size` bytes.
    #[must_use]
    pub fn blob_size(self, disk_size: u64) -> u64 {
        match self {
            Self::Raw => disk_size,
            Self::Vhd | Self::LegacyVhd => disk_size + FOOTER as u64,
        }
    }
}

/// The footer of a new fixed VHD of `disk_size` bytes in Azure's layout.
/// `now` is seconds since 2000-01-01 00:00 UTC.
#[must_use]
pub fn footer(disk_size: u64, now: u32, unique_id: [u8; 16]) -> [u8; FOOTER] {
    todo!()
}

/// Tells the layout of a blob of `blob_size` bytes from its last 512 bytes.
/// Anything that is no valid fixed-VHD footer for this size is [`Layout::Raw`];
/// a valid footer of a dynamic or differencing disk is an error text.
pub fn detect(last_page: &[u8; FOOTER], blob_size: u64) -> Result<Layout, String> {
    todo!()
}
