//! The GroupController service: snapshots of several volumes that are of one
//! moment. How that moment is found is in `volume::snapshot_group`.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use futures_util::future::try_join_all;
use tonic::{Request, Response, Status};

use super::controller::ControllerService;
use super::handle::{GroupHandle, Handle, SnapshotHandle};
use super::locks::Locks;
use super::snapshots::{Found, has_no_parameters, properties};
use super::v1::group_controller_server::GroupController;
use super::v1::group_controller_service_capability::{Rpc, Type, rpc};
use super::v1::*;
use super::volumes::look;
use super::{failure, secrets};
use crate::blob::Account;
use crate::node::account::ATTEMPT_DEADLINE;
use crate::volume::{self, GroupError, GroupSnapshots, Member};

/// For how long a moment is looked for in which nobody writes.
const PATIENCE: Duration = Duration::from_secs(20);
/// Volumes in a group at most: each is two requests at once.
const MOST: usize = 100;

fn of_group(error: &GroupError) -> Status {
    let text = error.to_string();
    match error {
        GroupError::Disk(error) => failure::of_volume(error),
        GroupError::Written { .. } => Status::unavailable(text),
        GroupError::OtherDisks(_) => Status::already_exists(text),
    }
}

fn message(group: &GroupHandle, members: Vec<Member>) -> Result<VolumeGroupSnapshot, Status> {
    let snapshots: Vec<Snapshot> = members
        .into_iter()
        .map(|member| found(group, member).message())
        .collect::<Result<_, _>>()?;
    let creation_time = snapshots.iter().filter_map(|one| one.creation_time);
    Ok(VolumeGroupSnapshot {
        group_snapshot_id: group.to_string(),
        creation_time: creation_time.min_by_key(|time| (time.seconds, time.nanos)),
        ready_to_use: true,
        snapshots,
    })
}

fn found(group: &GroupHandle, member: Member) -> Found {
    Found {
        handle: SnapshotHandle {
            volume: Handle {
                account: group.account.clone(),
                container: group.container.clone(),
                blob: member.blob,
            },
            time: member.time,
        },
        name: String::new(),
        blob_size: member.blob_size,
        group: Some(group.clone()),
    }
}

fn handles(group: &GroupHandle, members: impl IntoIterator<Item = Member>) -> BTreeSet<String> {
    let members = members.into_iter();
    members
        .map(|member| found(group, member).handle.to_string())
        .collect()
}

fn mismatch(id: &str, group: &GroupHandle) -> Status {
    Status::invalid_argument(format!("snapshot {id}: it is not of the group {group}"))
}

/// CreateVolumeGroupSnapshot.
async fn create(
    locks: &Locks,
    asked: CreateVolumeGroupSnapshotRequest,
) -> Result<VolumeGroupSnapshot, Status> {
    failure::given(&asked.name, "name")?;
    has_no_parameters(&asked.parameters)?;
    let volumes: Vec<Handle> = asked
        .source_volume_ids
        .iter()
        .map(|id| Handle::named(id))
        .collect::<Result<_, _>>()?;
    let Some(first) = volumes.first() else {
        return Err(Status::invalid_argument("source volume ids are missing"));
    };
    if volumes.len() > MOST {
        return Err(Status::invalid_argument(format!(
            "a group has at most {MOST} volumes"
        )));
    }
    let place = |volume: &Handle| (volume.account.clone(), volume.container.clone());
    if let Some(other) = volumes.iter().find(|other| place(other) != place(first)) {
        return Err(Status::failed_precondition(format!(
            "{first} and {other}: the volumes of a group lie in one container"
        )));
    }
    let _held = locks.take(&format!("group {}", asked.name))?;
    let account = secrets::open(&asked.secrets, None, None).await?;
    try_join_all(volumes.iter().map(|volume| look(&account, volume))).await?;
    let disks = volumes.iter().map(|volume| volume.blob.clone()).collect();
    let group = GroupHandle::of_name(account.name(), &first.container, &asked.name);
    // No name that CreateSnapshot would take for one of its own.
    let name = format!("group {}", asked.name);
    let names = (group.group.as_str(), name.as_str());
    let container = &group.container;
    let members = volume::create_group(
        &account,
        container,
        &disks,
        names,
        PATIENCE,
        ATTEMPT_DEADLINE,
    )
    .await
    .map_err(|error| of_group(&error))?;
    tracing::info!(%group, snapshots = members.len(), "group of snapshots");
    message(&group, members)
}

/// The account of a group, and the group's snapshots.
async fn open(
    group: &GroupHandle,
    given: &HashMap<String, String>,
) -> Result<(Account, GroupSnapshots), Status> {
    let account = secrets::open(given, None, None).await?;
    secrets::are_of(&group.account, account.name(), group)?;
    let there = volume::find_group(&account, &group.container, &group.group, ATTEMPT_DEADLINE);
    let there = there.await.map_err(|error| failure::of_storage(&error))?;
    Ok((account, there))
}

