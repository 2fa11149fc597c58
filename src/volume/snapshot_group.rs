//! Snapshots of several disks that are all of one moment, taken without their
//! holders' help.
//!
//! The store has no request for that. But every write changes its blob's ETag,
//! and a snapshot can be bound to one (`If-Match`). So first the ETags of all
//! blobs are read, and when the last one is known, the snapshots are taken, each
//! bound to its own: when all of them are, no blob was written between its
//! reading and its snapshot, so at the moment in between all blobs held what
//! their snapshots hold. One that was written meanwhile ends the round; what it
//! took is deleted, and the next begins. A disk that is written without a pause
//! cannot be in a group.
//!
//! | snapshots of a group and a round | what it is |
//! |---|---|
//! | as many disks as there are in the group | the group: finished, whoever looks and however late the last of its requests came |
//! | fewer | left by a round that did not succeed: to be deleted |
//!
//! Group, number of disks and round are in each snapshot's metadata
//! (`dyskgroup`).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use tokio::time::Instant;
use uuid::Uuid;

use super::OpenError;
use super::open::unusable;
use super::patience::patiently;
use super::snapshot::{self, delete_snapshot, list_with_snapshots};
use crate::blob::retry::Backoff;
use crate::blob::{
    Account, Advice, Conditions, Effect, ListedBlob, PageBlob, Properties, StorageError,
};

/// Group, number of disks and round of a snapshot, among its metadata.
pub(super) const KEY: &str = "dyskgroup";
const PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Why there is no group.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// One disk, or the store.
    #[error("{0}")]
    Disk(#[from] OpenError),
    /// The disks were written to in every round.
    #[error(
        "{}: written to without a pause for {patience:?}, so there is no moment to take all at: \
         stop the writers, or freeze their filesystems, and try again",
        disks.join(" and ")
    )]
    Written {
        /// `account/container/blob` of each.
        disks: Vec<String>,
        /// For how long a moment was looked for.
        patience: Duration,
    },
    /// There is a group of that name of other disks.
    #[error("there is a group of this name, of other disks: {}", .0.join(", "))]
    OtherDisks(Vec<String>),
}

impl From<StorageError> for GroupError {
    fn from(error: StorageError) -> Self {
        Self::Disk(error.into())
    }
}

/// Which group a snapshot is of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Membership {
    /// The group: letters and digits.
    pub group: String,
    disks: usize,
    round: String,
}

impl Membership {
    /// That in a snapshot's `metadata`.
    #[must_use]
    pub fn of(metadata: &[(String, String)]) -> Option<Self> {
        let (_, value) = metadata.iter().find(|(name, _)| name == KEY)?;
        let mut fields = value.split('-');
        let found = Self {
            group: fields.next()?.to_owned(),
            disks: fields.next()?.parse().ok()?,
            round: fields.next()?.to_owned(),
        };
        fields.next().is_none().then_some(found)
    }

    fn text(&self) -> String {
        format!("{}-{}-{}", self.group, self.disks, self.round)
    }
}

/// A snapshot of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The disk's blob.
    pub blob: String,
    /// The store's time stamp.
    pub time: String,
    /// Bytes in the blob at that time, footer included.
    pub blob_size: u64,
}

/// The snapshots of `group` in one container, finished or left behind.
#[derive(Clone, Debug, Default)]
pub struct GroupSnapshots(BTreeMap<Membership, Vec<Member>>);

impl GroupSnapshots {
    /// Sorts out those of `group`.
    fn of(group: &str, listed: impl IntoIterator<Item = ListedBlob>) -> Self {
        let mut all = Self::default();
        for listed in listed {
            let Some(member) = Membership::of(&listed.metadata).filter(|m| m.group == group) else {
                continue;
            };
            let Some(time) = listed.snapshot else {
                // A copy of a member has its metadata, and is none.
                continue;
            };
            all.0.entry(member).or_default().push(Member {
                blob: listed.name,
                time,
                blob_size: listed.size,
            });
        }
        all
    }

