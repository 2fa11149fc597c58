//! FlexVolume's call-outs on a real kernel.

use crate::support::lane;

#[test]
fn existing_flexvolumes_are_mounted_and_unmounted() {
    lane::run("6.12", &["--timeout", "300"], "flexvolume", &[]);
}
