//! A snapshot of a disk that is open: with everything that was acknowledged
//! before the call, and with no write of this volume in the middle of it.
//!
//! The cache is flushed, then writes are held for the one request. It carries
//! `If-Match`, so one that comes late, after writes went on, makes no snapshot
//! of another moment. Writes are held for [`super::grow_open::LONGEST_HOLD`] at
//! most: a store that does not answer costs a snapshot, not the disk.

use std::time::Duration;

use super::grow_open::ATTEMPT;
use super::open::unusable;
use super::patience::Patience;
use super::snapshot::{self, Snapshot, check_name, create_snapshot, find, list_snapshots};
use super::{OpenError, Volume};
use crate::blob::{Conditions, Effect, PageBlob};
use crate::device::BlockDevice;

/// How long the flush before a snapshot may take.
const LONGEST_FLUSH: Duration = Duration::from_secs(30);
/// Attempts that find the blob changed meanwhile, by the keeper's raises.
const MOST_CHANGES: u32 = 8;

impl Volume {
    /// Takes a snapshot called `name` of the disk as it is at some moment
    /// during the call, or finds the one that an earlier call of that name
    /// took. A volume open for reading only is taken as it lies in the store.
    ///
    /// # Errors
    /// It is fenced or closing; it cannot be flushed within 30 s; the store
    /// refuses, or does not answer within 10 s. The snapshot may be there then:
    /// a repeat finds it.
    pub async fn snapshot(&self, name: &str) -> Result<Snapshot, OpenError> {
        let blob = self.io.blob.isolated(1);
        check_name(&blob, name)?;
        let _alone = self.reshaping.lock().await;
        let inside = self.gate.enter();
        let _inside = inside.ok_or_else(|| unusable(&blob, "it is being detached".into()))?;
        self.check_not_fenced()?;
        if self.io.lease.is_none() {
            return create_snapshot(&blob, name, ATTEMPT).await;
        }
        if let Some(there) = find(list_snapshots(&blob, ATTEMPT).await?, name) {
            return Ok(there);
        }
        let flushed = tokio::time::timeout(LONGEST_FLUSH, self.flush()).await;
        match flushed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                let reason = format!("no snapshot: it cannot be flushed: {error}");
                return Err(unusable(&blob, reason));
            }
            Err(_) => {
                let reason = format!(
                    "no snapshot: it was not flushed within {LONGEST_FLUSH:?}: \
                     repeat it when the store answers"
                );
                return Err(unusable(&blob, reason));
            }
        }
        let taken = self
            .held("snapshot blob", self.take_held(&blob, name))
            .await;
        match taken {
            Err(OpenError::Storage(error)) if error.effect() != Effect::NotApplied => {
                // Its answer may be all that was lost.
                match list_snapshots(&blob, ATTEMPT).await {
                    Ok(listed) => find(listed, name).ok_or(OpenError::Storage(error)),
                    Err(_) => Err(OpenError::Storage(error)),
                }
            }
            taken => taken,
        }
    }

    /// The request. One whose outcome is unknown is not repeated.
    async fn take_held(&self, blob: &PageBlob, name: &str) -> Result<Snapshot, OpenError> {
        let none = Conditions::default();
        let mut patience = Patience::begin();
        let mut changes = 0;
        loop {
            let seen = match blob.properties(&none, ATTEMPT).await {
                Ok(seen) => seen,
                Err(error) => {
                    patience.after(error).await?;
                    continue;
                }
            };
            let conditions = Conditions {
                if_match: Some(seen.etag.clone()),
                ..Conditions::default()
            };
            let metadata = snapshot::named(seen.metadata, name);
            match blob.create_snapshot(&metadata, &conditions, ATTEMPT).await {
                Ok(time) => {
                    return Ok(Snapshot {
                        time,
                        name: Some(name.to_owned()),
                        blob_size: seen.size,
                        of_group: false,
                    });
                }
                Err(error) if error.code() == "ConditionNotMet" && changes < MOST_CHANGES => {
                    changes += 1;
                }
                Err(error) if error.effect() == Effect::NotApplied => {
                    patience.after(error).await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}
