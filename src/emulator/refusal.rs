//! What the service answers when it refuses: status, error code and text as in
//! "Blob service error codes" and "Common REST API error codes".

use std::borrow::Cow;

use hyper::StatusCode;
use hyper::header::{HeaderName, HeaderValue};

/// One documented error: its status, code and message.
#[derive(Debug)]
pub(super) struct Kind {
    status: u16,
    code: &'static str,
    message: &'static str,
}

macro_rules! kinds {
    ($($name:ident = $status:literal $code:literal $message:literal;)*) => {
        $(pub(super) const $name: Kind = Kind { status: $status, code: $code, message: $message };)*
    };
}

kinds! {
    ACCOUNT_REQUIRES_HTTPS = 400 "AccountRequiresHttps" "The account being accessed does not support http.";
    AUTHENTICATION_FAILED = 403 "AuthenticationFailed" "Server failed to authenticate the request. Make sure the value of Authorization header is formed correctly including the signature.";
    AUTHORIZATION_FAILURE = 403 "AuthorizationFailure" "This request is not authorized to perform this operation.";
    AUTHORIZATION_PERMISSION_MISMATCH = 403 "AuthorizationPermissionMismatch" "This request is not authorized to perform this operation using this permission.";
    AUTHORIZATION_PROTOCOL_MISMATCH = 403 "AuthorizationProtocolMismatch" "This request is not authorized to perform this operation using this protocol.";
    AUTHORIZATION_RESOURCE_TYPE_MISMATCH = 403 "AuthorizationResourceTypeMismatch" "This request is not authorized to perform this operation using this resource type.";
    AUTHORIZATION_SERVICE_MISMATCH = 403 "AuthorizationServiceMismatch" "This request is not authorized to perform this operation using this service.";
    AUTHORIZATION_SOURCE_IP_MISMATCH = 403 "AuthorizationSourceIPMismatch" "This request is not authorized to perform this operation using this source IP.";
    BLOB_ALREADY_EXISTS = 409 "BlobAlreadyExists" "The specified blob already exists.";
    BLOB_NOT_FOUND = 404 "BlobNotFound" "The specified blob does not exist.";
    BLOB_OVERWRITTEN = 409 "BlobOverwritten" "The blob has been recreated since the previous snapshot was taken.";
    CANNOT_VERIFY_COPY_SOURCE = 404 "CannotVerifyCopySource" "The specified resource does not exist.";
    CANNOT_VERIFY_COPY_SOURCE_AUTH = 403 "CannotVerifyCopySource" "Server failed to authenticate the request. Make sure the value of Authorization header is formed correctly including the signature.";
    CONDITION_NOT_MET = 412 "ConditionNotMet" "The condition specified using HTTP conditional header(s) is not met.";
    CONTAINER_ALREADY_EXISTS = 409 "ContainerAlreadyExists" "The specified container already exists.";
    CONTAINER_NOT_FOUND = 404 "ContainerNotFound" "The specified container does not exist.";
    COPY_ID_MISMATCH = 409 "CopyIdMismatch" "The specified copy ID did not match the copy ID for the pending copy operation.";
    CRC64_MISMATCH = 400 "Crc64Mismatch" "The CRC64 value specified in the request did not match with the CRC64 value calculated by the server.";
    INTERNAL_ERROR = 500 "InternalError" "Server encountered an internal error. Please try again after some time.";
    INVALID_AUTHENTICATION_INFO = 401 "InvalidAuthenticationInfo" "Authentication information is not given in the correct format. Check the value of Authorization header.";
    INVALID_BLOB_TYPE = 409 "InvalidBlobType" "The blob type is invalid for this operation.";
    INVALID_HEADER_VALUE = 400 "InvalidHeaderValue" "The value for one of the HTTP headers is not in the correct format.";
    INVALID_MD5 = 400 "InvalidMd5" "The MD5 value specified in the request is invalid. MD5 value must be 128 bits and base64 encoded.";
    INVALID_METADATA = 400 "InvalidMetadata" "The metadata specified is invalid. It has characters that are not permitted.";
    INVALID_PAGE_RANGE = 416 "InvalidPageRange" "The page range specified is invalid.";
    INVALID_QUERY_PARAMETER = 400 "InvalidQueryParameterValue" "Value for one of the query parameters specified in the request URI is invalid.";
    INVALID_RANGE = 416 "InvalidRange" "The range specified is invalid for the current size of the resource.";
    INVALID_RESOURCE_NAME = 400 "InvalidResourceName" "The specified resource name contains invalid characters.";
    INVALID_URI = 400 "InvalidUri" "The request URI is invalid.";
    KEY_BASED_AUTHENTICATION_NOT_PERMITTED = 403 "KeyBasedAuthenticationNotPermitted" "Key based authentication is not permitted on this storage account.";
    LEASE_ALREADY_PRESENT = 409 "LeaseAlreadyPresent" "There is already a lease present.";
    LEASE_ID_MISMATCH_WITH_BLOB = 412 "LeaseIdMismatchWithBlobOperation" "The lease ID specified did not match the lease ID for the blob.";
    LEASE_ID_MISMATCH_WITH_LEASE = 409 "LeaseIdMismatchWithLeaseOperation" "The lease ID specified did not match the lease ID for the blob.";
    LEASE_ID_MISSING = 412 "LeaseIdMissing" "There is currently a lease on the blob and no lease ID was specified in the request.";
    LEASE_IS_BREAKING_AND_CANNOT_BE_ACQUIRED = 409 "LeaseIsBreakingAndCannotBeAcquired" "The lease ID matched, but the lease is currently in breaking state and cannot be acquired until it is broken.";
    LEASE_IS_BREAKING_AND_CANNOT_BE_CHANGED = 409 "LeaseIsBreakingAndCannotBeChanged" "The lease ID matched, but the lease is currently in breaking state and cannot be changed.";
    LEASE_IS_BROKEN_AND_CANNOT_BE_RENEWED = 409 "LeaseIsBrokenAndCannotBeRenewed" "The lease ID matched, but the lease has been broken explicitly and cannot be renewed.";
    LEASE_LOST = 412 "LeaseLost" "A lease ID was specified, but the lease for the blob has expired.";
    LEASE_NOT_PRESENT_WITH_BLOB = 412 "LeaseNotPresentWithBlobOperation" "There is currently no lease on the blob.";
    LEASE_NOT_PRESENT_WITH_LEASE = 409 "LeaseNotPresentWithLeaseOperation" "There is currently no lease on the blob.";
    MD5_MISMATCH = 400 "Md5Mismatch" "The MD5 value specified in the request did not match with the MD5 value calculated by the server.";
    MISSING_CONTENT_LENGTH = 411 "MissingContentLengthHeader" "The Content-Length header was not specified.";
    MISSING_REQUIRED_HEADER = 400 "MissingRequiredHeader" "An HTTP header that's mandatory for this request is not specified.";
    NO_AUTHENTICATION_INFORMATION = 401 "NoAuthenticationInformation" "Server failed to authenticate the request. Please refer to the information in the www-authenticate header.";
    NO_PENDING_COPY = 409 "NoPendingCopyOperation" "There is currently no pending copy operation.";
    NOT_MODIFIED = 304 "ConditionNotMet" "The condition specified using HTTP conditional header(s) is not met.";
    OUT_OF_RANGE_QUERY_PARAMETER = 400 "OutOfRangeQueryParameterValue" "One of the query parameters specified in the request URI is outside the permissible range.";
    PENDING_COPY = 409 "PendingCopyOperation" "There is currently a pending copy operation.";
    PREVIOUS_SNAPSHOT_CANNOT_BE_NEWER = 400 "PreviousSnapshotCannotBeNewer" "The prevsnapshot query parameter value cannot be newer than snapshot query parameter value.";
    PREVIOUS_SNAPSHOT_NOT_FOUND = 409 "PreviousSnapshotNotFound" "The previous snapshot is not found.";
    REQUEST_BODY_TOO_LARGE = 413 "RequestBodyTooLarge" "The request body is too large and exceeds the maximum permissible limit.";
    RESOURCE_NOT_FOUND = 404 "ResourceNotFound" "The specified resource does not exist.";
    SEQUENCE_NUMBER_CONDITION_NOT_MET = 412 "SequenceNumberConditionNotMet" "The sequence number condition specified was not met.";
    SEQUENCE_NUMBER_INCREMENT_TOO_LARGE = 409 "SequenceNumberIncrementTooLarge" "The sequence number increment cannot be performed because it would result in overflow of the sequence number.";
    SERVER_BUSY = 503 "ServerBusy" "Ingress or egress is over the limit of this blob or account.";
    SNAPSHOTS_PRESENT = 409 "SnapshotsPresent" "This operation is not permitted while the blob has snapshots.";
    SOURCE_CONDITION_NOT_MET = 412 "SourceConditionNotMet" "The source condition specified using HTTP conditional header(s) is not met.";
    UNSUPPORTED_HTTP_VERB = 405 "UnsupportedHttpVerb" "The resource doesn't support specified Http Verb.";
}

