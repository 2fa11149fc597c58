//! The end of a cache: flushed and removed, or kept aside.

use std::sync::{Arc, PoisonError};

use super::layout::SECTOR;
use super::{Cache, SetAside};
use crate::volume::Volume;
use crate::volume::store::PageStore;

impl Cache {
    /// Keeps what is dirty where nothing replays it; removes the file when
    /// nothing is.
    pub(super) async fn keep_aside(self: &Arc<Self>) {
        let kept = self
            .with(|core| {
                let dirty_bytes = core.index.dirty_sectors() * SECTOR as u64;
                if dirty_bytes == 0 {
                    return core.staging.remove().map(|()| None);
                }
                let path = core.staging.set_aside()?;
                Ok::<_, std::io::Error>(path.map(|path| SetAside { path, dirty_bytes }))
            })
            .await;
        match kept {
            Ok(None) => {}
            Ok(Some(aside)) => {
                tracing::error!(
                    "{} bytes were never written to the store: kept in {}",
                    aside.dirty_bytes,
                    aside.path.display()
                );
                *self
                    .set_aside
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner) = Some(aside);
            }
            Err(error) => tracing::error!("staging file: {error}: left where it is"),
        }
    }

    fn kept_aside(&self) -> bool {
        self.set_aside
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }
}

impl<S: PageStore> Volume<S> {
    /// Flushes and ends the cache, after the last request has left and before
    /// the lease is released. Whatever cannot be flushed, because the volume
    /// is fenced or given up, is kept aside.
    pub(in crate::volume) async fn close_cache(&self, cache: &Arc<Cache>) {
        let mut abandoned = self.abandoned.subscribe();
        tokio::select! {
            biased;
            _ = abandoned.wait_for(|abandoned| *abandoned) => {}
            () = self.flush_for_good(cache) => {}
        }
        cache.end_write_back().await;
        if !cache.kept_aside() {
            cache.keep_aside().await;
        }
    }

    /// Flushes until it is done or pointless.
    async fn flush_for_good(&self, cache: &Arc<Cache>) {
        loop {
            match self.flush_cached(cache).await {
                Ok(()) => return,
                Err(_) if self.io.standing.fenced().is_some() => return,
                // Said in the log; the write-back pauses and tries again.
                Err(error) => tracing::warn!("{}: {error}: flushing again", self.io.blob.address()),
            }
        }
    }
}
