//! Byte sizes as people write them: `512`, `4k`, `60MiB`, `32GiB`, `8TiB`.

use std::fmt;
use std::str::FromStr;

/// A number of bytes, parsed from and printed in binary units.
///
/// `K`, `Ki`, `KB` and `KiB` (any case) all mean 1024 bytes, as block-device tools
/// have it; likewise M, G and T. A bare number is bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is not a size: write a whole number with an optional unit, like 512, 64KiB or 32GiB"
)]
pub struct ParseSizeError(String);

const UNITS: [(&str, u64); 4] = [
    ("T", 1 << 40),
    ("G", 1 << 30),
    ("M", 1 << 20),
    ("K", 1 << 10),
];

impl FromStr for ByteSize {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseSizeError(text.to_owned());
        let trimmed = text.trim();
        let digits_end = trimmed
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(trimmed.len());
        let (digits, unit) = trimmed.split_at(digits_end);
        let number: u64 = digits.parse().map_err(|_| error())?;
        let unit = unit.trim().to_ascii_uppercase();
        let factor = match unit.as_str() {
            "" | "B" => 1,
            _ => {
                UNITS
                    .iter()
                    .find(|(letter, _)| {
                        unit.strip_prefix(letter)
                            .is_some_and(|rest| matches!(rest, "" | "B" | "I" | "IB"))
                    })
                    .ok_or_else(error)?
                    .1
            }
        };
        number.checked_mul(factor).map(ByteSize).ok_or_else(error)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (letter, factor) in UNITS {
            if self.0 >= factor && self.0.is_multiple_of(factor) {
                return write!(f, "{}{letter}iB", self.0 / factor);
            }
        }
        write!(f, "{}B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_people_write() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("4k", 4096),
            ("4KiB", 4096),
            ("60MiB", 60 << 20),
            ("32 GiB", 32 << 30),
            ("32Gi", 32 << 30),
            ("8TiB", 8 << 40),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn refuses_what_is_no_size() {
        for text in ["", "GiB", "-1", "1.5GiB", "4PiB", "4 G G", "99999999999TiB"] {
            let error = text.parse::<ByteSize>().expect_err(text);
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn prints_the_largest_whole_unit() {
        for (bytes, text) in [
            (0, "0B"),
            (513, "513B"),
            (1536, "1536B"),
            (2048, "2KiB"),
            (8 << 40, "8TiB"),
        ] {
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
    }
}