    /// The finished group: a snapshot of each disk, by the disks' names.
    #[must_use]
    pub fn finished(&self) -> Option<Vec<Member>> {
        self.0.iter().find_map(|(membership, members)| {
            let mut first: BTreeMap<&str, &Member> = BTreeMap::new();
            for member in members {
                // A request that came late may have taken a second: as good.
                let there = first.entry(&member.blob).or_insert(member);
                if member.time < there.time {
                    *there = member;
                }
            }
            let all = first.len() == membership.disks;
            all.then(|| first.into_values().cloned().collect())
        })
    }

    /// Every one of them.
    pub fn all(&self) -> impl Iterator<Item = &Member> {
        self.0.values().flatten()
    }

    /// Deletes them all.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn delete(
        &self,
        account: &Account,
        container: &str,
        deadline: Duration,
    ) -> Result<(), OpenError> {
        let deletions = self.all().map(|member| {
            let blob = account.page_blob(container, &member.blob);
            async move { delete_snapshot(&blob, &member.time, deadline).await }
        });
        try_join_all(deletions).await.map(drop)
    }
}

/// Finds the snapshots of `group` in `container`.
///
/// # Errors
/// The store refuses.
pub async fn find_group(
    account: &Account,
    container: &str,
    group: &str,
    deadline: Duration,
) -> Result<GroupSnapshots, StorageError> {
    match list_with_snapshots(account, container, "", deadline).await {
        Err(error) if error.is_not_found() => Ok(GroupSnapshots::default()),
        listed => Ok(GroupSnapshots::of(group, listed?)),
    }
}

/// How a round ended; what it took, a look tells.
enum Round {
    /// All snapshots were taken.
    Taken,
    /// Some may have been taken.
    Unknown(StorageError),
    /// These were written to meanwhile.
    Written(Vec<String>),
    /// The store did not do it.
    Failed(StorageError),
}

/// Takes snapshots of all `disks`, blobs in `container`, at one moment, or
/// finds those that an earlier call for this `group` took. `name` becomes the
/// name of each, as of any snapshot. Rounds are begun for `patience`.
///
/// # Errors
/// See [`GroupError`]; what was taken is deleted then, as far as the store
/// lets it.
pub async fn create_group(
    account: &Account,
    container: &str,
    disks: &BTreeSet<String>,
    (group, name): (&str, &str),
    patience: Duration,
    deadline: Duration,
) -> Result<Vec<Member>, GroupError> {
    let blob = |disk: &String| account.page_blob(container, disk);
    let blobs: Vec<PageBlob> = disks.iter().map(blob).collect();
    let give_up = Instant::now() + patience;
    let mut backoff = Backoff::new(PAUSE, LONGEST_PAUSE);
    let mut failed = None;
    loop {
        let there = find_group(account, container, group, deadline).await?;
        if let Some(members) = there.finished() {
            let of: BTreeSet<_> = members.iter().map(|member| member.blob.clone()).collect();
            if of != *disks {
                return Err(GroupError::OtherDisks(of.into_iter().collect()));
            }
            return Ok(members);
        }
        there.delete(account, container, deadline).await?;
        let over = Instant::now() > give_up;
        if let Some(error) = failed.take().filter(|error| over || is_final(error)) {
            return Err(error);
        }
        failed = match round(&blobs, (group, name), deadline).await? {
            // The look will find them all, unless somebody deletes them.
            Round::Taken => {
                let reason = "another call deletes the group's snapshots: try again";
                Some(unusable(&blobs[0], reason.into()).into())
            }
            Round::Unknown(error) => Some(error.into()),
            Round::Written(disks) => {
                tokio::time::sleep(backoff.pause(None)).await;
                Some(GroupError::Written { disks, patience })
            }
            Round::Failed(error) => {
                tokio::time::sleep(backoff.pause(error.retry_after)).await;
                Some(error.into())
            }
        };
    }
}

