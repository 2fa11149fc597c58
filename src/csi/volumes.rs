//! CreateVolume, DeleteVolume and ControllerExpandVolume.
//!
//! A volume's blob says in its metadata for which name it was made and from
//! what, from its first moment: so a repeated call finds its own work, at
//! whatever point the last one ended, and nobody else's.

use tonic::Status;

use super::handle::{Handle, SnapshotHandle};
use super::locks::Locks;
use super::parameters::Parameters;
use super::v1::volume_content_source::Type;
use super::v1::*;
use super::{capability, failure, parameters, secrets};
use crate::blob::vhd::Layout;
use crate::blob::{Account, Advice, Conditions, DeleteSnapshots, PageBlob, StorageError};
use crate::node::account::ATTEMPT_DEADLINE;
use crate::node::provision::with_container;
use crate::volume::{self, CopyPlan, Disk, LARGEST_BLOB, OpenError, metadata_text};

const MIB: u64 = 1 << 20;
/// A claim that names no size.
const DEFAULT_SIZE: u64 = 1 << 30;
/// The largest disk in whole MiB: the footer needs some room too.
pub const LARGEST: u64 = LARGEST_BLOB - MIB;

/// For which name the blob was made, in its metadata.
pub const CLAIM: &str = "dyskclaim";
/// From what it was made.
const SOURCE: &str = "dysksource";

/// What sizes will do, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Capacity {
    required: u64,
    limit: Option<u64>,
}

impl Capacity {
    fn parse(range: Option<&CapacityRange>) -> Result<Self, Status> {
        let (required, limit) =
            range.map_or((0, 0), |range| (range.required_bytes, range.limit_bytes));
        let (Ok(required), Ok(limit)) = (u64::try_from(required), u64::try_from(limit)) else {
            return Err(Status::invalid_argument("capacity: a size below 0"));
        };
        let limit = (limit > 0).then_some(limit);
        if limit.is_some_and(|limit| limit < required) {
            return Err(Status::invalid_argument(
                "capacity: the limit is below what is required",
            ));
        }
        Ok(Self { required, limit })
    }

    /// The size to make: whole MiB.
    fn choose(self, at_least: u64) -> Result<u64, Status> {
        let wanted = match self.required.max(at_least) {
            0 => DEFAULT_SIZE
                .min(self.limit.unwrap_or(DEFAULT_SIZE) & !(MIB - 1))
                .max(MIB),
            some => some.div_ceil(MIB).saturating_mul(MIB),
        };
        if wanted > LARGEST || self.limit.is_some_and(|limit| wanted > limit) {
            return Err(Status::out_of_range(format!(
                "capacity: {wanted} bytes (whole MiB) are above the limit of {}",
                self.limit.unwrap_or(LARGEST).min(LARGEST)
            )));
        }
        Ok(wanted)
    }

    fn holds(self, size: u64) -> bool {
        size >= self.required && self.limit.is_none_or(|limit| size <= limit)
    }
}

/// A size as the messages have it.
pub fn bytes(size: u64) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

/// What a volume is made from.
struct Source {
    /// Its handle, as it was named.
    id: String,
    blob: PageBlob,
    size: u64,
}

/// Looks at a volume that must be there.
pub async fn look(account: &Account, handle: &Handle) -> Result<Disk, Status> {
    if account.name() != handle.account {
        return Err(Status::not_found(format!(
            "{handle}: no such volume in account {}",
            account.name()
        )));
    }
    let blob = account.page_blob(&handle.container, &handle.blob);
    volume::inspect(&blob, ATTEMPT_DEADLINE)
        .await
        .map_err(|error| failure::of_volume(&error))
}

async fn source(
    account: &Account,
    asked: Option<&VolumeContentSource>,
) -> Result<Option<Source>, Status> {
    let Some(asked) = asked else {
        return Ok(None);
    };
    let (id, parsed) = match &asked.r#type {
        Some(Type::Snapshot(snapshot)) => {
            let id = snapshot.snapshot_id.clone();
            let parsed = SnapshotHandle::parse(&id);
            (id, parsed.map(|parsed| (parsed.volume, Some(parsed.time))))
        }
        Some(Type::Volume(volume)) => {
            let id = volume.volume_id.clone();
            let parsed = Handle::parse(&id);
            (id, parsed.map(|volume| (volume, None)))
        }
        None => return Err(Status::invalid_argument("content source: it names none")),
    };
    let Some((handle, time)) = parsed else {
        return Err(Status::not_found(format!(
            "content source {id}: there is none"
        )));
    };
    if handle.account != account.name() {
        return Err(Status::invalid_argument(format!(
            "content source {id}: a copy stays within its account, here {}",
            account.name()
        )));
    }
    let mut blob = account.page_blob(&handle.container, &handle.blob);
    if let Some(time) = time {
        blob = blob.at_snapshot(time);
    }
    let disk = volume::inspect(&blob, ATTEMPT_DEADLINE)
        .await
        .map_err(|error| failure::of_volume(&error))?;
    Ok(Some(Source {
        id,
        blob,
        size: disk.size,
    }))
}

