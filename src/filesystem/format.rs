//! From an attached disk to one with a filesystem: the one place that formats,
//! and only what is proven empty.
//!
//! | the probe found | mark | pages written | then |
//! |---|---|---|---|
//! | it failed | | | nothing is known: an error |
//! | a filesystem of the kind asked for | not begun | | it is used as it is |
//! | the filesystem that the mark names | begun | | formatted again: nobody has mounted it |
//! | another filesystem, a partition table, contradictions | any | | refused |
//! | nothing | none | no | formatted |
//! | nothing | none | yes | refused: somebody wrote something |
//! | nothing, or bytes without a signature | begun | | formatted again |
//! | nothing, or bytes without a signature | complete | | refused: damaged |
//! | bytes without a signature | none | | refused |
//!
//! Formatting is: mark "begun" with the filesystem's id, mkfs, mark "complete".
//! A filesystem whose mark is not complete is never mounted, so what is made
//! again holds nobody's data.

use uuid::Uuid;

use super::probe::{Found, probe};
use super::tool::{self, SLOW};
use super::{FilesystemError, Kind, superblock};
use crate::node::AttachmentName;
use crate::node::client::{Client, ClientError};
use crate::volume::{FormatMark, FormatState};

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prepared {
    /// The filesystem was there.
    Found,
    /// It was made.
    Formatted,
}

/// Why a disk could not be prepared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrepareError {
    /// The disk or a tool.
    #[error(transparent)]
    Filesystem(#[from] FilesystemError),
    /// The daemon did not answer what it was asked: nothing was done, or a
    /// format has begun that a repetition will finish.
    #[error(transparent)]
    Daemon(#[from] ClientError),
}

/// What to do with a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Decision {
    Use,
    /// With the id of a format that has begun, if any.
    Format(Option<String>),
    Refuse(String),
}

/// Which disk, for whom.
#[derive(Clone, Copy, Debug)]
pub struct Disk<'a> {
    /// The daemon that serves it.
    pub daemon: &'a Client,
    /// Its attachment.
    pub name: &'a AttachmentName,
    /// Its device.
    pub device: &'a str,
    /// Attached read-only: nothing will be formatted.
    pub read_only: bool,
}

/// Makes sure that a filesystem of `kind` is on the disk.
///
/// # Errors
/// [`FilesystemError::Refused`]: what is there is not to be touched.
/// Otherwise something could not be found out or done; try again.
pub async fn prepare(disk: Disk<'_>, kind: Kind) -> Result<Prepared, PrepareError> {
    let device = disk.device;
    if disk.read_only {
        let found = probe(device).await?;
        return match judge(&found, None, kind) {
            Decision::Use => Ok(Prepared::Found),
            Decision::Refuse(reason) => Err(refused(device, reason)),
            Decision::Format(_) => Err(refused(
                device,
                "there is nothing on it, and it is attached read-only: \
                 mount it once for writing first"
                    .into(),
            )),
        };
    }
    // Both at once: a disk that is to be used is so by what the probe found and
    // by its mark, which nobody changes meanwhile.
    let (found, state) = tokio::join!(probe(device), disk.daemon.format_state(disk.name));
    let found = found?;
    let mut decision = judge(&found, Some(&state?), kind);
    if matches!(decision, Decision::Format(_)) {
        // Whether anything was ever written is asked once more, after the
        // probe: what it did not look at may have been written meanwhile.
        let state = disk.daemon.format_state(disk.name).await?;
        decision = judge(&found, Some(&state), kind);
    }
    match decision {
        Decision::Use => {
            check(device, kind).await?;
            Ok(Prepared::Found)
        }
        Decision::Refuse(reason) => Err(refused(device, reason)),
        Decision::Format(begun) => {
            let mut mark = FormatMark {
                filesystem: kind.to_string(),
                uuid: begun.unwrap_or_else(|| Uuid::new_v4().to_string()),
                complete: false,
            };
            disk.daemon.set_format_mark(disk.name, &mark).await?;
            tracing::info!(name = %disk.name, device, %kind, "formatting");
            mkfs(device, kind, &mark.uuid).await?;
            mark.complete = true;
            disk.daemon.set_format_mark(disk.name, &mark).await?;
            Ok(Prepared::Formatted)
        }
    }
}

fn refused(device: &str, reason: String) -> PrepareError {
    FilesystemError::Refused {
        device: device.to_owned(),
        reason,
    }
    .into()
}

