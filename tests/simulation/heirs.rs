//! Volumes that one daemon hands over to another on its node: the heir opens
//! them while the old one still lives, and either goes on in its stead or gives
//! up, or dies, and the old one goes on.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use dysk::volume::{Recover, Volume};
use tokio::time::{sleep, timeout};

use crate::check::{Event, Loss};
use crate::driver::{Driver, Ended, Node, Task};
use crate::outcome::timeless;
use crate::plan::{GiveUp, Heir, Opening, Step};
use crate::session::{Held, Session, open_as};
use crate::store::SimStore;
use crate::world::{Sabotage, SharedWorld, lock};

/// How long requests under way may take to end before the volume is left to
/// the old daemon.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the next daemon under the same lease holds.
pub fn heir_of(held: Held) -> Held {
    Held {
        daemons: held.daemons + 1,
        ..held
    }
}

impl Driver<'_> {
    /// Begins a hand-over of what is open on the step's node. What is under way
    /// there goes on; nothing new begins.
    pub fn hand_over(&mut self, step: &Step, heir: Heir) {
        let begun = |task: &Task| task.node != step.node || task.begun;
        let open = matches!(self.nodes[step.node], Node::Open(_));
        if self.plan.twins || !open || !self.tasks.iter().all(begun) {
            return;
        }
        let Node::Open(old) = std::mem::take(&mut self.nodes[step.node]) else {
            unreachable!("it was open");
        };
        let held = heir_of(old.held);
        self.nodes[step.node] = Node::HandingOver(old.clone());
        lock(&self.world).openings.push((step.node, step.id));
        self.held.insert(step.id, held);
        self.caching.insert(step.id, old.opening.caching);
        let place = (Arc::clone(&self.world), step.node);
        let future = hand_over(old, place, step.id, heir);
        self.spawn(step, None, GiveUp::Never, async {
            Ended::HandedOver(future.await)
        });
    }

    /// It came to an end, one way or the other.
    pub fn handed_over(&mut self, step: u32, node: usize, result: Result<Session, String>) {
        let Node::HandingOver(old) = std::mem::take(&mut self.nodes[node]) else {
            unreachable!("nothing else changes a node that hands over");
        };
        if !old.sound() {
            self.lose(node, Loss::Perhaps);
        }
        match result {
            Ok(session) => {
                self.tally.handed_over += 1;
                self.opened(node, session);
            }
            Err(why) => {
                self.tally.taken_back += 1;
                let what = timeless(&format!("not handed over: {why}"));
                self.record(Event::Noted { step, what });
                self.nodes[node] = Node::Open(old);
            }
        }
    }
}

/// The heir's session; or why there is none, and the old one goes on.
async fn hand_over(
    old: Session,
    (world, node): (SharedWorld, usize),
    id: u32,
    heir: Heir,
) -> Result<Session, String> {
    let volume = &old.volumes[0];
    if timeout(PATIENCE, volume.idle()).await.is_err() {
        return Err("the store keeps it busy".into());
    }
    let sabotaged = old.sabotage == Some(Sabotage::LetGo);
    let let_go = match sabotaged {
        true => Ok(()),
        false => volume.let_go().await,
    };
    let why = match let_go {
        Ok(()) => match inherit(&old, (&world, node), id, heir).await {
            Some(Ok(session)) => {
                // The old process ends here, without touching anything.
                if !sabotaged {
                    lock(&world).dead.insert(old.id);
                }
                session.volumes[0].go_on();
                return Ok(session);
            }
            Some(Err(error)) => error,
            None => format!("the heir {heir:?}"),
        },
        Err(error) => error.to_string(),
    };
    take_back(volume).await;
    lock(&world).dead.insert(id);
    Err(why)
}

/// The volume as the heir has it, unless that comes to nothing.
async fn inherit(
    old: &Session,
    (world, node): (&SharedWorld, usize),
    id: u32,
    heir: Heir,
) -> Option<Result<Session, String>> {
    let mut polls = match heir {
        Heir::Dies(polls) => polls,
        Heir::Succeeds | Heir::GivesUp => u32::MAX,
    };
    let store = SimStore::new(world, node, id);
    let place = (Arc::clone(world), node);
    let held = heir_of(old.held);
    // What to do with unflushed writes was decided when it was attached.
    let opening = Opening {
        recover: Recover::Replay,
        ..old.opening
    };
    let mut opening = pin!(open_as(store, place, id, held, opening, (false, true)));
    let opened = poll_fn(|context| {
        if polls == 0 {
            // The dead do nothing more, not even when they are dropped.
            lock(world).dead.insert(id);
            return Poll::Ready(None);
        }
        polls -= 1;
        opening.as_mut().poll(context).map(Some)
    });
    match (opened.await?, heir) {
        (Ok(session), Heir::GivesUp) => {
            let let_go = session.volumes[0].let_go().await;
            lock(world).dead.insert(id);
            // It ends either way.
            let_go.err().map(|error| Err(error.to_string()))
        }
        (Ok(_), Heir::Dies(_)) => {
            lock(world).dead.insert(id);
            None
        }
        (result, _) => Some(result.map_err(|error| error.to_string())),
    }
}

/// As the old daemon does: again and again.
async fn take_back(volume: &Arc<Volume<SimStore>>) {
    while volume.take_back().await.is_err() {
        sleep(Duration::from_millis(100)).await;
    }
}
