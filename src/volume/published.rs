//! To which nodes a cluster has published a volume, and which of them holds its
//! lease: for clusters whose controller says where a volume may be attached.
//!
//! Both are in the blob's metadata. The list ([`LIST`]) is the controller's: it
//! is changed only while nobody holds the lease, since a leased blob refuses
//! that without the lease's id, and every change hangs on the ETag that was
//! seen. The holder ([`HOLDER`]) is the node's: written under its lease, before
//! its device is there, with the lease's id.
//!
//! | list | lease | [`publish`] to N | [`unpublish`] from N |
//! |---|---|---|---|
//! | N, the same access | any | nothing to do | as below |
//! | N, another access | any | refused | as below |
//! | another node, and one of the two writes | any | refused | nothing to do |
//! | nobody, or readers beside a reader | free | N is added | the ETag is moved |
//! | nobody, or readers beside a reader | held | refused | nothing to do |
//! | N | held by N: the holder's id is the lease's | | that lease is released, then N taken out |
//! | N | held by somebody else | | refused until that lease ends |
//! | N | free | | N is taken out |
//!
//! Ending a dead node's lease releases it by its id rather than breaking it:
//! Release Lease hits the lease of that id or none, so one that comes late or
//! twice cannot end a lease that was taken since, and none that is not the
//! node's (`dyskctl` on another machine, a resize by the controller). The
//! node's I/O fails from there on: its writes carry the id of a lease that is
//! no more, and the next holder raises the sequence number.
//!
//! An unpublish that finds nothing to do moves the ETag all the same: a publish
//! that was given up and comes late would otherwise list a node for which
//! nobody will ever call unpublish again.

use std::time::Duration;

use percent_encoding::percent_decode_str;

use super::patience::{Patience, patiently};
use super::snapshot::metadata_text;
use super::{OpenError, Volume};
use crate::blob::{
    Advice, Conditions, Effect, LeaseId, LeaseState, PageBlob, Properties, StorageError,
};

/// The list: `NODE:rw` or `NODE:ro`, with commas between, names percent-encoded.
const LIST: &str = "dyskpublished";
/// The holder: `LEASE:NODE`.
const HOLDER: &str = "dyskholder";
/// The longest list: metadata has 8 KiB altogether.
const LONGEST: usize = 6 << 10;

/// What a node may do with a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it, without a lease.
    Read,
    /// Write to it, as the only node.
    Write,
}

/// A node that a volume is published to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// What the cluster calls it.
    pub node: String,
    /// What it may do.
    pub access: Access,
}

/// Why a volume is not published, or not unpublished. Nothing was changed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PublishError {
    /// The store refused, or the blob cannot be a disk.
    #[error("{0}")]
    Open(#[from] OpenError),
    /// The node has it with another access.
    #[error("{object}: published to {node} already, with another access: unpublish it first")]
    OtherAccess {
        /// `account/container/blob`.
        object: String,
        /// The node.
        node: String,
    },
    /// Other nodes have it, and one node alone may write.
    #[error("{object}: published to {nodes}: unpublish it there first")]
    Elsewhere {
        /// `account/container/blob`.
        object: String,
        /// Their names.
        nodes: String,
    },
    /// Somebody who was not published holds the lease.
    #[error(
        "{object}: leased by somebody else than a node it is published to: \
         detach it there, or wait until that lease ends"
    )]
    Leased {
        /// `account/container/blob`.
        object: String,
    },
    /// The list is full.
    #[error("{object}: published to as many nodes as its list holds: {nodes}")]
    Full {
        /// `account/container/blob`.
        object: String,
        /// How many.
        nodes: usize,
    },
    /// The node may not attach it.
    #[error(
        "{object}: not published to {node}: the cluster gave it to another node, or took it away"
    )]
    NotPublished {
        /// `account/container/blob`.
        object: String,
        /// The node.
        node: String,
    },
}

impl From<StorageError> for PublishError {
    fn from(error: StorageError) -> Self {
        Self::Open(error.into())
    }
}

/// The nodes in a blob's metadata.
#[must_use]
pub fn published(metadata: &[(String, String)]) -> Vec<Published> {
    let Some((_, list)) = metadata.iter().find(|(name, _)| name == LIST) else {
        return Vec::new();
    };
    let entries = list.split(',').filter_map(|entry| {
        let (node, access) = entry.rsplit_once(':')?;
        Some(Published {
            node: percent_decode_str(node).decode_utf8_lossy().into_owned(),
            // What is not understood is taken for the stronger of the two.
            access: if access == "ro" {
                Access::Read
            } else {
                Access::Write
            },
        })
    });
    entries.collect()
}

