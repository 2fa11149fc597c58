//! ListVolumes, ControllerGetVolume and GetCapacity: what there is, and what
//! there could be. Their requests bring no secrets, so they are those of the
//! default Secret.

use std::collections::HashMap;
use std::pin::pin;

use futures_util::TryStreamExt as _;
use tonic::Status;

use super::handle::Handle;
use super::parameters::Parameters;
use super::v1::*;
use super::volumes::{CLAIM, LARGEST, bytes};
use super::{capability, failure, health, secrets};
use crate::blob::reference::DEFAULT_CONTAINER;
use crate::blob::{Account, BlobType, LeaseState, ListedBlob};
use crate::node::account::ATTEMPT_DEADLINE;
use crate::volume::{self, OpenError, Wish};

const MIB: u64 = 1 << 20;
/// What a storage account holds unless its owner asked for more: 5 PiB. How
/// much of it is in use the blob service does not tell.
const ACCOUNT: u64 = 5 << 50;

/// The handle of a blob in the default container.
pub fn handle(account: &Account, listed: &ListedBlob) -> Handle {
    Handle {
        account: account.name().to_owned(),
        container: DEFAULT_CONTAINER.to_owned(),
        blob: listed.name.clone(),
    }
}

/// The entry of `listed`, of which `health` is known.
fn message(
    account: &Account,
    listed: &ListedBlob,
    health: VolumeHealth,
) -> list_volumes_response::Entry {
    let wrong = health.health_statuses.into_iter().next();
    let handle = handle(account, listed);
    list_volumes_response::Entry {
        volume: Some(volume(&handle, listed.size & !(MIB - 1))),
        status: Some(list_volumes_response::VolumeStatus {
            published_node_ids: nodes(&listed.metadata),
            volume_condition: Some(VolumeCondition {
                abnormal: wrong.is_some(),
                message: wrong.map_or_else(
                    || told(listed.lease_state).to_owned(),
                    |entry| entry.message,
                ),
            }),
        }),
    }
}

fn volume(handle: &Handle, size: u64) -> Volume {
    Volume {
        capacity_bytes: bytes(size),
        volume_id: handle.to_string(),
        ..Volume::default()
    }
}

/// Those that it is published to.
fn nodes(metadata: &[(String, String)]) -> Vec<String> {
    let published = volume::published(metadata).into_iter();
    published.map(|entry| entry.node).collect()
}

/// What there is to say of a disk: its settings, too, where they were changed.
fn condition(lease: LeaseState, wish: Option<&Wish>) -> String {
    let told = told(lease);
    let Some(wish) = wish else {
        return told.to_owned();
    };
    let settings = &wish.settings;
    match &wish.taken_up {
        None => format!("{told}; {settings} from the next attach on"),
        Some(taken) if taken.caching_waits => format!(
            "{told}; {settings} since {}, the caching mode from the next attach on",
            taken.at
        ),
        Some(taken) => format!("{told}; {settings} since {}", taken.at),
    }
}

fn told(lease: LeaseState) -> &'static str {
    match lease {
        LeaseState::Leased | LeaseState::Breaking => "attached",
        _ => "not attached",
    }
}

/// Which page of a list is asked for: at most how many entries, and those
/// after which handle, the last one of the page before.
///
/// # Errors
/// INVALID_ARGUMENT: a number below 0. ABORTED: a token of somebody else's.
pub fn page(max_entries: i32, token: &str) -> Result<(usize, Option<Handle>), Status> {
    let most = usize::try_from(max_entries)
        .map_err(|_| Status::invalid_argument("max entries: a number below 0"))?;
    let after = match token {
        "" => None,
        token => Some(Handle::parse(token).ok_or_else(|| {
            Status::aborted("starting token: not one of ours: begin without one")
        })?),
    };
    Ok((most, after))
}

