//! The engine against stores that misbehave, without a daemon.

mod blob_faults;
mod cache;
mod cache_model;
mod integrity;
mod late_writes;
mod limits;
mod one_connection;
mod stuck_requests;
mod unwritten;

#[path = "../support"]
mod support {
    pub mod emulated;
    pub mod nbd_peer;
    pub mod sim_store;
}
