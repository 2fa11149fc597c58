//! dyskctl
fn main() {}
