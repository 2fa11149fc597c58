//! The one place that builds and signs requests.
//!
//! A [`Request`] is what an operation wants to say; [`Request::build`] turns
//! it into bytes for one connection, with the date and signature of that
//! moment. Building twice is cheap: bodies are shared, not copied.

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{AUTHORIZATION, CONTENT_LENGTH, HOST, HeaderName, HeaderValue, USER_AGENT};
use hyper::{Method, Uri};

use super::credential::Credential;
use super::date;
use super::endpoint::{Endpoint, Target, encode_query};
use super::error::{Failure, StorageError};
use super::signing::string_to_sign;
use super::types::{Conditions, LeaseId, Range};

/// The version of the REST API that every request names. Page range listing
/// with `maxresults` needs 2020-10-02, CRC-64 needs 2019-02-02.
pub const API_VERSION: &str = "2021-12-02";

/// Header names of the service, as constants so that building hashes no text.
pub(super) mod name {
    use hyper::header::HeaderName;

    macro_rules! names {
        ($($constant:ident = $text:literal;)*) => {
            $(pub(in crate::blob) const $constant: HeaderName = HeaderName::from_static($text);)*
        };
    }

    names! {
        ACTION = "x-ms-lease-action";
        BLOB_CONTENT_LENGTH = "x-ms-blob-content-length";
        BLOB_SEQUENCE_NUMBER = "x-ms-blob-sequence-number";
        BLOB_TYPE = "x-ms-blob-type";
        BREAK_PERIOD = "x-ms-lease-break-period";
        CLIENT_REQUEST_ID = "x-ms-client-request-id";
        CONTENT_CRC64 = "x-ms-content-crc64";
        CONTENT_MD5 = "content-md5";
        ACCESS_TIER = "x-ms-access-tier";
        COPY_ACTION = "x-ms-copy-action";
        COPY_SOURCE = "x-ms-copy-source";
        DATE = "x-ms-date";
        DELETE_SNAPSHOTS = "x-ms-delete-snapshots";
        IF_SEQUENCE_NUMBER_EQ = "x-ms-if-sequence-number-eq";
        IF_SEQUENCE_NUMBER_LE = "x-ms-if-sequence-number-le";
        IF_SEQUENCE_NUMBER_LT = "x-ms-if-sequence-number-lt";
        LEASE_DURATION = "x-ms-lease-duration";
        LEASE_ID = "x-ms-lease-id";
        PAGE_WRITE = "x-ms-page-write";
        PROPOSED_LEASE_ID = "x-ms-proposed-lease-id";
        RANGE = "x-ms-range";
        RANGE_GET_CRC64 = "x-ms-range-get-content-crc64";
        RANGE_GET_MD5 = "x-ms-range-get-content-md5";
        SEQUENCE_NUMBER_ACTION = "x-ms-sequence-number-action";
        SOURCE_RANGE = "x-ms-source-range";
        VERSION = "x-ms-version";
    }
}

/// What a request does, for errors; costs nothing until it is printed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operation {
    name: &'static str,
    range: Option<Range>,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        match self.range {
            Some(range) => write!(f, " {range}"),
            None => Ok(()),
        }
    }
}

/// One operation on one object, unsigned.
#[derive(Clone)]
pub(super) struct Request {
    operation: Operation,
    target: Arc<Target>,
    snapshot: Option<String>,
    method: Method,
    query: Vec<(&'static str, Cow<'static, str>)>,
    headers: Vec<(HeaderName, HeaderValue)>,
    body: Bytes,
    /// Why it cannot be sent at all.
    invalid: Option<String>,
}

impl Request {
    /// `name` is the operation in an error's words, such as `put page`.
    pub fn new(method: Method, name: &'static str, target: &Arc<Target>) -> Self {
        Self {
            operation: Operation { name, range: None },
            target: target.clone(),
            snapshot: None,
            method,
            query: Vec::new(),
            // Enough for a conditioned page write with what `build` adds.
            headers: Vec::with_capacity(12),
            body: Bytes::new(),
            invalid: None,
        }
    }

    /// Addresses a snapshot of the blob.
    pub fn snapshot(mut self, time: Option<&str>) -> Self {
        if let Some(time) = time {
            self.snapshot = Some(time.to_owned());
            self.query.push(("snapshot", Cow::Owned(time.to_owned())));
        }
        self
    }

