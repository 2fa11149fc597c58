//! Snapshots and copies of whole blobs.

use std::time::Duration;

use hyper::Method;

use super::credential::Credential;
use super::page_blob::{Attempt, PageBlob};
use super::request::name;
use super::types::*;

impl PageBlob {
    /// True when this is a snapshot.
    #[must_use]
    pub fn is_snapshot(&self) -> bool {
        self.snapshot.is_some()
    }

    /// The URL by which Copy Blob within this account finds this blob. The
    /// account key reads every source in its account; a shared access
    /// signature has to be in the URL too, which is a secret then.
    #[must_use]
    pub fn copy_url(&self) -> String {
        let url = self.url();
        match &*self.account.0.shared.keyring.current() {
            Credential::Sas(sas) => {
                let join = if self.snapshot.is_some() { '&' } else { '?' };
                format!("{url}{join}{}", sas.as_str())
            }
            Credential::SharedKey(_) | Credential::Anonymous => url,
        }
    }

    /// Snapshot Blob: answers with the snapshot's time stamp.
    ///
    /// # Errors
    /// As any request.
    pub async fn create_snapshot(
        &self,
        metadata: &[(String, String)],
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<String> {
        let request = self
            .request(Method::PUT, "snapshot blob")
            .query("comp", "snapshot")
            .metadata(metadata)
            .conditions(conditions);
        let answer = self.execute(&request, deadline).await?;
        answer
            .demand(&request, "x-ms-snapshot")
            .map(ToOwned::to_owned)
    }

    /// Copy Blob from `source_url` (a snapshot's URL for a source in use).
    /// Asynchronous: follow it with [`PageBlob::properties`].
    ///
    /// # Errors
    /// 404 when the source is not there or not readable, or as any request.
    pub async fn start_copy(
        &self,
        source_url: &str,
        metadata: &[(String, String)],
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<CopyState> {
        let request = self
            .request(Method::PUT, "copy blob")
            .header(name::COPY_SOURCE, source_url)
            .metadata(metadata)
            .tier(self.tier.as_deref())
            .conditions(conditions);
        let answer = self.execute(&request, deadline).await?;
        answer
            .copy(&request)?
            .ok_or_else(|| request.bad_answer("it lacks the header x-ms-copy-id"))
    }

    /// Abort Copy Blob.
    ///
    /// # Errors
    /// 409 `NoPendingCopyOperation` when it is over, or as any request.
    pub async fn abort_copy(
        &self,
        copy_id: &str,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<()> {
        let request = self
            .request(Method::PUT, "abort copy")
            .query("comp", "copy")
            .query("copyid", copy_id.to_owned())
            .fixed(name::COPY_ACTION, "abort")
            .conditions(conditions);
        self.execute(&request, deadline).await?;
        Ok(())
    }
}
