//! Page blobs over HTTP: signing, requests, connections, typed errors, the VHD
//! footer. One method is one attempt; retries, leases kept alive and write
//! fencing live above, in `volume`.

pub mod account;
mod answer;
mod attempt;
mod checksum;
pub mod cloud;
mod connect;
mod connection;
mod copy;
pub mod credential;
mod date;
mod endpoint;
pub mod error;
mod explain;
mod keyring;
mod lease;
pub mod page_blob;
mod pool;
pub mod reference;
mod request;
pub mod retry;
pub mod sas;
mod signing;
pub mod source;
mod tls;
pub mod types;
pub mod vhd;
mod xml;

pub use account::{Account, AccountConfig, ConfigError};
pub use credential::{Credential, KeyError, SharedKey};
pub use error::{Advice, Effect, Failure, StorageError};
pub use page_blob::{Attempt, Checksum, DeleteSnapshots, PageBlob, RangeRead};
pub use request::API_VERSION;
pub use types::*;
