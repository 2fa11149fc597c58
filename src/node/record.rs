//! What a daemon leaves for the next one: a file per attachment, written
//! before the attachment is made and removed after all of it is undone.
//!
//! A record holds everything needed to find the device, renew or release the
//! lease and serve the disk again, without asking anybody. It may hold a
//! secret (a key that came from the environment), so it is 0600 in a 0700
//! directory on a tmpfs.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::api::AttachRequest;
use super::name::AttachmentName;
use crate::blob::vhd::Layout;

/// The format written here; another number is another format.
const FORMAT: u32 = 1;

/// One attachment, as far as it cannot be found out again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Always [`FORMAT`].
    format: u32,
    /// The attachment's id, which the kernel keeps with the device.
    pub id: String,
    /// What was asked for.
    pub request: AttachRequest,
    /// The lease id; none when read-only.
    pub lease: Option<String>,
    /// The device, once the kernel has picked one.
    pub device: Option<PathBuf>,
    /// When the attach began.
    pub since: Timestamp,
    /// The boot in which it was made: no device outlives it.
    #[serde(default)]
    pub boot: Option<String>,
    /// Usable bytes and layout, written before the device is made: a volume
    /// that was lost meanwhile is shown, and refused, with these.
    #[serde(default)]
    pub size: Option<u64>,
    /// See `size`.
    #[serde(default)]
    pub layout: Option<Layout>,
}

/// This boot, as the kernel names it; none where it does not say.
#[must_use]
pub fn this_boot() -> Option<String> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(text.trim().to_owned())
}

impl Record {
    /// A record of an attach that begins now.
    #[must_use]
    pub fn new(id: String, request: AttachRequest, lease: Option<String>) -> Self {
        Self {
            format: FORMAT,
            id,
            request,
            lease,
            device: None,
            since: Timestamp::now(),
            boot: this_boot(),
            size: None,
            layout: None,
        }
    }
}

/// The directory of records. All methods block; each is a few small files.
#[derive(Clone, Debug)]
pub struct Records {
    dir: PathBuf,
    /// Held while a record is read, changed and written.
    changing: Arc<Mutex<()>>,
}

/// A file among the records that is none.
#[derive(Debug)]
pub struct Unreadable {
    /// Where it was put aside.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

impl Records {
    /// The records in `dir`, which is made (0700) if need be.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(dir: PathBuf) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        Ok(Self {
            dir,
            changing: Arc::default(),
        })
    }

    /// Where the record of `name` is.
    #[must_use]
    pub fn path(&self, name: &AttachmentName) -> PathBuf {
        self.dir.join(format!("{name}.json"))
    }

    /// Writes or replaces the record: complete or not at all.
    ///
    /// # Errors
    /// As the file system has it; the old record then stands.
    pub fn write(&self, record: &Record) -> io::Result<()> {
        let path = self.path(&record.request.name);
        // No name starts with a dot, so this is no record's path.
        let draft = self.dir.join(format!(".{}.draft", record.request.name));
        let text = serde_json::to_vec_pretty(record)?;
        match fs::remove_file(&draft) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&draft)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&draft, &path)?;
        self.sync()
    }

    /// The record of `name`.
    ///
    /// # Errors
    /// As the file system has it; [`io::ErrorKind::InvalidData`] when it is no
    /// record.
    pub fn get(&self, name: &AttachmentName) -> io::Result<Record> {
        read(&self.path(name)).map_err(|reason| io::Error::new(io::ErrorKind::InvalidData, reason))
    }

    /// Changes the record of `name`.
    ///
    /// # Errors
    /// As [`Records::get`] and [`Records::write`]; the old record then stands.
    pub fn change(
        &self,
        name: &AttachmentName,
        change: impl FnOnce(&mut Record),
    ) -> io::Result<()> {
        // It guards nothing that a panic could leave half changed.
        let _alone = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut record = self.get(name)?;
        change(&mut record);
        self.write(&record)
    }

    /// Removes the record; one that is gone is fine.
    ///
    /// # Errors
    /// As the file system has it.
    pub fn remove(&self, name: &AttachmentName) -> io::Result<()> {
        match fs::remove_file(self.path(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => self.sync(),
        }
    }

    /// Every record, by name. Drafts of a daemon that died are removed;
    /// files that cannot be understood are put aside as `NAME.unreadable`,
    /// never guessed at.
    ///
    /// # Errors
    /// When the directory cannot be read or tidied.
    pub fn load(&self) -> io::Result<(Vec<Record>, Vec<Unreadable>)> {
        let mut paths = fs::read_dir(&self.dir)?
            .map(|entry| entry.map(|e| e.path()))
            .collect::<io::Result<Vec<_>>>()?;
        paths.sort();
        let (mut records, mut unreadable) = (Vec::new(), Vec::new());
        for path in paths {
            match path.extension().and_then(|e| e.to_str()) {
                Some("draft") => fs::remove_file(&path)?,
                Some("json") => match read(&path) {
                    Ok(record) => records.push(record),
                    Err(reason) => {
                        let aside = path.with_extension("unreadable");
                        fs::rename(&path, &aside)?;
                        unreadable.push(Unreadable {
                            path: aside,
                            reason,
                        });
                    }
                },
                _ => {}
            }
        }
        Ok((records, unreadable))
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }
}

