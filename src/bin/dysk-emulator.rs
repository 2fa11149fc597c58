//! dysk-emulator
fn main() {}
