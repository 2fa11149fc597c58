//! The operations of the service, and which one a request asks for.

use hyper::Method;
use serde::{Deserialize, Serialize};

use super::refusal::{self, Refusal};
use super::request::Request;

/// An operation of the Blob service. Names in rules and statistics are these in
/// kebab case, such as `put-page`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// List Containers.
    ListContainers,
    /// Create Container.
    CreateContainer,
    /// Get Container Properties.
    GetContainerProperties,
    /// Delete Container.
    DeleteContainer,
    /// List Blobs.
    ListBlobs,
    /// Put Blob.
    PutBlob,
    /// Put Page, `x-ms-page-write: update`.
    PutPage,
    /// Put Page, `x-ms-page-write: clear`.
    ClearPages,
    /// Put Page From URL.
    PutPageFromUrl,
    /// Get Blob.
    GetBlob,
    /// Get Blob Properties.
    GetBlobProperties,
    /// Set Blob Properties: resize, sequence number, content headers.
    SetBlobProperties,
    /// Get Blob Metadata.
    GetBlobMetadata,
    /// Set Blob Metadata.
    SetBlobMetadata,
    /// Get Page Ranges, also as a diff.
    GetPageRanges,
    /// Lease Blob, acquire.
    AcquireLease,
    /// Lease Blob, renew.
    RenewLease,
    /// Lease Blob, change.
    ChangeLease,
    /// Lease Blob, release.
    ReleaseLease,
    /// Lease Blob, break.
    BreakLease,
    /// Snapshot Blob.
    SnapshotBlob,
    /// Copy Blob.
    CopyBlob,
    /// Abort Copy Blob.
    AbortCopy,
    /// Delete Blob.
    DeleteBlob,
}

/// How many there are.
pub(super) const OPERATIONS: usize = Operation::DeleteBlob as usize + 1;

/// All of them, in the order of their numbers.
pub(super) const ALL: [Operation; OPERATIONS] = [
    Operation::ListContainers,
    Operation::CreateContainer,
    Operation::GetContainerProperties,
    Operation::DeleteContainer,
    Operation::ListBlobs,
    Operation::PutBlob,
    Operation::PutPage,
    Operation::ClearPages,
    Operation::PutPageFromUrl,
    Operation::GetBlob,
    Operation::GetBlobProperties,
    Operation::SetBlobProperties,
    Operation::GetBlobMetadata,
    Operation::SetBlobMetadata,
    Operation::GetPageRanges,
    Operation::AcquireLease,
    Operation::RenewLease,
    Operation::ChangeLease,
    Operation::ReleaseLease,
    Operation::BreakLease,
    Operation::SnapshotBlob,
    Operation::CopyBlob,
    Operation::AbortCopy,
    Operation::DeleteBlob,
];

impl Operation {
    /// The operation `request` asks for.
    pub(super) fn of(request: &Request) -> Result<Self, Refusal> {
        let target = &request.target;
        if target.container.is_empty() {
            Self::of_account(request)
        } else if target.blob.is_empty() {
            Self::of_container(request)
        } else {
            Self::of_blob(request)
        }
    }

    fn of_account(request: &Request) -> Result<Self, Refusal> {
        match (&request.method, request.query("comp")) {
            (&Method::GET, Some("list")) => Ok(Self::ListContainers),
            (_, Some(comp)) => Err(refusal::invalid_query("comp", comp)),
            (_, None) => Err((&refusal::UNSUPPORTED_HTTP_VERB).into()),
        }
    }

    fn of_container(request: &Request) -> Result<Self, Refusal> {
        if request.query("restype") != Some("container") {
            return Err((&refusal::INVALID_URI).into());
        }
        match (&request.method, request.query("comp")) {
            (&Method::GET, Some("list")) => Ok(Self::ListBlobs),
            (&Method::PUT, None) => Ok(Self::CreateContainer),
            (&Method::GET | &Method::HEAD, None | Some("metadata")) => {
                Ok(Self::GetContainerProperties)
            }
            (&Method::DELETE, None) => Ok(Self::DeleteContainer),
            (_, Some(comp)) => Err(refusal::invalid_query("comp", comp)),
            (_, None) => Err((&refusal::UNSUPPORTED_HTTP_VERB).into()),
        }
    }