/// CreateVolume.
pub async fn create(locks: &Locks, asked: CreateVolumeRequest) -> Result<Volume, Status> {
    failure::given(&asked.name, "name")?;
    capability::check(&asked.volume_capabilities)?;
    parameters::settings(&asked.mutable_parameters)?;
    let mut parameters = Parameters::parse(&asked.parameters)?;
    // Those of a VolumeAttributesClass come before the StorageClass's.
    parameters.context.extend(asked.mutable_parameters.clone());
    let capacity = Capacity::parse(asked.capacity_range.as_ref())?;
    let (endpoint, realm) = (parameters.endpoint.as_deref(), parameters.realm.as_deref());
    let account = secrets::open(&asked.secrets, endpoint, realm).await?;
    let handle = Handle::of_name(
        account.name(),
        &parameters.container,
        &parameters.prefix,
        &asked.name,
    )
    .map_err(Status::invalid_argument)?;
    let _held = locks.take(&handle)?;
    let source = source(&account, asked.volume_content_source.as_ref()).await?;
    let size = capacity.choose(source.as_ref().map_or(0, |source| source.size))?;
    let mut blob = account.page_blob(&handle.container, &handle.blob);
    if let Some(tier) = &parameters.tier {
        blob = blob.in_tier(tier);
    }
    let source_id = source.as_ref().map_or("", |source| source.id.as_str());
    let metadata = vec![
        (CLAIM.to_owned(), metadata_text(&asked.name)),
        (SOURCE.to_owned(), metadata_text(source_id)),
    ];
    let size = with_container(&account, &handle.container, || {
        make(&blob, size, parameters.layout, &metadata, source.as_ref())
    })
    .await
    .map_err(|error| of_making(&error, parameters.tier.as_deref()))?;
    let size = size.ok_or_else(|| {
        Status::already_exists(format!(
            "{handle}: there is another blob of this name: choose another name, \
             or parameters container or blobPrefix"
        ))
    })?;
    if !capacity.holds(size) {
        return Err(Status::already_exists(format!(
            "{handle}: there is one of this name already, with {size} bytes"
        )));
    }
    let mut context = parameters.context;
    context.insert("container".into(), handle.container.clone());
    context.insert("blob".into(), handle.blob.clone());
    Ok(Volume {
        capacity_bytes: bytes(size),
        volume_id: handle.to_string(),
        volume_context: context,
        content_source: asked.volume_content_source,
        accessible_topology: Vec::new(),
    })
}

/// An error of making a blob in `tier`: which code the service has for an
/// account without tiers, or for a disk too large for its tier, is not told in
/// its reference.
fn of_making(error: &OpenError, tier: Option<&str>) -> Status {
    match (error, tier) {
        (OpenError::Storage(refused), Some(tier))
            if matches!(refused.status(), Some(400 | 409))
                && refused.advice() == Advice::GiveUp =>
        {
            Status::invalid_argument(format!(
                "parameter tier {tier}: {refused}: only premium page blob accounts have tiers, \
                 each for disks up to its size: choose another, or leave it out"
            ))
        }
        // Nobody has a volume that is being made: it is a lease of an earlier call
        // for it, which was cut off, and goes or ends by itself.
        (OpenError::Leased { .. }, _) => Status::unavailable(error.to_string()),
        (OpenError::Storage(leased), _) if leased.is_lease_lost() => Status::unavailable(format!(
            "{leased}: an earlier call for it was cut off: try again"
        )),
        _ => failure::of_volume(error),
    }
}

/// Makes the blob, or finds or completes what an earlier call made: the
/// disk's size; `None` when the blob is somebody else's.
async fn make(
    blob: &PageBlob,
    size: u64,
    layout: Layout,
    metadata: &[(String, String)],
    source: Option<&Source>,
) -> Result<Option<u64>, OpenError> {
    if let Some(there) = find(blob, metadata).await? {
        if !there {
            return Ok(None);
        }
    } else if source.is_none() {
        let made = volume::create_with(blob, size, layout, metadata, ATTEMPT_DEADLINE).await;
        if let Err(error) = made {
            // Made by a call that ran beside this one, in another process?
            match find(blob, metadata).await? {
                None => return Err(error),
                Some(false) => return Ok(None),
                Some(true) => {}
            }
        }
    }
    if let Some(source) = source {
        let plan = CopyPlan {
            mark: source.id.clone(),
            disk_size: Some(size),
            metadata: metadata.to_vec(),
        };
        return match volume::copy(&source.blob, blob, &plan, |_, _| {}, ATTEMPT_DEADLINE).await? {
            volume::Copied::Now(size) | volume::Copied::Before(size) => Ok(Some(size)),
        };
    }
    let disk = volume::inspect(blob, ATTEMPT_DEADLINE).await?;
    if disk.size == 0 {
        // Its maker died before the footer was written.
        return volume::grow(blob, size, ATTEMPT_DEADLINE).await.map(Some);
    }
    Ok(Some(disk.size))
}