/// What `found` means. Without a state (a disk that cannot be written to)
/// nothing begun is known of.
fn judge(found: &Found, state: Option<&FormatState>, kind: Kind) -> Decision {
    let mark = state.and_then(|state| state.mark.as_ref());
    let begun = mark.filter(|mark| !mark.complete);
    if let Some(mark) = begun
        && mark.filesystem != kind.as_str()
    {
        return Decision::Refuse(format!(
            "a format as {} was interrupted, {kind} is asked for: ask for {}, \
             or delete the volume: nothing was ever on it",
            mark.filesystem, mark.filesystem
        ));
    }
    match (found, begun, mark) {
        (Found::Filesystem { uuid, .. }, Some(mark), _) => {
            if uuid.as_ref() == Some(&mark.uuid) {
                return Decision::Format(Some(mark.uuid.clone()));
            }
            Decision::Refuse(
                "another filesystem than the one whose making was interrupted is on it: \
                 its bytes are left as they are"
                    .into(),
            )
        }
        (Found::Filesystem { kind: there, .. }, None, _) if there == kind.as_str() => Decision::Use,
        (Found::Filesystem { kind: there, .. }, None, _) => Decision::Refuse(format!(
            "{there} is on it, {kind} is asked for: ask for {there}, or take another volume"
        )),
        (Found::Other(what), ..) => Decision::Refuse(format!(
            "{what} is on it, no {kind}: take another volume, or use it as a raw block volume"
        )),
        (Found::Nothing | Found::Bytes, Some(mark), _) => Decision::Format(Some(mark.uuid.clone())),
        (Found::Nothing | Found::Bytes, None, Some(mark)) => Decision::Refuse(format!(
            "{} was made on it and is not there any more: it is damaged or was wiped: \
             restore a snapshot, or repair it by hand",
            mark.filesystem
        )),
        (Found::Nothing, None, None) if state.is_none_or(|state| !state.written) => {
            Decision::Format(None)
        }
        (Found::Nothing | Found::Bytes, None, None) => Decision::Refuse(format!(
            "no {kind} is on it, but it was written to: whose data that is nobody knows: \
             use it as a raw block volume, or take another one"
        )),
    }
}

/// Refuses a filesystem that has recorded errors. Replaying a journal is left
/// to mount; nothing is repaired here.
async fn check(device: &str, kind: Kind) -> Result<(), FilesystemError> {
    if kind != Kind::Ext4 {
        return Ok(());
    }
    if superblock::read(device, kind).await?.errors {
        return Err(FilesystemError::Refused {
            device: device.to_owned(),
            reason: format!(
                "its {kind} has recorded errors and is not mounted: take a snapshot, \
                 then run e2fsck on it"
            ),
        });
    }
    Ok(())
}

async fn mkfs(device: &str, kind: Kind, uuid: &str) -> Result<(), FilesystemError> {
    let xfs_uuid = format!("uuid={uuid}");
    let (tool, arguments): (_, Vec<&str>) = match kind {
        // No reserved blocks: nobody but the pod writes to it. The disk reads
        // as zeroes, so nothing needs to be zeroed or discarded.
        Kind::Ext4 => {
            let zeroed = "nodiscard,lazy_itable_init=1,lazy_journal_init=1";
            let arguments = vec!["-q", "-F", "-m0", "-U", uuid, "-E", zeroed, device];
            ("mkfs.ext4", arguments)
        }
        Kind::Xfs => {
            let arguments = vec!["-q", "-f", "-K", "-m", &xfs_uuid, device];
            ("mkfs.xfs", arguments)
        }
        Kind::Btrfs => {
            let arguments = vec!["-q", "-f", "-K", "-U", uuid, device];
            ("mkfs.btrfs", arguments)
        }
    };
    tool::run(tool, &arguments, SLOW).await?;
    // mkfs flushes what it wrote, or said that it could not.
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "00000000-0000-0000-0000-000000000007";

    fn state(written: bool, mark: Option<bool>) -> FormatState {
        FormatState {
            written,
            mark: mark.map(|complete| FormatMark {
                filesystem: "ext4".into(),
                uuid: ID.into(),
                complete,
            }),
        }
    }

    fn filesystem(kind: &str, uuid: &str) -> Found {
        Found::Filesystem {
            kind: kind.into(),
            uuid: Some(uuid.into()),
        }
    }

    fn all() -> Vec<Found> {
        vec![
            Found::Nothing,
            Found::Bytes,
            filesystem("ext4", ID),
            filesystem("ext4", "other"),
            filesystem("xfs", ID),
            Found::Other("a partition table (gpt)".into()),
        ]
    }

    #[test]
    fn only_the_proven_empty_is_formatted() {
        for found in all() {
            for written in [false, true] {
                for mark in [None, Some(false), Some(true)] {
                    let decision = judge(&found, Some(&state(written, mark)), Kind::Ext4);
                    let empty = found == Found::Nothing && !written && mark.is_none();
                    let ours = matches!(found, Found::Nothing | Found::Bytes)
                        || matches!(&found, Found::Filesystem { uuid, .. }
                            if uuid.as_deref() == Some(ID));
                    let again = mark == Some(false) && ours;
                    assert_eq!(
                        matches!(decision, Decision::Format(_)),
                        empty || again,
                        "{found:?}, written: {written}, mark: {mark:?}: {decision:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_was_asked_for_is_used_and_nothing_else() {
        for found in all() {
            for written in [false, true] {
                for mark in [None, Some(true)] {
                    let decision = judge(&found, Some(&state(written, mark)), Kind::Ext4);
                    let there = matches!(&found, Found::Filesystem { kind, .. } if kind == "ext4");
                    assert_eq!(decision == Decision::Use, there, "{found:?}: {decision:?}");
                }
            }
        }
    }

    #[test]
    fn another_kind_never_replaces_an_interrupted_one() {
        for found in all() {
            let decision = judge(&found, Some(&state(true, Some(false))), Kind::Xfs);
            assert!(matches!(decision, Decision::Refuse(_)), "{found:?}");
        }
    }
}
