//! Carries a plan out on a paused clock, and judges what came of it.
//!
//! All requests are polled by one loop, which picks among those that are awake
//! by the seeded generator; keepers and executions in the store run as tasks
//! beside it. Nothing else decides: the same plan gives the same history.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use bytes::Bytes;
use dysk::blob::vhd::{self, Layout};
use dysk::blob::{LeaseId, StorageError};
use dysk::device::{BlockDevice, DeviceError};
use dysk::volume::{OpenError, OpenOptions, Volume};
use rand::RngExt;
use rand::rngs::SmallRng;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::blob::Blob;
use crate::check::{self, Event, changes};
use crate::fate::{Actor, AttemptKey, generator};
use crate::plan::{Action, CELL, Cells, GiveUp, Io, NODES, Opening, Plan, Profile, Step};
use crate::store::{Sabotage, SharedWorld, SimStore, World, lock};

/// After the store has healed and every node goes on, all that was begun ends
/// within this time, waiting for other nodes' leases included.
const SETTLES_WITHIN: Duration = Duration::from_secs(300);
/// Requests that a host has under way at once: more would make no history
/// stranger, and judging it slow.
const QUEUE_DEPTH: usize = 8;
/// A folder in which no volume left anything.
const STAGING: &str = "/nonexistent";
const LEASE: Duration = Duration::from_secs(60);

type SimVolume = Arc<Volume<SimStore>>;

/// What came of a history.
#[derive(Debug)]
pub struct Outcome {
    /// What is wrong, if anything.
    pub failure: Option<String>,
    pub events: Vec<(Duration, Event)>,
    pub trace: Vec<String>,
    /// Attempts that met with trouble.
    pub troubled: BTreeSet<AttemptKey>,
    pub tally: Tally,
}

/// What happened in histories, to see that they are worth something.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub requests: u64,
    pub unsettled: u64,
    pub openings: u64,
    pub fenced: u64,
    pub troubled: u64,
    pub late: u64,
}

impl Tally {
    pub fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.unsettled += other.unsettled;
        self.openings += other.openings;
        self.fenced += other.fenced;
        self.troubled += other.troubled;
        self.late += other.late;
    }
}

/// Carries out `plan`, keeping a trace if wanted.
pub fn run(plan: &Plan, sabotage: Option<Sabotage>, traced: bool) -> Outcome {
    dysk::blob::retry::seed(plan.seed);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(tokio::task::unconstrained(async {
        let blob = blob(plan);
        let world = World::new(Arc::new(plan.clone()), blob, sabotage, traced);
        let world = Arc::new(std::sync::Mutex::new(world));
        let mut driver = Driver::new(&world, plan);
        let failure = driver.carry_out().await.err();
        // Futures are dropped before the runtime is.
        driver.tasks.clear();
        driver.nodes = Default::default();
        let events = std::mem::take(&mut driver.events);
        let mut tally = driver.tally;
        let mut world = lock(&world);
        tally.troubled = world.troubled.len() as u64;
        tally.late = world.late;
        Outcome {
            failure,
            events,
            trace: world.take_trace(),
            troubled: std::mem::take(&mut world.troubled),
            tally,
        }
    }))
}

fn footer(plan: &Plan) -> [u8; vhd::FOOTER] {
    vhd::footer(u64::from(plan.pages) * 512, 7, [3; 16])
}

pub fn blob(plan: &Plan) -> Blob {
    let mut data = vec![0; plan.pages as usize * 512];
    if plan.vhd {
        data.extend_from_slice(&footer(plan));
    }
    Blob::new(data, plan.lease_first)
}

/// A volume that is open on a node: usually one, or twins.
#[derive(Clone)]
struct Session {
    /// The step that opened it.
    id: u32,
    held: Held,
    volumes: Vec<SimVolume>,
    io_deadline: bool,
    ending: Arc<AtomicBool>,
}

/// The lease that a session holds.
#[derive(Clone, Copy, Debug)]
struct Held {
    /// The step that acquired it.
    lease: u32,
    /// How many daemons held it before.
    daemons: u32,
}

#[derive(Default)]
enum Node {
    #[default]
    Empty,
    Opening,
    Open(Session),
}

enum Ended {
    Io(Result<Vec<(u32, u64)>, DeviceError>),
    Opened(Result<Session, OpenError>),
    Closed(Result<(), StorageError>),
}

