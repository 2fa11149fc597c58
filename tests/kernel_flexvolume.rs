//! FlexVolume's call-outs on a real kernel.

#[path = "support/lane.rs"]
mod lane;

#[test]
fn existing_flexvolumes_are_mounted_and_unmounted() {
    lane::run("6.12", &["--timeout", "300"], "flexvolume", &[]);
}