fn read(path: &Path) -> Result<Record, String> {
    let text = fs::read(path).map_err(|e| e.to_string())?;
    // serde's message names fields and positions, never values of secrets'
    // fields: those are plain strings that cannot be of a wrong shape.
    let value: serde_json::Value = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    match value.get("format").and_then(serde_json::Value::as_u64) {
        Some(format) if format == u64::from(FORMAT) => {}
        Some(format) => return Err(format!("format {format} is not ours ({FORMAT})")),
        None => return Err("no format number".into()),
    }
    let record: Record = serde_json::from_value(value).map_err(|e| e.to_string())?;
    let named = format!("{}.json", record.request.name);
    if path.file_name().is_none_or(|f| *f != *named) {
        return Err(format!("it is the record of {}", record.request.name));
    }
    Ok(record)
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::blob::source::CredentialSource;
    use crate::node::api::{AccountSpec, Secret};
    use crate::node::policy::Policy;

    pub fn request(name: &str) -> AttachRequest {
        AttachRequest {
            name: name.parse().expect("name"),
            account: AccountSpec {
                name: "acct".into(),
                endpoint: "http://127.0.0.1:1/acct".into(),
                credential: Secret(CredentialSource::Key("c2VjcmV0".into())),
                ca_file: None,
            },
            container: "dysks".into(),
            blob: format!("{name}.vhd"),
            read_only: false,
            policy: Policy::default(),
            connections: None,
            break_lease: false,
            recover: crate::volume::Recover::default(),
            create: None,
            reuse: false,
            holder: None,
            follow_settings: false,
        }
    }

    #[test]
    fn survives_a_round_trip_privately() {
        let temp = tempfile::tempdir().expect("temp dir");
        let records = Records::open(temp.path().join("attachments")).expect("open");
        let mut record = Record::new("id-1".into(), request("vol1"), Some("lease".into()));
        records.write(&record).expect("write");
        record.device = Some("/dev/nbd3".into());
        records.write(&record).expect("replace");
        let path = records.path(&record.request.name);
        let mode = fs::metadata(&path).expect("stat").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let (loaded, unreadable) = records.load().expect("load");
        assert_eq!(loaded, [record.clone()]);
        assert!(unreadable.is_empty());
        records.remove(&record.request.name).expect("remove");
        records.remove(&record.request.name).expect("again");
        assert!(records.load().expect("load").0.is_empty());
    }

    #[test]
    fn puts_aside_what_it_does_not_understand() {
        let temp = tempfile::tempdir().expect("temp dir");
        let records = Records::open(temp.path().into()).expect("open");
        let good = Record::new("id".into(), request("good"), None);
        records.write(&good).expect("write");
        let text = fs::read_to_string(records.path(&good.request.name)).expect("read");
        for (file, text) in [
            ("torn.json", &text[..text.len() / 2]),
            (
                "newer.json",
                &text.replace("\"format\": 1", "\"format\": 2"),
            ),
            ("moved.json", &text),
            (".dead.draft", "x"),
        ] {
            fs::write(temp.path().join(file), text).expect("write");
        }
        let (loaded, unreadable) = records.load().expect("load");
        assert_eq!(loaded, [good]);
        let names: Vec<_> = unreadable
            .iter()
            .map(|u| u.path.file_name().and_then(|n| n.to_str()).expect("name"))
            .collect();
        assert_eq!(
            names,
            ["moved.unreadable", "newer.unreadable", "torn.unreadable"]
        );
        assert!(!temp.path().join(".dead.draft").exists());
    }
}