/// A step under way.
struct Task {
    step: u32,
    node: usize,
    session: Option<Session>,
    /// The volume was fenced before this began.
    fenced: bool,
    future: Pin<Box<dyn Future<Output = Ended> + Send>>,
    awake: Arc<Awake>,
    polls_left: Option<u32>,
    drop_at: Option<Duration>,
}

struct Awake {
    ready: AtomicBool,
    driver: Arc<Notify>,
}

impl Wake for Awake {
    fn wake(self: Arc<Self>) {
        self.ready.store(true, Ordering::Relaxed);
        self.driver.notify_one();
    }
}

struct Driver<'a> {
    world: SharedWorld,
    plan: &'a Plan,
    choice: SmallRng,
    woken: Arc<Notify>,
    nodes: [Node; NODES],
    tasks: Vec<Task>,
    /// The openings of each node, dead or alive.
    openings: Vec<(usize, u32)>,
    /// What each opening holds, or tried to.
    held: BTreeMap<u32, Held>,
    events: Vec<(Duration, Event)>,
    tally: Tally,
}

impl<'a> Driver<'a> {
    fn new(world: &SharedWorld, plan: &'a Plan) -> Self {
        Self {
            world: Arc::clone(world),
            plan,
            choice: generator(plan.seed, [9, 9, 9]),
            woken: Arc::new(Notify::new()),
            nodes: Default::default(),
            tasks: Vec::new(),
            openings: Vec::new(),
            held: BTreeMap::new(),
            events: Vec::new(),
            tally: Tally::default(),
        }
    }

    fn now(&self) -> Duration {
        lock(&self.world).now()
    }

    fn record(&mut self, event: Event) {
        let now = self.now();
        lock(&self.world).note(format_args!("{event:?}"));
        self.events.push((now, event));
    }

    async fn carry_out(&mut self) -> Result<(), String> {
        let plan = self.plan;
        let mut steps = plan.steps.iter().peekable();
        loop {
            let now = self.now();
            if let Some(step) = steps.next_if(|step| step.at <= now) {
                self.begin(step);
                continue;
            }
            self.lose_patience(now);
            if let Some(task) = self.pick(now) {
                self.poll(task)?;
                if self.choice.random_range(0..4) == 0 {
                    tokio::task::yield_now().await;
                }
                continue;
            }
            if self.tasks.is_empty() && steps.peek().is_none() {
                break;
            }
            let last = plan.steps.last().map_or(Duration::ZERO, |step| step.at);
            let thawed = self.thaws().max().unwrap_or_default();
            let bound = last.max(plan.heal_at).max(thawed) + SETTLES_WITHIN;
            if now >= bound {
                let stuck: Vec<u32> = self.tasks.iter().map(|task| task.step).collect();
                return Err(format!("not ended by {bound:?}: {stuck:?}"));
            }
            let next = self
                .tasks
                .iter()
                .filter_map(|task| task.drop_at)
                .chain(steps.peek().map(|step| step.at))
                .chain(self.thaws())
                .filter(|at| *at > now)
                .fold(bound, Duration::min);
            let next = lock(&self.world).instant(next);
            tokio::select! {
                biased;
                () = self.woken.notified() => {}
                () = sleep_until(next) => {}
            }
        }
        self.judge().await
    }

    fn thaws(&self) -> impl Iterator<Item = Duration> + use<> {
        lock(&self.world).frozen_until.into_iter()
    }

    fn frozen(&self, node: usize, now: Duration) -> bool {
        lock(&self.world).frozen_until[node] > now
    }

    /// A task that is awake, on a node that does not stand still.
    fn pick(&mut self, now: Duration) -> Option<usize> {
        let awake: Vec<usize> = (0..self.tasks.len())
            .filter(|at| {
                let task = &self.tasks[*at];
                task.awake.ready.load(Ordering::Relaxed) && !self.frozen(task.node, now)
            })
            .collect();
        if awake.is_empty() {
            return None;
        }
        Some(awake[self.choice.random_range(0..awake.len())])
    }

