//! Compiles the CSI messages and services; needs no protoc.

use std::error::Error;

/// Requests that carry secrets get no `Debug`, so that no log line can ever
/// hold one.
const WITH_SECRETS: [&str; 20] = [
    "CreateVolumeRequest",
    "DeleteVolumeRequest",
    "ControllerPublishVolumeRequest",
    "ControllerUnpublishVolumeRequest",
    "ValidateVolumeCapabilitiesRequest",
    "ControllerModifyVolumeRequest",
    "ControllerExpandVolumeRequest",
    "CreateSnapshotRequest",
    "DeleteSnapshotRequest",
    "ListSnapshotsRequest",
    "GetSnapshotRequest",
    "ControllerListVolumeHealthRequest",
    "ControllerGetVolumeHealthRequest",
    "CreateVolumeGroupSnapshotRequest",
    "DeleteVolumeGroupSnapshotRequest",
    "GetVolumeGroupSnapshotRequest",
    "NodeGetStorageHealthRequest",
    "NodeStageVolumeRequest",
    "NodePublishVolumeRequest",
    "NodeExpandVolumeRequest",
];

fn main() -> Result<(), Box<dyn Error>> {
    let folder = "src/csi/proto";
    println!("cargo:rerun-if-changed={folder}");
    let files = protox::compile(["csi.proto"], [folder])?;
    let mut prost = tonic_prost_build::Config::new();
    prost.skip_debug(WITH_SECRETS.map(|message| format!(".csi.v1.{message}")));
    tonic_prost_build::configure()
        .build_transport(false)
        .compile_fds_with_config(files, prost)?;
    Ok(())
}
