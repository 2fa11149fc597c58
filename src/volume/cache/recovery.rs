//! What an earlier daemon left in a staging file, and whether it may be used.
//!
//! Its writes were acknowledged and may be missing in the store. They are
//! taken up only if nobody can have written to the volume since, which is
//! known in two ways:
//!
//! - the lease they were taken under was renewed: the store renews a lease
//!   only if nobody else has held the blob since;
//! - the blob's sequence number, read under the new lease and before it is
//!   raised, is the one recorded: every opening raises it by at least one, and
//!   a number is recorded only after the store has said that it is reached.
//!
//! In the same boot the file is whole (SIGKILL does not undo a pwrite), and
//! every entry counts. After a reboot, pages of the file reached the disk in
//! any order: a slot may be old, or another block's. So each dirty sector
//! needs its checksum, and each entry a sequence past `flushed`, which FLUSH
//! and FUA record durably before they answer. That is enough: let `w` be a
//! write to a sector that was flushed; its sequence is at most `flushed`. An
//! entry past `flushed` was composed after `w` was staged or written through,
//! hence with `w`'s checksum or a later one for that sector, or with the
//! sector not dirty. Older bytes cannot match it, older entries do not count.
//!
//! Taking up is restartable: the table is cleaned first, then the header
//! names the new lease and boot, then the number is raised and recorded.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::budget::Share;
use super::core::Core;
use super::index::Index;
use super::layout::{BLOCK, BLOCK_LEN, Entry, Header, SECTOR, SECTORS, digest, sum};
use super::leftover::{clear_away_damaged, stem_of};
use super::staging::{Staging, Stretch};
use super::{Cache, Recover, SetAside, StagingFiles, StagingOptions, System, apart, write_back};
use crate::blob::BlobAddress;
use crate::volume::patience::patiently;
use crate::volume::store::PageStore;
use crate::volume::{Caching, OpenError, OpenOptions, Volume};

const LEAST_SLOTS: u64 = 64;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Unflushed writes that were found to be ours.
#[derive(Debug)]
pub(in crate::volume) struct Adopted {
    staging: Staging,
    entries: Vec<(u32, Entry)>,
}

/// What a staging file says about itself.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StagingInfo {
    /// The volume, as `account/container/blob`.
    pub volume: String,
    /// Bytes that may never have reached the store.
    pub dirty_bytes: u64,
}

fn system() -> Arc<dyn StagingFiles> {
    Arc::new(System)
}

/// Reads a staging file that no daemon has open.
///
/// # Errors
/// It is in use ([`io::ErrorKind::WouldBlock`]), is no staging file
/// ([`io::ErrorKind::InvalidData`]), is not there, or cannot be read.
pub fn inspect_staging(path: &Path) -> io::Result<StagingInfo> {
    let staging = Staging::open(&system(), path, None)?.ok_or(io::ErrorKind::NotFound)?;
    let (entries, _) = staging.table()?;
    Ok(StagingInfo {
        volume: staging.header().address.clone(),
        dirty_bytes: dirty_bytes(&entries),
    })
}

/// Removes a staging file and the unflushed writes in it, for good.
///
/// # Errors
/// As [`inspect_staging`].
pub fn discard_staging(path: &Path) -> io::Result<()> {
    Staging::open(&system(), path, None)?
        .ok_or(io::ErrorKind::NotFound)?
        .remove()
}

fn dirty_bytes(entries: &[(u32, Entry)]) -> u64 {
    let sectors: u64 = entries
        .iter()
        .map(|(_, entry)| u64::from(entry.dirty.count_ones()))
        .sum();
    sectors * SECTOR as u64
}

fn path_of(address: &BlobAddress, options: &StagingOptions) -> PathBuf {
    options.dir.join(stem_of(&address.to_string()) + ".staging")
}

fn boot(options: &StagingOptions) -> io::Result<String> {
    match &options.boot {
        Some(boot) => Ok(boot.clone()),
        None => Ok(std::fs::read_to_string(BOOT_ID)?.trim().to_owned()),
    }
}