fn with(mut metadata: Vec<(String, String)>, list: &[Published]) -> Vec<(String, String)> {
    metadata.retain(|(name, _)| name != LIST);
    if !list.is_empty() {
        let entries = list.iter().map(|entry| {
            let access = match entry.access {
                Access::Read => "ro",
                Access::Write => "rw",
            };
            format!("{}:{access}", metadata_text(&entry.node))
        });
        let entries: Vec<_> = entries.collect();
        metadata.push((LIST.to_owned(), entries.join(",")));
    }
    metadata
}

/// The lease of `node`, as it was named by its holder.
fn lease_of(metadata: &[(String, String)], node: &str) -> Option<LeaseId> {
    let (_, holder) = metadata.iter().find(|(name, _)| name == HOLDER)?;
    let (lease, named) = holder.split_once(':')?;
    (named == metadata_text(node)).then(|| LeaseId::from_text(lease))
}

fn is_leased(seen: &Properties) -> bool {
    matches!(seen.lease_state, LeaseState::Leased | LeaseState::Breaking)
}

/// What one attempt at changing metadata came to.
enum Set {
    Done,
    /// Somebody has the lease.
    Leased,
    /// Look again: it was changed since, or perhaps done.
    Again,
}

/// One Set Blob Metadata, bound to what was `seen`.
async fn set(
    blob: &PageBlob,
    metadata: &[(String, String)],
    (seen, lease): (&Properties, Option<&LeaseId>),
    patience: &mut Patience,
    deadline: Duration,
) -> Result<Set, StorageError> {
    let conditions = Conditions {
        lease: lease.cloned(),
        if_match: Some(seen.etag.clone()),
        ..Conditions::default()
    };
    let Err(error) = blob.set_metadata(metadata, &conditions, deadline).await else {
        return Ok(Set::Done);
    };
    if lease.is_none() && error.is_lease_lost() {
        return Ok(Set::Leased);
    }
    let changed = error.code() == "ConditionNotMet";
    if changed || error.effect() != Effect::NotApplied || error.advice() != Advice::GiveUp {
        patience.after_change(error, changed).await?;
        return Ok(Set::Again);
    }
    Err(error)
}

/// Publishes the volume to `node`. Needs no lease, takes none.
///
/// # Errors
/// [`PublishError`]; a call that is repeated finds what it did.
pub async fn publish(
    blob: &PageBlob,
    node: &str,
    access: Access,
    deadline: Duration,
) -> Result<(), PublishError> {
    let object = || blob.address().to_string();
    let none = Conditions::default();
    let mut patience = Patience::begin();
    loop {
        let seen = patiently!(blob.properties(&none, deadline))?;
        let mut list = published(&seen.metadata);
        if let Some(entry) = list.iter().find(|entry| entry.node == node) {
            if entry.access == access {
                return Ok(());
            }
            return Err(PublishError::OtherAccess {
                object: object(),
                node: node.to_owned(),
            });
        }
        let one_writes = access == Access::Write || list.iter().any(|e| e.access == Access::Write);
        if one_writes && !list.is_empty() {
            let nodes: Vec<_> = list.iter().map(|entry| entry.node.as_str()).collect();
            return Err(PublishError::Elsewhere {
                object: object(),
                nodes: nodes.join(", "),
            });
        }
        if is_leased(&seen) {
            return Err(PublishError::Leased { object: object() });
        }
        list.push(Published {
            node: node.to_owned(),
            access,
        });
        let metadata = with(seen.metadata.clone(), &list);
        if metadata
            .last()
            .is_some_and(|(_, text)| text.len() > LONGEST)
        {
            return Err(PublishError::Full {
                object: object(),
                nodes: list.len() - 1,
            });
        }
        match set(blob, &metadata, (&seen, None), &mut patience, deadline).await? {
            Set::Done => return Ok(()),
            Set::Leased => return Err(PublishError::Leased { object: object() }),
            Set::Again => {}
        }
    }
}

