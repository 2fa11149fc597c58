//! The page-blob emulator over raw HTTP, signed by a second implementation of
//! Shared Key that shares nothing with the service's.

mod client;

mod access;
mod conditions;
mod copies;
mod durability;
mod faults;
mod leases;
mod pages;
mod snapshots;
mod tls;
