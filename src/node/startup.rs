//! What an earlier daemon left behind.
//!
//! | record | device | what happens |
//! |---|---|---|
//! | there | gone | the lease is released if it is still that one, then record and link go |
//! | there | lives | listed as stale; its I/O waits until it is detached |
//! | not readable | | put aside, logged |

use std::io;
use std::sync::Arc;

use tokio::sync::watch;

use super::detach;
use super::entry::{Detaching, Entry, Parts, Phase};
use super::record::Record;
use super::registry::Registry;
use crate::blob::LeaseId;

/// Takes stock of the records. Names of what is being tidied up are taken
/// until that is done; nothing here waits for the store.
///
/// # Errors
/// When the records cannot be read.
pub(super) async fn take_stock(registry: &Registry) -> io::Result<()> {
    let records = registry.0.records.clone();
    let (found, unreadable) = detach::blocking(move || records.load()).await?;
    for file in unreadable {
        tracing::error!(
            path = %file.path.display(),
            reason = %file.reason,
            "a record cannot be understood and was put aside; \
             look for its device in /sys/block/nbd*/backend"
        );
    }
    for record in found {
        take_up(registry, record).await;
    }
    Ok(())
}

async fn take_up(registry: &Registry, record: Record) {
    let name = record.request.name.clone();
    let volume = record.request.volume();
    let found = registry.0.transport.find(&record.id).await;
    let mut parts = Parts {
        lease: record.lease.map(LeaseId::from_text),
        device_path: record.device,
        ..Parts::default()
    };
    let entry = |phase| Entry {
        id: record.id.clone(),
        request: Arc::new(record.request.clone()),
        since: record.since,
        phase,
    };
    match found {
        Ok(None) => {
            tracing::info!(%name, %volume, "the device of an earlier dyskd is gone; tidying up");
            let parts = Arc::new(parts);
            let (sender, outcome) = watch::channel(None);
            let detaching = Detaching {
                parts: parts.clone(),
                force: watch::Sender::new(false),
                outcome,
            };
            let before = entry(Phase::Stale(parts, "its device is gone".into()));
            registry.adopt(entry(Phase::Detaching(detaching.clone())));
            tokio::spawn(detach::run(registry.clone(), before, detaching, sender));
        }
        Ok(Some(device)) => {
            let path = device.path().to_owned();
            let reason = format!(
                "{} is an earlier dyskd's and not served: its i/o waits until {name} is detached",
                path.display()
            );
            tracing::error!(%name, %volume, %reason, "stale device");
            parts.link = Some(registry.0.links.path(&name));
            parts.device_path = Some(path);
            parts.device = Some(device);
            registry.adopt(entry(Phase::Stale(Arc::new(parts), reason)));
        }
        Err(error) => {
            let reason = format!("cannot tell whether its device lives: {error}");
            tracing::error!(%name, %volume, %reason, "stale record");
            registry.adopt(entry(Phase::Stale(Arc::new(parts), reason)));
        }
    }
}