/// Another round would end in the same way.
fn is_final(error: &GroupError) -> bool {
    matches!(error, GroupError::Disk(OpenError::Storage(error)) if error.advice() == Advice::GiveUp)
}

/// One round: all ETags, then all snapshots.
async fn round(
    blobs: &[PageBlob],
    (group, name): (&str, &str),
    deadline: Duration,
) -> Result<Round, GroupError> {
    let none = Conditions::default();
    let seen = blobs.iter().map(|blob| {
        let none = &none;
        async move { patiently!(blob.properties(none, deadline)) }
    });
    // The moment that the snapshots are of is when this is done.
    let seen: Vec<Properties> = try_join_all(seen).await?;
    for (blob, seen) in blobs.iter().zip(&seen) {
        if let Some(reason) = super::copy::incomplete(seen) {
            return Err(unusable(blob, reason).into());
        }
    }
    let membership = Membership {
        group: group.to_owned(),
        disks: blobs.len(),
        round: Uuid::new_v4().simple().to_string(),
    };
    let taking = blobs.iter().zip(seen).map(|(blob, seen)| {
        let mut metadata = snapshot::named(seen.metadata, name);
        metadata.push((KEY.to_owned(), membership.text()));
        let conditions = Conditions {
            if_match: Some(seen.etag),
            ..Conditions::default()
        };
        // One attempt: what became of one without an answer a look tells.
        async move { blob.create_snapshot(&metadata, &conditions, deadline).await }
    });
    let answers = join_all(taking).await;
    let mut written = Vec::new();
    let (mut failed, mut unknown) = (None, None);
    for (blob, answer) in blobs.iter().zip(answers) {
        match answer {
            Ok(_) => {}
            Err(error) if error.code() == "ConditionNotMet" => {
                written.push(blob.address().to_string());
            }
            Err(error) if error.effect() == Effect::NotApplied => failed = Some(error),
            Err(error) => unknown = Some(error),
        }
    }
    Ok(match (failed, unknown) {
        (Some(error), _) => Round::Failed(error),
        (None, _) if !written.is_empty() => Round::Written(written),
        (None, Some(error)) => Round::Unknown(error),
        (None, None) => Round::Taken,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::{BlobType, ETag, LeaseState};

    fn listed(blob: &str, time: &str, mark: &str) -> ListedBlob {
        ListedBlob {
            name: blob.into(),
            snapshot: Some(time.into()),
            blob_type: BlobType::Page,
            size: 512,
            lease_state: LeaseState::Available,
            etag: ETag("\"1\"".into()),
            sequence_number: 0,
            metadata: vec![(KEY.into(), mark.into())],
        }
    }

    fn finished(of: &[(&str, &str, &str)]) -> Option<Vec<String>> {
        let listed = of.iter().map(|(blob, time, mark)| listed(blob, time, mark));
        let members = GroupSnapshots::of("g", listed).finished()?;
        let each = members.into_iter();
        Some(
            each.map(|member| member.blob + "@" + &member.time)
                .collect(),
        )
    }

    #[test]
    fn a_group_is_all_of_one_round() {
        // One of two; two of two rounds; two of the same disk.
        assert_eq!(finished(&[("a", "1", "g-2-x")]), None);
        assert_eq!(finished(&[("a", "1", "g-2-x"), ("b", "2", "g-2-y")]), None);
        assert_eq!(finished(&[("a", "1", "g-2-x"), ("a", "2", "g-2-x")]), None);
        // Other groups, and marks of nobody's.
        assert_eq!(finished(&[("a", "1", "g-2-x"), ("b", "2", "h-2-x")]), None);
        assert_eq!(finished(&[("a", "1", "g-1-x-y"), ("b", "2", "g")]), None);
        let all = finished(&[
            ("c", "0", "g-2-w"),
            ("b", "3", "g-2-x"),
            ("a", "2", "g-2-x"),
            ("a", "1", "g-2-x"),
        ]);
        assert_eq!(all, Some(vec!["a@1".into(), "b@3".into()]));
    }
}
