//! A cache between two daemons of one node: the staging file is let go of for
//! the next one, and taken back when that one fails.
//!
//! The file holds every acknowledged write that the store may lack, so nothing
//! has to be flushed. Whoever has the file open decides what becomes of them:
//! before it is let go of nothing here is under way any more, and afterwards
//! nothing here can change it.

use std::io;
use std::sync::{Arc, PoisonError};

use super::Cache;
use crate::volume::Volume;
use crate::volume::load;
use crate::volume::store::PageStore;

impl<S: PageStore> Volume<S> {
    /// Lets another process open the volume's staging file, if it has one, and
    /// forgets what that process may change in the store.
    /// No request may be under way, and none may come before
    /// [`Volume::take_back`]. The write-back ends: what it had sent may come
    /// late, and is kept out by the raise of whoever opens the volume next.
    ///
    /// # Errors
    /// It was not let go of; [`Volume::take_back`] goes on from there too.
    pub async fn let_go(&self) -> io::Result<()> {
        if let Some(unwritten) = &self.io.unwritten {
            unwritten.forget();
        }
        let Some(cache) = self.cache.as_ref().filter(|cache| cache.stages()) else {
            return Ok(());
        };
        cache.end_write_back().await;
        cache.with(|core| core.staging.let_go()).await
    }

    /// Goes on after [`Volume::let_go`]: what the file says counts, whatever
    /// the other process did with it. Fenced, if unflushed writes are not in it
    /// any more.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] while the other process lives and has
    /// the file open: try again. Others: the file cannot be used.
    pub async fn take_back(self: &Arc<Self>) -> io::Result<()> {
        if let Some(unwritten) = &self.io.unwritten {
            unwritten.learn_anew();
            load::start(self);
        }
        let Some(cache) = self.cache.as_ref().filter(|cache| cache.stages()) else {
            return Ok(());
        };
        // Its lock is released with it, should it not have been let go of.
        cache.with(|core| core.staging.let_go()).await?;
        let core = cache.origin.open_again(self.io.standing.number()).await?;
        let lost = cache
            .with(move |old| {
                let was = old.index.dirty_sectors();
                *old = core;
                was > old.index.dirty_sectors()
            })
            .await;
        if lost {
            // The other daemon writes nothing back while it only opens; it
            // sets unflushed writes aside when it finds the volume taken. A
            // flush must not be answered as if they were in the store.
            self.io.standing.fence(
                "the daemon that was to take over found it taken and set the unflushed writes aside: see dyskctl staging list".into(),
            );
        }
        super::run(self);
        Ok(())
    }

    /// Starts to write back what was staged: for a volume that was opened with
    /// [`crate::volume::OpenOptions::hold_back`].
    pub fn go_on(self: &Arc<Self>) {
        super::run(self);
    }
}

impl Cache {
    /// Ends the write-back where it is.
    pub(super) async fn end_write_back(&self) {
        let writer = self
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(writer) = writer {
            writer.end().await;
        }
    }
}
