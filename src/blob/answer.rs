//! A store's successful answer, and how its headers are read.

use bytes::Bytes;
use hyper::HeaderMap;
use hyper::header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderName, LAST_MODIFIED};

use super::date;
use super::error::StorageError;
use super::request::{Request, name};
use super::types::*;

/// The head and the body of a 2xx answer.
#[derive(Debug)]
pub(super) struct Answer {
    /// The HTTP status, 200 to 299.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body, in the pieces in which it came.
    pub pieces: Vec<Bytes>,
}

impl Answer {
    /// A header's text.
    pub fn text(&self, name: impl AsRef<str>) -> Option<&str> {
        self.headers.get(name.as_ref())?.to_str().ok()
    }

    /// A header's number.
    pub fn number(&self, name: &HeaderName) -> Option<u64> {
        self.text(name)?.trim().parse().ok()
    }

    /// A header that must be there.
    pub fn demand<'a>(&'a self, request: &Request, name: &str) -> Result<&'a str, StorageError> {
        self.text(name)
            .ok_or_else(|| request.bad_answer(format_args!("it lacks the header {name}")))
    }

    /// The entity tag.
    pub fn etag(&self, request: &Request) -> Result<ETag, StorageError> {
        self.demand(request, ETAG.as_str())
            .map(|tag| ETag(tag.to_owned()))
    }

    /// The sequence number, 0 where the store sent none.
    pub fn sequence_number(&self) -> u64 {
        self.number(&name::BLOB_SEQUENCE_NUMBER).unwrap_or(0)
    }

    /// Entity tag and sequence number after a write.
    pub fn written(&self, request: &Request) -> Result<Written, StorageError> {
        Ok(Written {
            etag: self.etag(request)?,
            sequence_number: self.sequence_number(),
        })
    }

    /// The body as one buffer.
    pub fn body(&self) -> Vec<u8> {
        self.pieces.concat()
    }

    /// The headers of Get Blob Properties.
    pub fn properties(&self, request: &Request) -> Result<Properties, StorageError> {
        let size = self.demand(request, CONTENT_LENGTH.as_str())?;
        let blob_type = self.demand(request, name::BLOB_TYPE.as_str())?;
        let modified = self.demand(request, LAST_MODIFIED.as_str())?;
        Ok(Properties {
            size: size
                .parse()
                .map_err(|_| request.bad_answer("its size is no number"))?,
            blob_type: blob_type_of(blob_type)
                .ok_or_else(|| request.bad_answer("an unknown type of blob"))?,
            etag: self.etag(request)?,
            last_modified: date::parse(modified)
                .ok_or_else(|| request.bad_answer("last-modified is no date"))?,
            sequence_number: self.sequence_number(),
            // A snapshot has no lease of its own and sends no state.
            lease_state: match self.text("x-ms-lease-state") {
                Some(text) => lease_state_of(text)
                    .ok_or_else(|| request.bad_answer("an unknown lease state"))?,
                None => LeaseState::Available,
            },
            lease_infinite: self.text("x-ms-lease-duration") == Some("infinite"),
            metadata: self.metadata(),
            copy: self.copy(request)?,
        })
    }

    fn metadata(&self) -> Vec<(String, String)> {
        let mut metadata: Vec<_> = self
            .headers
            .iter()
            .filter_map(|(name, value)| {
                let name = name.as_str().strip_prefix("x-ms-meta-")?;
                Some((
                    name.to_owned(),
                    String::from_utf8_lossy(value.as_bytes()).into_owned(),
                ))
            })
            .collect();
        metadata.sort_unstable();
        metadata
    }

    /// The `x-ms-copy-*` headers, when there are any.
    pub fn copy(&self, request: &Request) -> Result<Option<CopyState>, StorageError> {
        let Some(id) = self.text("x-ms-copy-id") else {
            return Ok(None);
        };
        let status = self.demand(request, "x-ms-copy-status")?;
        Ok(Some(CopyState {
            id: id.to_owned(),
            status: copy_status_of(status)
                .ok_or_else(|| request.bad_answer("an unknown copy status"))?,
            progress: self.text("x-ms-copy-progress").and_then(|text| {
                let (done, all) = text.split_once('/')?;
                Some((done.trim().parse().ok()?, all.trim().parse().ok()?))
            }),
            description: self
                .text("x-ms-copy-status-description")
                .map(ToOwned::to_owned),
        }))
    }

    /// The range and whole size in `Content-Range`.
    pub fn content_range(&self, request: &Request) -> Result<(Range, u64), StorageError> {
        let text = self.demand(request, CONTENT_RANGE.as_str())?;
        content_range(text)
            .ok_or_else(|| request.bad_answer(format_args!("content-range is \"{text}\"")))
    }
}

/// Parses `bytes first-last/size`.
fn content_range(text: &str) -> Option<(Range, u64)> {
    let rest = text.trim().strip_prefix("bytes")?.trim_start();
    let (range, size) = rest.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (start, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let size: u64 = size.trim().parse().ok()?;
    let end = last.checked_add(1)?;
    (start < end && end <= size).then_some((Range { start, end }, size))
}

/// `x-ms-blob-type`, and `BlobType` in a listing.
pub(super) fn blob_type_of(text: &str) -> Option<BlobType> {
    match text {
        "PageBlob" => Some(BlobType::Page),
        "BlockBlob" => Some(BlobType::Block),
        "AppendBlob" => Some(BlobType::Append),
        _ => None,
    }
}

/// `x-ms-lease-state`, and `LeaseState` in a listing.
pub(super) fn lease_state_of(text: &str) -> Option<LeaseState> {
    match text {
        "available" => Some(LeaseState::Available),
        "leased" => Some(LeaseState::Leased),
        "expired" => Some(LeaseState::Expired),
        "breaking" => Some(LeaseState::Breaking),
        "broken" => Some(LeaseState::Broken),
        _ => None,
    }
}

fn copy_status_of(text: &str) -> Option<CopyStatus> {
    match text {
        "pending" => Some(CopyStatus::Pending),
        "success" => Some(CopyStatus::Success),
        "aborted" => Some(CopyStatus::Aborted),
        "failed" => Some(CopyStatus::Failed),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_content_range() {
        assert_eq!(
            content_range("bytes 512-1023/4096"),
            Some((
                Range {
                    start: 512,
                    end: 1024
                },
                4096
            ))
        );
        for text in [
            "",
            "bytes",
            "bytes */4096",
            "bytes 5-4/9",
            "bytes 0-9/5",
            "bytes 0-18446744073709551615/1",
            "bytes 0-1/*",
        ] {
            assert_eq!(content_range(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn content_range_never_panics(text in "(bytes )?[0-9*/ -]{0,60}|.*") {
            if let Some((range, size)) = content_range(&text) {
                prop_assert!(range.start < range.end && range.end <= size);
            }
        }

        #[test]
        fn content_range_round_trips(start in 0u64..1 << 43, len in 1u64..1 << 30, more in 0u64..99) {
            let range = Range::at(start, len);
            let text = format!("bytes {}-{}/{}", start, range.end - 1, range.end + more);
            prop_assert_eq!(content_range(&text), Some((range, range.end + more)));
        }
    }
}