    /// Adds a query parameter, decoded.
    pub fn query(mut self, name: &'static str, value: impl Into<Cow<'static, str>>) -> Self {
        self.query.push((name, value.into()));
        self
    }

    /// Adds a query parameter when there is a value.
    pub fn query_if(self, name: &'static str, value: Option<&str>) -> Self {
        match value {
            Some(value) => self.query(name, value.to_owned()),
            None => self,
        }
    }

    /// Adds a header whose value is a constant.
    pub fn fixed(mut self, name: HeaderName, value: &'static str) -> Self {
        self.headers.push((name, HeaderValue::from_static(value)));
        self
    }

    /// Adds a header; a value that no header can carry makes the request invalid.
    pub fn header(mut self, name: HeaderName, value: impl Into<String>) -> Self {
        let value: String = value.into();
        // Beyond ASCII the signature of either side is anybody's guess.
        let parsed = if value.is_ascii() {
            HeaderValue::from_maybe_shared(Bytes::from(value)).ok()
        } else {
            None
        };
        match parsed {
            Some(value) => self.headers.push((name, value)),
            None => self.invalid = Some(format!("the value of {name} is not printable ascii")),
        }
        self
    }

    /// Adds a header with a number.
    pub fn number(mut self, name: HeaderName, value: u64) -> Self {
        self.headers.push((name, HeaderValue::from(value)));
        self
    }

    /// Adds a byte range, `bytes=first-last`, and names it in errors.
    pub fn range(mut self, name: HeaderName, range: Range) -> Self {
        debug_assert!(!range.is_empty(), "an empty range has no header form");
        if self.operation.range.is_none() {
            self.operation.range = Some(range);
        }
        self.header(name, byte_range(range))
    }

    /// Adds `x-ms-access-tier`, when there is a tier.
    pub fn tier(self, tier: Option<&str>) -> Self {
        match tier {
            Some(tier) => self.header(name::ACCESS_TIER, tier),
            None => self,
        }
    }

    /// Adds `x-ms-meta-*` headers.
    pub fn metadata(mut self, metadata: &[(String, String)]) -> Self {
        for (name, value) in metadata {
            match HeaderName::from_bytes(format!("x-ms-meta-{name}").as_bytes()) {
                Ok(header) => self = self.header(header, value.clone()),
                Err(_) => self.invalid = Some(format!("metadata name \"{name}\" is not allowed")),
            }
        }
        self
    }

    /// Adds a lease id.
    pub fn lease(self, id: &LeaseId) -> Self {
        self.header(name::LEASE_ID, id.as_str())
    }

    /// Adds every condition that is set.
    pub fn conditions(mut self, conditions: &Conditions) -> Self {
        use hyper::header::{IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_UNMODIFIED_SINCE};
        if let Some(id) = &conditions.lease {
            self = self.lease(id);
        }
        for (header, tag) in [
            (IF_MATCH, &conditions.if_match),
            (IF_NONE_MATCH, &conditions.if_none_match),
        ] {
            if let Some(tag) = tag {
                self = self.header(header, tag.0.as_str());
            }
        }
        for (header, time) in [
            (IF_MODIFIED_SINCE, conditions.if_modified_since),
            (IF_UNMODIFIED_SINCE, conditions.if_unmodified_since),
        ] {
            if let Some(time) = time {
                self = self.header(header, date::format(time));
            }
        }
        for (header, number) in [
            (
                name::IF_SEQUENCE_NUMBER_LT,
                conditions.if_sequence_number_lt,
            ),
            (
                name::IF_SEQUENCE_NUMBER_LE,
                conditions.if_sequence_number_le,
            ),
            (
                name::IF_SEQUENCE_NUMBER_EQ,
                conditions.if_sequence_number_eq,
            ),
        ] {
            if let Some(number) = number {
                self = self.number(header, number);
            }
        }
        self
    }

    /// Sets the body.
    pub fn body(mut self, body: Bytes) -> Self {
        self.body = body;
        self
    }

    /// What it does and to what.
    pub fn target(&self) -> &Arc<Target> {
        &self.target
    }

