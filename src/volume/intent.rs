//! What a blob is about to become, told in its own metadata.
//!
//! A VHD's footer is the last page of its blob, so no single request makes or
//! moves one: between the request that gives the blob its size and the one
//! that writes the footer a crash would leave a blob whose last page is empty,
//! which is a raw disk to everybody. An intent is written before that and says
//! what the blob is meant to be; whoever opens it next, or repeats the call,
//! completes it.
//!
//! | last page | size | what the blob is |
//! |---|---|---|
//! | footer | the old one | the old disk: growing has not begun |
//! | zeroes | the new one | the old disk, and zeroes after it: unfinished |
//! | footer | the new one | the new disk: finished, whatever the metadata says |
//!
//! The footer is written last of all, so that it alone says "finished" and an
//! intent may stay in the metadata for ever.

use std::time::Duration;

use bytes::Bytes;

use super::patience::patiently;
use super::store::PageStore;
use crate::blob::vhd::{self, Layout};
use crate::blob::{Checksum, Conditions, LeaseId, Range, StorageError};
use crate::device::PAGE;

/// The name of the intent among a blob's metadata.
const KEY: &str = "dysklayout";

/// A blob that is to become a VHD of another size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Intent {
    /// Its layout, before and after; never [`Layout::Raw`].
    pub layout: Layout,
    /// Bytes in the blob before; 0 for one that is being made.
    pub old: u64,
    /// Bytes in the blob after.
    pub new: u64,
    /// The disk's unique id, in the old footer and in the new.
    pub id: [u8; 16],
}

impl Intent {
    /// As metadata: `LAYOUT:OLD:NEW:ID`.
    pub fn entry(&self) -> (String, String) {
        let layout = match self.layout {
            Layout::LegacyVhd => "legacy-vhd",
            Layout::Vhd | Layout::Raw => "vhd",
        };
        let id = uuid::Uuid::from_bytes(self.id).simple();
        let value = format!("{layout}:{}:{}:{id}", self.old, self.new);
        (KEY.to_owned(), value)
    }

    /// The intent among `metadata`; one that makes no sense is none.
    pub fn of(metadata: &[(String, String)]) -> Option<Self> {
        let (_, value) = metadata.iter().find(|(name, _)| name == KEY)?;
        let words: Vec<&str> = value.split(':').collect();
        let [layout, old, new, id] = words.as_slice() else {
            return None;
        };
        let layout = match *layout {
            "vhd" => Layout::Vhd,
            "legacy-vhd" => Layout::LegacyVhd,
            _ => return None,
        };
        let intent = Self {
            layout,
            old: old.parse().ok()?,
            new: new.parse().ok()?,
            id: *uuid::Uuid::try_parse(id).ok()?.as_bytes(),
        };
        let aligned = intent.old.is_multiple_of(PAGE) && intent.new.is_multiple_of(PAGE);
        (aligned && intent.old < intent.new).then_some(intent)
    }

    /// The footer of what the blob becomes.
    pub fn footer(&self) -> [u8; vhd::FOOTER] {
        let names = match self.layout {
            Layout::LegacyVhd => self.new,
            Layout::Vhd | Layout::Raw => self.new - PAGE,
        };
        vhd::footer(names, super::create::vhd_now(), self.id)
    }

    /// The unfinished intent of a blob, whose last page is `page`.
    pub fn unfinished(metadata: &[(String, String)], size: u64, page: &[u8]) -> Option<Self> {
        // A page with anything on it is either the footer or somebody's data.
        let empty = page.iter().all(|&byte| byte == 0);
        Self::of(metadata).filter(|intent| empty && intent.new == size)
    }
}

/// `metadata` without an intent.
pub fn without(metadata: &[(String, String)]) -> Vec<(String, String)> {
    let others = metadata.iter().filter(|(name, _)| name != KEY);
    others.cloned().collect()
}

/// Empties the old footer's page, which becomes a page of the disk, and then
/// writes the new footer. Both are fenced by `conditions`: a late duplicate of
/// either would hit data once the disk has grown again.
///
/// # Errors
/// As any request; it can be called again.
pub async fn complete<S: PageStore>(
    blob: &S,
    intent: &Intent,
    conditions: &Conditions,
    deadline: Duration,
) -> Result<(), StorageError> {
    if let Some(start) = intent.old.checked_sub(PAGE) {
        let page = Range::at(start, PAGE);
        patiently!(blob.clear_pages(page, conditions, deadline))?;
    }
    let footer = Bytes::copy_from_slice(&intent.footer());
    let at = intent.new - PAGE;
    patiently!(blob.put_page(at, footer.clone(), Checksum::Off, conditions, deadline))?;
    Ok(())
}

/// Conditions of a holder of `lease` at the sequence number `number`.
pub fn fenced(lease: &LeaseId, number: u64) -> Conditions {
    Conditions {
        if_sequence_number_lt: Some(number + 1),
        ..Conditions::lease(lease)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTENT: Intent = Intent {
        layout: Layout::Vhd,
        old: 1024,
        new: 2048,
        id: [0xab; 16],
    };

    #[test]
    fn reads_what_it_writes_and_nothing_else() {
        for intent in [
            INTENT,
            Intent {
                layout: Layout::LegacyVhd,
                old: 0,
                ..INTENT
            },
        ] {
            assert_eq!(Intent::of(&[intent.entry()]), Some(intent));
        }
        let id = "ab".repeat(16);
        for value in [
            String::new(),
            format!("raw:1024:2048:{id}"),
            format!("vhd:2048:1024:{id}"),
            format!("vhd:1024:2049:{id}"),
            "vhd:1024:2048:x".into(),
            format!("vhd:1024:2048:{id}:more"),
        ] {
            assert_eq!(Intent::of(&[(KEY.to_owned(), value)]), None);
        }
        assert!(without(&[INTENT.entry()]).is_empty());
    }

    #[test]
    fn is_unfinished_only_at_its_size_and_with_an_empty_last_page() {
        let metadata = [INTENT.entry()];
        let unfinished = |size, page: &[u8]| Intent::unfinished(&metadata, size, page);
        assert_eq!(unfinished(2048, &[0; 512]), Some(INTENT));
        assert_eq!(unfinished(1024, &[0; 512]), None);
        let mut page = [0; 512];
        page[511] = 1;
        assert_eq!(unfinished(2048, &page), None);
        assert_eq!(Intent::unfinished(&[], 2048, &[0; 512]), None);
    }
}
