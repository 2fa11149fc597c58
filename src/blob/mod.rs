//! Page blobs over HTTP: signing, requests, connections, typed errors, the VHD
//! footer. One method is one attempt; retries, leases kept alive and write
//! fencing live above, in `volume`.

pub mod account;
pub mod credential;
pub mod error;
pub mod page_blob;
pub mod reference;
pub mod retry;
pub mod source;
pub mod types;
pub mod vhd;

pub use account::{Account, AccountConfig, ConfigError};
pub use credential::{Credential, KeyError, SharedKey};
pub use error::{Advice, Effect, Failure, StorageError};
pub use page_blob::{Attempt, Checksum, DeleteSnapshots, PageBlob, RangeRead};
pub use types::*;