    /// An error about this request.
    pub fn error(&self, failure: Failure, detail: impl Into<String>) -> StorageError {
        let mut error =
            StorageError::new(self.operation.to_string(), &self.target.address, failure);
        if let Some(time) = &self.snapshot {
            error.object.push_str("?snapshot=");
            error.object.push_str(time);
        }
        error.detail = detail.into();
        error
    }

    /// A 2xx answer to this request that makes no sense.
    pub fn bad_answer(&self, what: impl fmt::Display) -> StorageError {
        self.error(Failure::BadAnswer, format!(": {what}"))
    }

    /// The request as it goes out now: dated, identified, signed.
    ///
    /// # Errors
    /// Status 400 `InvalidHeaderValue`, made here, for what cannot be spelled
    /// in HTTP; [`Failure::Credential`] for a signature that cannot.
    pub fn build(
        &self,
        endpoint: &Endpoint,
        credential: &Credential,
    ) -> Result<hyper::Request<Full<Bytes>>, StorageError> {
        if let Some(reason) = &self.invalid {
            return Err(self.error(
                Failure::Status {
                    status: 400,
                    code: "InvalidHeaderValue".into(),
                },
                format!(": not sent: {reason}"),
            ));
        }
        let mut headers = self.headers.clone();
        headers.push((name::DATE, date::now()));
        headers.push((name::VERSION, HeaderValue::from_static(API_VERSION)));
        headers.push((name::CLIENT_REQUEST_ID, client_request_id()));

        let authorization = match credential {
            Credential::SharedKey(key) => {
                let text = string_to_sign(
                    &self.method,
                    &mut headers,
                    self.body.len(),
                    &self.target.resource,
                    &self.query,
                );
                let account = &self.target.address.account;
                let value = format!("SharedKey {account}:{}", key.sign(&text));
                let mut value = HeaderValue::from_maybe_shared(Bytes::from(value))
                    .map_err(|_| self.error(Failure::Credential, ": the account's name is odd"))?;
                value.set_sensitive(true);
                Some(value)
            }
            Credential::Sas(_) | Credential::Anonymous => None,
        };

        let mut request = hyper::Request::new(Full::new(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri(credential)?;
        let map = request.headers_mut();
        map.reserve(headers.len() + 4);
        map.insert(HOST, endpoint.authority.clone());
        map.insert(
            USER_AGENT,
            HeaderValue::from_static(concat!("dysk/", env!("CARGO_PKG_VERSION"))),
        );
        if self.method == Method::PUT {
            map.insert(CONTENT_LENGTH, HeaderValue::from(self.body.len()));
        }
        if let Some(value) = authorization {
            map.insert(AUTHORIZATION, value);
        }
        map.extend(headers);
        Ok(request)
    }

    /// The request line's path and query, a shared access signature included.
    fn uri(&self, credential: &Credential) -> Result<Uri, StorageError> {
        let signature = match credential {
            Credential::Sas(text) => text.as_str(),
            _ => "",
        };
        let mut text =
            String::with_capacity(self.target.path.len() + 32 * self.query.len() + signature.len());
        text.push_str(&self.target.path);
        let mut separator = '?';
        for (name, value) in &self.query {
            text.push(separator);
            text.push_str(name);
            text.push('=');
            text.push_str(&encode_query(value));
            separator = '&';
        }
        if !signature.is_empty() {
            text.push(separator);
            text.push_str(signature);
        }
        Uri::from_maybe_shared(Bytes::from(text)).map_err(|_| {
            self.error(
                Failure::Credential,
                ": the shared access signature is no query string: copy it whole",
            )
        })
    }
}

/// `bytes=first-last`, both inclusive.
pub(super) fn byte_range(range: Range) -> String {
    let mut text = String::with_capacity(48);
    // Writing to a String cannot fail.
    let _infallible = write!(
        text,
        "bytes={}-{}",
        range.start,
        range.end.saturating_sub(1)
    );
    text
}

/// An id under which the store's own logs can find a request: this process's
/// random mark and a count.
fn client_request_id() -> HeaderValue {
    use std::sync::OnceLock;
    static MARK: OnceLock<u32> = OnceLock::new();
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mark = MARK.get_or_init(rand::random);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let text = format!("dysk-{mark:08x}-{count}");
    HeaderValue::from_maybe_shared(Bytes::from(text))
        .unwrap_or_else(|_| HeaderValue::from_static("dysk"))
}
