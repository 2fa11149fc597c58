//! One open volume, and the requests that are made of it.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use dysk::blob::{LeaseId, StorageError};
use dysk::device::{BlockDevice, DeviceError};
use dysk::volume::{Budget, OpenError, OpenOptions, StagingOptions, Volume};
use tokio::runtime::Handle;

use crate::check::changes;
use crate::files::SimFiles;
use crate::plan::{CELL, Cells, Io, Opening};
use crate::store::SimStore;
use crate::world::{Sabotage, SharedWorld, lock};

pub type SimVolume = Arc<Volume<SimStore>>;

/// A volume that is open on a node: usually one, or twins.
#[derive(Clone)]
pub struct Session {
    /// The step that opened it.
    pub id: u32,
    pub held: Held,
    pub opening: Opening,
    pub volumes: Vec<SimVolume>,
    pub sabotage: Option<Sabotage>,
    pub io_deadline: bool,
    pub ending: Arc<AtomicBool>,
}

impl Session {
    /// What the volume has cached is its own: it is not fenced, and nothing
    /// was set aside.
    pub fn sound(&self) -> bool {
        self.volumes.iter().all(|volume| {
            let status = volume.status();
            let aside = status.cache.and_then(|cache| cache.set_aside);
            status.fenced.is_none() && aside.is_none()
        })
    }
}

/// The lease that a session holds.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// The step that acquired it.
    pub lease: u32,
    /// How many daemons held it before.
    pub daemons: u32,
}

pub fn lease_text(opening: u32) -> String {
    opening.to_string()
}

/// The staging folder of `node` as the daemon sees it that makes the opening
/// `id`.
fn staging(world: &SharedWorld, node: usize, id: u32, opening: Opening) -> StagingOptions {
    let (boots, plan, sabotage) = {
        let world = lock(world);
        (world.boots[node], Arc::clone(&world.plan), world.sabotage)
    };
    let boots = match sabotage {
        Some(Sabotage::Boot) => 0,
        _ => boots,
    };
    StagingOptions {
        dir: "/staging".into(),
        // The least there is; a budget makes it less.
        size: 0,
        budget: plan.budget.map_or_else(Budget::unlimited, Budget::new),
        recover: opening.recover,
        boot: Some(format!("{node}-{boots}")),
        survives_power_cut: Some(plan.disk),
        files: Arc::new(SimFiles::new(world, node, id)),
    }
}

pub async fn open(
    store: SimStore,
    (world, node): (SharedWorld, usize),
    id: u32,
    held: Held,
    opening: Opening,
    twins: bool,
) -> Result<Session, OpenError> {
    open_as(store, (world, node), id, held, opening, (twins, false)).await
}

/// As [`open`]; and whether the write-back is held back, as an heir's is until
/// it is told to go on.
pub async fn open_as(
    store: SimStore,
    (world, node): (SharedWorld, usize),
    id: u32,
    held: Held,
    opening: Opening,
    (twins, hold_back): (bool, bool),
) -> Result<Session, OpenError> {
    let mut options = OpenOptions::new(LeaseId::from_text(lease_text(held.lease)));
    options.resume = held.daemons > 0;
    options.hold_back = hold_back;
    options.break_lease = opening.break_lease;
    options.wait = opening.wait;
    options.attempt_deadline = opening.attempt_deadline;
    options.io_deadline = opening.io_deadline;
    options.keeper = Some(Handle::current());
    options.caching = opening.caching;
    options.staging = staging(&world, node, id, opening);
    let sabotage = {
        let world = lock(&world);
        options.allocation_map = world.plan.map;
        world.sabotage
    };
    let mut volumes = vec![Volume::open(store.clone(), options.clone()).await?];
    if twins {
        volumes.push(Volume::open(store, options).await?);
    }
    Ok(Session {
        id,
        held,
        opening,
        volumes,
        sabotage,
        io_deadline: opening.io_deadline.is_some(),
        ending: Arc::new(AtomicBool::new(false)),
    })
}

pub async fn close_all(volumes: &[SimVolume]) -> Result<(), StorageError> {
    for volume in volumes {
        volume.close().await?;
    }
    Ok(())
}

/// Makes the request of step `id` and reads the values of cells off its answer.
pub async fn request(
    volume: &SimVolume,
    id: u32,
    io: Io,
    sabotage: Option<Sabotage>,
) -> Result<Vec<(u32, u64)>, DeviceError> {
    let none = Vec::new();
    let io = match (sabotage, io) {
        (Some(Sabotage::Flush), Io::Flush) => return Ok(none),
        (Some(Sabotage::Fua), Io::Write(cells, _)) => Io::Write(cells, false),
        (Some(Sabotage::Fua), Io::Zero(cells, _)) => Io::Zero(cells, false),
        _ => io,
    };
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
pub fn values(cells: Cells, data: &[u8]) -> Result<Vec<(u32, u64)>, String> {
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