    fn of_blob(request: &Request) -> Result<Self, Refusal> {
        match (&request.method, request.query("comp")) {
            (&Method::GET, None) => Ok(Self::GetBlob),
            (&Method::HEAD, None) => Ok(Self::GetBlobProperties),
            (&Method::DELETE, None) => Ok(Self::DeleteBlob),
            (&Method::PUT, None) => Ok(if request.header("x-ms-copy-source").is_some() {
                Self::CopyBlob
            } else {
                Self::PutBlob
            }),
            (&Method::GET, Some("pagelist")) => Ok(Self::GetPageRanges),
            (&Method::GET | &Method::HEAD, Some("metadata")) => Ok(Self::GetBlobMetadata),
            (&Method::PUT, Some("metadata")) => Ok(Self::SetBlobMetadata),
            (&Method::PUT, Some("properties")) => Ok(Self::SetBlobProperties),
            (&Method::PUT, Some("snapshot")) => Ok(Self::SnapshotBlob),
            (&Method::PUT, Some("copy")) => Ok(Self::AbortCopy),
            (&Method::PUT, Some("page")) => Self::of_page(request),
            (&Method::PUT, Some("lease")) => Self::of_lease(request),
            (_, Some(comp)) => Err(refusal::invalid_query("comp", comp)),
            (_, None) => Err((&refusal::UNSUPPORTED_HTTP_VERB).into()),
        }
    }

    fn of_page(request: &Request) -> Result<Self, Refusal> {
        let write = request.required("x-ms-page-write")?;
        if write.eq_ignore_ascii_case("clear") {
            Ok(Self::ClearPages)
        } else if !write.eq_ignore_ascii_case("update") {
            Err(refusal::invalid_header("x-ms-page-write", write))
        } else if request.header("x-ms-copy-source").is_some() {
            Ok(Self::PutPageFromUrl)
        } else {
            Ok(Self::PutPage)
        }
    }

    fn of_lease(request: &Request) -> Result<Self, Refusal> {
        let action = request.required("x-ms-lease-action")?;
        match action.to_ascii_lowercase().as_str() {
            "acquire" => Ok(Self::AcquireLease),
            "renew" => Ok(Self::RenewLease),
            "change" => Ok(Self::ChangeLease),
            "release" => Ok(Self::ReleaseLease),
            "break" => Ok(Self::BreakLease),
            _ => Err(refusal::invalid_header("x-ms-lease-action", action)),
        }
    }

    /// May it be done without credentials in a public container?
    pub(super) fn reads_blob(self) -> bool {
        matches!(
            self,
            Self::GetBlob | Self::GetBlobProperties | Self::GetBlobMetadata | Self::GetPageRanges
        )
    }

    /// The permissions of a SAS of which one is needed.
    pub(super) fn permissions(self) -> &'static str {
        match self {
            Self::ListContainers | Self::ListBlobs => "l",
            Self::CreateContainer | Self::PutBlob | Self::SnapshotBlob | Self::CopyBlob => "cw",
            Self::GetContainerProperties
            | Self::GetBlob
            | Self::GetBlobProperties
            | Self::GetBlobMetadata
            | Self::GetPageRanges => "r",
            Self::DeleteContainer | Self::DeleteBlob => "d",
            Self::BreakLease => "wd",
            _ => "w",
        }
    }

    /// Its name in rules and statistics.
    pub(super) fn name(self) -> String {
        serde_json::to_value(self)
            .ok()
            .and_then(|value| value.as_str().map(str::to_owned))
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_agree() {
        for (number, operation) in ALL.into_iter().enumerate() {
            assert_eq!(operation as usize, number);
        }
        assert_eq!(Operation::PutPageFromUrl.name(), "put-page-from-url");
    }
}