/// File calls may wait for a disk, unless the file is known to be memory.
async fn blocking<T: Send + 'static>(
    options: &StagingOptions,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    if options.survives_power_cut == Some(false) {
        return work();
    }
    apart(options.files.may_wait(), work).await
}

fn refused(address: &BlobAddress, reason: String) -> OpenError {
    OpenError::Unusable {
        object: address.to_string(),
        reason,
    }
}

fn file_error(address: &BlobAddress, path: &Path, error: &io::Error) -> OpenError {
    let path = path.display();
    let reason = match error.kind() {
        io::ErrorKind::WouldBlock => {
            format!("{path} is in use: another daemon serves this volume on this node")
        }
        io::ErrorKind::InvalidData => {
            format!(
                "{path} is damaged or no staging file: attach with --recover set-aside to keep it out of the way, or with --recover discard to drop it"
            )
        }
        io::ErrorKind::StorageFull => {
            format!("no room for {path}: free some, or name another staging directory")
        }
        _ => format!("staging file {path}: {error}"),
    };
    refused(address, reason)
}

/// Looks for unflushed writes to the volume, under its lease and before its
/// number is raised; takes them up, sets them aside, drops them or refuses.
///
/// # Errors
/// There are some that may not or cannot be used; the error spells out the choice.
pub(in crate::volume) async fn adopt<S: PageStore>(
    blob: &S,
    options: &OpenOptions,
) -> Result<Option<Adopted>, OpenError> {
    let address = blob.address();
    let path = path_of(address, &options.staging);
    let recover = options.staging.recover;
    let survives = options.staging.survives_power_cut;
    let opened = {
        let path = path.clone();
        let files = Arc::clone(&options.staging.files);
        blocking(&options.staging, move || {
            open_and_read(&files, &path, survives, recover)
        })
        .await
    };
    let Some(found) = opened.map_err(|error| file_error(address, &path, &error))? else {
        return Ok(None);
    };
    let left = format!(
        "{} bytes of unflushed writes in {}",
        dirty_bytes(&found.entries),
        path.display()
    );
    if options.caching != Caching::ReadWrite {
        let reason = format!(
            "{left} wait for an attach with --caching read-write: attach so, or add --recover set-aside to keep them out of the way, or --recover discard to drop them"
        );
        return Err(refused(address, reason));
    }
    let header = found.staging.header();
    let renewed = options.resume && header.lease == options.lease.as_str();
    if !renewed && recover != Recover::Force {
        let deadline = options.attempt_deadline;
        let number = patiently!(blob.properties(deadline))?.sequence_number;
        if number != header.epoch {
            let reason = format!(
                "{left}, but the volume may have been written elsewhere since (sequence number {number}, not {}): attach with --recover set-aside to keep them out of the way, --recover discard to drop them, or --recover force to write them over what is there",
                header.epoch
            );
            return Err(refused(address, reason));
        }
    }
    let boot =
        boot(&options.staging).map_err(|error| file_error(address, Path::new(BOOT_ID), &error))?;
    let lease = options.lease.as_str().to_owned();
    let volume = digest(&address.to_string());
    let taken = blocking(&options.staging, move || {
        take_up(found, volume, lease, boot)
    })
    .await;
    let adopted = taken.map_err(|error| file_error(address, &path, &error))?;
    tracing::info!(
        "{address}: taking up {} bytes of unflushed writes",
        dirty_bytes(&adopted.entries)
    );
    Ok(Some(adopted))
}

struct Found {
    staging: Staging,
    entries: Vec<(u32, Entry)>,
    torn: usize,
}

