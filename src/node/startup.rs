//! What an earlier daemon left behind: every readable record is taken up by a
//! task of its own, see [`super::recover`]; one that cannot be read is put
//! aside and logged, never guessed at.

use std::collections::HashMap;
use std::io;

use super::detach;
use super::recover::{self, Inherited};
use super::registry::Registry;

/// Takes stock of the records; what was `inherited`, by attachment id, goes on
/// at once. Their names are taken from here on; nothing
/// here waits for the kernel or the store.
///
/// # Errors
/// When the records cannot be read.
pub(super) async fn take_stock(
    registry: &Registry,
    mut inherited: HashMap<String, Inherited>,
) -> io::Result<()> {
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
        let inherited = inherited.remove(&record.id);
        recover::begin(registry, record, inherited);
    }
    Ok(())
}
