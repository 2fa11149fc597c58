//! List Containers and List Blobs.

use std::ops::Bound;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hyper::StatusCode;
use hyper::header::HeaderValue;

use crate::blob::LeaseState;
use crate::emulator::clock;
use crate::emulator::lease::{state_name, status_name};
use crate::emulator::record::{Kind, Record, etag, modified};
use crate::emulator::refusal::{self, Refusal};
use crate::emulator::reply::Reply;
use crate::emulator::request::Request;
use crate::emulator::service::State;
use crate::emulator::xml::Xml;

/// Most entries in one answer.
const MOST: usize = 5000;

struct Page<'a> {
    prefix: &'a str,
    most: usize,
    marker: Option<(String, String)>,
}

impl<'a> Page<'a> {
    fn of(request: &'a Request) -> Result<Self, Refusal> {
        let most = match request.query("maxresults") {
            None => MOST,
            Some(text) => match text.parse::<usize>() {
                Ok(1..) => text.parse().unwrap_or(MOST).min(MOST),
                Ok(0) => return Err((&refusal::OUT_OF_RANGE_QUERY_PARAMETER).into()),
                Err(_) => return Err(refusal::invalid_query("maxresults", text)),
            },
        };
        let marker = request
            .query("marker")
            .filter(|text| !text.is_empty())
            .map(|text| decode_marker(text).ok_or_else(|| refusal::invalid_query("marker", text)))
            .transpose()?;
        Ok(Self {
            prefix: request.query("prefix").unwrap_or_default(),
            most,
            marker,
        })
    }
}

/// A marker names the entry the next list begins with.
fn encode_marker(name: &str, snapshot: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("{snapshot}\0{name}"))
}

fn decode_marker(text: &str) -> Option<(String, String)> {
    let text = String::from_utf8(URL_SAFE_NO_PAD.decode(text).ok()?).ok()?;
    let (snapshot, name) = text.split_once('\0')?;
    Some((name.to_owned(), snapshot.to_owned()))
}

fn begin(request: &Request, state: &State, container: Option<&str>, page: &Page<'_>) -> Xml {
    let mut xml = Xml::new();
    let endpoint = format!("{}/", state.url());
    let mut attributes = vec![("ServiceEndpoint", endpoint.as_str())];
    if let Some(container) = container {
        attributes.push(("ContainerName", container));
    }
    xml.open_with("EnumerationResults", &attributes);
    xml.optional(
        "Prefix",
        Some(page.prefix).filter(|prefix| !prefix.is_empty()),
    );
    xml.optional(
        "Marker",
        request.query("marker").filter(|text| !text.is_empty()),
    );
    xml.optional("MaxResults", request.query("maxresults"));
    xml.optional(
        "Delimiter",
        request.query("delimiter").filter(|text| !text.is_empty()),
    );
    xml
}

fn includes(request: &Request, what: &str) -> bool {
    request
        .query("include")
        .is_some_and(|list| list.split(',').any(|item| item == what))
}

fn text_of(date: &HeaderValue) -> &str {
    date.to_str().unwrap_or_default()
}

fn metadata(xml: &mut Xml, metadata: &[(String, String)]) {
    xml.open("Metadata");
    for (name, value) in metadata {
        xml.text(name, value);
    }
    xml.close("Metadata");
}

pub(super) fn containers(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let page = Page::of(request)?;
    let mut xml = begin(request, state, None, &page);
    xml.open("Containers");
    let from = page.marker.as_ref().map_or("", |(name, _)| name);
    let mut next = String::new();
    let found = state.store.containers();
    let found = found
        .iter()
        .map(|container| &container.record)
        .filter(|record| record.name.as_str() >= from && record.name.starts_with(page.prefix));
    for (number, record) in found.enumerate() {
        if number == page.most {
            next = encode_marker(&record.name, "");
            break;
        }
        xml.open("Container");
        xml.text("Name", &record.name);
        xml.open("Properties");
        let date = clock::http_date_of(modified(record.version));
        xml.text("Last-Modified", text_of(&date));
        xml.text("Etag", &etag(record.version));
        xml.text("LeaseStatus", "unlocked");
        xml.text("LeaseState", "available");
        xml.close("Properties");
        if includes(request, "metadata") {
            metadata(&mut xml, &record.metadata);
        }
        xml.close("Container");
    }
    xml.close("Containers");
    xml.text("NextMarker", &next);
    xml.close("EnumerationResults");
    Ok(Reply::new(StatusCode::OK).xml(xml.finish()))
}

