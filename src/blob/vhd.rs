//! The footer of a fixed VHD, and which part of a blob is the disk.
//!
//! Follows "Virtual Hard Disk Image Format Specification" 1.0, "Hard Disk
//! Footer Format". All numbers are big-endian.

/// Bytes in the footer.
pub const FOOTER: usize = 512;

const COOKIE: &[u8; 8] = b"conectix";
/// Bit 1 is reserved and always set.
const FEATURES: u32 = 2;
const VERSION: u32 = 0x0001_0000;
/// There is no dynamic header to point at.
const NO_HEADER: u64 = u64::MAX;
/// Hyper-V's name. Readers that do not know a creator (qemu among them) take
/// the size from the rounded geometry rather than from the size field.
const CREATOR: &[u8; 4] = b"win ";
const CREATOR_VERSION: u32 = 0x000a_0000;
const CREATOR_HOST: &[u8; 4] = b"Wi2k";
const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
const DIFFERENCING: u32 = 4;

/// Byte offsets of the fields that are read back.
mod at {
    pub const CURRENT_SIZE: usize = 48;
    pub const DISK_TYPE: usize = 60;
    pub const CHECKSUM: usize = 64;
    pub const UNIQUE_ID: usize = 68;
}

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
    /// Usable bytes in a blob of `blob_size` bytes with this layout; 0 for a
    /// blob too small to hold its footer.
    #[must_use]
    pub fn usable(self, blob_size: u64) -> u64 {
        match self {
            Self::Raw => blob_size,
            Self::Vhd | Self::LegacyVhd => blob_size.saturating_sub(FOOTER as u64),
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
    let (cylinders, heads, sectors) = geometry(disk_size);
    let mut footer = [0; FOOTER];
    let mut fields = Fields {
        footer: &mut footer,
        at: 0,
    };
    fields.put(COOKIE);
    fields.put(&FEATURES.to_be_bytes());
    fields.put(&VERSION.to_be_bytes());
    fields.put(&NO_HEADER.to_be_bytes());
    fields.put(&now.to_be_bytes());
    fields.put(CREATOR);
    fields.put(&CREATOR_VERSION.to_be_bytes());
    fields.put(CREATOR_HOST);
    fields.put(&disk_size.to_be_bytes()); // original size
    fields.put(&disk_size.to_be_bytes()); // current size
    fields.put(&cylinders.to_be_bytes());
    fields.put(&[heads, sectors]);
    fields.put(&FIXED.to_be_bytes());
    fields.put(&[0; 4]); // the checksum counts as zero in itself
    fields.put(&unique_id);
    let sum = checksum(&footer);
    footer[at::CHECKSUM..at::CHECKSUM + 4].copy_from_slice(&sum.to_be_bytes());
    footer
}

/// Appends fields one after the other; the rest of the footer stays zero.
struct Fields<'a> {
    footer: &'a mut [u8; FOOTER],
    at: usize,
}

impl Fields<'_> {
    fn put(&mut self, bytes: &[u8]) {
        self.footer[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }
}

/// One's complement of the sum of all bytes but the checksum's own.
fn checksum(footer: &[u8; FOOTER]) -> u32 {
    let all: u32 = footer.iter().copied().map(u32::from).sum();
    let own: u32 = footer[at::CHECKSUM..at::CHECKSUM + 4]
        .iter()
        .copied()
        .map(u32::from)
        .sum();
    !(all - own)
}

/// Cylinders, heads and sectors per track ("CHS Calculation", appendix): the
/// largest geometry that fits, capped at 127 GiB.
fn geometry(disk_size: u64) -> (u16, u8, u8) {
    let total = (disk_size / 512).min(65_535 * 16 * 255);
    let (heads, sectors) = if total >= 65_535 * 16 * 63 {
        (16, 255)
    } else {
        let tracks = total / 17;
        let heads = tracks.div_ceil(1024).max(4);
        if heads <= 16 && tracks < heads * 1024 {
            (heads, 17)
        } else if total / 31 < 16 * 1024 {
            (16, 31)
        } else {
            (16, 63)
        }
    };
    let cylinders = total / sectors / heads;
    (
        u16::try_from(cylinders).unwrap_or(u16::MAX),
        u8::try_from(heads).unwrap_or(16),
        u8::try_from(sectors).unwrap_or(255),
    )
}

/// The unique id in a footer.
#[must_use]
pub fn unique_id(footer: &[u8; FOOTER]) -> [u8; 16] {
    let mut id = [0; 16];
    id.copy_from_slice(&footer[at::UNIQUE_ID..at::UNIQUE_ID + 16]);
    id
}

