//! The end of a history: everything is closed on a store that is well, and
//! what is left is looked at.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dysk::blob::vhd::{self, Layout};
use dysk::device::DeviceError;
use dysk::volume::{Caching, Recover};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::blob::Blob;
use crate::check::{self, Event, Loss, Rank, Sessions};
use crate::driver::{Driver, LEASE, Node, SETTLES_WITHIN};
use crate::fate::Actor;
use crate::plan::{Cells, Io, NODES, Opening, Plan};
use crate::session::{Held, Session, close_all, lease_text, open, request, values};
use crate::store::SimStore;
use crate::world::lock;

/// The footer of the blob, where the plan has one.
pub fn footer(plan: &Plan) -> [u8; vhd::FOOTER] {
    vhd::footer(u64::from(plan.pages) * 512, 7, [3; 16])
}

/// The blob of the plan, before anything happens.
pub fn blob(plan: &Plan) -> Blob {
    let mut data = vec![0; plan.pages as usize * 512];
    if plan.vhd {
        data.extend_from_slice(&footer(plan));
    }
    Blob::new(data, plan.lease_first)
}

impl Driver<'_> {
    /// An error has to be one of the few that are promised.
    pub fn justify(&mut self, session: &Session, error: &DeviceError) -> Result<(), String> {
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
    pub fn given_back(&self, session: &Session) -> Result<(), String> {
        let world = lock(&self.world);
        match world.blob.holder(world.now()) {
            Some((id, false)) if id == lease_text(session.held.lease) && !self.plan.twins => Err(
                format!("the volume of #{} closed and keeps its lease", session.id),
            ),
            _ => Ok(()),
        }
    }

    /// Ends everything on a store that is well, and looks at what is left.
    pub async fn judge(&mut self) -> Result<(), String> {
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
                    Ok(Ok(())) => {
                        self.given_back(&session)?;
                        self.closed(node, &session);
                    }
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
        // Whoever comes next, and from elsewhere, finds this.
        self.record(Event::Opened {
            session: u32::MAX,
            loss: Loss::Unflushed,
        });
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
            caching: Caching::None,
            recover: Recover::Replay,
        };
        let store = SimStore::judge(&self.world);
        let held = Held {
            lease: id,
            daemons: 0,
        };
        self.held.insert(id, held);
        let place = (Arc::clone(&self.world), NODES);
        let session = open(store, place, id, held, opening, false)
            .await
            .map_err(|error| format!("not opened on a well store: {error}"))?;
        self.record(Event::Opened {
            session: id,
            loss: Loss::Nothing,
        });
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
            let values = request(volume, step, io, None)
                .await
                .map_err(|error| format!("{io} on a well store: {error}"))?;
            self.record(Event::Done { step, values });
        }
        close_all(&session.volumes)
            .await
            .map_err(|error| format!("not closed on a well store: {error}"))
    }

    /// Reads and mere trims that began before their holder's lease would have
    /// run out.
    fn unasking(&self) -> BTreeSet<u32> {
        let world = lock(&self.world);
        let begun = self.events.iter().filter_map(|(at, event)| match event {
            Event::Invoked {
                step,
                session,
                io: Io::Read(_) | Io::Trim(_, false),
            } if self.plan.map => Some((*at, *step, *session)),
            _ => None,
        });
        begun
            .filter(|(at, _, session)| {
                let held = self.held.get(session);
                let lease = held.map(|held| lease_text(held.lease));
                lease.is_some_and(|lease| world.blob.runs_out(&lease) > Some(*at))
            })
            .map(|(_, step, _)| step)
            .collect()
    }

    fn check(&self) -> Result<(), String> {
        let granted = lock(&self.world).blob.granted.clone();
        let rank = |held: &Held| {
            let granted = *granted.get(&lease_text(held.lease))?;
            let daemons = held.daemons;
            Some(Rank { granted, daemons })
        };
        let ranks = self
            .held
            .iter()
            .filter_map(|(id, held)| Some((*id, rank(held)?)));
        let sessions = Sessions {
            ranks: ranks.collect(),
            caching: self.caching.clone(),
            unasking: self.unasking(),
        };
        let events: Vec<Event> = self.events.iter().map(|(_, event)| event.clone()).collect();
        check::check(&events, self.plan.cells(), &sessions)
    }
}
