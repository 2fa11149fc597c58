//! The store as the nodes see it: one blob behind a network on which anything
//! may be refused, cut, delayed, and executed long after its sender gave up.

use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use dysk::blob::{
    Attempt, BlobAddress, BlobType, Checksum, Conditions, Failure, LeaseId, PageRanges, Properties,
    Range, RangeRead, SequenceNumber, StorageError, Written,
};
use dysk::volume::PageStore;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, sleep_until};

use crate::blob::Refusal;
use crate::driver::LEASE;
use crate::fate::{Actor, Answer, AttemptKey, Fate, Orphaned};
use crate::operation::Operation;
use crate::world::{Sabotage, SharedWorld, World, lock};

/// One volume's handle on the blob.
#[derive(Clone, Debug)]
pub struct SimStore {
    world: SharedWorld,
    address: Arc<BlobAddress>,
    node: usize,
    /// The step that opens the volume.
    opening: u32,
    keeper: bool,
    judge: bool,
}

/// A request on its way: told when its sender goes.
#[derive(Debug, Default)]
struct Flight {
    /// The sender has its answer, or has gone.
    over: bool,
    orphaned: Option<Orphaned>,
}

/// The sender's end of a flight.
struct Sender {
    flight: Arc<Mutex<Flight>>,
    orphaned: Orphaned,
}

impl Sender {
    fn answered(&self) {
        self.flight.lock().expect("never poisoned").over = true;
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let mut flight = self.flight.lock().expect("never poisoned");
        if !flight.over {
            flight.over = true;
            flight.orphaned = Some(self.orphaned);
        }
    }
}

impl SimStore {
    /// A handle for the volume that step `opening` opens on `node`.
    pub fn new(world: &SharedWorld, node: usize, opening: u32) -> Self {
        Self {
            world: Arc::clone(world),
            address: Arc::new(BlobAddress::new("acct", "dysks", "vol1")),
            node,
            opening,
            keeper: false,
            judge: false,
        }
    }

    /// A handle that no trouble befalls.
    pub fn judge(world: &SharedWorld) -> Self {
        Self {
            judge: true,
            ..Self::new(world, 0, u32::MAX)
        }
    }

    fn actor(&self, world: &World) -> Actor {
        if self.judge {
            return Actor::Judge;
        }
        match world.current {
            _ if self.keeper => Actor::Keeper(self.opening),
            Some(step) => Actor::Step(step),
            None => Actor::Background(self.opening),
        }
    }

    /// Waits while the node stands still, for ever if it died.
    async fn alive(&self) {
        loop {
            let until = {
                let world = lock(&self.world);
                if self.judge {
                    return;
                }
                if world.dead.contains(&self.opening) {
                    None
                } else {
                    let until = world.frozen_until[self.node];
                    if until <= world.now() {
                        return;
                    }
                    Some(world.instant(until))
                }
            };
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        }
    }

    /// A moment in which the daemon may die, and ends all it does.
    async fn point(&self) {
        if !self.judge && lock(&self.world).point(self.node) {
            std::future::pending::<()>().await;
        }
    }

    fn error(&self, operation: Operation, failure: Failure) -> StorageError {
        StorageError::new(operation.to_string(), &self.address, failure)
    }