/// Whether a blob is there, and if so, whether it was made for this.
async fn find(blob: &PageBlob, metadata: &[(String, String)]) -> Result<Option<bool>, OpenError> {
    match blob
        .properties(&Conditions::default(), ATTEMPT_DEADLINE)
        .await
    {
        Ok(seen) => Ok(Some(
            metadata.iter().all(|entry| seen.metadata.contains(entry)),
        )),
        Err(error) if error.code() == "ContainerNotFound" => Err(error.into()),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// DeleteVolume.
pub async fn delete(locks: &Locks, asked: DeleteVolumeRequest) -> Result<(), Status> {
    failure::given(&asked.volume_id, "volume id")?;
    // A handle that is none names a volume that is not there.
    let Some(handle) = Handle::parse(&asked.volume_id) else {
        return Ok(());
    };
    let _held = locks.take(&handle)?;
    let account = secrets::open(&asked.secrets, None, None).await?;
    secrets::are_of(&handle.account, account.name(), &handle)?;
    let blob = account.page_blob(&handle.container, &handle.blob);
    match delete_alone(&blob).await {
        Ok(()) => {}
        Err(OpenError::Storage(error)) if error.is_not_found() => {}
        Err(OpenError::Storage(error)) if has_snapshots(&error) => {
            return Err(Status::failed_precondition(format!(
                "{handle}: it has snapshots, which would be lost with it: delete them first"
            )));
        }
        Err(error) => return Err(failure::of_volume(&error)),
    }
    let forgotten = volume::forget_wish(&blob, ATTEMPT_DEADLINE).await;
    forgotten.map_err(|error| failure::of_storage(&error))
}

fn has_snapshots(error: &StorageError) -> bool {
    error.code() == "SnapshotsPresent"
}

/// Deletes a blob that has no snapshots but what copies of it have left.
async fn delete_alone(blob: &PageBlob) -> Result<(), OpenError> {
    let refuse = DeleteSnapshots::Refuse;
    match volume::delete(blob, refuse, ATTEMPT_DEADLINE).await {
        Err(OpenError::Storage(error)) if has_snapshots(&error) => {}
        other => return other,
    }
    volume::forget_left_snapshots(blob, ATTEMPT_DEADLINE).await?;
    volume::delete(blob, refuse, ATTEMPT_DEADLINE).await
}

/// ControllerExpandVolume: grows a volume that nobody has attached; of one
/// that is attached, the node that holds its lease does all of it.
pub async fn expand(
    locks: &Locks,
    asked: ControllerExpandVolumeRequest,
) -> Result<ControllerExpandVolumeResponse, Status> {
    failure::given(&asked.volume_id, "volume id")?;
    if asked.capacity_range.is_none() {
        return Err(Status::invalid_argument("capacity range is missing"));
    }
    let capacity = Capacity::parse(asked.capacity_range.as_ref())?;
    let handle = Handle::named(&asked.volume_id)?;
    let _held = locks.take(&handle)?;
    let account = secrets::open(&asked.secrets, None, None).await?;
    let disk = look(&account, &handle).await?;
    let size = if capacity.holds(disk.size) {
        disk.size
    } else {
        capacity.choose(disk.size)?
    };
    let blob = account.page_blob(&handle.container, &handle.blob);
    let size = match volume::grow(&blob, size, ATTEMPT_DEADLINE).await {
        Ok(grown) => grown,
        Err(OpenError::Leased { .. }) => size,
        Err(error) => return Err(failure::of_volume(&error)),
    };
    Ok(ControllerExpandVolumeResponse {
        capacity_bytes: bytes(size),
        // The filesystem has to grow in any case, and only a node can do it.
        node_expansion_required: true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(required: i64, limit: i64, at_least: u64) -> Result<u64, tonic::Code> {
        let range = CapacityRange {
            required_bytes: required,
            limit_bytes: limit,
        };
        Capacity::parse(Some(&range))
            .and_then(|capacity| capacity.choose(at_least))
            .map_err(|status| status.code())
    }

    #[test]
    fn sizes_are_whole_mebibytes_within_the_limits() {
        use tonic::Code::{InvalidArgument, OutOfRange};
        let gib = 1 << 30;
        assert_eq!(choose(0, 0, 0), Ok(gib));
        assert_eq!(choose(0, 10 << 20, 0), Ok(10 << 20));
        assert_eq!(choose(1, 0, 0), Ok(MIB));
        assert_eq!(choose((1 << 20) + 1, 0, 0), Ok(2 * MIB));
        assert_eq!(choose(1, 0, gib), Ok(gib));
        assert_eq!(choose(1, 1, 0), Err(OutOfRange));
        assert_eq!(choose(bytes(LARGEST), 0, 0), Ok(LARGEST));
        assert_eq!(choose(bytes(LARGEST) + 1, 0, 0), Err(OutOfRange));
        assert_eq!(choose(i64::MAX, 0, 0), Err(OutOfRange));
        assert_eq!(choose(2, 1, 0), Err(InvalidArgument));
        assert_eq!(choose(-1, 0, 0), Err(InvalidArgument));
    }
}
