//! `/dev/dysk/NAME`: a link to the device that keeps its name when the
//! kernel picks another number.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::name::AttachmentName;

/// Where links are by default.
pub const LINK_DIR: &str = "/dev/dysk";

/// The directory of links. All methods block.
#[derive(Clone, Debug)]
pub struct Links {
    dir: PathBuf,
}

impl Links {
    /// Links in `dir`, which is made with the first of them.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The link of `name`.
    #[must_use]
    pub fn path(&self, name: &AttachmentName) -> PathBuf {
        self.dir.join(name.as_str())
    }

    /// Points `name` at `device`, replacing a link that is there.
    ///
    /// # Errors
    /// As the file system has it; also when something that is no link has
    /// the name.
    pub fn make(&self, name: &AttachmentName, device: &Path) -> io::Result<PathBuf> {
        fs::create_dir_all(&self.dir)?;
        let path = self.path(name);
        // No name starts with a dot. Renaming makes the change one step.
        let draft = self.dir.join(format!(".{name}"));
        remove(&draft)?;
        if fs::symlink_metadata(&path).is_ok_and(|m| !m.is_symlink()) {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("{} is there and no link", path.display()),
            ));
        }
        symlink(device, &draft)?;
        fs::rename(&draft, &path)?;
        Ok(path)
    }

    /// udev makes the same link, but relative.
    fn leads_to(&self, target: &Path, device: &Path) -> bool {
        let folder = fs::canonicalize(&self.dir);
        folder.is_ok_and(|folder| {
            target
                .strip_prefix("..")
                .is_ok_and(|rest| folder.parent().is_some_and(|dev| dev.join(rest) == device))
        })
    }

    /// Removes the link of `name` unless it points at another device.
    ///
    /// # Errors
    /// As the file system has it.
    pub fn remove(&self, name: &AttachmentName, device: &Path) -> io::Result<()> {
        let path = self.path(name);
        match fs::read_link(&path) {
            Ok(target) if target == device || self.leads_to(&target, device) => remove(&path),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Files that tell udev what is attached as what: `DYSK_NAME=NAME` in a file
/// named for the attachment's id, which is the device's `backend` in sysfs.
/// All methods block.
#[derive(Clone, Debug)]
pub struct Names {
    dir: PathBuf,
}

impl Names {
    /// Files in `dir`, which is made with the first of them.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Writes the file of `id`; one that is there is replaced.
    ///
    /// # Errors
    /// As the file system has it.
    pub fn write(&self, id: &str, name: &AttachmentName) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        fs::write(self.dir.join(id), format!("DYSK_NAME={name}\n"))
    }

    /// Removes the file of `id`; one that is gone is fine.
    ///
    /// # Errors
    /// As the file system has it.
    pub fn remove(&self, id: &str) -> io::Result<()> {
        remove(&self.dir.join(id))
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_device_and_leaves_what_is_not_ours() {
        let temp = tempfile::tempdir().expect("temp dir");
        let links = Links::new(temp.path().join("dysk"));
        let name = "vol1".parse().expect("name");
        let (old, new) = (Path::new("/dev/nbd0"), Path::new("/dev/nbd7"));
        let path = links.make(&name, old).expect("make");
        links.make(&name, new).expect("move");
        assert_eq!(fs::read_link(&path).expect("link"), new);
        links.remove(&name, old).expect("not ours");
        assert!(fs::symlink_metadata(&path).is_ok());
        links.remove(&name, new).expect("remove");
        links.remove(&name, new).expect("again");
        assert!(fs::symlink_metadata(&path).is_err());
        let device = temp.path().join("nbd3");
        symlink("../nbd3", &path).expect("udev makes it so");
        links
            .remove(&name, Path::new("/dev/nbd3"))
            .expect("another");
        assert!(fs::symlink_metadata(&path).is_ok());
        links.remove(&name, &device).expect("ours");
        assert!(fs::symlink_metadata(&path).is_err());
        fs::write(&path, "data").expect("write");
        assert!(links.make(&name, new).is_err());
    }
}
