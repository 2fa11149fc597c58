//! dyskd
fn main() {}
