//! The NBD protocol: wire types, negotiation, the transmission server, and the
//! Linux kernel's client by generic netlink. Knows nothing of page blobs; a
//! disk is any [`crate::device::BlockDevice`].

pub mod kernel;
pub mod negotiation;
pub mod server;
pub mod transmission;
pub mod wire;
