//! CreateSnapshot, DeleteSnapshot and ListSnapshots. Those of groups are made
//! and deleted in [`super::groups`], and listed here.

use std::collections::{HashMap, HashSet};

use tonic::Status;

use super::handle::{GroupHandle, Handle, SnapshotHandle};
use super::locks::Locks;
use super::v1::list_snapshots_response::Entry;
use super::v1::*;
use super::volumes::{bytes, look};
use super::{failure, listing, secrets};
use crate::blob::reference::DEFAULT_CONTAINER;
use crate::blob::{Account, Conditions, Properties};
use crate::node::account::ATTEMPT_DEADLINE;
use crate::volume::{self, Membership, snapshot_name};

const MIB: u64 = 1 << 20;

/// A snapshot that was found, with the name it was taken under.
pub struct Found {
    pub handle: SnapshotHandle,
    pub name: String,
    pub blob_size: u64,
    /// The group that it is of.
    pub group: Option<GroupHandle>,
}

impl Found {
    pub fn message(&self) -> Result<Snapshot, Status> {
        let time: jiff::Timestamp =
            self.handle.time.parse().map_err(|_| {
                Status::internal(format!("{}: its time stamp is no time", self.handle))
            })?;
        // Disks of this driver are whole MiB; what is beyond is the footer.
        let size = self.blob_size & !(MIB - 1);
        Ok(Snapshot {
            size_bytes: bytes(size),
            snapshot_id: self.handle.to_string(),
            source_volume_id: self.handle.volume.to_string(),
            creation_time: Some(prost_types::Timestamp {
                seconds: time.as_second(),
                nanos: time.subsec_nanosecond(),
            }),
            ready_to_use: true,
            group_snapshot_id: self
                .group
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
        })
    }
}

/// Those of one container whose blobs' names begin with `prefix`, in order; of a
/// volume's, one of each name.
async fn found(account: &Account, container: &str, prefix: &str) -> Result<Vec<Found>, Status> {
    let listed = listing::blobs(account, container, prefix, true).await?;
    let found = listed.into_iter().filter_map(|listed| {
        let (time, name) = (listed.snapshot?, snapshot_name(&listed.metadata)?);
        let group = Membership::of(&listed.metadata).map(|membership| GroupHandle {
            account: account.name().to_owned(),
            container: container.to_owned(),
            group: membership.group,
        });
        Some(Found {
            group,
            handle: SnapshotHandle {
                volume: Handle {
                    account: account.name().to_owned(),
                    container: container.to_owned(),
                    blob: listed.name,
                },
                time,
            },
            name,
            blob_size: listed.size,
        })
    });
    let mut all: Vec<Found> = found.collect();
    all.sort_by(|a, b| a.handle.cmp(&b.handle));
    // The first of a name is the one that was told; see `create_snapshot`.
    let mut names = HashSet::new();
    all.retain(|one| {
        one.group.is_some() || names.insert((one.handle.volume.clone(), one.name.clone()))
    });
    Ok(all)
}