/// `None` when there is nothing unflushed, or it was put out of the way.
fn open_and_read(
    files: &Arc<dyn StagingFiles>,
    path: &Path,
    survives: Option<bool>,
    recover: Recover,
) -> io::Result<Option<Found>> {
    let mut staging = match Staging::open(files, path, survives) {
        Ok(None) => return Ok(None),
        Ok(Some(staging)) => staging,
        Err(error)
            if error.kind() == io::ErrorKind::InvalidData
                && matches!(recover, Recover::SetAside | Recover::Discard) =>
        {
            clear_away_damaged(&**files, path, recover)?;
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let (entries, torn) = staging.table()?;
    if entries.is_empty() && torn == 0 || recover == Recover::Discard {
        staging.remove()?;
        return Ok(None);
    }
    if recover == Recover::SetAside {
        if let Some(aside) = staging.set_aside()? {
            tracing::warn!("unflushed writes kept in {}", aside.display());
        }
        return Ok(None);
    }
    Ok(Some(Found {
        staging,
        entries,
        torn,
    }))
}

/// Chooses what counts, and makes the file say so.
fn take_up(found: Found, volume: [u8; 32], lease: String, boot: String) -> io::Result<Adopted> {
    let Found {
        mut staging,
        mut entries,
        torn,
    } = found;
    if staging.header().volume != volume {
        return Err(io::ErrorKind::InvalidData.into());
    }
    if staging.header().boot == boot {
        if torn > 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
    } else {
        entries = after_power_cut(&staging, &entries)?;
    }
    staging.replace_table(&entries)?;
    staging.record(|header| {
        header.lease = lease;
        header.boot = boot;
        // From here on every entry counts again.
        header.flushed = 0;
    })?;
    Ok(Adopted { staging, entries })
}

/// Entries past `flushed`, with the sectors whose bytes are theirs; of two for
/// one block the later, for the earlier had been written back.
fn after_power_cut(staging: &Staging, entries: &[(u32, Entry)]) -> io::Result<Vec<(u32, Entry)>> {
    let mut latest: HashMap<u64, (u32, Entry)> = HashMap::new();
    let mut bytes = [0; BLOCK_LEN];
    for (slot, entry) in entries {
        if entry.sequence <= staging.header().flushed {
            continue;
        }
        let rival = latest.get(&entry.block);
        if rival.is_some_and(|(_, rival)| rival.sequence > entry.sequence) {
            continue;
        }
        let mut entry = *entry;
        let dirty = entry.dirty;
        for sector in (0..SECTORS).filter(|sector| dirty & (1 << sector) != 0) {
            let stretch = Stretch {
                slot: *slot,
                at: sector * SECTOR,
                bytes: 0..SECTOR,
            };
            let read = staging.read(&[stretch], &mut bytes);
            let whole = match read {
                Ok(()) => sum(&bytes[..SECTOR]) == entry.sums[sector],
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => false,
                Err(error) => return Err(error),
            };
            if !whole {
                entry.dirty &= !(1 << sector);
                entry.sums[sector] = 0;
            }
        }
        latest.insert(entry.block, (*slot, entry));
    }
    let mut kept: Vec<_> = latest
        .into_values()
        .filter(|(_, entry)| entry.dirty != 0)
        .collect();
    kept.sort_by_key(|(slot, _)| *slot);
    Ok(kept)
}

/// Makes the cache of a volume that is open for writing at sequence number
/// `number`.
///
/// # Errors
/// The staging file cannot be made or written.
pub(in crate::volume) async fn start(
    address: &BlobAddress,
    options: &OpenOptions,
    number: u64,
    adopted: Option<Adopted>,
) -> Result<Option<Arc<Cache>>, OpenError> {
    let mode = options.caching;
    if mode == Caching::None {
        return Ok(None);
    }
    let origin = Origin {
        path: path_of(address, &options.staging),
        address: address.clone(),
        lease: options.lease.as_str().to_owned(),
        staging: options.staging.clone(),
    };
    let (from, named) = (origin.clone(), mode == Caching::ReadWrite);
    let made = blocking(&options.staging, move || match adopted {
        Some(adopted) => resume(adopted, &from.staging, number),
        None => from.create(number, named),
    })
    .await;
    let core = made.map_err(|error| file_error(address, &origin.path, &error))?;
    Ok(Some(Cache::new(mode, core, origin)))
}

/// What a volume's staging file is made or opened again from.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    path: PathBuf,
    address: BlobAddress,
    lease: String,
    staging: StagingOptions,
}

impl Origin {
    fn create(self, number: u64, named: bool) -> io::Result<Core> {
        let address = self.address.to_string();
        create(
            &self.path,
            address,
            self.lease,
            &self.staging,
            number,
            named,
        )
    }

    /// The file as it is now, after somebody else had it; a new one when that
    /// one found nothing unflushed in it.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] while the other one has it open;
    /// otherwise as [`start`].
    pub(super) async fn open_again(&self, number: u64) -> io::Result<Core> {
        let origin = self.clone();
        let options = self.staging.clone();
        blocking(&options, move || {
            let survives = origin.staging.survives_power_cut;
            let files = &origin.staging.files;
            match open_and_read(files, &origin.path, survives, Recover::Replay)? {
                Some(found) => {
                    let boot = boot(&origin.staging)?;
                    let volume = digest(&origin.address.to_string());
                    let adopted = take_up(found, volume, origin.lease, boot)?;
                    resume(adopted, &origin.staging, number)
                }
                None => origin.create(number, true),
            }
        })
        .await
    }
}

fn create(
    path: &Path,
    address: String,
    lease: String,
    options: &StagingOptions,
    number: u64,
    named: bool,
) -> io::Result<Core> {
    let slots = u32::try_from((options.size / BLOCK).max(LEAST_SLOTS)).unwrap_or(u32::MAX - 1);
    let header = Header {
        generation: 0,
        slots,
        epoch: number,
        flushed: 0,
        volume: digest(&address),
        address,
        lease,
        boot: boot(options)?,
    };
    // A daemon that is killed in here must not leave half a file where its
    // successor looks for a whole one. Whoever has the lease is alone here.
    let making = if named {
        path.with_extension("making")
    } else {
        // It has this name for an instant only.
        path.with_extension(uuid::Uuid::new_v4().simple().to_string())
    };
    match options.files.remove(&making) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let survives = options.survives_power_cut;
    let mut staging = Staging::create(&options.files, &making, named, header, survives)?;
    if named && let Err(error) = staging.place(path) {
        staging.remove()?;
        return Err(error);
    }
    let share = Share::join(options.budget.clone());
    Ok(Core::new(Index::new(slots, 0), staging, share))
}

fn resume(adopted: Adopted, options: &StagingOptions, number: u64) -> io::Result<Core> {
    let Adopted {
        mut staging,
        entries,
    } = adopted;
    staging.record(|header| header.epoch = number)?;
    let sequence = entries
        .iter()
        .map(|(_, entry)| entry.sequence)
        .max()
        .unwrap_or(0);
    let mut index = Index::new(staging.header().slots, sequence);
    index.restore(&entries);
    let mut share = Share::join(options.budget.clone());
    share.take_over(entries.len() as u64);
    Ok(Core::new(index, staging, share))
}

/// The volume is somebody else's now: keeps what an earlier daemon of ours
/// left unflushed where nothing replays it.
pub(in crate::volume) async fn withdraw(
    address: &BlobAddress,
    options: &OpenOptions,
) -> Option<SetAside> {
    let path = path_of(address, &options.staging);
    let survives = options.staging.survives_power_cut;
    let withdrawn = blocking(&options.staging, {
        let path = path.clone();
        let files = Arc::clone(&options.staging.files);
        move || {
            let Some(mut staging) = Staging::open(&files, &path, survives)? else {
                return Ok(None);
            };
            let (entries, torn) = staging.table()?;
            if entries.is_empty() && torn == 0 {
                return staging.remove().map(|()| None);
            }
            let dirty_bytes = dirty_bytes(&entries);
            let path = staging.set_aside()?;
            Ok::<_, io::Error>(path.map(|path| SetAside { path, dirty_bytes }))
        }
    });
    withdrawn.await.unwrap_or_else(|error| {
        tracing::error!("staging file {}: {error}: left where it is", path.display());
        None
    })
}

/// Starts writing back, if the volume has a cache.
pub(in crate::volume) fn run<S: PageStore>(volume: &Arc<Volume<S>>) {
    if let Some(cache) = &volume.cache {
        write_back::start(volume, cache);
    }
}