/// The blobs that this driver made in the default container, by name, from
/// behind `after` on.
pub async fn made_here(
    account: &Account,
    after: Option<&Handle>,
) -> Result<Vec<ListedBlob>, Status> {
    let mut all = blobs(account, DEFAULT_CONTAINER, "", false).await?;
    all.retain(|listed| {
        listed.blob_type == BlobType::Page
            && listed.metadata.iter().any(|(name, _)| name == CLAIM)
            && after.is_none_or(|after| listed.name > after.blob)
    });
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

/// All pages of the list of blobs whose names begin with `prefix`, with their
/// snapshots when `snapshots`; none in a container that is not there.
pub async fn blobs(
    account: &Account,
    container: &str,
    prefix: &str,
    snapshots: bool,
) -> Result<Vec<ListedBlob>, Status> {
    let mut marker: Option<String> = None;
    let mut all = Vec::new();
    loop {
        let marked = marker.as_deref();
        let page = account.list_blobs(container, prefix, snapshots, marked, ATTEMPT_DEADLINE);
        let (page, next) = match page.await {
            Err(error) if error.is_not_found() => return Ok(all),
            other => other.map_err(|error| failure::of_storage(&error))?,
        };
        all.extend(page);
        marker = next.filter(|next| !next.is_empty());
        if marker.is_none() {
            return Ok(all);
        }
    }
}

/// ListVolumes: those that this driver made in the default container; abnormal
/// is a blob that cannot be a disk. The token is the last handle of the page
/// before.
pub async fn list(
    secret: &HashMap<String, String>,
    asked: ListVolumesRequest,
) -> Result<ListVolumesResponse, Status> {
    let (most, after) = page(asked.max_entries, &asked.starting_token)?;
    let account = secrets::open(secret, None, None).await?;
    let mut all = made_here(&account, after.as_ref()).await?;
    let more = most > 0 && all.len() > most;
    if more {
        all.truncate(most);
    }
    let last = all.last().filter(|_| more);
    let next_token = last.map(|last| handle(&account, last).to_string());
    let mut looked = pin!(health::look_at_each(&account, all));
    let mut entries = Vec::new();
    while let Some((listed, health)) = looked.try_next().await? {
        // One that is gone was deleted meanwhile.
        if let Some(health) = health {
            entries.push(message(&account, &listed, health));
        }
    }
    Ok(ListVolumesResponse {
        entries,
        next_token: next_token.unwrap_or_default(),
    })
}

/// ControllerGetVolume: abnormal is a blob that cannot be a disk.
pub async fn get(
    secret: &HashMap<String, String>,
    asked: ControllerGetVolumeRequest,
) -> Result<ControllerGetVolumeResponse, Status> {
    failure::given(&asked.volume_id, "volume id")?;
    let nowhere = || Status::not_found(format!("{}: no such volume", asked.volume_id));
    let handle = Handle::parse(&asked.volume_id).ok_or_else(nowhere)?;
    let account = secrets::open(secret, None, None).await?;
    if account.name() != handle.account {
        return Err(nowhere());
    }
    let blob = account.page_blob(&handle.container, &handle.blob);
    let inspected = volume::inspect(&blob, ATTEMPT_DEADLINE).await;
    let (size, published_node_ids, abnormal, message) = match inspected {
        Ok(disk) => {
            let wish = volume::wish(&blob, ATTEMPT_DEADLINE).await;
            let wish = wish.map_err(|error| failure::of_storage(&error))?;
            let nodes = nodes(&disk.properties.metadata);
            let message = condition(disk.properties.lease_state, wish.as_ref());
            (disk.size, nodes, false, message)
        }
        Err(OpenError::Storage(error)) => return Err(failure::of_storage(&error)),
        Err(error) => (0, Vec::new(), true, error.to_string()),
    };
    Ok(ControllerGetVolumeResponse {
        volume: Some(volume(&handle, size)),
        status: Some(controller_get_volume_response::VolumeStatus {
            published_node_ids,
            volume_condition: Some(VolumeCondition { abnormal, message }),
        }),
    })
}

/// GetCapacity: an account's own limit, and a page blob's.
pub fn capacity(asked: &GetCapacityRequest) -> Result<GetCapacityResponse, Status> {
    Parameters::parse(&asked.parameters)?;
    let possible = asked
        .volume_capabilities
        .iter()
        .all(|capability| capability::unsupported(capability).is_none());
    Ok(GetCapacityResponse {
        available_capacity: if possible { bytes(ACCOUNT) } else { 0 },
        maximum_volume_size: Some(bytes(LARGEST)),
        minimum_volume_size: Some(bytes(MIB)),
    })
}
