//! A daemon in this process or as a program, its command line, and the CSI
//! controller, against the embedded store: no kernel is needed.

mod bad_input;
mod bench_command;
mod cli;
mod csi_controller;
mod csi_node;
mod daemon;
mod disks;
mod disks_in_use;
mod kept_aside;
mod metrics;
mod serve_clients;
mod service;
mod stuck_volume;

#[path = "../support"]
mod support {
    pub mod node;
}
