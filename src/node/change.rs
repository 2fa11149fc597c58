//! Changes of what is attached that leave it attached: resizes and snapshots.
//! They and a hand-over or stop keep out of each other's way.

use std::sync::Arc;

use super::api::ErrorCode;
use super::entry::{Entry, Parts, Phase};
use super::error::NodeError;
use super::name::AttachmentName;
use super::registry::{Registry, stopping, unknown};

/// A resize or snapshot under way, until dropped.
pub(super) struct Change(Registry);

impl Drop for Change {
    fn drop(&mut self) {
        self.0.0.lock().changes -= 1;
        self.0.poke();
    }
}

impl Registry {
    /// Begins a change of what `name` is attached to, which has to end before
    /// the daemon hands over or stops.
    pub(super) fn begin_change(
        &self,
        name: &AttachmentName,
    ) -> Result<(Change, Entry, Arc<Parts>), NodeError> {
        let mut table = self.0.lock();
        if table.stopping || table.handing_over {
            return Err(stopping());
        }
        let entry = table.entries.get(name).cloned();
        let entry = entry.ok_or_else(|| unknown(name))?;
        let Phase::Attached(parts) = &entry.phase else {
            let state = entry.view().state;
            return Err(NodeError::new(
                ErrorCode::Busy,
                format!("{name} is {state}: try again when it is attached"),
            ));
        };
        let parts = parts.clone();
        table.changes += 1;
        Ok((Change(self.clone()), entry, parts))
    }
}