    fn poll(&mut self, at: usize) -> Result<(), String> {
        let task = &mut self.tasks[at];
        task.awake.ready.store(false, Ordering::Relaxed);
        let waker = Waker::from(Arc::clone(&task.awake));
        lock(&self.world).current = Some(task.step);
        let polled = task.future.as_mut().poll(&mut Context::from_waker(&waker));
        lock(&self.world).current = None;
        match polled {
            Poll::Ready(ended) => {
                let task = self.tasks.swap_remove(at);
                self.ended(&task, ended)
            }
            Poll::Pending => {
                if let Some(left) = &mut task.polls_left {
                    *left -= 1;
                    if *left == 0 {
                        self.give_up(at, "dropped");
                    }
                }
                Ok(())
            }
        }
    }

    fn lose_patience(&mut self, now: Duration) {
        while let Some(at) = self.tasks.iter().position(|task| {
            task.drop_at.is_some_and(|drop_at| drop_at <= now) && !self.frozen(task.node, now)
        }) {
            self.give_up(at, "dropped");
        }
    }

    fn give_up(&mut self, at: usize, why: &str) {
        let task = self.tasks.swap_remove(at);
        self.record(Event::Ended {
            step: task.step,
            why: why.into(),
        });
        self.tally.unsettled += 1;
        if task.session.is_none() {
            self.nodes[task.node] = Node::Empty;
        }
    }

    fn begin(&mut self, step: &Step) {
        match step.action {
            Action::Open(opening, give_up) => {
                if matches!(self.nodes[step.node], Node::Empty) {
                    let held = Held {
                        lease: step.id,
                        daemons: 0,
                    };
                    self.open(step, held, opening, give_up);
                }
            }
            Action::Restart(opening) => {
                if let Node::Open(session) = &self.nodes[step.node] {
                    let held = Held {
                        daemons: session.held.daemons + 1,
                        ..session.held
                    };
                    self.crash(step.node);
                    self.open(step, held, opening, GiveUp::Never);
                }
            }
            Action::Io(io, give_up) => {
                let Node::Open(session) = &self.nodes[step.node] else {
                    return;
                };
                let same = |task: &&Task| task.session.as_ref().is_some_and(|s| s.id == session.id);
                if self.tasks.iter().filter(same).count() >= QUEUE_DEPTH {
                    return;
                }
                let session = session.clone();
                let twin = step.id as usize % session.volumes.len();
                let volume = Arc::clone(&session.volumes[twin]);
                self.tally.requests += 1;
                self.record(Event::Invoked {
                    step: step.id,
                    session: session.id,
                    io,
                });
                let id = step.id;
                self.spawn(step, Some(session), give_up, async move {
                    Ended::Io(request(&volume, id, io).await)
                });
            }
            Action::Close(give_up) => self.close(step, give_up, false),
            Action::Abandon => self.close(step, GiveUp::Never, true),
            Action::Drop => {
                if matches!(self.nodes[step.node], Node::Open(_)) {
                    self.nodes[step.node] = Node::Empty;
                }
            }
            Action::Crash => self.crash(step.node),
            Action::Freeze(time) => {
                let mut world = lock(&self.world);
                world.frozen_until[step.node] = world.now() + time;
                world.note(format_args!("node {} freezes for {time:?}", step.node));
            }
        }
    }

    fn open(&mut self, step: &Step, held: Held, opening: Opening, give_up: GiveUp) {
        self.nodes[step.node] = Node::Opening;
        self.openings.push((step.node, step.id));
        self.held.insert(step.id, held);
        let store = SimStore::new(&self.world, step.node, step.id);
        let future = open(store, step.id, held, opening, self.plan.twins);
        self.spawn(step, None, give_up, async { Ended::Opened(future.await) });
    }

    fn close(&mut self, step: &Step, give_up: GiveUp, abandon: bool) {
        match std::mem::take(&mut self.nodes[step.node]) {
            Node::Open(session) => {
                session.ending.store(true, Ordering::Relaxed);
                let volumes = session.volumes.clone();
                if abandon {
                    volumes.iter().for_each(|volume| volume.abandon());
                }
                self.spawn(step, Some(session), give_up, async move {
                    Ended::Closed(close_all(&volumes).await)
                });
            }
            other => self.nodes[step.node] = other,
        }
    }

