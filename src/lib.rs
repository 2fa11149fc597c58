//! dysk turns Azure page blobs into Linux block devices.
//!
//! The house has floors, and imports run downwards only:
//! binaries, then [`cli`] and [`csi`], then [`node`] (the daemon), then
//! [`volume`] and [`nbd`], which meet only at [`device::BlockDevice`], then
//! [`blob`]. [`filesystem`] is on the floor of `cli` and `csi`; [`emulator`]
//! stands beside them, and what stands here alone is for every floor. See `docs/design.md`.

pub mod blob;
pub mod buffers;
pub mod caller;
pub mod cli;
pub mod csi;
pub mod device;
pub mod emulator;
pub mod filesystem;
pub mod metrics;
pub mod mounts;
pub mod nbd;
pub mod node;
pub mod runtime;
pub mod size;
pub mod volume;
