//! A cached volume's flushes, zeroes and trims, and its extents: what is about
//! the store rather than about bytes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::Cache;
use super::core::Core;
use super::data::{blocks_around, staging_failed};
use super::through::{Changing, overtake_with_zeroes};
use crate::blob::Range;
use crate::caller::unless_gone;
use crate::device::DeviceError;
use crate::volume::Volume;
use crate::volume::disk::{split, usize_from};
use crate::volume::io::Change;
use crate::volume::store::PageStore;

/// Zeroes up to this long are staged like any other write.
const STAGED_ZEROES: u64 = 64 << 10;
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

impl<S: PageStore> Volume<S> {
    /// Makes any range read as zeroes.
    pub(in crate::volume) async fn zero_cached(
        &self,
        cache: &Arc<Cache>,
        range: Range,
        fua: bool,
    ) -> Result<(), DeviceError> {
        self.unfenced()?;
        if cache.stages() && !fua && range.len() <= STAGED_ZEROES {
            let zeroes = Bytes::from_static(&ZEROES).slice(..usize_from(range.len()));
            return self.write_cached(cache, range, zeroes, fua).await;
        }
        let (head, body, tail) = split(range);
        for edge in [head, tail] {
            if !edge.is_empty() {
                let zeroes = Bytes::from_static(&ZEROES).slice(..usize_from(edge.len()));
                self.write_cached(cache, edge, zeroes, fua).await?;
            }
        }
        if body.is_empty() {
            return Ok(());
        }
        self.clear_cached(cache, &Change::Clear(body), fua).await
    }

    /// Clears whole pages, of which there are some.
    pub(in crate::volume) async fn clear_cached(
        &self,
        cache: &Arc<Cache>,
        change: &Change,
        fua: bool,
    ) -> Result<(), DeviceError> {
        self.unfenced()?;
        let body = change.range();
        {
            let _locked = unless_gone(self.locks.lock(blocks_around(body))).await?;
            let changing = Changing::begin(cache, body).await;
            overtake_with_zeroes(cache, body).await;
            self.io.change(change).await?;
            let mut rest = body;
            while !rest.is_empty() {
                rest = cache
                    .with(move |core| core.cleared(rest))
                    .await
                    .map_err(|error| staging_failed(&error))?;
            }
            changing.done();
        }
        self.make_durable(cache, fua).await
    }

    /// The dirty parts of `within`, as [`Core::dirty`].
    pub(in crate::volume) async fn dirty(
        &self,
        cache: &Arc<Cache>,
        within: Range,
        most: usize,
    ) -> (Vec<Range>, u64) {
        cache.with(move |core| core.dirty(within, most)).await
    }

    /// After a change with FUA: on a disk, makes sure that a power cut cannot
    /// bring back what was staged before it.
    pub(super) async fn make_durable(
        &self,
        cache: &Arc<Cache>,
        fua: bool,
    ) -> Result<(), DeviceError> {
        if !fua || !cache.stages() || cache.memory {
            return Ok(());
        }
        self.record_flushed(cache, None).await
    }

    async fn record_flushed(
        &self,
        cache: &Arc<Cache>,
        through: Option<u64>,
    ) -> Result<(), DeviceError> {
        cache
            .with(move |core| {
                let through = through.unwrap_or(core.index.sequence());
                if core.staging.header().flushed >= through {
                    return Ok(());
                }
                core.staging.record(|header| header.flushed = through)
            })
            .await
            .map_err(|error| staging_failed(&error))
    }

    /// Returns once the store has everything acknowledged before the call.
    pub(in crate::volume) async fn flush_cached(
        &self,
        cache: &Arc<Cache>,
    ) -> Result<(), DeviceError> {
        let whole = Range::at(0, self.size());
        self.io
            .within_deadline("flush", whole, Box::pin(self.drain(cache)))
            .await
    }

    async fn drain(&self, cache: &Arc<Cache>) -> Result<(), DeviceError> {
        let failures = cache.failures.load(Ordering::Acquire);
        let through = cache.with(Core::want_flushed).await;
        loop {
            let progress = cache.progress.notified();
            tokio::pin!(progress);
            progress.as_mut().enable();
            self.unfenced()?;
            if cache
                .with(move |core| core.index.clean_through(through))
                .await
            {
                break;
            }
            if cache.failures.load(Ordering::Acquire) != failures {
                return Err(cache.failure());
            }
            cache.work.notify_one();
            progress.await;
        }
        if cache.memory || !cache.stages() {
            return Ok(());
        }
        self.record_flushed(cache, Some(through)).await
    }
}
