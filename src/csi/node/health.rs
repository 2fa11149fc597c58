//! NodeGetVolumeHealth and NodeGetStorageHealth: what is wrong with a volume on
//! this node, and with the stores that its volumes are in. All of it is the
//! daemon's word; of a volume that could not be staged, why, as far as this
//! process was asked to stage it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

use tonic::{Code, Status};

use super::{Node, attach};
use crate::csi::failure;
use crate::csi::health::entry;
use crate::csi::v1::node_get_storage_health_response::StorageBackendHealth;
use crate::csi::v1::volume_health::VolumeHealthEntry;
use crate::csi::v1::*;
use crate::node::api::{Attachment, State};

/// Refused volumes that are remembered.
const MOST_REFUSED: usize = 512;

/// Why a volume was not staged.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Why {
    message: String,
    /// The store refused the call's Secret, which may not be the one that the
    /// volume is served with.
    of_secret: bool,
}

/// Volumes whose staging was refused for a reason that another attempt does
/// not mend, by handle, and why.
#[derive(Debug, Default)]
pub struct Refused(Mutex<HashMap<String, Why>>);

impl Refused {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Why>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes how staging `volume_id` ended.
    pub fn staged(&self, volume_id: &str, answer: &Result<(), Status>) {
        let status = match answer {
            Ok(()) => return self.forget(volume_id),
            Err(status) => status,
        };
        let of_secret = match status.code() {
            Code::FailedPrecondition | Code::Internal => false,
            Code::PermissionDenied | Code::Unauthenticated => true,
            // The others say that the call was wrong or came at a wrong time,
            // and of the volume nothing.
            _ => return,
        };
        let mut all = self.lock();
        if all.len() >= MOST_REFUSED && !all.contains_key(volume_id) {
            let other = all.keys().next().cloned();
            other.and_then(|other| all.remove(&other));
        }
        let message = status.message().to_owned();
        all.insert(volume_id.to_owned(), Why { message, of_secret });
    }

    /// The volume is staged, or nobody wants it here any more.
    pub fn forget(&self, volume_id: &str) {
        self.lock().remove(volume_id);
    }

    fn why(&self, volume_id: &str) -> Option<Why> {
        self.lock().get(volume_id).cloned()
    }
}

/// What is wrong with an attachment, worst first.
fn of_attachment(attachment: &Attachment) -> Vec<VolumeHealthEntry> {
    use VolumeHealthErrorType::{Degraded, Inaccessible};
    let mut wrong = Vec::new();
    let name = &attachment.name;
    let reason = attachment.reason.as_deref().unwrap_or("no reason given");
    let state = match attachment.state {
        State::Failed => Some((Inaccessible, "AttachmentFailed")),
        State::Stale => Some((Inaccessible, "AttachmentStale")),
        // Its I/O waits, and goes on when the daemon has it.
        State::Recovering => Some((Degraded, "Recovering")),
        State::Attaching | State::Attached | State::Detaching => None,
    };
    if let Some((status, word)) = state {
        let message = format!("{name}: {}: {reason}", attachment.state);
        wrong.push(entry(status, word, message));
    }
    if let Some(why) = &attachment.fenced {
        let message = format!("{name}: fenced: {why}");
        wrong.push(entry(Inaccessible, "Fenced", message));
    }
    if let Some(why) = &attachment.blocked {
        let message = format!("{name}: {why}");
        wrong.push(entry(Inaccessible, "StoreRefusesAccess", message));
    }
    if let Some(throttled) = &attachment.throttled {
        let message = format!("{name}: {throttled}");
        wrong.push(entry(Degraded, "Throttled", message));
    }
    if !attachment.kept_aside.is_empty() {
        let message = format!(
            "{name}: unflushed writes of an earlier attach are kept on this node: \
             dyskctl says which, and drops them or puts them back"
        );
        wrong.push(entry(Degraded, "UnflushedWritesKept", message));
    }
    wrong
}

/// NodeGetVolumeHealth.
pub async fn of_volume(
    node: &Node,
    asked: NodeGetVolumeHealthRequest,
) -> Result<NodeGetVolumeHealthResponse, Status> {
    let volume_id = asked.volume_id;
    failure::given(&volume_id, "volume id")?;
    let name = attach::name_of(&volume_id)?;
    let attachment = attach::look(node, &name).await?;
    let refused = node.refused.why(&volume_id);
    if attachment.is_none() && refused.is_none() {
        return Err(Status::not_found(format!("{volume_id}: not on this node")));
    }
    // What is attached says for itself whether the store lets it in.
    let refused = refused.filter(|why| attachment.is_none() || !why.of_secret);
    let mut health_statuses = attachment.as_ref().map(of_attachment).unwrap_or_default();
    health_statuses.extend(refused.map(|why| {
        let inaccessible = VolumeHealthErrorType::Inaccessible;
        entry(inaccessible, "StagingRefused", why.message)
    }));
    Ok(NodeGetVolumeHealthResponse {
        volume_health: Some(VolumeHealth {
            volume_id,
            health_statuses,
        }),
    })
}

