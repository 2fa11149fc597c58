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

    /// Removes the link of `name` unless it points at another device.
    ///
    /// # Errors
    /// As the file system has it.
    pub fn remove(&self, name: &AttachmentName, device: &Path) -> io::Result<()> {
        let path = self.path(name);
        match fs::read_link(&path) {
            Ok(target) if target == device => remove(&path),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
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
        fs::write(&path, "data").expect("write");
        assert!(links.make(&name, new).is_err());
    }
}
