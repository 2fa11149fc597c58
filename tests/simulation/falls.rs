//! Daemons that die, nodes that lose power, and what whoever comes next has to
//! find of the unflushed writes they left.

use std::time::Duration;

use dysk::volume::Caching;

use crate::check::{Event, Loss};
use crate::driver::{Driver, Node};
use crate::heirs::heir_of;
use crate::session::{Session, lease_text};
use crate::world::{Fall, lock};

/// The last holder, and what may have become of its unflushed writes.
pub struct Line {
    pub session: u32,
    pub node: usize,
    pub loss: Loss,
}

impl Driver<'_> {
    /// Takes note of daemons that fell at a point of their own.
    pub fn follow_cuts(&mut self, now: Duration) {
        let fallen = std::mem::take(&mut lock(&self.world).fallen);
        for cut in fallen {
            self.fall(cut.node, cut.fall);
            let then = cut.then.into_iter();
            self.following
                .extend(then.map(|(after, step)| (now + after, step)));
        }
    }

    /// The node's daemon is no more, and with a power cut all it had in memory.
    pub fn fall(&mut self, node: usize, fall: Fall) {
        match &self.nodes[node] {
            Node::Open(session) => {
                self.fallen[node] = Some(session.held);
                if !session.sound() {
                    self.lose(node, Loss::Perhaps);
                }
            }
            Node::Opening => {
                let opening = self
                    .tasks
                    .iter()
                    .find(|task| task.node == node && task.session.is_none());
                self.fallen[node] = opening.map(|task| self.held[&task.step]);
            }
            Node::HandingOver(session) => {
                // The heir may have raised the sequence number already.
                self.fallen[node] = Some(heir_of(session.held));
                if !session.sound() {
                    self.lose(node, Loss::Perhaps);
                }
            }
            Node::Empty => {}
        }
        {
            let mut world = lock(&self.world);
            world.note(format_args!("node {node}: {fall:?}"));
            world.bury(node);
            world.frozen_until[node] = Duration::ZERO;
        }
        while let Some(at) = self.tasks.iter().position(|task| task.node == node) {
            // One that was closing may have been fenced before.
            let closing = self.tasks[at].session.as_ref();
            if closing.is_some_and(|session| !session.sound()) {
                self.lose(node, Loss::Perhaps);
            }
            self.give_up(at, "crashed");
        }
        self.nodes[node] = Node::Empty;
        let mut world = lock(&self.world);
        world.disks[node].lock().expect("whole").unlock();
        if fall == Fall::PowerCut {
            world.lose_power(node);
            drop(world);
            let loss = match self.plan.disk {
                true => Loss::Anything,
                false => Loss::Unflushed,
            };
            self.lose(node, loss);
            // Its lease is in nobody's memory either.
            self.fallen[node] = None;
        }
    }

    /// What the last holder has on this node may be lost so.
    pub fn lose(&mut self, node: usize, loss: Loss) {
        if let Some(line) = self.line.as_mut().filter(|line| line.node == node) {
            line.loss = line.loss.max(loss);
        }
    }

    /// A volume is open on `node` now.
    pub fn opened(&mut self, node: usize, session: Session) {
        self.tally.openings += 1;
        // One that is closing yet may have lost the volume to this very opening.
        let closing = self.tasks.iter().filter(|task| task.node == node);
        let mut sessions = closing.filter_map(|task| task.session.as_ref());
        if sessions.any(|session| !session.sound()) {
            self.lose(node, Loss::Perhaps);
        }
        let loss = self.inherits(session.id, node);
        self.record(Event::Opened {
            session: session.id,
            loss,
        });
        self.tally.inherited += u64::from(self.staged(session.id) && loss == Loss::Nothing);
        self.tally.bereft += u64::from(self.staged(session.id) && loss > Loss::Perhaps);
        self.line = Some(Line {
            session: session.id,
            node,
            loss: Loss::Nothing,
        });
        self.nodes[node] = Node::Open(session);
    }

    /// What a session sees of its predecessor's unflushed writes.
    pub fn inherits(&self, session: u32, node: usize) -> Loss {
        let Some(line) = &self.line else {
            return Loss::Nothing;
        };
        if self.caching[&line.session] != Caching::ReadWrite {
            return Loss::Nothing;
        }
        if line.node != node {
            return Loss::Unflushed;
        }
        let world = lock(&self.world);
        let granted = |session: &u32| {
            let lease = lease_text(self.held[session].lease);
            world.blob.granted.get(&lease).copied()
        };
        let between = granted(&line.session)..granted(&session);
        let others = world.openings.iter().any(|(on, opening)| {
            *on != node && between.contains(&granted(opening)) && granted(opening).is_some()
        });
        line.loss.max(match others {
            true => Loss::Perhaps,
            false => Loss::Nothing,
        })
    }

    /// It stages, and so did its predecessor.
    pub fn staged(&self, session: u32) -> bool {
        let staged = |session| self.caching[session] == Caching::ReadWrite;
        staged(&session) && self.line.as_ref().is_some_and(|line| staged(&line.session))
    }

    /// A volume that was closed in good order has flushed everything.
    pub fn closed(&mut self, node: usize, session: &Session) {
        let last = self
            .line
            .as_ref()
            .is_some_and(|line| line.session == session.id && line.loss == Loss::Nothing);
        if last && session.sound() {
            self.record(Event::Closed {
                session: session.id,
            });
        } else {
            self.lose(node, Loss::Perhaps);
        }
    }
}
