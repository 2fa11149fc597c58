//! Mounting a disk's filesystem.

use std::fs;
use std::path::Path;

use super::tool::{self, SLOW};
use super::{FilesystemError, Kind};

/// Mounts the filesystem of `kind` on `device` at `path`, which is made when
/// it is not there.
///
/// # Errors
/// The folder cannot be made, or mount(8) refused.
pub async fn mount(
    device: &str,
    path: &Path,
    kind: Kind,
    read_only: bool,
    options: &[String],
) -> Result<(), FilesystemError> {
    let unusable = |reason: String| FilesystemError::Unknown {
        device: device.to_owned(),
        reason: format!("cannot be mounted at {}: {reason}", path.display()),
    };
    let text = path.to_str().ok_or_else(|| unusable("not UTF-8".into()))?;
    let folder = path.to_owned();
    tokio::task::spawn_blocking(move || fs::create_dir_all(folder))
        .await
        .map_err(|died| unusable(died.to_string()))?
        .map_err(|error| unusable(error.to_string()))?;
    let mut all: Vec<&str> = options.iter().map(String::as_str).collect();
    if read_only {
        all.push("ro");
    }
    if kind == Kind::Xfs {
        // A copy of a volume has its id, and may be on the same node.
        all.push("nouuid");
    }
    let all = all.join(",");
    let mut arguments = vec!["-t", kind.as_str()];
    if !all.is_empty() {
        arguments.extend(["-o", &all]);
    }
    arguments.extend(["--", device, text]);
    tool::run("mount", &arguments, SLOW).await?;
    Ok(())
}
