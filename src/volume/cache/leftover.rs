//! Unflushed writes that no daemon serves: what lies in a staging folder, put
//! back into its place or dropped by whoever decides about it. Nothing here
//! happens by itself.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use super::files::StagingFiles;
use super::layout::digest;
use super::recovery::inspect_staging;
use super::{Recover, SetAside, StagingInfo};

/// What a file in a staging folder is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeftoverState {
    /// A daemon has it open: its volume is attached.
    InUse,
    /// The next attach of its volume looks at it.
    Waiting,
    /// Out of the way: nothing looks at it.
    Aside,
    /// It cannot be read as a staging file.
    Damaged,
}

/// A file in a staging folder.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Leftover {
    /// Where it is.
    pub path: PathBuf,
    /// What it is good for.
    pub state: LeftoverState,
    /// What it says about itself; nothing when in use or damaged.
    #[serde(flatten)]
    pub info: Option<StagingInfo>,
}

/// The name, without its extension, of a volume's files.
pub(super) fn stem_of(volume: &str) -> String {
    let mut name = String::new();
    for byte in &digest(volume)[..16] {
        write!(name, "{byte:02x}").expect("a String takes everything");
    }
    name
}

/// Renames a staging file to a name of its own with `extension`, where no
/// attach looks. Returns that name; it is not durable yet.
pub(super) fn put_away(
    files: &dyn StagingFiles,
    path: &Path,
    extension: &str,
) -> io::Result<PathBuf> {
    let stem = path.with_extension("");
    let mut stamp = jiff::Timestamp::now().as_millisecond();
    loop {
        let mut name = stem.clone().into_os_string();
        name.push(format!(".{stamp}.{extension}"));
        let away = PathBuf::from(name);
        match files.rename(path, &away) {
            Ok(()) => return Ok(away),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => stamp += 1,
            Err(error) => return Err(error),
        }
    }
}

/// Removes a file that cannot be read as a staging file, or keeps it out of
/// the way.
pub(super) fn clear_away_damaged(
    files: &dyn StagingFiles,
    path: &Path,
    recover: Recover,
) -> io::Result<()> {
    if recover == Recover::Discard {
        files.remove(path)?;
    } else {
        let away = put_away(files, path, "damaged")?;
        tracing::warn!("a damaged staging file is kept as {}", away.display());
    }
    files.sync_folder(path.parent().unwrap_or(Path::new("/")))
}

/// The staging files in `folder`, by name. A folder that is not there has none.
///
/// # Errors
/// The folder or a file in it cannot be read.
pub fn list_staging(folder: &Path) -> io::Result<Vec<Leftover>> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let kind = match path.extension().and_then(|extension| extension.to_str()) {
            Some("staging") => LeftoverState::Waiting,
            Some("aside") => LeftoverState::Aside,
            Some("damaged") => LeftoverState::Damaged,
            _ => continue,
        };
        let (state, info) = match inspect_staging(&path) {
            Ok(info) => (kind, Some(info)),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => (LeftoverState::InUse, None),
                io::ErrorKind::InvalidData => (LeftoverState::Damaged, None),
                // Gone since the folder was read.
                io::ErrorKind::NotFound => continue,
                _ => return Err(error),
            },
        };
        found.push(Leftover { path, state, info });
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// The unflushed writes of `volume` (`account/container/blob`) in `folder`
/// that were put out of the way.
///
/// # Errors
/// As [`list_staging`].
pub fn kept_aside(folder: &Path, volume: &str) -> io::Result<Vec<SetAside>> {
    let found = list_staging(folder)?.into_iter();
    let aside = found.filter(|file| file.state == LeftoverState::Aside);
    let ours = aside.filter_map(|file| {
        let info = file.info.filter(|info| info.volume == volume)?;
        Some(SetAside {
            path: file.path,
            dirty_bytes: info.dirty_bytes,
        })
    });
    Ok(ours.collect())
}

/// Puts a file that was set aside back to where the next attach of its volume
/// looks for it. Returns that place.
///
/// # Errors
/// As [`inspect_staging`]; [`io::ErrorKind::AlreadyExists`] when the volume is
/// attached or other unflushed writes wait there.
pub fn restore_staging(path: &Path) -> io::Result<PathBuf> {
    let info = inspect_staging(path)?;
    let place = path.with_file_name(format!("{}.staging", stem_of(&info.volume)));
    let cwd = rustix::fs::CWD;
    rustix::fs::renameat_with(cwd, path, cwd, &place, rustix::fs::RenameFlags::NOREPLACE)?;
    let folder = place.parent().unwrap_or(Path::new("/"));
    std::fs::File::open(folder)?.sync_all()?;
    Ok(place)
}
