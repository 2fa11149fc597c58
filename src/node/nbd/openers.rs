//! Which processes have a device or a partition of it open. A plain open
//! claims nothing, so the kernel cannot be asked: `/proc/*/fd` can. By device
//! number: in a container the same device has another name.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

/// `opened by NAME (pid PID)` for every other process that has a block device
/// with one of these `numbers`, major and minor, open. Processes that end
/// meanwhile are passed over.
pub(super) fn of(proc: &Path, numbers: &HashSet<(u32, u32)>) -> Vec<String> {
    let Ok(entries) = fs::read_dir(proc) else {
        return Vec::new();
    };
    let own = std::process::id();
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| opens(&proc.join(pid.to_string()), numbers))
        .map(|pid| {
            let name = fs::read_to_string(proc.join(format!("{pid}/comm"))).unwrap_or_default();
            format!("opened by {} (pid {pid})", name.trim())
        })
        .collect()
}

fn opens(process: &Path, numbers: &HashSet<(u32, u32)>) -> bool {
    let Ok(files) = fs::read_dir(process.join("fd")) else {
        return false;
    };
    files
        .flatten()
        .filter_map(|file| block_device(&file.path()))
        .any(|number| numbers.contains(&number))
}

/// The number of the block device that `path` leads to, when it is one. The
/// file is not opened and no file server asked.
fn block_device(path: &Path) -> Option<(u32, u32)> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let found = statx(CWD, path, flags, StatxFlags::TYPE).ok()?;
    let kind = FileType::from_raw_mode(found.stx_mode.into());
    (kind == FileType::BlockDevice).then_some((found.stx_rdev_major, found.stx_rdev_minor))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use super::*;

    /// Any block device of this machine, if it has one.
    fn some_block_devices() -> Vec<(PathBuf, (u32, u32))> {
        let found = fs::read_dir("/dev").expect("/dev").flatten();
        found
            .map(|entry| entry.path())
            .filter_map(|path| block_device(&path).map(|number| (path, number)))
            .collect()
    }

    #[test]
    fn finds_openers_of_a_device_whatever_its_name() {
        let devices = some_block_devices();
        let Some((device, number)) = devices.first() else {
            eprintln!("no block device here: nothing to look for");
            return;
        };
        let temp = tempfile::tempdir().expect("temp dir");
        let (proc, alias) = (temp.path().join("proc"), temp.path().join("xvda"));
        symlink(device, &alias).expect("alias");
        for (pid, name, target) in [
            (4_000_001, "dd\n", device.as_path()),
            (4_000_002, "postgres\n", &alias),
            (4_000_003, "other\n", Path::new("/dev/null")),
        ] {
            let process = proc.join(pid.to_string());
            fs::create_dir_all(process.join("fd")).expect("fd");
            fs::write(process.join("comm"), name).expect("comm");
            symlink(target, process.join("fd/3")).expect("link");
        }
        let mut found = of(&proc, &HashSet::from([*number]));
        found.sort();
        assert_eq!(
            found,
            [
                "opened by dd (pid 4000001)",
                "opened by postgres (pid 4000002)"
            ]
        );
        assert!(of(&proc, &HashSet::from([(number.0, 999_999)])).is_empty());
    }

    #[test]
    fn what_is_no_block_device_has_no_number() {
        // A character device's number may be the same as a disk's.
        assert_eq!(block_device(Path::new("/dev/null")), None);
        assert_eq!(block_device(Path::new("/")), None);
        assert_eq!(block_device(Path::new("/no such file")), None);
    }
}
