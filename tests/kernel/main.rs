//! Everything that takes a kernel: guests of the lane (`tests/kernel/run`), with
//! the binaries just built.
//!
//! As many guests run at once as the harness has threads (`--test-threads`).

mod boot;
mod csi;
mod databases;
mod disks;
mod figures;
mod flexvolume;
mod kill;
mod lane;
mod memory;
mod netlink;
mod pods;
mod power;
mod storms;
mod systemd;
mod two_nodes;

#[path = "../support"]
mod support {
    pub mod azurite;
    pub mod csi_node;
    pub mod guest;
    pub mod lane;
    pub mod node;
    pub mod outside_store;
    pub mod proxy;
}