    fn crash(&mut self, node: usize) {
        {
            let mut world = lock(&self.world);
            world.note(format_args!("node {node} crashes"));
            for (on, opening) in &self.openings {
                if *on == node {
                    world.dead.insert(*opening);
                }
            }
            world.frozen_until[node] = Duration::ZERO;
        }
        while let Some(at) = self.tasks.iter().position(|task| task.node == node) {
            self.give_up(at, "crashed");
        }
        self.nodes[node] = Node::Empty;
    }

    fn spawn(
        &mut self,
        step: &Step,
        session: Option<Session>,
        give_up: GiveUp,
        future: impl Future<Output = Ended> + Send + 'static,
    ) {
        let drop_at = match give_up {
            GiveUp::After(time) => Some(self.now() + time),
            GiveUp::Never | GiveUp::Polls(_) => None,
        };
        let polls_left = match give_up {
            GiveUp::Polls(polls) => Some(polls),
            GiveUp::Never | GiveUp::After(_) => None,
        };
        let fenced = session
            .as_ref()
            .is_some_and(|session| session.volumes.iter().any(|v| v.status().fenced.is_some()));
        let awake = Arc::new(Awake {
            ready: AtomicBool::new(true),
            driver: Arc::clone(&self.woken),
        });
        self.tasks.push(Task {
            step: step.id,
            node: step.node,
            session,
            fenced,
            future: Box::pin(future),
            awake,
            polls_left,
            drop_at,
        });
    }

    fn ended(&mut self, task: &Task, ended: Ended) -> Result<(), String> {
        let step = task.step;
        match ended {
            Ended::Io(Ok(_)) if task.fenced => {
                Err(format!("#{step} was answered by a fenced volume"))
            }
            Ended::Io(Ok(values)) => {
                self.record(Event::Done { step, values });
                Ok(())
            }
            Ended::Io(Err(error)) => {
                let session = task.session.as_ref().expect("requests have a session");
                self.tally.unsettled += 1;
                self.record(Event::Ended {
                    step,
                    why: error.to_string(),
                });
                self.justify(session, &error)
                    .map_err(|wrong| format!("#{step} failed, {wrong}: {error}"))
            }
            Ended::Opened(Ok(session)) => {
                self.tally.openings += 1;
                self.record(Event::Opened {
                    session: session.id,
                });
                self.nodes[task.node] = Node::Open(session);
                Ok(())
            }
            Ended::Opened(Err(error)) => {
                self.nodes[task.node] = Node::Empty;
                let what = format!("not opened: {error}");
                self.record(Event::Noted { step, what });
                if self.plan.profile == Profile::Calm {
                    return Err(format!("#{step} not opened in a calm: {error}"));
                }
                Ok(())
            }
            Ended::Closed(result) => {
                let what = format!("closed: {result:?}");
                self.record(Event::Noted { step, what });
                let session = task.session.as_ref().expect("what is closed was open");
                if result.is_ok() {
                    self.given_back(session)?;
                }
                Ok(())
            }
        }
    }

    /// An error has to be one of the few that are promised.
    fn justify(&mut self, session: &Session, error: &DeviceError) -> Result<(), String> {
        match error {
            DeviceError::Io(cause) if cause.starts_with("fenced: ") => {
                self.tally.fenced += 1;
                let lost = lock(&self.world)
                    .blob
                    .lost
                    .contains(&lease_text(session.held.lease));
                if lost {
                    Ok(())
                } else {
                    Err("but the lease was never lost".into())
                }
            }
            DeviceError::Io(cause) if cause.contains("within the i/o deadline") => {
                if session.io_deadline {
                    Ok(())
                } else {
                    Err("but there is no deadline".into())
                }
            }
            DeviceError::Shutdown if session.ending.load(Ordering::Relaxed) => Ok(()),
            _ => Err("which is not promised".into()),
        }
    }

    /// A volume that closed well does not hold the lease any more, unless a
    /// late acquire brought it back.
    fn given_back(&self, session: &Session) -> Result<(), String> {
        let world = lock(&self.world);
        match world.blob.holder(world.now()) {
            Some((id, false)) if id == lease_text(session.held.lease) && !self.plan.twins => Err(
                format!("the volume of #{} closed and keeps its lease", session.id),
            ),
            _ => Ok(()),
        }
    }

