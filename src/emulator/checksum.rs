//! MD5 and CRC-64 as the service computes them. Azure's CRC-64 has the reflected
//! polynomial 0x9A6C9329AC4BC9B5 (CRC-64/NVME) and travels as the base64 of its
//! eight bytes, least significant first.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use md5::{Digest, Md5};

/// Base64 of the MD5 of `pieces`.
pub(super) fn md5(pieces: &[Bytes]) -> String {
    let mut hash = Md5::new();
    for piece in pieces {
        hash.update(piece);
    }
    STANDARD.encode(hash.finalize())
}

/// Base64 of the CRC-64 of `pieces`.
pub(super) fn crc64(pieces: &[Bytes]) -> String {
    let mut digest = crc64fast_nvme::Digest::new();
    for piece in pieces {
        digest.write(piece);
    }
    STANDARD.encode(digest.sum64().to_le_bytes())
}

/// Is `text` the base64 of `len` bytes?
pub(super) fn is_base64_of(text: &str, len: usize) -> bool {
    STANDARD.decode(text).is_ok_and(|bytes| bytes.len() == len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        let pieces = [Bytes::from_static(b"1234"), Bytes::from_static(b"56789")];
        assert_eq!(md5(&pieces), "JfnnlDI7RTiF9RgfG2JNCw==");
        // The check value of CRC-64/NVME is 0xAE8B14860A799888.
        assert_eq!(
            crc64(&pieces),
            STANDARD.encode(0xAE8B_1486_0A79_9888_u64.to_le_bytes())
        );
        assert!(is_base64_of(&md5(&[]), 16));
        assert!(!is_base64_of("AAAA", 16));
    }
}