/// What is wrong with the stores that the attachments are in: one answer for
/// each kind of trouble, which names the accounts.
fn of_stores(attachments: &[Attachment]) -> Vec<StorageBackendHealth> {
    use StorageHealthErrorType::{StorageDegraded, StorageUnreachable};
    let mut accounts: BTreeMap<_, BTreeMap<&str, String>> = BTreeMap::new();
    for attachment in attachments {
        let account = attachment.account.as_str();
        if let Some(why) = &attachment.blocked {
            let trouble = (StorageUnreachable as i32, "StoreRefusesAccess");
            accounts
                .entry(trouble)
                .or_default()
                .insert(account, why.clone());
        }
        // A disk at its own limit says nothing about the account's others.
        if let Some(throttled) = attachment.throttled.as_ref().filter(|t| t.account) {
            let trouble = (StorageDegraded as i32, "AccountThrottled");
            accounts
                .entry(trouble)
                .or_default()
                .insert(account, throttled.to_string());
        }
    }
    let told = accounts.into_iter().map(|((status, reason), accounts)| {
        let accounts = accounts.into_iter();
        let each: Vec<_> = accounts
            .map(|(account, why)| format!("account {account}: {why}"))
            .collect();
        StorageBackendHealth {
            status,
            reason: reason.into(),
            message: each.join("; "),
            volume_capability: None,
        }
    });
    told.collect()
}

/// NodeGetStorageHealth. A daemon that does not answer is a store that nothing
/// on this node reaches.
pub async fn of_storage(node: &Node) -> NodeGetStorageHealthResponse {
    let backend_health = match node.daemon.list().await {
        Ok(attachments) => of_stores(&attachments),
        Err(error) => vec![StorageBackendHealth {
            status: StorageHealthErrorType::StorageUnreachable.into(),
            reason: "DaemonSilent".into(),
            message: error.to_string(),
            volume_capability: None,
        }],
    };
    NodeGetStorageHealthResponse { backend_health }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment(change: impl Fn(&mut serde_json::Value)) -> Attachment {
        let mut json = serde_json::json!({
            "id": "i", "name": "v", "state": "attached", "account": "acct",
            "endpoint": "https://acct.example", "container": "dysks", "blob": "v.vhd",
            "readOnly": false, "caching": "none", "connections": 2,
            "since": "2026-11-21T05:00:00Z", "completed": 0, "storeRequests": 0, "inFlight": 0,
        });
        change(&mut json);
        serde_json::from_value(json).expect("an attachment")
    }

    fn reasons(attachment: &Attachment) -> Vec<String> {
        let all = of_attachment(attachment).into_iter();
        all.map(|entry| entry.reason).collect()
    }

    #[test]
    fn what_is_wrong_is_told_and_nothing_else() {
        let throttled =
            serde_json::json!({"since": "2026-11-21T05:00:00Z", "account": true, "waiting": 3});
        assert!(reasons(&attachment(|_| {})).is_empty());
        assert!(reasons(&attachment(|a| a["state"] = "detaching".into())).is_empty());
        for (field, value, reason) in [
            ("state", "failed".into(), "AttachmentFailed"),
            ("state", "stale".into(), "AttachmentStale"),
            ("state", "recovering".into(), "Recovering"),
            ("fenced", "taken".into(), "Fenced"),
            ("blocked", "403".into(), "StoreRefusesAccess"),
            ("throttled", throttled.clone(), "Throttled"),
        ] {
            let one = attachment(|a| a[field] = value.clone());
            assert_eq!(reasons(&one), [reason]);
        }
        let two = attachment(|a| {
            a["fenced"] = "taken".into();
            a["throttled"] = throttled.clone();
        });
        assert_eq!(reasons(&two), ["Fenced", "Throttled"]);

        let blocked = attachment(|a| a["blocked"] = "403".into());
        let other = attachment(|a| {
            a["blocked"] = "403".into();
            a["account"] = "other".into();
        });
        let told = of_stores(&[blocked.clone(), other, blocked, two]);
        let told: Vec<_> = told
            .iter()
            .map(|told| (told.status, told.reason.as_str(), told.message.as_str()))
            .collect();
        assert_eq!(told.len(), 2, "{told:?}");
        assert_eq!(told[0].1, "AccountThrottled");
        assert_eq!(
            told[1],
            (
                2,
                "StoreRefusesAccess",
                "account acct: 403; account other: 403"
            )
        );
    }

    #[test]
    fn a_refusal_is_remembered_until_it_is_mended() {
        let refused = Refused::default();
        let no = |code: Code| Err(Status::new(code, "why"));
        refused.staged("v", &no(Code::Unavailable));
        refused.staged("v", &no(Code::Aborted));
        assert_eq!(refused.why("v"), None);
        refused.staged("v", &no(Code::FailedPrecondition));
        refused.staged("v", &no(Code::Unavailable));
        let why = refused.why("v").expect("noted");
        assert_eq!((why.message.as_str(), why.of_secret), ("why", false));
        refused.staged("v", &no(Code::Unauthenticated));
        assert!(refused.why("v").is_some_and(|why| why.of_secret));
        refused.staged("v", &Ok(()));
        assert_eq!(refused.why("v"), None);
        for n in 0..2 * MOST_REFUSED {
            refused.staged(&n.to_string(), &no(Code::Internal));
        }
        assert_eq!(refused.lock().len(), MOST_REFUSED);
    }
}