    /// Ends everything on a store that is well, and looks at what is left.
    async fn judge(&mut self) -> Result<(), String> {
        let well = self
            .thaws()
            .max()
            .unwrap_or_default()
            .max(self.plan.heal_at);
        let well = lock(&self.world).instant(well);
        sleep_until(well).await;
        for node in 0..NODES {
            if let Node::Open(session) = std::mem::take(&mut self.nodes[node]) {
                match timeout(SETTLES_WITHIN, close_all(&session.volumes)).await {
                    Ok(Ok(())) => self.given_back(&session)?,
                    Ok(Err(error)) => return Err(format!("not closed on a well store: {error}")),
                    Err(_) => return Err(format!("the volume of #{} does not close", session.id)),
                }
            }
        }
        let began = Instant::now();
        while lock(&self.world).under_way > 0 {
            if began.elapsed() > SETTLES_WITHIN {
                return Err("the store is never at rest".into());
            }
            sleep(Duration::from_secs(1)).await;
        }
        // Releases in the background have had their time.
        sleep(LEASE / 2).await;
        self.no_lease_leaks()?;
        sleep(LEASE).await;
        if let Some((id, _)) = {
            let world = lock(&self.world);
            world
                .blob
                .holder(world.now())
                .map(|(id, late)| (id.to_owned(), late))
        } {
            return Err(format!("somebody still renews the lease of #{id}"));
        }
        self.read_all(u32::MAX - 1, "the store").await?;
        self.open_again().await?;
        self.check()
    }

    fn no_lease_leaks(&self) -> Result<(), String> {
        let world = lock(&self.world);
        let Some((id, false)) = world.blob.holder(world.now()) else {
            return Ok(());
        };
        let id: u32 = id.parse().expect("a step's number");
        let hindered = world.dead.contains(&id)
            || world
                .troubled
                .iter()
                .any(|(actor, _)| *actor == Actor::Keeper(id));
        if hindered {
            Ok(())
        } else {
            Err(format!("the lease of #{id} is left"))
        }
    }

    fn all(&self) -> Cells {
        Cells {
            first: 0,
            count: self.plan.cells(),
        }
    }

    /// What lies in the store itself.
    async fn read_all(&mut self, step: u32, session: &str) -> Result<(), String> {
        let bytes = {
            let mut world = lock(&self.world);
            world.note(format_args!("{session} is read"));
            world.blob.bytes().to_vec()
        };
        tokio::task::yield_now().await;
        let disk = self.plan.pages as usize * 512;
        if self.plan.vhd && bytes[disk..] != footer(self.plan) {
            return Err("the footer is overwritten".into());
        }
        let values = values(self.all(), &bytes[..disk]).map_err(|torn| torn.to_string())?;
        self.record(Event::Invoked {
            step,
            session: u32::MAX,
            io: Io::Read(self.all()),
        });
        self.record(Event::Done { step, values });
        Ok(())
    }

    /// A fresh client opens, reads what is there, writes, closes.
    async fn open_again(&mut self) -> Result<(), String> {
        let id = u32::MAX;
        let opening = Opening {
            break_lease: false,
            wait: Duration::ZERO,
            attempt_deadline: Duration::from_secs(10),
            io_deadline: None,
        };
        let store = SimStore::judge(&self.world);
        let held = Held {
            lease: id,
            daemons: 0,
        };
        self.held.insert(id, held);
        let session = open(store, id, held, opening, false)
            .await
            .map_err(|error| format!("not opened on a well store: {error}"))?;
        self.record(Event::Opened { session: id });
        let volume = &session.volumes[0];
        let layout = if self.plan.vhd {
            Layout::Vhd
        } else {
            Layout::Raw
        };
        if volume.status().layout != layout {
            return Err(format!("the layout is {:?} now", volume.status().layout));
        }
        for (step, io) in [
            (u32::MAX - 2, Io::Read(self.all())),
            (u32::MAX - 3, Io::Write(self.all(), true)),
            (u32::MAX - 4, Io::Read(self.all())),
        ] {
            self.record(Event::Invoked {
                step,
                session: id,
                io,
            });
            let values = request(volume, step, io)
                .await
                .map_err(|error| format!("{io} on a well store: {error}"))?;
            self.record(Event::Done { step, values });
        }
        close_all(&session.volumes)
            .await
            .map_err(|error| format!("not closed on a well store: {error}"))
    }

