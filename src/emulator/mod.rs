//! A faithful page-blob service for demos, tests and benches: HTTP in front,
//! sparse files behind, faults on demand beside. It knows the wire protocol of
//! the Blob service and nothing of the rest of dysk.
//!
//! A request walks: `server` (connection) -> `service` (authorise, faults, caps,
//! latency) -> `ops` (one function per operation, under one blob's lock) ->
//! `store` and `blob` (records, bytes, page maps). `lease`, `conditions`, `auth`
//! and `sas` are the rules; `admin` is the interface under `/-/`.

mod admin;
mod auth;
mod blob;
mod checksum;
mod clock;
mod conditions;
mod config;
mod dice;
mod faults;
mod lease;
mod operation;
mod ops;
mod pages;
mod record;
mod refusal;
mod reply;
mod request;
mod running;
mod sas;
mod server;
mod service;
mod sparse;
mod stats;
mod store;
mod throttle;
mod timer;
mod xml;

pub use config::{
    Config, DEFAULT_ACCOUNT, DEFAULT_KEY, KeyError, ParseSpanError, SettingsChange, Span, Storage,
    TlsFiles,
};
pub use faults::{Effect, FaultPlan, Rule, RuleReport};
pub use operation::Operation;
pub use running::{Emulator, Running, StartError};
pub use stats::{LateStats, OperationStats, StatsReport};