/// Tells the layout of a blob of `blob_size` bytes from its last 512 bytes.
/// Anything that is no valid fixed-VHD footer for this size is [`Layout::Raw`];
/// a valid footer of a dynamic or differencing disk is an error text.
///
/// # Errors
/// What kind of disk it is and what to do with it.
pub fn detect(last_page: &[u8; FOOTER], blob_size: u64) -> Result<Layout, String> {
    let number = |at: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&last_page[at..at + 4]);
        u32::from_be_bytes(bytes)
    };
    if !last_page.starts_with(COOKIE) || number(at::CHECKSUM) != checksum(last_page) {
        return Ok(Layout::Raw);
    }
    let current_size =
        u64::from(number(at::CURRENT_SIZE)) << 32 | u64::from(number(at::CURRENT_SIZE + 4));
    let refuse = |kind: &str| {
        Err(format!(
            "it holds a {kind} vhd, only fixed ones are disks: convert it with qemu-img convert -O vpc -o subformat=fixed,force_size"
        ))
    };
    match number(at::DISK_TYPE) {
        DYNAMIC => refuse("dynamic"),
        DIFFERENCING => refuse("differencing"),
        FIXED if current_size == blob_size => Ok(Layout::LegacyVhd),
        FIXED if blob_size.checked_sub(FOOTER as u64) == Some(current_size) => Ok(Layout::Vhd),
        _ => Ok(Layout::Raw),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn with_checksum(mut footer: [u8; FOOTER]) -> [u8; FOOTER] {
        let sum = checksum(&footer);
        footer[at::CHECKSUM..at::CHECKSUM + 4].copy_from_slice(&sum.to_be_bytes());
        footer
    }

    #[test]
    fn writes_every_field_where_the_specification_puts_it() {
        let id = [0xab; 16];
        let footer = footer(GIB, 0x1234_5678, id);
        assert_eq!(unique_id(&footer), id);
        let expected = concat!(
            "636f6e6563746978", // conectix
            "00000002",         // features
            "00010000",         // version
            "ffffffffffffffff", // data offset
            "12345678",         // time
            "77696e20",         // creator
            "000a0000",         // its version
            "5769326b",         // its host
            "0000000040000000", // original size
            "0000000040000000", // current size
            "0820103f",         // 2080 cylinders, 16 heads, 63 sectors
            "00000002",         // fixed
        );
        assert_eq!(hex(&footer[..64]), expected);
        assert_eq!(hex(&footer[68..84]), "ab".repeat(16));
        assert!(footer[84..].iter().all(|&byte| byte == 0));
    }

    /// `qemu-img create -f vpc -o subformat=fixed X 1G`, which rounds the size
    /// up to a whole geometry: the footer as it wrote it, but for the zeroes.
    const QEMU: &str = concat!(
        "636f6e6563746978000000020001000",
        "0ffffffffffffffff3293b53d71656d75",
        "000500035769326b000000004003e000",
        "000000004003e0000821103f00000002",
        "ffffe4e41f2b5982a9dd46d18d75",
        "6f6eb841dfb6",
    );

    #[test]
    fn agrees_with_qemu_but_for_the_creator() {
        let id = 0x1f2b_5982_a9dd_46d1_8d75_6f6e_b841_dfb6_u128;
        let mut footer = footer(0x4003_e000, 0x3293_b53d, id.to_be_bytes());
        footer[28..32].copy_from_slice(b"qemu");
        footer[32..36].copy_from_slice(&0x0005_0003_u32.to_be_bytes());
        assert_eq!(hex(&with_checksum(footer)[..84]), QEMU);
    }

    #[test]
    fn geometry_is_the_specifications() {
        // Sizes and geometries as qemu-img wrote them.
        for (size, expected) in [
            (0x0200_2000, (0x03c4, 4, 17)),
            (0x4003_e000, (0x0821, 16, 63)),
            (0x8007_c000, (0x1042, 16, 63)),
            (0x8_0017_e000, (0x4041, 16, 255)),
            (8 << 40, (65_535, 16, 255)),
            (0, (0, 4, 17)),
        ] {
            assert_eq!(geometry(size), expected, "{size:#x}");
        }
    }

    #[test]
    fn tells_the_three_layouts_apart() {
        let ours = footer(GIB, 1, [7; 16]);
        assert_eq!(detect(&ours, GIB + 512), Ok(Layout::Vhd));
        // The predecessor's footer names the whole blob.
        assert_eq!(detect(&ours, GIB), Ok(Layout::LegacyVhd));
        // A footer about some other size is data.
        assert_eq!(detect(&ours, 2 * GIB), Ok(Layout::Raw));
        assert_eq!(detect(&[0; FOOTER], GIB), Ok(Layout::Raw));
        let mut broken = ours;
        broken[100] ^= 1;
        assert_eq!(detect(&broken, GIB + 512), Ok(Layout::Raw));
        for (kind, word) in [(3, "dynamic"), (4, "differencing")] {
            let mut other = ours;
            other[63] = kind;
            assert_eq!(detect(&other, GIB + 512), Ok(Layout::Raw), "no checksum");
            let text = detect(&with_checksum(other), GIB + 512).expect_err("not fixed");
            assert!(text.contains(word), "{text}");
        }
        for layout in [Layout::Raw, Layout::Vhd, Layout::LegacyVhd] {
            assert_eq!(layout.usable(layout.blob_size(GIB)), GIB);
            assert!(layout.usable(0) == 0);
        }
    }

    proptest! {
        #[test]
        fn finds_its_own_footers(pages in 1u64..1 << 34, now: u32, id: [u8; 16]) {
            let size = pages * 512;
            let page = footer(size, now, id);
            prop_assert_eq!(detect(&page, size + 512), Ok(Layout::Vhd));
            let (cylinders, heads, sectors) = geometry(size);
            let covered = u64::from(cylinders) * u64::from(heads) * u64::from(sectors) * 512;
            prop_assert!(covered <= size);
        }

        #[test]
        fn never_panics(mut page in prop::collection::vec(any::<u8>(), FOOTER), size: u64, real: bool) {
            if real {
                page[..8].copy_from_slice(COOKIE);
            }
            let mut page: [u8; FOOTER] = page.try_into().expect("512 bytes");
            if real {
                page = with_checksum(page);
            }
            let _known = detect(&page, size).is_ok();
        }
    }
}
