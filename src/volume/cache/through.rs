//! Writes that go through to the store, and what the cache does about them:
//! under the range lock, from before the store may have them until its answer.

use std::sync::Arc;

use bytes::Bytes;

use super::Cache;
use super::core::Core;
use super::data::{sections, staging_failed};
use crate::blob::Range;
use crate::device::DeviceError;
use crate::volume::Volume;
use crate::volume::disk::usize_from;
use crate::volume::store::PageStore;

/// A change in the store; unless [`Changing::done`], its outcome counts as
/// unknown when dropped.
pub(super) struct Changing {
    cache: Arc<Cache>,
    id: u64,
    known: bool,
}

impl Changing {
    pub(super) async fn begin(cache: &Arc<Cache>, range: Range) -> Self {
        let guarded = Arc::clone(cache);
        let begin = move |core: &mut Core| Self {
            id: core.begin_change(range),
            cache: guarded,
            known: false,
        };
        cache.with(begin).await
    }

    pub(super) fn done(mut self) {
        self.known = true;
    }
}

impl Drop for Changing {
    fn drop(&mut self) {
        let (id, known) = (self.id, self.known);
        self.cache.soon(move |core| core.end_change(id, known));
        // It may have cleaned or freed the very blocks that others wait for.
        self.cache.progress.notify_waiters();
    }
}

/// `data` at `offset`, cut into sections.
fn in_sections(offset: u64, data: &Bytes) -> impl Iterator<Item = (u64, Bytes)> {
    sections(Range::at(offset, data.len() as u64)).map(move |section| {
        let from = usize_from(section.start - offset);
        let part = data.slice(from..from + usize_from(section.len()));
        (section.start, part)
    })
}

/// Before a change puts whole pages into the store: see [`Core::overtake`].
pub(super) async fn overtake(cache: &Arc<Cache>, offset: u64, data: &Bytes) {
    if !cache.stages() {
        return;
    }
    for (at, part) in in_sections(offset, data) {
        cache.with(move |core| core.overtake(at, &part)).await;
    }
}

/// Before a change clears `range` in the store, likewise.
pub(super) async fn overtake_with_zeroes(cache: &Arc<Cache>, range: Range) {
    if !cache.stages() {
        return;
    }
    let mut rest = range;
    while !rest.is_empty() {
        rest = cache
            .with(move |core| core.overtake_with_zeroes(rest))
            .await;
    }
}

impl<S: PageStore> Volume<S> {
    /// Writes whole pages to the store; the cache follows. The caller has
    /// locked their blocks.
    pub(super) async fn write_through(
        &self,
        cache: &Arc<Cache>,
        offset: u64,
        data: Bytes,
    ) -> Result<(), DeviceError> {
        let range = Range::at(offset, data.len() as u64);
        let changing = Changing::begin(cache, range).await;
        overtake(cache, offset, &data).await;
        self.write_pages(offset, data.clone()).await?;
        self.written(cache, offset, &data).await?;
        changing.done();
        Ok(())
    }

    pub(super) async fn written(
        &self,
        cache: &Arc<Cache>,
        offset: u64,
        data: &Bytes,
    ) -> Result<(), DeviceError> {
        for (at, part) in in_sections(offset, data) {
            cache
                .with(move |core| core.wrote(at, &part))
                .await
                .map_err(|error| staging_failed(&error))?;
        }
        Ok(())
    }
}
