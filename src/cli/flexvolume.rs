//! `dyskctl flexvolume`: the call-outs of a FlexVolume driver, for volumes of
//! type `azure/dysk` that clusters already have. Follows "FlexVolume", Kubernetes
//! sig-storage.
//!
//! | call-out | what is done |
//! |---|---|
//! | `init` | says that there is no attach by a controller |
//! | `mount DIR OPTIONS` | attach through the daemon, format only what is proven empty, mount |
//! | `unmount DIR` | unmount; detach, unless another pod of the node uses the disk |
//! | anything else | `Not supported`: kubelet does it its own way |
//!
//! The answer is one line of JSON on standard output and nothing on standard
//! error, which kubelet would mix into it. Every call finds its own work done
//! and may be repeated; those for one disk wait for each other. What a mount
//! point belongs to is noted in the run directory before anything is attached,
//! so that an unmount finds it whatever died in between.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde_json::json;

use super::error::CliError;
use super::{Global, output};
use crate::blob::reference::DEFAULT_CONTAINER;
use crate::filesystem::format::{self, Disk};
use crate::filesystem::{self, Kind, probe};
use crate::mounts;
use crate::node::api::{AttachRequest, Attachment, ErrorCode};
use crate::node::client::{Client, ClientError};
use crate::node::name::{NameError, fingerprint};
use crate::node::policy::Policy;
use crate::node::{AttachmentName, secret};
use crate::volume::Recover;

/// For somebody else's lease: a dead node's ends within a minute.
const WAIT_MS: u64 = 70_000;
/// For another call-out of the same disk; kubelet repeats after two minutes.
const LOCK_PATIENCE: Duration = Duration::from_secs(100);
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Where mount points are noted, in the run directory.
const NOTES: &str = "flexvolume";

#[derive(Debug, Args)]
pub struct Options {
    /// The call-out and its arguments, as kubelet passes them
    #[arg(required = true, num_args = 1.., trailing_var_arg = true, allow_hyphen_values = true, value_name = "CALL")]
    call: Vec<String>,
}

/// An answer to kubelet: `Success`, `Failure` or `Not supported`.
enum Answer {
    Success(serde_json::Value),
    NotSupported(String),
}

pub async fn run(global: &Global, options: Options) -> Result<(), CliError> {
    let words: Vec<&str> = options.call.iter().map(String::as_str).collect();
    let driver = Driver::new(global);
    let answer = match words.as_slice() {
        ["init"] => Ok(Answer::Success(
            json!({ "capabilities": { "attach": false } }),
        )),
        ["mount", dir, options] => driver.mount(Path::new(dir), options).await,
        ["unmount", dir] => driver.unmount(Path::new(dir)).await,
        ["init" | "mount" | "unmount", ..] => Err(format!(
            "{}: its arguments are not those of the call-out",
            words[0]
        )),
        [call, ..] => Ok(Answer::NotSupported((*call).to_owned())),
        [] => Ok(Answer::NotSupported("nothing".into())),
    };
    let (mut line, code) = match answer {
        Ok(Answer::Success(line)) => (line, 0),
        Ok(Answer::NotSupported(call)) => (
            json!({ "status": "Not supported", "message": format!("{call}: not supported") }),
            1,
        ),
        Err(message) => {
            let words: Vec<&str> = message.split_whitespace().collect();
            (
                json!({ "status": "Failure", "message": words.join(" ") }),
                1,
            )
        }
    };
    if code == 0 {
        line["status"] = json!("Success");
    }
    output::line(line)?;
    match code {
        0 => Ok(()),
        _ => Err(CliError::told()),
    }
}

/// A disk that kubelet wants mounted.
struct Wanted {
    request: AttachRequest,
    kind: Kind,
}

