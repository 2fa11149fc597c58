//! The requests that a volume makes of its store: the seam at which a
//! simulated store takes the place of a page blob.

use std::fmt::Debug;
use std::future::Future;
use std::time::Duration;

use bytes::Bytes;

use crate::blob::{
    Attempt, BlobAddress, Checksum, Conditions, LeaseId, PageBlob, PageRanges, Properties, Range,
    RangeRead, SequenceNumber, Written,
};

/// One page blob; each method is one attempt, as [`PageBlob`]'s of the same
/// name.
pub trait PageStore: Clone + Debug + Send + Sync + 'static {
    /// See [`PageBlob::address`].
    fn address(&self) -> &BlobAddress;
    /// See [`PageBlob::isolated`].
    #[must_use]
    fn isolated(&self, max_connections: usize) -> Self;
    /// See [`PageBlob::put_page`].
    fn put_page(
        &self,
        offset: u64,
        data: Bytes,
        checksum: Checksum,
        conditions: &Conditions,
        deadline: Duration,
    ) -> impl Future<Output = Attempt<Written>> + Send;
    /// See [`PageBlob::clear_pages`].
    fn clear_pages(
        &self,
        range: Range,
        conditions: &Conditions,
        deadline: Duration,
    ) -> impl Future<Output = Attempt<Written>> + Send;
    /// See [`PageBlob::get_range`].
    fn get_range(
        &self,
        range: Range,
        checksum: Checksum,
        conditions: &Conditions,
        deadline: Duration,
    ) -> impl Future<Output = Attempt<RangeRead>> + Send;
    /// See [`PageBlob::page_ranges`]; without a diff.
    fn page_ranges(
        &self,
        within: Range,
        max_results: u32,
        deadline: Duration,
    ) -> impl Future<Output = Attempt<PageRanges>> + Send;
    /// See [`PageBlob::properties`].
    fn properties(&self, deadline: Duration) -> impl Future<Output = Attempt<Properties>> + Send;
    /// See [`PageBlob::set_sequence_number`].
    fn set_sequence_number(
        &self,
        action: SequenceNumber,
        conditions: &Conditions,
        deadline: Duration,
    ) -> impl Future<Output = Attempt<Written>> + Send;
    /// See [`PageBlob::acquire_lease`].
    fn acquire_lease(
        &self,
        id: &LeaseId,
        seconds: u32,
        conditions: &Conditions,
        deadline: Duration,
    ) -> impl Future<Output = Attempt<()>> + Send;
    /// See [`PageBlob::renew_lease`].
    fn renew_lease(
        &self,
        id: &LeaseId,
        deadline: Duration,
    ) -> impl Future<Output = Attempt<()>> + Send;
    /// See [`PageBlob::release_lease`].
    fn release_lease(
        &self,
        id: &LeaseId,
        deadline: Duration,
    ) -> impl Future<Output = Attempt<()>> + Send;
    /// See [`PageBlob::break_lease`].
    fn break_lease(
        &self,
        period: Option<u32>,
        conditions: &Conditions,
        deadline: Duration,
    ) -> impl Future<Output = Attempt<u32>> + Send;
}

impl PageStore for PageBlob {
    fn address(&self) -> &BlobAddress {
        self.address()
    }

    fn isolated(&self, max_connections: usize) -> Self {
        self.isolated(max_connections)
    }

    fn put_page(
        &self,
        offset: u64,
        data: Bytes,
        checksum: Checksum,
        conditions: &Conditions,
        deadline: Duration,
    ) -> impl Future<Output = Attempt<Written>> + Send {
        self.put_page(offset, data, checksum, conditions, deadline)
    }

    fn clear_pages(
        &self,
        range: Range,
        conditions: &Conditions,
        deadline: Duration,
    ) -> impl Future<Output = Attempt<Written>> + Send {
        self.clear_pages(range, conditions, deadline)
    }

    fn get_range(
        &self,
        range: Range,
        checksum: Checksum,
        conditions: &Conditions,
        deadline: Duration,
    ) -> impl Future<Output = Attempt<RangeRead>> + Send {
        self.get_range(range, checksum, conditions, deadline)
    }

    async fn page_ranges(
        &self,
        within: Range,
        max_results: u32,
        deadline: Duration,
    ) -> Attempt<PageRanges> {
        let (most, none) = (Some(max_results), Conditions::default());
        self.page_ranges(Some(within), None, None, most, &none, deadline)
            .await
    }

    async fn properties(&self, deadline: Duration) -> Attempt<Properties> {
        self.properties(&Conditions::default(), deadline).await
    }

    fn set_sequence_number(
        &self,
        action: SequenceNumber,
        conditions: &Conditions,
        deadline: Duration,
    ) -> impl Future<Output = Attempt<Written>> + Send {
        self.set_sequence_number(action, conditions, deadline)
    }

    fn acquire_lease(
        &self,
        id: &LeaseId,
        seconds: u32,
        conditions: &Conditions,
        deadline: Duration,
    ) -> impl Future<Output = Attempt<()>> + Send {
        self.acquire_lease(id, Some(seconds), conditions, deadline)
    }

    fn renew_lease(
        &self,
        id: &LeaseId,
        deadline: Duration,
    ) -> impl Future<Output = Attempt<()>> + Send {
        self.renew_lease(id, deadline)
    }

    fn release_lease(
        &self,
        id: &LeaseId,
        deadline: Duration,
    ) -> impl Future<Output = Attempt<()>> + Send {
        self.release_lease(id, deadline)
    }

    fn break_lease(
        &self,
        period: Option<u32>,
        conditions: &Conditions,
        deadline: Duration,
    ) -> impl Future<Output = Attempt<u32>> + Send {
        self.break_lease(period, conditions, deadline)
    }
}
