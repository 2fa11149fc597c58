//! The scenarios, by what they need of the guest: nbd loaded (`data`,
//! `failure`, `refusal`), or not (`bare`).

mod bare;
mod data;
mod failure;
mod refusal;
mod wrapped;