    /// One attempt: `execute` runs in the store at most once, now, later or
    /// never; it is told whether its sender has gone.
    async fn attempt<T: Send + 'static>(
        &self,
        operation: Operation,
        deadline: Duration,
        execute: impl FnOnce(&mut World, bool) -> Result<T, Refusal> + Send + 'static,
    ) -> Attempt<(T, Fate)> {
        self.alive().await;
        self.point().await;
        let started = Instant::now();
        let (key, fate) = {
            let mut world = lock(&self.world);
            let actor = self.actor(&world);
            let count = world.attempts.entry(actor).or_default();
            let key = (actor, *count);
            *count += 1;
            let now = world.now();
            let fate = {
                let plan = &world.plan;
                let spared = plan.spared.contains(&key) || now >= plan.heal_at;
                Fate::draw(plan.seed, key, self.node, &plan.rules, spared, now)
            };
            if fate.trouble {
                world.troubled.insert(key);
            }
            (key, fate)
        };
        let launched = self.launch(key, operation, &fate, execute);
        let give_up = started + deadline;
        let heard_at = started + fate.answers;
        let in_time = heard_at <= give_up && !matches!(fate.answer, Answer::Silence(_));
        sleep_until(if in_time { heard_at } else { give_up }).await;
        self.alive().await;
        self.point().await;
        let failure = match &fate.answer {
            Answer::Silence(written) => Failure::Deadline { written: *written },
            _ if !in_time => Failure::Deadline { written: true },
            Answer::Failure(failure, _) => failure.clone(),
            Answer::Truth | Answer::Garbled => {
                let result = launched
                    .executed
                    .await
                    .expect("what is answered with the truth is executed");
                match result {
                    Ok(value) if fate.answer == Answer::Truth => {
                        launched.sender.answered();
                        return Ok((value, fate));
                    }
                    Ok(_) => Failure::BadAnswer,
                    Err((status, code)) => Failure::Status {
                        status,
                        code: code.into(),
                    },
                }
            }
        };
        launched.sender.answered();
        let mut error = self.error(operation, failure);
        if let Answer::Failure(_, retry_after) = fate.answer {
            error.retry_after = retry_after;
        }
        lock(&self.world).note(format_args!("{key:?} hears {error}"));
        Err(error)
    }

    /// Sends a request on its way.
    fn launch<T: Send + 'static>(
        &self,
        key: AttemptKey,
        operation: Operation,
        fate: &Fate,
        execute: impl FnOnce(&mut World, bool) -> Result<T, Refusal> + Send + 'static,
    ) -> Launched<T> {
        let (tell, executed) = oneshot::channel();
        let flight = Arc::new(Mutex::new(Flight::default()));
        let launched = Launched {
            sender: Sender {
                flight: Arc::clone(&flight),
                orphaned: fate.orphaned,
            },
            executed,
        };
        let Some(executes) = fate.executes else {
            return launched;
        };
        let shared = Arc::clone(&self.world);
        lock(&shared).under_way += 1;
        let name = (self.node, self.opening);
        tokio::spawn(async move {
            sleep(executes).await;
            let orphaned = flight.lock().expect("never poisoned").orphaned;
            match orphaned {
                Some(Orphaned::Cancelled) => {
                    lock(&shared).under_way -= 1;
                    return;
                }
                Some(Orphaned::Late(more)) => sleep(more).await,
                Some(Orphaned::InTime) | None => {}
            }
            let mut world = lock(&shared);
            let late = flight.lock().expect("never poisoned").over;
            world.under_way -= 1;
            world.late += u64::from(late);
            let result = execute(&mut world, late);
            let number = world.blob.number;
            let (node, opening) = name;
            world.note(format_args!(
                "{key:?} node {node} volume {opening}: {operation} executes{}: {:?}, number {number}",
                if late { " late" } else { "" },
                result.as_ref().err(),
            ));
            // A sender that has gone does not listen.
            tell.send(result).ok();
        });
        launched
    }

    /// The conditions as the store takes them.
    fn conditions(world: &World, conditions: &Conditions) -> Conditions {
        let mut conditions = conditions.clone();
        match world.sabotage {
            Some(Sabotage::Bound) => conditions.if_sequence_number_lt = None,
            Some(Sabotage::Lease) => {
                let holder = world.blob.holder(world.now());
                conditions.lease = holder.map(|(id, _)| LeaseId::from_text(id));
            }
            _ => {}
        }
        conditions
    }

    /// What a write-back is told whose outcome nobody waits for.
    fn unordered(&self) -> Option<Written> {
        let world = lock(&self.world);
        let early = world.sabotage == Some(Sabotage::Order)
            && matches!(self.actor(&world), Actor::Background(_));
        early.then(|| Self::written(&world))
    }

    fn written(world: &World) -> Written {
        Written {
            etag: world.blob.etag(),
            sequence_number: world.blob.number,
        }
    }
}

/// A request on its way, seen from its sender.
struct Launched<T> {
    sender: Sender,
    executed: oneshot::Receiver<Result<T, Refusal>>,
}

impl PageStore for SimStore {
    fn address(&self) -> &BlobAddress {
        &self.address
    }

    fn isolated(&self, _max_connections: usize) -> Self {
        Self {
            keeper: true,
            ..self.clone()
        }
    }