/// Reads kubelet's options; no text of them is repeated in an error, for
/// secrets are among them.
fn wanted(options: &str) -> Result<Wanted, String> {
    let options: BTreeMap<String, serde_json::Value> = serde_json::from_str(options)
        .map_err(|error| format!("the options are no JSON object (column {})", error.column()))?;
    let text = |key: &str| options.get(key).and_then(serde_json::Value::as_str);
    let decoded = |key: &str| -> Result<Option<String>, String> {
        let Some(encoded) = text(&format!("kubernetes.io/secret/{key}")) else {
            return Ok(None);
        };
        let wrong = |_| format!("secret key {key}: not base64 of a text");
        let bytes = STANDARD.decode(encoded).map_err(|_| wrong(()))?;
        String::from_utf8(bytes).map(Some).map_err(|_| wrong(()))
    };
    let mut values = BTreeMap::new();
    for key in secret::KEYS {
        if let Some(value) = decoded(key)? {
            values.insert(key, value);
        }
    }
    let account = secret::account(
        |key| values.get(key).map(String::as_str),
        text("endpoint"),
        text("realm"),
    )
    .map_err(|error| format!("secret: {error}"))?;
    let blob = text("blob").filter(|blob| !blob.is_empty());
    let blob = blob.ok_or("option blob is missing: name the page blob, such as vol1.vhd")?;
    let mut policy = Policy {
        wait_ms: WAIT_MS,
        ..Policy::default()
    };
    if let Some(caching) = text("cachingMode") {
        policy.caching = serde_json::from_value(caching.into())
            .map_err(|_| "option cachingMode: none, read-only or read-write")?;
    }
    let container = text("container").unwrap_or(DEFAULT_CONTAINER);
    let request = AttachRequest {
        name: name_of(&format!("{}/{container}/{blob}", account.name))?,
        account,
        container: container.to_owned(),
        blob: blob.to_owned(),
        read_only: text("kubernetes.io/readwrite") == Some("ro"),
        policy,
        connections: None,
        break_lease: false,
        recover: Recover::default(),
        create: None,
        reuse: true,
        holder: None,
        follow_settings: false,
    };
    Ok(Wanted {
        request,
        kind: text("kubernetes.io/fsType").unwrap_or_default().parse()?,
    })
}

/// The name of a volume's attachment: any volume has one, no two have the same.
fn name_of(volume: &str) -> Result<AttachmentName, String> {
    let name = format!("flex-{}", fingerprint(volume.as_bytes()));
    name.parse().map_err(|error: NameError| error.to_string())
}

/// The driver of one daemon's node.
struct Driver {
    daemon: Client,
    notes: PathBuf,
}

impl Driver {
    fn new(global: &Global) -> Self {
        let run_dir = global.socket.parent().unwrap_or(Path::new("."));
        Self {
            daemon: global.client(),
            notes: run_dir.join(NOTES),
        }
    }

    async fn mount(&self, dir: &Path, options: &str) -> Result<Answer, String> {
        let Wanted { request, kind } = wanted(options)?;
        let name = &request.name;
        // Makes sure that there is a run directory to note things in.
        self.daemon.version().await.map_err(text)?;
        let _alone = self.lock(name).await?;
        self.note(dir, name)?;
        let attachment = self.daemon.attach(&request, |_| {}).await.map_err(text)?;
        match self.mount_attached(&attachment, dir, kind).await {
            Ok(()) => Ok(Answer::Success(json!({}))),
            Err(reason) => {
                // Another pod's mount keeps it; so does a repeat that succeeds.
                self.detach(name).await?;
                Err(reason)
            }
        }
    }

    async fn mount_attached(
        &self,
        attachment: &Attachment,
        dir: &Path,
        kind: Kind,
    ) -> Result<(), String> {
        let device = attachment.device.as_deref().and_then(Path::to_str);
        let device = device.ok_or_else(|| format!("{}: it has no device yet", attachment.name))?;
        match mounts::at(dir).map_err(text)? {
            Some(there) if there.source == Path::new(device) => return Ok(()),
            Some(there) => {
                return Err(format!(
                    "{}: {} is mounted there",
                    dir.display(),
                    there.source.display()
                ));
            }
            None => {}
        }
        // A disk that another pod of this node has mounted needs no proof.
        let disk = Disk {
            daemon: &self.daemon,
            name: &attachment.name,
            device,
            read_only: attachment.read_only,
        };
        if !is_source(device)? {
            format::prepare(disk, kind).await.map_err(text)?;
        } else if !is_of_kind(device, kind).await? {
            return Err(format!("{device}: mounted already, and not as {kind}"));
        }
        filesystem::mount(device, dir, kind, attachment.read_only, &[])
            .await
            .map_err(text)
    }

    async fn unmount(&self, dir: &Path) -> Result<Answer, String> {
        let noted = self.noted(dir)?;
        let _alone = match &noted {
            Some(name) => Some(self.lock(name).await?),
            None => None,
        };
        mounts::unmount_all(dir).map_err(text)?;
        if let Some(name) = &noted {
            self.detach(name).await?;
            self.forget(dir)?;
        }
        Ok(Answer::Success(json!({})))
    }

    /// Detaches what nobody uses any more.
    async fn detach(&self, name: &AttachmentName) -> Result<(), String> {
        match self.daemon.detach(name, false).await {
            Ok(_) => Ok(()),
            Err(ClientError::Refused(refused))
                if matches!(refused.code, ErrorCode::NotAttached | ErrorCode::InUse) =>
            {
                Ok(())
            }
            Err(error) => Err(text(error)),
        }
    }

