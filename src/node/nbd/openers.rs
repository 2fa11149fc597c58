//! Which processes have a device or a partition of it open. A plain open
//! claims nothing, so the kernel cannot be asked: `/proc/*/fd` can.

use std::fs;
use std::path::Path;

/// `opened by NAME (pid PID)` for every other process that has `device` or a
/// partition of it open. Processes that end meanwhile are passed over.
pub(super) fn of(proc: &Path, device: &Path) -> Vec<String> {
    let Some(device) = device.to_str() else {
        return Vec::new();
    };
    let Ok(entries) = fs::read_dir(proc) else {
        return Vec::new();
    };
    let own = std::process::id();
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| opens(&proc.join(pid.to_string()), device))
        .map(|pid| {
            let name = fs::read_to_string(proc.join(format!("{pid}/comm"))).unwrap_or_default();
            format!("opened by {} (pid {pid})", name.trim())
        })
        .collect()
}

fn opens(process: &Path, device: &str) -> bool {
    let Ok(files) = fs::read_dir(process.join("fd")) else {
        return false;
    };
    files
        .filter_map(|file| fs::read_link(file.ok()?.path()).ok())
        .any(|target| target.to_str().is_some_and(|t| is_of(t, device)))
}

/// `/dev/nbd3` or `/dev/nbd3p1`, not `/dev/nbd33`.
fn is_of(target: &str, device: &str) -> bool {
    match target.strip_prefix(device) {
        Some("") => true,
        Some(rest) => rest
            .strip_prefix('p')
            .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn finds_openers_of_the_disk_and_its_partitions() {
        let proc = tempfile::tempdir().expect("temp dir");
        for (pid, name, target) in [
            (4_000_001, "dd\n", "/dev/nbd3"),
            (4_000_002, "qemu\n", "/dev/nbd3p12"),
            (4_000_003, "other\n", "/dev/nbd33"),
            (4_000_004, "path\n", "/dev/nbd3path"),
        ] {
            let process = proc.path().join(pid.to_string());
            fs::create_dir_all(process.join("fd")).expect("fd");
            fs::write(process.join("comm"), name).expect("comm");
            symlink(target, process.join("fd/3")).expect("link");
        }
        let mut found = of(proc.path(), Path::new("/dev/nbd3"));
        found.sort();
        assert_eq!(
            found,
            ["opened by dd (pid 4000001)", "opened by qemu (pid 4000002)"]
        );
    }
}