pub(super) fn blobs(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let page = Page::of(request)?;
    let container = state.store.container(&request.target.container)?;
    let delimiter = request.query("delimiter").filter(|text| !text.is_empty());
    let mut xml = begin(request, state, Some(&container.record.name), &page);
    xml.open("Blobs");
    let (from, from_snapshot) = page.marker.clone().unwrap_or_default();
    let start = from.as_str().max(page.prefix).to_owned();
    let mut listed = 0;
    let mut next = String::new();
    let mut group = String::new();
    let slots = container.slots();
    let range = (Bound::Included(start), Bound::Unbounded);
    'names: for (name, slot) in slots.blobs.range::<String, _>(range) {
        let Some(rest) = name.strip_prefix(page.prefix) else {
            break;
        };
        let versions = slot.read();
        let snapshots = versions
            .snapshots
            .values()
            .filter(|_| includes(request, "snapshots"));
        for blob in snapshots.chain(&versions.base) {
            let record = &blob.record;
            // The blob itself comes after its snapshots.
            let time = record.snapshot.as_deref().unwrap_or("~");
            if *name == from && time < from_snapshot.as_str() {
                continue;
            }
            let prefix = delimiter.and_then(|delimiter| {
                rest.find(delimiter)
                    .map(|at| format!("{}{}", page.prefix, &rest[..at + delimiter.len()]))
            });
            if prefix.as_ref() == Some(&group) {
                continue;
            }
            if listed == page.most {
                next = encode_marker(name, time);
                break 'names;
            }
            listed += 1;
            match prefix {
                Some(prefix) => {
                    xml.open("BlobPrefix");
                    xml.text("Name", &prefix);
                    xml.close("BlobPrefix");
                    group = prefix;
                }
                None => describe(&mut xml, record, request),
            }
        }
    }
    drop(slots);
    xml.close("Blobs");
    xml.text("NextMarker", &next);
    xml.close("EnumerationResults");
    Ok(Reply::new(StatusCode::OK).xml(xml.finish()))
}

fn describe(xml: &mut Xml, record: &Record, request: &Request) {
    xml.open("Blob");
    xml.text("Name", &record.name);
    xml.optional("Snapshot", record.snapshot.as_deref());
    xml.open("Properties");
    xml.text(
        "Creation-Time",
        text_of(&clock::http_date_of(record.created)),
    );
    xml.text(
        "Last-Modified",
        text_of(&clock::http_date_of(record.modified())),
    );
    // Without quotes, other than in the header.
    xml.text("Etag", record.etag().trim_matches('"'));
    xml.text("Content-Length", &record.size.to_string());
    let kind = record.content.kind.as_deref();
    xml.text("Content-Type", kind.unwrap_or("application/octet-stream"));
    xml.optional("Content-Encoding", record.content.encoding.as_deref());
    xml.optional("Content-MD5", record.content.md5.as_deref());
    if record.kind == Kind::PageBlob {
        let number = record.sequence_number.to_string();
        xml.text("x-ms-blob-sequence-number", &number);
    }
    xml.text("BlobType", record.kind.name());
    if record.snapshot.is_none() {
        let state = record.lease.state(request.now);
        xml.text("LeaseStatus", status_name(state));
        xml.text("LeaseState", state_name(state));
        if state == LeaseState::Leased {
            let infinite = record.lease.is_infinite();
            xml.text("LeaseDuration", if infinite { "infinite" } else { "fixed" });
        }
    }
    if let Some(copy) = record.copy.as_ref().filter(|_| includes(request, "copy")) {
        xml.text("CopyId", &copy.id);
        xml.text("CopyStatus", copy.status.name());
        xml.text("CopySource", &copy.source_url);
        xml.text("CopyProgress", &format!("{}/{}", copy.done, copy.total));
        if let Some(completed) = copy.completed {
            xml.text(
                "CopyCompletionTime",
                text_of(&clock::http_date_of(completed)),
            );
        }
        xml.optional("CopyStatusDescription", copy.description.as_deref());
    }
    xml.text("ServerEncrypted", "true");
    xml.close("Properties");
    if includes(request, "metadata") {
        metadata(xml, &record.metadata);
    }
    xml.close("Blob");
}
