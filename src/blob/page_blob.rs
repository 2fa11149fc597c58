//! One page blob: each method is exactly one attempt at one REST operation.
//!
//! Nothing here retries. `deadline` bounds the whole attempt, from picking a
//! connection to the last byte of the answer; when it passes, the connection
//! is closed and the error says whether the request may have been written.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::Method;
use hyper::header::HeaderName;

use super::account::Account;
use super::answer::Answer;
use super::attempt::Expect;
use super::checksum;
use super::endpoint::{Target, encode_query};
use super::error::StorageError;
use super::request::{Request, name};
use super::types::*;
use super::xml;

/// The longest list of page ranges that is read, in bytes. The store's cap of
/// 10,000 ranges a page takes under 1 MiB; stores without the cap take more.
const RANGE_LIST: u64 = 64 << 20;

/// The result of one attempt.
pub type Attempt<T> = Result<T, StorageError>;

/// A handle on one page blob (or one snapshot of it); cheap to clone.
#[derive(Clone)]
pub struct PageBlob {
    pub(super) account: Account,
    pub(super) target: Arc<Target>,
    pub(super) snapshot: Option<String>,
    /// Where the blob is made, when it is made.
    pub(super) tier: Option<String>,
}

impl std::fmt::Debug for PageBlob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageBlob")
            .field("account", &self.account)
            .field("address", &self.target.address)
            .field("snapshot", &self.snapshot)
            .finish()
    }
}

/// The answer of Get Blob on a range.
#[derive(Clone, Debug)]
pub struct RangeRead {
    /// The bytes, as the pieces in which they came; lengths add up to exactly
    /// the range that was asked for.
    pub pieces: Vec<Bytes>,
    /// Size of the whole blob, from `Content-Range`.
    pub blob_size: u64,
    /// Entity tag.
    pub etag: ETag,
    /// `x-ms-blob-sequence-number`.
    pub sequence_number: u64,
}

/// A checksum to send with a write or to demand of a read.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Checksum {
    /// None.
    #[default]
    Off,
    /// `Content-MD5`; on reads `x-ms-range-get-content-md5` (ranges up to 4 MiB).
    Md5,
    /// `x-ms-content-crc64`; on reads `x-ms-range-get-content-crc64`.
    Crc64,
}

/// What Delete Blob does with snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeleteSnapshots {
    /// Fails when there are any (no header sent).
    Refuse,
    /// `include`: the blob and its snapshots.
    Include,
    /// `only`: the snapshots and not the blob.
    Only,
}

impl PageBlob {
    /// The address, without the snapshot.
    #[must_use]
    pub fn address(&self) -> &BlobAddress {
        &self.target.address
    }

    /// The same blob with connections of its own, at most `max_connections`;
    /// see [`Account::isolated`].
    #[must_use]
    pub fn isolated(&self, max_connections: usize) -> Self {
        Self {
            account: self.account.isolated(max_connections),
            ..self.clone()
        }
    }

    /// The same blob as of the snapshot taken at `time` (an `x-ms-snapshot` value).
    #[must_use]
    pub fn at_snapshot(&self, time: impl Into<String>) -> Self {
        Self {
            snapshot: Some(time.into()),
            ..self.clone()
        }
    }

    /// The same blob, to be made in `tier` of a premium account (P4 to P60,
    /// `x-ms-access-tier` of Put Blob and Copy Blob).
    #[must_use]
    pub fn in_tier(&self, tier: impl Into<String>) -> Self {
        Self {
            tier: Some(tier.into()),
            ..self.clone()
        }
    }

    /// The account this blob is in.
    #[must_use]
    pub fn account(&self) -> &Account {
        &self.account
    }

    /// A request about this blob or snapshot.
    pub(super) fn request(&self, method: Method, operation: &'static str) -> Request {
        Request::new(method, operation, &self.target).snapshot(self.snapshot.as_deref())
    }

    /// Executes a request whose answer has no body.
    pub(super) async fn execute(&self, request: &Request, deadline: Duration) -> Attempt<Answer> {
        self.account
            .execute(request, Expect::Nothing, deadline)
            .await
    }

    async fn write(&self, request: &Request, deadline: Duration) -> Attempt<Written> {
        self.execute(request, deadline).await?.written(request)
    }

