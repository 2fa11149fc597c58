//! The XML answers: errors, page ranges, blob listings.

use std::collections::BTreeMap;

use percent_encoding::percent_decode_str;
use serde::Deserialize;

use super::answer::{blob_type_of, lease_state_of};
use super::types::*;

/// What an error's body says, as far as it is repeated.
#[derive(Debug, Default)]
pub(super) struct ErrorDocument {
    /// The storage error code.
    pub code: Option<String>,
    /// The header or query parameter that the store blames, by name.
    pub culprit: Option<String>,
}

/// Reads an error's body; anything unreadable is an empty document.
pub(super) fn error(body: &[u8]) -> ErrorDocument {
    #[derive(Deserialize)]
    struct Document {
        #[serde(rename = "Code")]
        code: Option<String>,
        #[serde(rename = "HeaderName", alias = "QueryParameterName")]
        culprit: Option<String>,
    }
    let document: Option<Document> = text(body).ok().and_then(|text| {
        let is_error = text.contains("<Error");
        is_error
            .then(|| quick_xml::de::from_str(text).ok())
            .flatten()
    });
    let word = |text: Option<String>| {
        text.filter(|text| {
            !text.is_empty()
                && text.len() <= 80
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        })
    };
    match document {
        Some(document) => ErrorDocument {
            code: word(document.code),
            culprit: word(document.culprit),
        },
        None => ErrorDocument::default(),
    }
}

/// The ranges of a Get Page Ranges answer and its marker.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct PageList {
    pub filled: Vec<Range>,
    pub cleared: Vec<Range>,
    pub next_marker: Option<String>,
}

/// Reads the body of Get Page Ranges, both forms.
pub(super) fn page_list(body: &[u8]) -> Result<PageList, String> {
    #[derive(Deserialize)]
    struct Document {
        #[serde(rename = "$value", default)]
        items: Vec<Item>,
    }
    #[derive(Deserialize)]
    enum Item {
        PageRange(Bounds),
        ClearRange(Bounds),
        NextMarker(Option<String>),
        #[serde(other)]
        Other,
    }
    #[derive(Deserialize)]
    struct Bounds {
        #[serde(rename = "Start")]
        start: u64,
        #[serde(rename = "End")]
        end: u64,
    }
    impl Bounds {
        /// Both bounds are inclusive on the wire.
        fn range(&self) -> Result<Range, String> {
            match self.end.checked_add(1) {
                Some(end) if self.start < end => Ok(Range {
                    start: self.start,
                    end,
                }),
                _ => Err(format!("page range {} to {}", self.start, self.end)),
            }
        }
    }

    let document: Document = from_str(body)?;
    let mut list = PageList::default();
    for item in &document.items {
        match item {
            Item::PageRange(bounds) => list.filled.push(bounds.range()?),
            Item::ClearRange(bounds) => list.cleared.push(bounds.range()?),
            Item::NextMarker(marker) => list.next_marker = present(marker.clone()),
            Item::Other => {}
        }
    }
    // Ascending already, but others rely on it.
    list.filled.sort_unstable();
    list.cleared.sort_unstable();
    Ok(list)
}

/// Reads the body of List Blobs: the blobs and the marker.
pub(super) fn blob_list(body: &[u8]) -> Result<(Vec<ListedBlob>, Option<String>), String> {
    #[derive(Deserialize)]
    struct Document {
        #[serde(rename = "Blobs", default)]
        blobs: Blobs,
        #[serde(rename = "NextMarker")]
        next_marker: Option<String>,
    }
    #[derive(Default, Deserialize)]
    struct Blobs {
        #[serde(rename = "Blob", default)]
        list: Vec<Blob>,
    }
    #[derive(Deserialize)]
    struct Blob {
        #[serde(rename = "Name")]
        name: Name,
        #[serde(rename = "Snapshot")]
        snapshot: Option<String>,
        #[serde(rename = "Properties")]
        properties: BlobProperties,
        #[serde(rename = "Metadata", default)]
        metadata: Option<BTreeMap<String, Option<String>>>,
    }
    /// A name with characters that XML cannot hold comes percent-encoded.
    #[derive(Deserialize)]
    struct Name {
        #[serde(rename = "@Encoded")]
        encoded: Option<bool>,
        #[serde(rename = "$text", default)]
        text: String,
    }
    #[derive(Deserialize)]
    struct BlobProperties {
        #[serde(rename = "Etag")]
        etag: String,
        #[serde(rename = "Content-Length")]
        size: u64,
        #[serde(rename = "BlobType")]
        blob_type: String,
        #[serde(rename = "LeaseState")]
        lease_state: Option<String>,
        #[serde(rename = "x-ms-blob-sequence-number")]
        sequence_number: Option<String>,
    }

    let document: Document = from_str(body)?;
    let mut blobs = Vec::with_capacity(document.blobs.list.len());
    for blob in document.blobs.list {
        let name = if blob.name.encoded == Some(true) {
            percent_decode_str(&blob.name.text)
                .decode_utf8_lossy()
                .into_owned()
        } else {
            blob.name.text
        };
        let properties = blob.properties;
        let quoted = properties.etag.starts_with('"');
        blobs.push(ListedBlob {
            name,
            snapshot: present(blob.snapshot),
            blob_type: blob_type_of(&properties.blob_type)
                .ok_or_else(|| format!("blob type \"{}\"", properties.blob_type))?,
            size: properties.size,
            lease_state: match properties.lease_state.as_deref() {
                None | Some("") => LeaseState::Available,
                Some(text) => {
                    lease_state_of(text).ok_or_else(|| format!("lease state \"{text}\""))?
                }
            },
            // A listing leaves out the quotes that the header has.
            etag: ETag(if quoted {
                properties.etag
            } else {
                format!("\"{}\"", properties.etag)
            }),
            sequence_number: properties
                .sequence_number
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(0),
            metadata: blob
                .metadata
                .unwrap_or_default()
                .into_iter()
                .map(|(name, value)| (name.to_ascii_lowercase(), value.unwrap_or_default()))
                .collect(),
        });
    }
    Ok((blobs, present(document.next_marker)))
}