/// Takes the volume from `node`, from all nodes when `None`, and ends the lease
/// that such a node holds. What is not there is fine.
///
/// # Errors
/// [`PublishError::Leased`]: the node is in the list and somebody else holds
/// the lease; or the store refuses.
pub async fn unpublish(
    blob: &PageBlob,
    node: Option<&str>,
    deadline: Duration,
) -> Result<(), PublishError> {
    let none = Conditions::default();
    let mut patience = Patience::begin();
    loop {
        let seen = match patiently!(blob.properties(&none, deadline)) {
            Err(error) if error.is_not_found() => return Ok(()),
            other => other?,
        };
        let meant = |entry: &Published| node.is_none_or(|node| node == entry.node);
        let (gone, left): (Vec<_>, Vec<_>) = published(&seen.metadata).into_iter().partition(meant);
        if gone.is_empty() && is_leased(&seen) {
            return Ok(());
        }
        let lease = gone.iter().find_map(|e| lease_of(&seen.metadata, &e.node));
        let lease = lease.filter(|_| seen.lease_state != LeaseState::Available);
        if let Some(lease) = lease {
            match patiently!(blob.release_lease(&lease, deadline)) {
                Ok(()) => tracing::warn!(volume = %blob.address(), "a node's lease was ended"),
                // It is not the node's, or not any more.
                Err(error) if error.is_lease_lost() => {}
                Err(error) => return Err(error.into()),
            }
        }
        let metadata = with(seen.metadata.clone(), &left);
        match set(blob, &metadata, (&seen, None), &mut patience, deadline).await? {
            Set::Done => return Ok(()),
            Set::Leased => {
                return Err(PublishError::Leased {
                    object: blob.address().to_string(),
                });
            }
            Set::Again => {}
        }
    }
}

/// Refuses a node that is not in the list.
fn is_listed(
    blob: &PageBlob,
    seen: &Properties,
    node: &str,
    needs: Access,
) -> Result<(), PublishError> {
    let list = published(&seen.metadata);
    let mut of_node = list.iter().filter(|entry| entry.node == node);
    if of_node.any(|entry| entry.access == needs || entry.access == Access::Write) {
        return Ok(());
    }
    Err(PublishError::NotPublished {
        object: blob.address().to_string(),
        node: node.to_owned(),
    })
}

/// Sees that the volume is published to `node`, before its lease is waited for.
/// Only [`Volume::name_holder`] sees it for good.
///
/// # Errors
/// [`PublishError::NotPublished`], or the store refuses.
pub async fn expect_published(
    blob: &PageBlob,
    node: &str,
    needs: Access,
    deadline: Duration,
) -> Result<(), PublishError> {
    let none = Conditions::default();
    let seen = patiently!(blob.properties(&none, deadline))?;
    is_listed(blob, &seen, node, needs)
}

impl Volume {
    /// Sees that the volume is published to `node`, and names it as the
    /// holder of the lease. To be called before the disk is used.
    ///
    /// # Errors
    /// [`PublishError::NotPublished`], or the store refuses.
    pub async fn name_holder(&self, node: &str) -> Result<(), PublishError> {
        let (blob, deadline) = (&self.io.blob, self.io.attempt_deadline);
        let needs = match self.io.lease {
            Some(_) => Access::Write,
            None => Access::Read,
        };
        let none = Conditions::default();
        let mut patience = Patience::begin();
        loop {
            let seen = patiently!(blob.properties(&none, deadline))?;
            is_listed(blob, &seen, node, needs)?;
            let Some(lease) = &self.io.lease else {
                return Ok(());
            };
            let entry = (
                HOLDER.to_owned(),
                format!("{}:{}", lease.as_str(), metadata_text(node)),
            );
            if seen.metadata.contains(&entry) {
                return Ok(());
            }
            let mut metadata = seen.metadata.clone();
            metadata.retain(|(name, _)| name != HOLDER);
            metadata.push(entry);
            let by = (&seen, Some(lease));
            if let Set::Done = set(blob, &metadata, by, &mut patience, deadline).await? {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_survives_its_metadata() {
        let list = vec![
            Published {
                node: "a,b:c é".into(),
                access: Access::Read,
            },
            Published {
                node: "node-1:0123456789ab".into(),
                access: Access::Write,
            },
        ];
        let other = ("dyskclaim".to_owned(), "x".to_owned());
        let metadata = with(vec![other.clone()], &list);
        assert_eq!(published(&metadata), list);
        assert_eq!(with(metadata, &[]), vec![other]);
        assert_eq!(published(&[]), Vec::new());
    }

    #[test]
    fn a_lease_is_that_of_the_node_it_names() {
        let metadata = [(HOLDER.to_owned(), format!("id-1:{}", metadata_text("n:1")))];
        let lease = lease_of(&metadata, "n:1").expect("its own");
        assert_eq!(lease.as_str(), "id-1");
        assert_eq!(lease_of(&metadata, "n:2"), None);
        assert_eq!(lease_of(&[], "n:1"), None);
    }
}
