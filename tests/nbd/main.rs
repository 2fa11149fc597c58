//! The NBD server: the protocol byte by byte, and with the clients people use.

mod clients;
mod endings;
mod negotiation;
mod pause;
mod pipeline;
mod protocol;
mod server;

#[path = "../support"]
mod support {
    pub mod memory_disk;
    pub mod nbd_peer;
}
