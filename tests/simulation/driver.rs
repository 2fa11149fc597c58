//! Carries a plan out on a paused clock, and judges what came of it.
//!
//! All requests are polled by one loop, which picks among those that are awake
//! by the seeded generator; keepers and executions in the store run as tasks
//! beside it. Nothing else decides: the same plan gives the same history.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use dysk::blob::StorageError;
use dysk::device::DeviceError;
use dysk::volume::{Caching, OpenError, Recover};
use rand::RngExt;
use rand::rngs::SmallRng;
use tokio::sync::Notify;
use tokio::time::sleep_until;

use crate::awake::Awake;
use crate::check::{Event, Loss};
use crate::ending::blob;
use crate::falls::Line;
use crate::fate::generator;
use crate::outcome::{Outcome, Tally, timeless};
use crate::plan::{Action, GiveUp, NODES, Opening, Plan, Profile, Step};
use crate::session::{Held, Session, close_all, open, request};
use crate::store::SimStore;
use crate::world::{Fall, Sabotage, SharedWorld, World, lock};

/// After the store has healed and every node goes on, all that was begun ends
/// within this time, waiting for other nodes' leases included.
pub const SETTLES_WITHIN: Duration = Duration::from_secs(300);
pub const LEASE: Duration = Duration::from_secs(60);
/// In one instant; far more than a full queue takes.
const MOST_POLLS: u32 = 100_000;
/// Requests that a host has under way at once: more would make no history
/// stranger, and judging it slow.
const QUEUE_DEPTH: usize = 8;

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
        lock(&world).bell = Arc::clone(&driver.woken);
        let failure = driver.carry_out().await.err();
        // Futures are dropped before the runtime is.
        driver.tasks.clear();
        driver.nodes = Default::default();
        let events = std::mem::take(&mut driver.events);
        let mut tally = driver.tally;
        let mut world = lock(&world);
        tally.troubled = world.troubled.len() as u64;
        tally.late = world.late;
        let points = driver.points;
        Outcome {
            points,
            failure,
            events,
            trace: world.take_trace(),
            troubled: std::mem::take(&mut world.troubled),
            tally,
        }
    }))
}

#[derive(Default)]
pub enum Node {
    #[default]
    Empty,
    Opening,
    Open(Session),
    HandingOver(Session),
}

pub enum Ended {
    Io(Result<Vec<(u32, u64)>, DeviceError>),
    Opened(Result<Session, OpenError>),
    Closed(Result<(), StorageError>),
    HandedOver(Result<Session, String>),
}

/// A step under way.
pub struct Task {
    pub step: u32,
    pub node: usize,
    pub session: Option<Session>,
    /// The volume was fenced before this began.
    fenced: bool,
    future: Pin<Box<dyn Future<Output = Ended> + Send>>,
    awake: Arc<Awake>,
    /// It was polled, so that the volume knows of it.
    pub begun: bool,
    polls_left: Option<u32>,
    drop_at: Option<Duration>,
}