/// An empty element means that there is none.
fn present(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.is_empty())
}

fn from_str<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, String> {
    quick_xml::de::from_str(text(body)?).map_err(|error| format!("unreadable xml: {error}"))
}

/// The document as text, without the byte order mark that Azure sends.
fn text(body: &[u8]) -> Result<&str, String> {
    let text = std::str::from_utf8(body).map_err(|_| "xml that is not utf-8".to_owned())?;
    Ok(text.strip_prefix('\u{feff}').unwrap_or(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_page_ranges_and_differences() {
        let body = "\u{feff}<?xml version=\"1.0\" encoding=\"utf-8\"?>\n<PageList>\
            <PageRange><Start>4096</Start><End>8191</End></PageRange>\
            <ClearRange><Start>512</Start><End>1023</End></ClearRange>\
            <PageRange><Start>0</Start><End>511</End></PageRange>\
            <NextMarker>m1</NextMarker></PageList>";
        assert_eq!(
            page_list(body.as_bytes()),
            Ok(PageList {
                filled: vec![Range::at(0, 512), Range::at(4096, 4096)],
                cleared: vec![Range::at(512, 512)],
                next_marker: Some("m1".into()),
            })
        );
        for empty in ["<PageList/>", "<PageList><NextMarker/></PageList>"] {
            assert_eq!(page_list(empty.as_bytes()), Ok(PageList::default()));
        }
        for bad in [
            "",
            "no",
            "<PageList><PageRange><Start>9</Start><End>1</End></PageRange></PageList>",
            "<PageList><PageRange><Start>0</Start><End>18446744073709551615</End></PageRange></PageList>",
        ] {
            assert!(page_list(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn reads_a_listing() {
        let body = "<?xml version=\"1.0\" encoding=\"utf-8\"?><EnumerationResults \
            ServiceEndpoint=\"https://acct.blob.core.windows.net/\" ContainerName=\"dysks\">\
            <Blobs><Blob><Name>a &amp; b.vhd</Name><Snapshot>2026-01-01T00:00:00.0000000Z</Snapshot>\
            <Properties><Etag>0x8D</Etag><Content-Length>1024</Content-Length>\
            <x-ms-blob-sequence-number>7</x-ms-blob-sequence-number><BlobType>PageBlob</BlobType>\
            <LeaseStatus>locked</LeaseStatus><LeaseState>leased</LeaseState></Properties>\
            <Metadata><Owner>me</Owner><Empty/></Metadata><OrMetadata/></Blob>\
            <Blob><Name Encoded=\"true\">x%EF%BF%BEy</Name><Properties><Etag>\"1\"</Etag>\
            <Content-Length>5</Content-Length><BlobType>BlockBlob</BlobType></Properties></Blob>\
            </Blobs><NextMarker>more</NextMarker></EnumerationResults>";
        let (blobs, marker) = blob_list(body.as_bytes()).expect("a listing");
        assert_eq!(marker.as_deref(), Some("more"));
        assert_eq!(blobs.len(), 2);
        assert_eq!(blobs[0].name, "a & b.vhd");
        assert_eq!(blobs[0].etag.0, "\"0x8D\"");
        assert_eq!(blobs[0].sequence_number, 7);
        assert_eq!(blobs[0].lease_state, LeaseState::Leased);
        assert_eq!(
            blobs[0].metadata,
            vec![
                ("empty".into(), String::new()),
                ("owner".into(), "me".into())
            ]
        );
        assert_eq!(blobs[1].name, "x\u{fffe}y");
        assert_eq!(blobs[1].blob_type, BlobType::Block);
        let none = "<EnumerationResults><Blobs /><NextMarker /></EnumerationResults>";
        assert_eq!(blob_list(none.as_bytes()), Ok((Vec::new(), None)));
    }

    #[test]
    fn takes_from_an_error_only_what_cannot_be_a_secret() {
        let body = "\u{feff}<?xml version=\"1.0\"?><Error><Code>InvalidHeaderValue</Code>\
            <Message>sig=secret</Message><HeaderName>x-ms-range</HeaderName>\
            <HeaderValue>secret</HeaderValue></Error>";
        let document = error(body.as_bytes());
        assert_eq!(document.code.as_deref(), Some("InvalidHeaderValue"));
        assert_eq!(document.culprit.as_deref(), Some("x-ms-range"));
        assert!(
            error(b"<Error><Code>a secret?</Code></Error>")
                .code
                .is_none()
        );
        assert!(error(b"<html>502</html>").code.is_none());
    }

    proptest! {
        #[test]
        fn never_panics(body in prop::collection::vec(any::<u8>(), 0..200), text in "(<[/]?(PageList|PageRange|Start|End|Error|Code|Blobs|Blob|Name)>|[0-9a-z&;]{0,4}){0,20}") {
            for body in [&body[..], text.as_bytes()] {
                error(body);
                let _pages = page_list(body).is_ok();
                let _blobs = blob_list(body).is_ok();
            }
        }
    }
}