    /// Put Blob: creates (or, unless conditioned, replaces) an empty page blob of `size` bytes.
    ///
    /// # Errors
    /// 409 `BlobAlreadyExists` under [`Conditions::not_existing`], or as any request.
    pub async fn create(
        &self,
        size: u64,
        metadata: &[(String, String)],
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Written> {
        let request = self
            .request(Method::PUT, "put blob")
            .fixed(name::BLOB_TYPE, "PageBlob")
            .number(name::BLOB_CONTENT_LENGTH, size)
            .metadata(metadata)
            .tier(self.tier.as_deref())
            .conditions(conditions);
        self.write(&request, deadline).await
    }

    /// Put Page, update: at most 4 MiB, both ends on page boundaries.
    ///
    /// # Errors
    /// 412 when a condition or the lease does not hold, or as any request.
    pub async fn put_page(
        &self,
        offset: u64,
        data: Bytes,
        checksum: Checksum,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Written> {
        let mut request = self
            .request(Method::PUT, "put page")
            .query("comp", "page")
            .fixed(name::PAGE_WRITE, "update")
            .range(name::RANGE, Range::at(offset, data.len() as u64))
            .conditions(conditions);
        let pieces = std::slice::from_ref(&data);
        match checksum {
            Checksum::Off => {}
            Checksum::Md5 => {
                request = request.header(name::CONTENT_MD5, checksum::md5(pieces));
            }
            Checksum::Crc64 => {
                request = request.header(name::CONTENT_CRC64, checksum::crc64(pieces));
            }
        }
        self.write(&request.body(data), deadline).await
    }

    /// Put Page, clear: any length, both ends on page boundaries.
    ///
    /// # Errors
    /// As [`PageBlob::put_page`].
    pub async fn clear_pages(
        &self,
        range: Range,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Written> {
        let request = self
            .request(Method::PUT, "clear pages")
            .query("comp", "page")
            .fixed(name::PAGE_WRITE, "clear")
            .range(name::RANGE, range)
            .conditions(conditions);
        self.write(&request, deadline).await
    }

    /// Put Page From URL: copies `source_range` of `source_url` (which carries
    /// its own authorisation) to the same length at `offset`.
    ///
    /// # Errors
    /// As [`PageBlob::put_page`].
    pub async fn put_page_from_url(
        &self,
        offset: u64,
        source_url: &str,
        source_range: Range,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Written> {
        let request = self
            .request(Method::PUT, "put page from url")
            .query("comp", "page")
            .fixed(name::PAGE_WRITE, "update")
            .range(name::RANGE, Range::at(offset, source_range.len()))
            .range(name::SOURCE_RANGE, source_range)
            .header(name::COPY_SOURCE, source_url)
            .conditions(conditions);
        self.write(&request, deadline).await
    }

    /// Get Blob on a range, which must not be empty.
    ///
    /// # Errors
    /// 416 `InvalidRange` beyond the end; [`super::Failure::BadAnswer`] when
    /// the answer is not exactly that range or fails the checksum.
    pub async fn get_range(
        &self,
        range: Range,
        checksum: Checksum,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<RangeRead> {
        let mut request = self
            .request(Method::GET, "get blob")
            .range(name::RANGE, range)
            .conditions(conditions);
        match checksum {
            Checksum::Off => {}
            Checksum::Md5 => request = request.fixed(name::RANGE_GET_MD5, "true"),
            Checksum::Crc64 => request = request.fixed(name::RANGE_GET_CRC64, "true"),
        }
        let expect = Expect::Exactly(range.len());
        let answer = self.account.execute(&request, expect, deadline).await?;
        if answer.status != 206 {
            let status = answer.status;
            return Err(request.bad_answer(format_args!("status {status} in place of 206")));
        }
        let (got, blob_size) = answer.content_range(&request)?;
        if got != range {
            return Err(request.bad_answer(format_args!("it is about the range {got}")));
        }
        verify(&request, &answer, checksum)?;
        Ok(RangeRead {
            blob_size,
            etag: answer.etag(&request)?,
            sequence_number: answer.sequence_number(),
            pieces: answer.pieces,
        })
    }

    /// Get Page Ranges within `within` (all when `None`); the differences since
    /// the snapshot `since` when given.
    ///
    /// # Errors
    /// 409 when the blob was created anew since that snapshot, or as any request.
    pub async fn page_ranges(
        &self,
        within: Option<Range>,
        since: Option<&str>,
        marker: Option<&str>,
        max_results: Option<u32>,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<PageRanges> {
        let mut request = self
            .request(Method::GET, "get page ranges")
            .query("comp", "pagelist")
            .query_if("prevsnapshot", since)
            .query_if("marker", marker)
            .conditions(conditions);
        if let Some(max) = max_results {
            request = request.query("maxresults", max.to_string());
        }
        if let Some(range) = within {
            request = request.range(name::RANGE, range);
        }
        let expect = Expect::UpTo(RANGE_LIST);
        let answer = self.account.execute(&request, expect, deadline).await?;
        let list = xml::page_list(&answer.body()).map_err(|reason| request.bad_answer(reason))?;
        Ok(PageRanges {
            filled: list.filled,
            cleared: list.cleared,
            next_marker: list.next_marker,
            blob_size: answer
                .number(&name::BLOB_CONTENT_LENGTH)
                .ok_or_else(|| request.bad_answer("it lacks the blob's size"))?,
            etag: answer.etag(&request)?,
        })
    }

    /// Get Blob Properties (HEAD).
    ///
    /// # Errors
    /// 404 when the blob is not there, or as any request.
    pub async fn properties(
        &self,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Properties> {
        let request = self
            .request(Method::HEAD, "get blob properties")
            .conditions(conditions);
        self.execute(&request, deadline).await?.properties(&request)
    }

    /// Set Blob Properties: a new size.
    ///
    /// # Errors
    /// As any request.
    pub async fn resize(
        &self,
        size: u64,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Written> {
        let request = self
            .request(Method::PUT, "resize blob")
            .query("comp", "properties")
            .number(name::BLOB_CONTENT_LENGTH, size)
            .conditions(conditions);
        self.write(&request, deadline).await
    }

    /// Set Blob Properties: the sequence number.
    ///
    /// # Errors
    /// As any request.
    pub async fn set_sequence_number(
        &self,
        action: SequenceNumber,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Written> {
        let (word, number) = match action {
            SequenceNumber::Max(number) => ("max", Some(number)),
            SequenceNumber::Update(number) => ("update", Some(number)),
            SequenceNumber::Increment => ("increment", None),
        };
        let mut request = self
            .request(Method::PUT, "set sequence number")
            .query("comp", "properties")
            .fixed(name::SEQUENCE_NUMBER_ACTION, word)
            .conditions(conditions);
        if let Some(number) = number {
            request = request.number(name::BLOB_SEQUENCE_NUMBER, number);
        }
        self.write(&request, deadline).await
    }

    /// Set Blob Metadata: replaces all of it.
    ///
    /// # Errors
    /// As any request.
    pub async fn set_metadata(
        &self,
        metadata: &[(String, String)],
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Written> {
        let request = self
            .request(Method::PUT, "set blob metadata")
            .query("comp", "metadata")
            .metadata(metadata)
            .conditions(conditions);
        self.write(&request, deadline).await
    }

    /// Delete Blob.
    ///
    /// # Errors
    /// 409 `SnapshotsPresent` under [`DeleteSnapshots::Refuse`], or as any request.
    pub async fn delete(
        &self,
        snapshots: DeleteSnapshots,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<()> {
        let mut request = self
            .request(Method::DELETE, "delete blob")
            .conditions(conditions);
        match snapshots {
            DeleteSnapshots::Refuse => {}
            DeleteSnapshots::Include => {
                request = request.fixed(name::DELETE_SNAPSHOTS, "include");
            }
            DeleteSnapshots::Only => request = request.fixed(name::DELETE_SNAPSHOTS, "only"),
        }
        self.execute(&request, deadline).await?;
        Ok(())
    }

    /// The URL of this blob (or snapshot) on its endpoint, unsigned: a copy
    /// source within the same account.
    #[must_use]
    pub fn url(&self) -> String {
        let mut url = self.account.origin();
        url.push_str(&self.target.path);
        if let Some(time) = &self.snapshot {
            url.push_str("?snapshot=");
            url.push_str(&encode_query(time));
        }
        url
    }
}

/// Checks a read against the checksum that was demanded.
fn verify(request: &Request, answer: &Answer, checksum: Checksum) -> Attempt<()> {
    let (header, computed): (HeaderName, String) = match checksum {
        Checksum::Off => return Ok(()),
        Checksum::Md5 => (name::CONTENT_MD5, checksum::md5(&answer.pieces)),
        Checksum::Crc64 => (name::CONTENT_CRC64, checksum::crc64(&answer.pieces)),
    };
    let sent = answer.demand(request, header.as_str())?;
    if sent == computed {
        return Ok(());
    }
    Err(request.bad_answer(format_args!(
        "{header} is {sent}, but the data received gives {computed}"
    )))
}