pub struct Driver<'a> {
    pub world: SharedWorld,
    pub plan: &'a Plan,
    choice: SmallRng,
    woken: Arc<Notify>,
    pub nodes: [Node; NODES],
    pub tasks: Vec<Task>,
    /// Steps that follow cuts, and when.
    pub following: Vec<(Duration, Step)>,
    /// What the daemons that fell held.
    pub fallen: [Option<Held>; NODES],
    /// How many moments each node had to die in.
    points: [u32; NODES + 1],
    /// Who opened the volume last.
    pub line: Option<Line>,
    /// What each opening holds, or tried to.
    pub held: BTreeMap<u32, Held>,
    pub caching: BTreeMap<u32, Caching>,
    pub events: Vec<(Duration, Event)>,
    pub tally: Tally,
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
            following: Vec::new(),
            fallen: [None; NODES],
            points: [0; NODES + 1],
            line: None,
            caching: BTreeMap::new(),
            held: BTreeMap::new(),
            events: Vec::new(),
            tally: Tally::default(),
        }
    }

    pub fn now(&self) -> Duration {
        lock(&self.world).now()
    }

    pub fn record(&mut self, event: Event) {
        let now = self.now();
        lock(&self.world).note(format_args!("{event:?}"));
        self.events.push((now, event));
    }

    async fn carry_out(&mut self) -> Result<(), String> {
        let plan = self.plan;
        let mut steps = plan.steps.iter().peekable();
        let (mut instant, mut polls) = (Duration::ZERO, 0);
        loop {
            let now = self.now();
            if now != instant {
                (instant, polls) = (now, 0);
            }
            self.follow_cuts(now);
            let due = self.following.iter().position(|(at, _)| *at <= now);
            if let Some(at) = due {
                let (_, step) = self.following.remove(at);
                self.begin(&step);
                continue;
            }
            if let Some(step) = steps.next_if(|step| step.at <= now) {
                self.begin(step);
                continue;
            }
            self.lose_patience(now);
            if let Some(task) = self.pick(now) {
                polls += 1;
                if polls > MOST_POLLS {
                    let step = self.tasks[task].step;
                    return Err(format!("#{step} and others go round at {now:?} for ever"));
                }
                self.poll(task)?;
                if self.choice.random_range(0..4) == 0 {
                    tokio::task::yield_now().await;
                }
                continue;
            }
            if self.tasks.is_empty() && steps.peek().is_none() && self.following.is_empty() {
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
                .chain(self.following.iter().map(|(at, _)| *at))
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
        self.points = lock(&self.world).last_points();
        self.judge().await
    }

    pub fn thaws(&self) -> impl Iterator<Item = Duration> + use<> {
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
        if lock(&self.world).point(task.node) {
            return Ok(());
        }
        task.begun = true;
        task.awake.ready.store(false, Ordering::Relaxed);
        let waker = Waker::from(Arc::clone(&task.awake));
        lock(&self.world).current = Some(task.step);
        let polled = task.future.as_mut().poll(&mut Context::from_waker(&waker));
        lock(&self.world).current = None;
        if !lock(&self.world).fallen.is_empty() {
            // It died before it could answer.
            return Ok(());
        }
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

    pub fn give_up(&mut self, at: usize, why: &str) {
        let task = self.tasks.swap_remove(at);
        self.record(Event::Ended {
            step: task.step,
            why: why.into(),
        });
        self.tally.unsettled += 1;
        if task.session.is_none() {
            self.nodes[task.node] = Node::Empty;
        }
        if task
            .session
            .is_some_and(|session| session.ending.load(Ordering::Relaxed))
        {
            // A closing that goes on, or not, behind the driver's back.
            self.lose(task.node, Loss::Perhaps);
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
                    self.fallen[step.node] = None;
                    self.open(step, held, opening, give_up);
                }
            }
            Action::Restart(opening) => {
                if let Node::Open(_) = &self.nodes[step.node] {
                    self.fall(step.node, Fall::Kill);
                }
                if matches!(self.nodes[step.node], Node::Empty)
                    && let Some(held) = self.fallen[step.node].take()
                {
                    let held = Held {
                        daemons: held.daemons + 1,
                        ..held
                    };
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
                let (id, sabotage) = (step.id, session.sabotage);
                self.spawn(step, Some(session), give_up, async move {
                    Ended::Io(request(&volume, id, io, sabotage).await)
                });
            }
            Action::Close(give_up) => self.close(step, give_up, false),
            Action::Abandon => self.close(step, GiveUp::Never, true),
            Action::Drop => {
                if matches!(self.nodes[step.node], Node::Open(_)) {
                    self.lose(step.node, Loss::Perhaps);
                    self.nodes[step.node] = Node::Empty;
                }
            }
            Action::HandOver(heir) => self.hand_over(step, heir),
            Action::Crash => self.fall(step.node, Fall::PowerCut),
            Action::Kill => self.fall(step.node, Fall::Kill),
            Action::Freeze(time) => {
                let mut world = lock(&self.world);
                let until = world.now() + time;
                let frozen_until = &mut world.frozen_until[step.node];
                *frozen_until = until.max(*frozen_until);
                world.note(format_args!("node {} freezes for {time:?}", step.node));
            }
        }
    }

    fn open(&mut self, step: &Step, held: Held, opening: Opening, give_up: GiveUp) {
        self.nodes[step.node] = Node::Opening;
        lock(&self.world).openings.push((step.node, step.id));
        self.held.insert(step.id, held);
        self.caching.insert(step.id, opening.caching);
        if opening.recover != Recover::Replay {
            self.lose(step.node, Loss::Perhaps);
        }
        let store = SimStore::new(&self.world, step.node, step.id);
        let place = (Arc::clone(&self.world), step.node);
        let future = open(store, place, step.id, held, opening, self.plan.twins);
        self.spawn(step, None, give_up, async { Ended::Opened(future.await) });
    }

    fn close(&mut self, step: &Step, give_up: GiveUp, abandon: bool) {
        match std::mem::take(&mut self.nodes[step.node]) {
            Node::Open(session) => {
                session.ending.store(true, Ordering::Relaxed);
                let volumes = session.volumes.clone();
                if abandon {
                    self.lose(step.node, Loss::Perhaps);
                    volumes.iter().for_each(|volume| volume.abandon());
                }
                self.spawn(step, Some(session), give_up, async move {
                    Ended::Closed(close_all(&volumes).await)
                });
            }
            other => self.nodes[step.node] = other,
        }
    }

    pub fn spawn(
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
            begun: false,
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
            Ended::HandedOver(result) => {
                self.handed_over(step, task.node, result);
                Ok(())
            }
            Ended::Opened(Ok(session)) => {
                self.opened(task.node, session);
                Ok(())
            }
            Ended::Opened(Err(error)) => {
                self.nodes[task.node] = Node::Empty;
                if matches!(error, OpenError::Fenced { .. }) {
                    self.lose(task.node, Loss::Perhaps);
                }
                let what = timeless(&format!("not opened: {error}"));
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
                self.closed(task.node, session);
                if result.is_ok() {
                    self.given_back(session)?;
                }
                Ok(())
            }
        }
    }
}