    fn note_of(&self, dir: &Path) -> PathBuf {
        self.notes
            .join(fingerprint(dir.as_os_str().as_encoded_bytes()))
    }

    /// Notes whose the mount point is: complete or not at all.
    fn note(&self, dir: &Path, name: &AttachmentName) -> Result<(), String> {
        let path = self.note_of(dir);
        let draft = path.with_extension("draft");
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&draft)?;
            file.write_all(name.as_str().as_bytes())?;
            fs::rename(&draft, &path)
        };
        write().map_err(|error| format!("cannot write {}: {error}", path.display()))
    }

    fn noted(&self, dir: &Path) -> Result<Option<AttachmentName>, String> {
        let path = self.note_of(dir);
        match fs::read_to_string(&path) {
            Ok(name) => name
                .parse()
                .map(Some)
                .map_err(|error| format!("{}: {error}", path.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }

    fn forget(&self, dir: &Path) -> Result<(), String> {
        let path = self.note_of(dir);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(format!("{}: {error}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// One call-out for a disk at a time; released when dropped.
    async fn lock(&self, name: &AttachmentName) -> Result<File, String> {
        let path = self.notes.join(format!("{name}.lock"));
        let open = || -> io::Result<File> {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&self.notes)?;
            OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
        };
        let failed = |error: io::Error| format!("{}: {error}", path.display());
        let file = open().map_err(failed)?;
        let taken = async {
            loop {
                match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                    Ok(()) => return Ok(()),
                    Err(Errno::WOULDBLOCK) => tokio::time::sleep(LOOK_AGAIN).await,
                    Err(error) => return Err(failed(error.into())),
                }
            }
        };
        match tokio::time::timeout(LOCK_PATIENCE, taken).await {
            Ok(taken) => taken.map(|()| file),
            Err(_) => Err(format!("{name}: another call for it is under way")),
        }
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

async fn is_of_kind(device: &str, kind: Kind) -> Result<bool, String> {
    match probe(device).await.map_err(text)? {
        crate::filesystem::Found::Filesystem { kind: found, .. } => Ok(found == kind.as_str()),
        _ => Ok(false),
    }
}

/// Is the device mounted anywhere here?
fn is_source(device: &str) -> Result<bool, String> {
    let mounts = mounts::list().map_err(text)?;
    Ok(mounts.iter().any(|mount| mount.source == Path::new(device)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(text: &str) -> String {
        STANDARD.encode(text)
    }

    fn options(more: &serde_json::Value) -> String {
        let mut options = json!({
            "kubernetes.io/fsType": "xfs",
            "kubernetes.io/readwrite": "rw",
            "kubernetes.io/secret/accountname": encoded("acct\n"),
            "kubernetes.io/secret/accountkey": encoded("c2VjcmV0"),
            "kubernetes.io/pod.name": "p",
            "blob": "vol1.vhd",
        });
        for (key, value) in more.as_object().cloned().unwrap_or_default() {
            options[key] = value;
        }
        options.to_string()
    }

    #[test]
    fn reads_what_kubelet_passes() {
        let plain = wanted(&options(&json!({}))).expect("a disk");
        assert_eq!(plain.request.volume(), "acct/dysks/vol1.vhd");
        assert_eq!(plain.kind, Kind::Xfs);
        assert!(plain.request.reuse && !plain.request.read_only);
        assert_eq!(
            plain.request.account.endpoint,
            "https://acct.blob.core.windows.net"
        );
        let other = wanted(&options(&json!({
            "container": "c", "kubernetes.io/readwrite": "ro", "kubernetes.io/fsType": "",
        })));
        let other = other.expect("a disk");
        assert_eq!(other.request.volume(), "acct/c/vol1.vhd");
        assert!(other.request.read_only && other.kind == Kind::Ext4);
        assert_ne!(other.request.name, plain.request.name);
    }

    #[test]
    fn errors_name_the_key_and_never_its_value() {
        let secret = "hidden\u{e9}";
        for (more, says) in [
            (json!({ "blob": "" }), "option blob"),
            (json!({ "kubernetes.io/fsType": "ntfs" }), "ntfs"),
            (
                json!({ "kubernetes.io/secret/accountkey": secret }),
                "accountkey",
            ),
            (
                json!({ "kubernetes.io/secret/accountname": "" }),
                "accountname",
            ),
        ] {
            let error = wanted(&options(&more)).err().expect("refused");
            assert!(error.contains(says) && !error.contains("hidden"), "{error}");
        }
        let torn = format!("{{\"kubernetes.io/secret/accountkey\": \"{secret}\"");
        let error = wanted(&torn).err().expect("refused");
        assert!(!error.contains("hidden"), "{error}");
    }
}
