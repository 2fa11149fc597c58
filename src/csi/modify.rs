//! ControllerModifyVolume: the caching mode and the limits of a volume that is
//! there. Its node alone can change it while it is attached, and no call goes
//! from here to there: the wish lies in a blob beside the volume's
//! (`volume::Settings`), where the node's daemon looks for it.

use std::time::Duration;

use tokio::time::Instant;
use tonic::Status;

use super::handle::Handle;
use super::locks::Locks;
use super::v1::ControllerModifyVolumeRequest;
use super::volumes::look;
use super::{failure, parameters, secrets};
use crate::blob::LeaseState;
use crate::node::account::ATTEMPT_DEADLINE;
use crate::volume;

/// For how long to wait for the node that has the volume attached: some of its
/// looks, well below the sidecar's own patience.
const WAIT: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(250);

/// ControllerModifyVolume. Its success says that the node that has the volume
/// attached has taken the limits up, or that none has it attached, so that they
/// hold from the next attach on.
pub async fn modify(locks: &Locks, asked: ControllerModifyVolumeRequest) -> Result<(), Status> {
    failure::given(&asked.volume_id, "volume id")?;
    let handle = Handle::named(&asked.volume_id)?;
    let settings = parameters::settings(&asked.mutable_parameters)?;
    let _held = locks.take(&handle)?;
    let account = secrets::open(&asked.secrets, None, None).await?;
    let mut disk = look(&account, &handle).await?;
    if settings.is_none() {
        return Ok(());
    }
    let blob = account.page_blob(&handle.container, &handle.blob);
    let left = volume::leave_wish(&blob, settings, ATTEMPT_DEADLINE).await;
    let mut wish = Some(left.map_err(|error| failure::of_storage(&error))?);
    let give_up = Instant::now() + WAIT;
    loop {
        if let Some(taken) = wish.as_ref().and_then(|wish| wish.taken_up.as_ref()) {
            tracing::info!(volume = %handle, at = %taken.at, %settings, "modified");
            return Ok(());
        }
        let lease = disk.properties.lease_state;
        if !matches!(lease, LeaseState::Leased | LeaseState::Breaking) {
            tracing::info!(volume = %handle, %settings, "modified from the next attach on");
            return Ok(());
        }
        if Instant::now() > give_up {
            return Err(Status::unavailable(format!(
                "{handle}: {settings} is left for the node that has it attached, \
                 and not taken up yet: try again; a disk that was attached by dyskctl \
                 has to be detached first"
            )));
        }
        tokio::time::sleep(PAUSE).await;
        let seen = volume::wish(&blob, ATTEMPT_DEADLINE).await;
        wish = seen.map_err(|error| failure::of_storage(&error))?;
        disk = look(&account, &handle).await?;
    }
}
