//! Lease Blob: its five actions.

use std::time::Duration;

use hyper::Method;

use super::page_blob::{Attempt, PageBlob};
use super::request::{Request, name};
use super::types::*;

impl PageBlob {
    fn lease_request(&self, operation: &'static str, action: &'static str) -> Request {
        self.request(Method::PUT, operation)
            .query("comp", "lease")
            .fixed(name::ACTION, action)
    }

    /// Lease Blob, acquire, for 15 to 60 `seconds`, or for ever when `None`.
    ///
    /// # Errors
    /// 409 `LeaseAlreadyPresent` when somebody else holds it, or as any request.
    pub async fn acquire_lease(
        &self,
        id: &LeaseId,
        seconds: Option<u32>,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<()> {
        let mut request = self
            .lease_request("acquire lease", "acquire")
            .header(name::PROPOSED_LEASE_ID, id.as_str())
            .conditions(conditions);
        request = match seconds {
            Some(seconds) => request.number(name::LEASE_DURATION, seconds.into()),
            None => request.fixed(name::LEASE_DURATION, "-1"),
        };
        self.execute(&request, deadline).await?;
        Ok(())
    }

    /// Lease Blob, renew.
    ///
    /// # Errors
    /// 409 when the lease is not ours any more
    /// ([`super::StorageError::is_lease_lost`]), or as any request.
    pub async fn renew_lease(&self, id: &LeaseId, deadline: Duration) -> Attempt<()> {
        let request = self.lease_request("renew lease", "renew").lease(id);
        self.execute(&request, deadline).await?;
        Ok(())
    }

    /// Lease Blob, change.
    ///
    /// # Errors
    /// As [`PageBlob::renew_lease`].
    pub async fn change_lease(
        &self,
        id: &LeaseId,
        proposed: &LeaseId,
        deadline: Duration,
    ) -> Attempt<()> {
        let request = self
            .lease_request("change lease", "change")
            .lease(id)
            .header(name::PROPOSED_LEASE_ID, proposed.as_str());
        self.execute(&request, deadline).await?;
        Ok(())
    }

    /// Lease Blob, release.
    ///
    /// # Errors
    /// As [`PageBlob::renew_lease`].
    pub async fn release_lease(&self, id: &LeaseId, deadline: Duration) -> Attempt<()> {
        let request = self.lease_request("release lease", "release").lease(id);
        self.execute(&request, deadline).await?;
        Ok(())
    }

    /// Lease Blob, break, after at most `period` seconds (0 to 60; `None`: the
    /// store's default). Answers with the seconds left.
    ///
    /// # Errors
    /// 409 `LeaseNotPresentWithLeaseOperation` when there is none, or as any request.
    pub async fn break_lease(
        &self,
        period: Option<u32>,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<u32> {
        let mut request = self
            .lease_request("break lease", "break")
            .conditions(conditions);
        if let Some(seconds) = period {
            request = request.number(name::BREAK_PERIOD, seconds.into());
        }
        let answer = self.execute(&request, deadline).await?;
        let left = answer.demand(&request, "x-ms-lease-time")?;
        left.trim()
            .parse()
            .map_err(|_| request.bad_answer("x-ms-lease-time is no number"))
    }
}