/// DeleteVolumeGroupSnapshot.
async fn delete(locks: &Locks, asked: DeleteVolumeGroupSnapshotRequest) -> Result<(), Status> {
    failure::given(&asked.group_snapshot_id, "group snapshot id")?;
    let Some(group) = GroupHandle::parse(&asked.group_snapshot_id) else {
        return Ok(());
    };
    let _held = locks.take(&group)?;
    let (account, there) = open(&group, &asked.secrets).await?;
    let given: BTreeSet<String> = asked.snapshot_ids.into_iter().collect();
    if !given.is_empty() {
        let all = handles(&group, there.all().cloned());
        // What is given and not there may be deleted already, by a call whose
        // answer was lost; but not be somebody else's.
        for id in given.difference(&all) {
            if exists(&account, id).await? {
                return Err(mismatch(id, &group));
            }
        }
        let members = handles(&group, there.finished().unwrap_or_default());
        if let Some(id) = members.difference(&given).next() {
            return Err(Status::invalid_argument(format!(
                "{group}: snapshot {id} is of it, and is not among those to be deleted"
            )));
        }
    }
    let deleted = there.delete(&account, &group.container, ATTEMPT_DEADLINE);
    deleted.await.map_err(|error| failure::of_volume(&error))
}

/// Whether there is such a snapshot.
async fn exists(account: &Account, id: &str) -> Result<bool, Status> {
    let Some(snapshot) = SnapshotHandle::parse(id) else {
        return Ok(false);
    };
    if snapshot.volume.account != account.name() {
        return Ok(false);
    }
    let seen = properties(account, &snapshot).await?;
    Ok(seen.is_some())
}

/// GetVolumeGroupSnapshot.
async fn get(asked: GetVolumeGroupSnapshotRequest) -> Result<VolumeGroupSnapshot, Status> {
    failure::given(&asked.group_snapshot_id, "group snapshot id")?;
    let nowhere = || {
        let id = &asked.group_snapshot_id;
        Status::not_found(format!("{id}: no such group of snapshots"))
    };
    let group = GroupHandle::parse(&asked.group_snapshot_id).ok_or_else(nowhere)?;
    let (_, there) = open(&group, &asked.secrets).await?;
    let members = there.finished().ok_or_else(nowhere)?;
    let given: BTreeSet<String> = asked.snapshot_ids.iter().cloned().collect();
    let all = handles(&group, members.iter().cloned());
    if !given.is_empty()
        && let Some(id) = given.symmetric_difference(&all).next()
    {
        return Err(mismatch(id, &group));
    }
    message(&group, members)
}

#[tonic::async_trait]
impl GroupController for ControllerService {
    async fn group_controller_get_capabilities(
        &self,
        _request: Request<GroupControllerGetCapabilitiesRequest>,
    ) -> Result<Response<GroupControllerGetCapabilitiesResponse>, Status> {
        let offered = GroupControllerServiceCapability {
            r#type: Some(Type::Rpc(Rpc {
                r#type: rpc::Type::CreateDeleteGetVolumeGroupSnapshot.into(),
            })),
        };
        Ok(Response::new(GroupControllerGetCapabilitiesResponse {
            capabilities: vec![offered],
        }))
    }

    async fn create_volume_group_snapshot(
        &self,
        request: Request<CreateVolumeGroupSnapshotRequest>,
    ) -> Result<Response<CreateVolumeGroupSnapshotResponse>, Status> {
        let mut asked = request.into_inner();
        self.fill(&mut asked.secrets).await?;
        let group_snapshot = Some(create(&self.locks, asked).await?);
        Ok(Response::new(CreateVolumeGroupSnapshotResponse {
            group_snapshot,
        }))
    }

    async fn delete_volume_group_snapshot(
        &self,
        request: Request<DeleteVolumeGroupSnapshotRequest>,
    ) -> Result<Response<DeleteVolumeGroupSnapshotResponse>, Status> {
        let mut asked = request.into_inner();
        self.fill(&mut asked.secrets).await?;
        delete(&self.locks, asked).await?;
        Ok(Response::new(DeleteVolumeGroupSnapshotResponse {}))
    }

    async fn get_volume_group_snapshot(
        &self,
        request: Request<GetVolumeGroupSnapshotRequest>,
    ) -> Result<Response<GetVolumeGroupSnapshotResponse>, Status> {
        let mut asked = request.into_inner();
        self.fill(&mut asked.secrets).await?;
        let group_snapshot = Some(get(asked).await?);
        Ok(Response::new(GetVolumeGroupSnapshotResponse {
            group_snapshot,
        }))
    }
}