/// What the store says of a snapshot in `account`; `None` when it is not there.
pub async fn properties(
    account: &Account,
    snapshot: &SnapshotHandle,
) -> Result<Option<Properties>, Status> {
    let blob = account.page_blob(&snapshot.volume.container, &snapshot.volume.blob);
    let blob = blob.at_snapshot(snapshot.time.as_str());
    match blob
        .properties(&Conditions::default(), ATTEMPT_DEADLINE)
        .await
    {
        Ok(properties) => Ok(Some(properties)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(failure::of_storage(&error)),
    }
}

/// Refuses parameters of a class, which has none of ours.
pub fn has_no_parameters(parameters: &HashMap<String, String>) -> Result<(), Status> {
    let mut names = parameters.keys();
    match names.find(|name| !name.starts_with("csi.storage.k8s.io/")) {
        None => Ok(()),
        Some(name) => Err(Status::invalid_argument(format!(
            "parameter {name}: there is no such parameter"
        ))),
    }
}

/// CreateSnapshot. A name is one volume's within its container.
pub async fn create(locks: &Locks, asked: CreateSnapshotRequest) -> Result<Snapshot, Status> {
    failure::given(&asked.name, "name")?;
    failure::given(&asked.source_volume_id, "source volume id")?;
    has_no_parameters(&asked.parameters)?;
    let handle = Handle::named(&asked.source_volume_id)?;
    let _held = locks.take(&format!("snapshot {}", asked.name))?;
    let account = secrets::open(&asked.secrets, None, None).await?;
    look(&account, &handle).await?;
    let others = found(&account, &handle.container, "").await?;
    if let Some(other) = others.iter().find(|other| {
        other.group.is_none() && other.name == asked.name && other.handle.volume != handle
    }) {
        return Err(Status::already_exists(format!(
            "snapshot {}: there is one of volume {}",
            asked.name, other.handle.volume
        )));
    }
    let blob = account.page_blob(&handle.container, &handle.blob);
    let taken = volume::create_snapshot(&blob, &asked.name, ATTEMPT_DEADLINE)
        .await
        .map_err(|error| failure::of_volume(&error))?;
    let taken = Found {
        handle: SnapshotHandle {
            volume: handle,
            time: taken.time,
        },
        name: asked.name,
        blob_size: taken.blob_size,
        group: None,
    };
    taken.message()
}

/// DeleteSnapshot.
pub async fn delete(locks: &Locks, asked: DeleteSnapshotRequest) -> Result<(), Status> {
    failure::given(&asked.snapshot_id, "snapshot id")?;
    let Some(snapshot) = SnapshotHandle::parse(&asked.snapshot_id) else {
        return Ok(());
    };
    let _held = locks.take(&snapshot)?;
    let account = secrets::open(&asked.secrets, None, None).await?;
    secrets::are_of(&snapshot.volume.account, account.name(), &snapshot)?;
    let volume = &snapshot.volume;
    let blob = account.page_blob(&volume.container, &volume.blob);
    let Some(seen) = properties(&account, &snapshot).await? else {
        return Ok(());
    };
    if Membership::of(&seen.metadata).is_some() {
        return Err(Status::invalid_argument(format!(
            "{snapshot}: it is of a group: delete the group"
        )));
    }
    let deleted = match snapshot_name(&seen.metadata) {
        Some(name) => {
            // Nobody takes another of that name meanwhile.
            let _named = locks.take(&format!("snapshot {name}"))?;
            let which = (name.as_str(), snapshot.time.as_str());
            volume::delete_snapshots_of_name(&blob, which, ATTEMPT_DEADLINE).await
        }
        None => volume::delete_snapshot(&blob, &snapshot.time, ATTEMPT_DEADLINE).await,
    };
    deleted.map_err(|error| failure::of_volume(&error))
}

/// GetSnapshot.
pub async fn get(asked: GetSnapshotRequest) -> Result<Snapshot, Status> {
    failure::given(&asked.snapshot_id, "snapshot id")?;
    let nowhere = || Status::not_found(format!("{}: no such snapshot", asked.snapshot_id));
    let wanted = SnapshotHandle::parse(&asked.snapshot_id).ok_or_else(nowhere)?;
    let account = secrets::open(&asked.secrets, None, None).await?;
    if account.name() != wanted.volume.account {
        return Err(nowhere());
    }
    let (container, blob) = (&wanted.volume.container, &wanted.volume.blob);
    let all = found(&account, container, blob).await?;
    let one = all.into_iter().find(|found| found.handle == wanted);
    one.ok_or_else(nowhere)?.message()
}

/// ListSnapshots: one snapshot, those of one volume, or those of the default
/// container. The token is the last handle of the page before.
pub async fn list(asked: ListSnapshotsRequest) -> Result<ListSnapshotsResponse, Status> {
    let most = usize::try_from(asked.max_entries)
        .map_err(|_| Status::invalid_argument("max entries: a number below 0"))?;
    let after = match asked.starting_token.as_str() {
        "" => None,
        token => Some(SnapshotHandle::parse(token).ok_or_else(|| {
            Status::aborted("starting token: not one of ours: begin without one")
        })?),
    };
    let nothing = ListSnapshotsResponse::default();
    let account = secrets::open(&asked.secrets, None, None).await?;
    let one = match asked.snapshot_id.as_str() {
        "" => None,
        id => match SnapshotHandle::parse(id) {
            Some(handle) => Some(handle),
            None => return Ok(nothing),
        },
    };
    let volume = match asked.source_volume_id.as_str() {
        "" => one.as_ref().map(|one| one.volume.clone()),
        id => match Handle::parse(id) {
            Some(handle) => Some(handle),
            None => return Ok(nothing),
        },
    };
    if volume
        .as_ref()
        .is_some_and(|volume| volume.account != account.name())
    {
        return Ok(nothing);
    }
    let (container, prefix) = volume.as_ref().map_or((DEFAULT_CONTAINER, ""), |v| {
        (v.container.as_str(), v.blob.as_str())
    });
    let mut all = found(&account, container, prefix).await?;
    all.retain(|found| {
        volume
            .as_ref()
            .is_none_or(|volume| found.handle.volume == *volume)
            && one.as_ref().is_none_or(|one| found.handle == *one)
            && after.as_ref().is_none_or(|after| found.handle > *after)
    });
    let more = most > 0 && all.len() > most;
    if more {
        all.truncate(most);
    }
    let next_token = match all.last() {
        Some(last) if more => last.handle.to_string(),
        _ => String::new(),
    };
    let entries = all.iter().map(|found| {
        let snapshot = Some(found.message()?);
        Ok(Entry { snapshot })
    });
    Ok(ListSnapshotsResponse {
        entries: entries.collect::<Result<_, Status>>()?,
        next_token,
    })
}