    fn check(&self) -> Result<(), String> {
        let granted = lock(&self.world).blob.granted.clone();
        let rank = |held: &Held| {
            let granted = granted.get(&lease_text(held.lease))?;
            Some((*granted, held.daemons))
        };
        let ranks = self
            .held
            .iter()
            .filter_map(|(id, held)| Some((*id, rank(held)?)));
        let rank: BTreeMap<u32, (u32, u32)> = ranks.collect();
        let events: Vec<Event> = self.events.iter().map(|(_, event)| event.clone()).collect();
        check::check(&events, self.plan.cells(), &rank)
    }
}

fn lease_text(opening: u32) -> String {
    opening.to_string()
}

async fn open(
    store: SimStore,
    id: u32,
    held: Held,
    opening: Opening,
    twins: bool,
) -> Result<Session, OpenError> {
    let mut options = OpenOptions::new(LeaseId::from_text(lease_text(held.lease)));
    options.resume = held.daemons > 0;
    options.break_lease = opening.break_lease;
    options.wait = opening.wait;
    options.attempt_deadline = opening.attempt_deadline;
    options.io_deadline = opening.io_deadline;
    options.keeper = Some(Handle::current());
    // What says that it is memory is not waited for on another thread.
    options.staging.dir = STAGING.into();
    options.staging.survives_power_cut = Some(false);
    let mut volumes = vec![Volume::open(store.clone(), options.clone()).await?];
    if twins {
        volumes.push(Volume::open(store, options).await?);
    }
    Ok(Session {
        id,
        held,
        volumes,
        io_deadline: opening.io_deadline.is_some(),
        ending: Arc::new(AtomicBool::new(false)),
    })
}

async fn close_all(volumes: &[SimVolume]) -> Result<(), StorageError> {
    for volume in volumes {
        volume.close().await?;
    }
    Ok(())
}

/// Makes the request of step `id` and reads the values of cells off its answer.
async fn request(volume: &SimVolume, id: u32, io: Io) -> Result<Vec<(u32, u64)>, DeviceError> {
    let none = Vec::new();
    match io {
        Io::Read(cells) => {
            let len = u32::try_from(cells.len()).expect("a small read");
            let data = volume.read(cells.offset(), len).await?.to_bytes();
            Ok(values(cells, &data).unwrap_or_else(|torn| panic!("#{id}: {torn}")))
        }
        Io::Write(cells, fua) => {
            let (_, value) = changes(id, io).expect("a write changes something");
            let words = usize::try_from(cells.len() / 8).expect("a small write");
            let data: Bytes = value.to_le_bytes().repeat(words).into();
            volume.write(cells.offset(), data, fua).await.map(|()| none)
        }
        Io::Zero(cells, fua) => {
            let (offset, len) = (cells.offset(), cells.len());
            let zeroed = volume.write_zeroes(offset, len, fua, id.is_multiple_of(2));
            zeroed.await.map(|()| none)
        }
        Io::Trim(cells, fua) => {
            let trimmed = volume.trim(cells.offset(), cells.len(), fua);
            trimmed.await.map(|()| none)
        }
        Io::Flush => volume.flush().await.map(|()| none),
        Io::Extents(cells) => {
            let extents = volume.extents(cells.offset(), cells.len()).await?;
            let mut at = cells.offset();
            let mut zeroes = none;
            for extent in extents {
                if extent.zero {
                    let first = at.div_ceil(CELL);
                    let end = (at + extent.len) / CELL;
                    let cell = |at| u32::try_from(at).expect("a small disk");
                    zeroes.extend((first..end).map(|at| (cell(at), 0)));
                }
                at += extent.len;
            }
            Ok(zeroes)
        }
    }
}

/// The value of each cell in `data`.
fn values(cells: Cells, data: &[u8]) -> Result<Vec<(u32, u64)>, String> {
    let cell = usize::try_from(CELL).expect("small");
    if data.len() != cells.count as usize * cell {
        return Err(format!("{} bytes for {cells}", data.len()));
    }
    cells
        .iter()
        .zip(data.chunks_exact(cell))
        .map(|(at, bytes)| {
            let (words, _) = bytes.as_chunks::<8>();
            let value = u64::from_le_bytes(words[0]);
            if words.iter().all(|word| *word == words[0]) {
                Ok((at, value))
            } else {
                Err(format!("cell {at} is torn"))
            }
        })
        .collect()
}
