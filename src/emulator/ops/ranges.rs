//! Get Page Ranges, also as the difference to an earlier snapshot.

use std::ops::Range;
use std::sync::Arc;

use hyper::StatusCode;

use super::{guard_read, require_pages};
use crate::emulator::blob::Blob;
use crate::emulator::pages::{PAGE, PageMap};
use crate::emulator::refusal::{self, Refusal};
use crate::emulator::reply::Reply;
use crate::emulator::request::Request;
use crate::emulator::service::State;
use crate::emulator::store::Versions;
use crate::emulator::xml::Xml;

/// Most ranges in one answer.
const MOST: u64 = 10_000;

/// Service version that brought `maxresults` and `marker`.
const PAGING: &str = "2020-10-02";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Filled,
    Cleared,
}

pub(super) fn get(state: &Arc<State>, request: &Request) -> Result<Reply, Refusal> {
    let most = most(request)?;
    let from = marker(request)?;
    let target = &request.target;
    let slot = state.store.slot(&target.container, &target.blob)?;
    let versions = slot.read();
    let blob = versions.get(request.snapshot())?;
    let record = &blob.record;
    guard_read(request, record)?;
    require_pages(record)?;
    let pages = asked_pages(request, record.size)?;
    let pages = pages.start.max(from)..pages.end;
    let (ranges, next) = match request.query("prevsnapshot") {
        None => take(most, runs(blob, pages)),
        Some(previous) => {
            let difference = Difference::new(&versions, request.snapshot(), previous)?;
            take(most, difference.ranges(pages))
        }
    };
    let mut xml = Xml::new();
    xml.open("PageList");
    for (change, range) in ranges {
        let element = match change {
            Change::Filled => "PageRange",
            Change::Cleared => "ClearRange",
        };
        xml.range(element, range.start * PAGE, range.end * PAGE - 1);
    }
    xml.optional("NextMarker", next.map(|page| page.to_string()).as_deref());
    xml.close("PageList");
    Ok(Reply::new(StatusCode::OK)
        .version(record)
        .number("x-ms-blob-content-length", record.size)
        .xml(xml.finish()))
}

/// `maxresults`; versions that do not know it get the whole list.
fn most(request: &Request) -> Result<u64, Refusal> {
    let Some(text) = request.query("maxresults") else {
        let paged = request
            .header("x-ms-version")
            .or_else(|| request.query("sv"))
            .is_some_and(|version| version >= PAGING);
        return Ok(if paged { MOST } else { u64::MAX });
    };
    match text.parse::<u64>() {
        Ok(0) => Err(Refusal::from(&refusal::OUT_OF_RANGE_QUERY_PARAMETER)
            .with("QueryParameterName", "maxresults")
            .with("QueryParameterValue", text)),
        Ok(number) => Ok(number.min(MOST)),
        Err(_) => Err(refusal::invalid_query("maxresults", text)),
    }
}

/// `marker`: the page at which the next list begins.
fn marker(request: &Request) -> Result<u64, Refusal> {
    match request.query("marker") {
        None | Some("") => Ok(0),
        Some(text) => text
            .parse()
            .map_err(|_| refusal::invalid_query("marker", text)),
    }
}

/// The pages the range header names, cut at the end of the blob.
fn asked_pages(request: &Request, size: u64) -> Result<Range<u64>, Refusal> {
    let end = size / PAGE;
    let Some((first, last)) = request.range()? else {
        return Ok(0..end);
    };
    if first >= size {
        return Err((&refusal::INVALID_RANGE).into());
    }
    let last = last.map_or(end, |last| (last / PAGE + 1).min(end));
    Ok(first / PAGE..last)
}

type Found = (Change, Range<u64>);

fn runs(blob: &Blob, pages: Range<u64>) -> impl Iterator<Item = Found> {
    let mut at = pages.start;
    std::iter::from_fn(move || {
        let run = blob.next_written(at, pages.end)?;
        at = run.end;
        Some((Change::Filled, run))
    })
}

/// Joins neighbours of one kind and stops after `most`; also says where the
/// next list begins.
fn take(most: u64, found: impl Iterator<Item = Found>) -> (Vec<Found>, Option<u64>) {
    let mut list: Vec<Found> = Vec::new();
    for (change, range) in found {
        let full = list.len() as u64 >= most;
        match list.last_mut() {
            Some((last, end)) if *last == change && end.end == range.start => end.end = range.end,
            _ if full => return (list, Some(range.start)),
            _ => list.push((change, range)),
        }
    }
    (list, None)
}

/// What changed between a snapshot and a later one, or the blob.
struct Difference<'a> {
    /// Pages touched, one map per step between snapshots.
    steps: Vec<&'a PageMap>,
    target: &'a Blob,
    previous: &'a Blob,
}

impl<'a> Difference<'a> {
    fn new(
        versions: &'a Versions,
        target_time: Option<&str>,
        previous_time: &str,
    ) -> Result<Self, Refusal> {
        let target = versions.get(target_time)?;
        let previous = versions
            .snapshots
            .get(previous_time)
            .ok_or(&refusal::PREVIOUS_SNAPSHOT_NOT_FOUND)?;
        if target_time.is_some_and(|time| time < previous_time) {
            return Err((&refusal::PREVIOUS_SNAPSHOT_CANNOT_BE_NEWER).into());
        }
        let lineage = &target.record.lineage;
        if previous.record.lineage != *lineage {
            return Err((&refusal::BLOB_OVERWRITTEN).into());
        }
        let mut steps: Vec<&PageMap> = versions
            .snapshots
            .iter()
            .filter(|(time, blob)| {
                time.as_str() > previous_time
                    && target_time.is_none_or(|target| time.as_str() <= target)
                    && blob.record.lineage == *lineage
            })
            .map(|(_, blob)| blob.touched())
            .collect();
        if target_time.is_none() {
            steps.push(target.touched());
        }
        Ok(Self {
            steps,
            target,
            previous,
        })
    }

    fn next_touched(&self, from: u64, limit: u64) -> Option<Range<u64>> {
        self.steps
            .iter()
            .filter_map(|step| step.next_run(from, limit))
            .min_by_key(|run| (run.start, std::cmp::Reverse(run.end)))
    }

    /// Touched pages with data now; and those that held data then and hold
    /// none now.
    fn ranges(&self, pages: Range<u64>) -> impl Iterator<Item = Found> {
        let mut at = pages.start;
        let mut limit = at;
        std::iter::from_fn(move || {
            loop {
                if at >= limit {
                    let run = self.next_touched(at, pages.end)?;
                    (at, limit) = (run.start, run.end);
                }
                let filled = self.target.next_written(at, limit);
                if let Some(run) = &filled
                    && run.start == at
                {
                    at = run.end;
                    return Some((Change::Filled, run.clone()));
                }
                // Up to the next filled page nothing is written now.
                let gap_end = filled.map_or(limit, |run| run.start);
                match self.previous.next_written(at, gap_end) {
                    Some(run) => {
                        at = run.end;
                        return Some((Change::Cleared, run));
                    }
                    None => at = gap_end,
                }
            }
        })
    }
}
