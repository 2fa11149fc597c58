//! The node daemon: which volumes are attached, how they come and go, what is
//! left for the next daemon, and the control API with both of its ends.
//!
//! Nothing here touches a byte of a disk: data flows from the transport's
//! sockets straight into [`crate::volume`]. How a disk reaches the kernel
//! stands behind [`transport::Transport`].

pub mod account;
mod admission;
pub mod api;
mod attach;
mod change;
pub mod client;
mod credential;
pub mod daemon;
mod detach;
pub mod dysktab;
mod entry;
pub mod error;
mod error_code;
pub mod exposition;
mod format;
mod handover;
mod link;
pub mod memory;
pub mod name;
pub mod nbd;
pub mod policy;
pub mod provision;
mod record;
mod recover;
pub mod registry;
mod resize;
mod run_dir;
mod scrape;
pub mod secret;
mod server;
pub mod service;
mod settings;
mod snapshot;
mod startup;
mod stop;
pub mod transport;
mod turns;

pub use error::NodeError;
pub use name::AttachmentName;