    async fn put_page(
        &self,
        offset: u64,
        data: Bytes,
        _checksum: Checksum,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Written> {
        let conditions = conditions.clone();
        let operation = Operation::Put(Range::at(offset, data.len() as u64));
        let execute = move |world: &mut World, _| {
            let conditions = Self::conditions(world, &conditions);
            let now = world.now();
            world.blob.put(offset, &data, &conditions, now)?;
            Ok(Self::written(world))
        };
        if let Some(written) = self.unordered() {
            let store = self.clone();
            tokio::spawn(async move { store.attempt(operation, deadline, execute).await });
            return Ok(written);
        }
        Ok(self.attempt(operation, deadline, execute).await?.0)
    }

    async fn clear_pages(
        &self,
        range: Range,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Written> {
        let conditions = conditions.clone();
        let done = self.attempt(Operation::Clear(range), deadline, move |world, _| {
            let conditions = Self::conditions(world, &conditions);
            let now = world.now();
            world.blob.clear(range, &conditions, now)?;
            Ok(Self::written(world))
        });
        Ok(done.await?.0)
    }

    async fn get_range(
        &self,
        range: Range,
        _checksum: Checksum,
        _conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<RangeRead> {
        let got = self.attempt(Operation::Get(range), deadline, move |world, _| {
            let data = world.blob.get(range)?;
            Ok((data, world.blob.len(), Self::written(world)))
        });
        let ((data, blob_size, seen), fate) = got.await?;
        let data = Bytes::from(data);
        let piece = data.len().div_ceil(fate.pieces).max(1);
        Ok(RangeRead {
            pieces: (0..data.len())
                .step_by(piece)
                .map(|at| data.slice(at..data.len().min(at + piece)))
                .collect(),
            blob_size,
            etag: seen.etag,
            sequence_number: seen.sequence_number,
        })
    }

    async fn page_ranges(
        &self,
        within: Range,
        max_results: u32,
        deadline: Duration,
    ) -> Attempt<PageRanges> {
        let listed = self.attempt(Operation::Ranges(within), deadline, move |world, _| {
            let filled = match world.sabotage {
                Some(Sabotage::Ranges) => Vec::new(),
                _ => world.blob.ranges(within),
            };
            Ok((filled, world.blob.len(), world.blob.etag()))
        });
        let (mut filled, blob_size, etag) = listed.await?.0;
        let most = usize::try_from(max_results).expect("fits");
        let next_marker = filled.get(most).map(|range| range.start.to_string());
        filled.truncate(most);
        Ok(PageRanges {
            filled,
            cleared: Vec::new(),
            next_marker,
            blob_size,
            etag,
        })
    }

    async fn properties(&self, deadline: Duration) -> Attempt<Properties> {
        let seen = self.attempt(Operation::Properties, deadline, move |world, _| {
            Ok(Properties {
                size: world.blob.len(),
                blob_type: BlobType::Page,
                etag: world.blob.etag(),
                last_modified: UNIX_EPOCH,
                sequence_number: world.blob.number,
                lease_state: world.blob.lease_state(world.now()),
                lease_infinite: false,
                metadata: Vec::new(),
                copy: None,
            })
        });
        Ok(seen.await?.0)
    }

    async fn set_sequence_number(
        &self,
        action: SequenceNumber,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<Written> {
        let conditions = conditions.clone();
        let done = self.attempt(Operation::Number(action), deadline, move |world, _| {
            if let (Some(Sabotage::Raise), SequenceNumber::Max(number)) = (world.sabotage, action) {
                return Ok(Written {
                    etag: world.blob.etag(),
                    sequence_number: number,
                });
            }
            let conditions = Self::conditions(world, &conditions);
            let now = world.now();
            world.blob.set_number(action, &conditions, now)?;
            Ok(Self::written(world))
        });
        Ok(done.await?.0)
    }

    async fn acquire_lease(
        &self,
        id: &LeaseId,
        seconds: u32,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<()> {
        let (id, conditions) = (id.clone(), conditions.clone());
        let done = self.attempt(Operation::Acquire, deadline, move |world, late| {
            let now = world.now();
            let conditions = match world.sabotage {
                Some(Sabotage::AcquireConditions) => Conditions::default(),
                _ => conditions,
            };
            world.blob.acquire(&id, seconds, &conditions, late, now)
        });
        done.await?;
        Ok(())
    }

    async fn renew_lease(&self, id: &LeaseId, deadline: Duration) -> Attempt<()> {
        let id = id.clone();
        let done = self.attempt(Operation::Renew, deadline, move |world, _| {
            let now = world.now();
            let renewed = world.blob.renew(&id, now);
            let over = world.blob.runs_out(id.as_str());
            match world.sabotage {
                Some(Sabotage::Certain) if over.is_some_and(|at| now < at + LEASE) => Ok(()),
                _ => renewed,
            }
        });
        done.await?;
        Ok(())
    }

    async fn release_lease(&self, id: &LeaseId, deadline: Duration) -> Attempt<()> {
        let id = id.clone();
        let done = self.attempt(Operation::Release, deadline, move |world, _| {
            world.blob.release(&id)
        });
        done.await?;
        Ok(())
    }

    async fn break_lease(
        &self,
        _period: Option<u32>,
        conditions: &Conditions,
        deadline: Duration,
    ) -> Attempt<u32> {
        let conditions = conditions.clone();
        let done = self.attempt(Operation::Break, deadline, move |world, _| {
            world.blob.break_now(&conditions)
        });
        Ok(done.await?.0)
    }
}