/// A refused request, on its way to become an answer.
#[derive(Clone, Debug)]
pub(super) struct Refusal(Box<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    status: u16,
    code: Cow<'static, str>,
    message: Cow<'static, str>,
    fields: Vec<(&'static str, String)>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl From<&'static Kind> for Refusal {
    fn from(kind: &'static Kind) -> Self {
        Self(Box::new(Inner {
            status: kind.status,
            code: Cow::Borrowed(kind.code),
            message: Cow::Borrowed(kind.message),
            fields: Vec::new(),
            headers: Vec::new(),
        }))
    }
}

impl From<std::io::Error> for Refusal {
    /// The emulator's own storage failed (disk full, I/O error): the effect of
    /// the request is unknown, which is what 500 tells the client.
    fn from(error: std::io::Error) -> Self {
        tracing::error!("the emulator's own storage failed: {error}");
        let mut refusal = Self::from(&INTERNAL_ERROR);
        refusal.0.message = Cow::Owned(format!("the emulator's own storage failed: {error}"));
        refusal
    }
}

impl Refusal {
    /// An answer made to order (a fault rule's).
    pub(super) fn custom(status: u16, code: String, message: String) -> Self {
        Self(Box::new(Inner {
            status,
            code: Cow::Owned(code),
            message: Cow::Owned(message),
            fields: Vec::new(),
            headers: Vec::new(),
        }))
    }

    /// Adds a child element to the XML body, such as `AuthenticationErrorDetail`.
    pub(super) fn with(mut self, element: &'static str, text: impl Into<String>) -> Self {
        self.0.fields.push((element, text.into()));
        self
    }

    /// Adds a header to the answer.
    pub(super) fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.0.headers.push((name, value));
        self
    }

    pub(super) fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    pub(super) fn code(&self) -> &str {
        &self.0.code
    }

    pub(super) fn message(&self) -> &str {
        &self.0.message
    }

    pub(super) fn fields(&self) -> &[(&'static str, String)] {
        &self.0.fields
    }

    pub(super) fn headers(&self) -> &[(HeaderName, HeaderValue)] {
        &self.0.headers
    }
}

/// 400 InvalidHeaderValue that names the header.
pub(super) fn invalid_header(name: &str, value: &str) -> Refusal {
    Refusal::from(&INVALID_HEADER_VALUE)
        .with("HeaderName", name)
        .with("HeaderValue", value)
}

/// 400 MissingRequiredHeader that names the header.
pub(super) fn missing_header(name: &str) -> Refusal {
    Refusal::from(&MISSING_REQUIRED_HEADER).with("HeaderName", name)
}

/// 400 InvalidQueryParameterValue that names the parameter.
pub(super) fn invalid_query(name: &str, value: &str) -> Refusal {
    Refusal::from(&INVALID_QUERY_PARAMETER)
        .with("QueryParameterName", name)
        .with("QueryParameterValue", value)
}
