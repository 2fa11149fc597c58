//! What a sparse volume need not ask of the store: reads of what holds no pages,
//! and zeroes written there ([`super::unwritten`] knows where that is).

use super::disk::usize_from;
use super::io::{Change, Io};
use super::store::PageStore;
use super::unwritten::is_zero;
use crate::blob::Range;
use crate::caller::unless_gone;
use crate::device::{DeviceError, ReadData};

/// Zeroes from here on are cleared rather than sent.
const CLEARED_ZEROES: u64 = 64 << 10;

impl<S: PageStore> Io<S> {
    /// Reads `range`, of which only what may hold pages is asked for.
    pub(super) async fn read_settled(&self, range: Range) -> Result<ReadData, DeviceError> {
        let Some(needed) = self.needed(range) else {
            return Ok(ReadData::zeroes(usize_from(range.len())));
        };
        let data = self.fetch(needed).await?;
        if needed == range {
            return Ok(data);
        }
        let mut whole = ReadData::zeroes(usize_from(needed.start - range.start));
        whole.append(data);
        whole.push_zeroes(usize_from(range.end - needed.end));
        Ok(whole)
    }

    /// The part of `range` that may hold pages.
    fn needed(&self, range: Range) -> Option<Range> {
        let Some(unwritten) = &self.unwritten else {
            return Some(range);
        };
        match unwritten.needed(range) {
            Some(all) if all == range => Some(all),
            part if self.standing.certain() => part,
            _ => Some(range),
        }
    }

    /// Settles `change`, of which only what is not so already is sent.
    pub(super) async fn change_settled(&self, change: &Change) -> Result<(), DeviceError> {
        let Some(unwritten) = &self.unwritten else {
            return self.send_settled(change).await;
        };
        let range = change.range();
        let zeroes = match change {
            Change::Put { data, .. } => is_zero(data),
            Change::Clear(_) | Change::Trim(_) => true,
        };
        if zeroes {
            let Some(needed) = self.needed(range) else {
                if matches!(change, Change::Trim(_)) {
                    // It is empty if it is ours, and if not, a trim promised
                    // nothing of what others write.
                    return Ok(());
                }
                // Nothing is to be changed; but what is acknowledged has to be
                // so in the disk of whoever holds it now.
                let under_way = self.standing.progress.begin();
                let ours = unless_gone(self.standing.confirm_lease()).await?;
                ours.map_err(|fenced| self.fenced(&fenced))?;
                under_way.done();
                return Ok(());
            };
            if needed.len() >= CLEARED_ZEROES || !matches!(change, Change::Put { .. }) {
                self.send_settled(&Change::Clear(needed)).await?;
                unwritten.cleared(range);
                return Ok(());
            }
        }
        // Ends after what stands for an unsettled outcome.
        let putting = unwritten.put(range);
        let sent = self.send_settled(change).await;
        drop(putting);
        sent
    }
}
