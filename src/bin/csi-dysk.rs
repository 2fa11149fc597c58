//! csi-dysk
fn main() {}
