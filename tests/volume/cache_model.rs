//! The cache against a model: whatever was acknowledged is read back, whatever
//! was flushed is in the store, through daemon deaths, reboots, power cuts and
//! a store that fails, forgets to answer and executes late.
//!
//! Each history is drawn from a seed. `CACHE_SEED=n` replays one,
//! `CACHE_HISTORIES=n` runs more of them.

// All of this file is tests, and its sizes are small.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::sim_store::{Faults, SimStore};
use bytes::Bytes;
use dysk::blob::LeaseId;
use dysk::device::BlockDevice as _;
use dysk::volume::{Caching, OpenOptions, Recover, StagingOptions, Volume};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

/// The model's unit: a quarter of a page, so that unaligned I/O is covered.
const CELL: u64 = 128;
const SIZE: u64 = 384 << 10;
const CELLS: usize = (SIZE / CELL) as usize;

/// Longer than any history's faults can take, on the simulation's clock.
const STUCK: Duration = Duration::from_secs(3600);

/// What a cell may hold. The values are stamps of writes; 0 is zeroes.
#[derive(Clone, Debug)]
struct Cell {
    /// After everything acknowledged.
    now: BTreeSet<u64>,
    /// After a power cut at any moment since the last flush.
    after_power_cut: BTreeSet<u64>,
}

struct Model {
    cells: Vec<Cell>,
    next: u64,
}

#[derive(Clone, Debug)]
enum Op {
    Read {
        at: u64,
        len: u64,
    },
    Write {
        at: u64,
        len: u64,
        stamp: u64,
        fua: bool,
    },
    Zero {
        at: u64,
        len: u64,
        fua: bool,
    },
    Trim {
        at: u64,
        len: u64,
        fua: bool,
    },
    Flush,
}

impl Op {
    /// The cells it changes, and to what.
    fn changes(&self) -> Option<(std::ops::Range<usize>, u64)> {
        let cells = |at: u64, len: u64| (at / CELL) as usize..((at + len) / CELL) as usize;
        match *self {
            Op::Write { at, len, stamp, .. } => Some((cells(at, len), stamp)),
            Op::Zero { at, len, .. } => Some((cells(at, len), 0)),
            Op::Trim { at, len, .. } => {
                let start = at.next_multiple_of(512);
                let end = (at + len) / 512 * 512;
                (start < end).then(|| (cells(start, end - start), 0))
            }
            _ => None,
        }
    }

    fn is_fua(&self) -> bool {
        matches!(
            self,
            Op::Write { fua: true, .. } | Op::Zero { fua: true, .. } | Op::Trim { fua: true, .. }
        )
    }
}

fn pattern(stamp: u64, len: u64) -> Bytes {
    stamp.to_le_bytes().repeat(len as usize / 8).into()
}

/// The stamp in a cell; a torn one is a failure.
fn stamp_of(cell: &[u8], at: usize) -> u64 {
    let stamp = &cell[..8];
    assert!(
        cell.chunks(8).all(|eight| eight == stamp),
        "cell {at} is torn"
    );
    u64::from_le_bytes(stamp.try_into().unwrap())
}

impl Model {
    fn new() -> Self {
        let zero = BTreeSet::from([0]);
        let cell = Cell {
            now: zero.clone(),
            after_power_cut: zero,
        };
        Self {
            cells: vec![cell; CELLS],
            next: 1,
        }
    }

    fn draw(&mut self, rng: &mut SmallRng) -> Op {
        let (unit, most) = match rng.random_range(0..10) {
            0 => (CELL, 40),
            1..4 => (512, 20),
            4 => (4096, 60),
            _ => (4096, 2),
        };
        let len = unit * rng.random_range(1..=most);
        let last = (SIZE - len) / unit;
        // Half of it goes to the same few blocks.
        let hot = rng.random_bool(0.5);
        let at = unit * rng.random_range(0..=if hot { last.min(32 << 10) / unit } else { last });
        let fua = rng.random_bool(0.15);
        match rng.random_range(0..100) {
            0..45 => {
                self.next += 1;
                Op::Write {
                    at,
                    len,
                    stamp: self.next,
                    fua,
                }
            }
            45..80 => Op::Read { at, len },
            80..85 => Op::Zero { at, len, fua },
            85..89 => Op::Trim { at, len, fua },
            _ => Op::Flush,
        }
    }

    /// A batch ran; `done` says which of it was acknowledged, `reads` what was read.
    fn ran(&mut self, batch: &[Op], done: &[bool], reads: &[(u64, Vec<u8>)]) {
        for (at, bytes) in reads {
            for (cell, bytes) in (*at / CELL..).zip(bytes.chunks(CELL as usize)) {
                let cell = cell as usize;
                let stamp = stamp_of(bytes, cell);
                let meanwhile = batch.iter().any(|op| {
                    op.changes()
                        .is_some_and(|(cells, value)| value == stamp && cells.contains(&cell))
                });
                let allowed = &self.cells[cell].now;
                assert!(
                    meanwhile || allowed.contains(&stamp),
                    "cell {cell} reads {stamp}, may be {allowed:?}"
                );
            }
        }
        let flushed = batch
            .iter()
            .zip(done)
            .any(|(op, done)| *done && matches!(op, Op::Flush));
        for (number, cell) in self.cells.iter_mut().enumerate() {
            if flushed {
                cell.after_power_cut = cell.now.clone();
            }
            let writers: Vec<(u64, bool, bool)> = batch
                .iter()
                .zip(done)
                .filter_map(|(op, done)| {
                    let (cells, value) = op.changes()?;
                    cells
                        .contains(&number)
                        .then_some((value, *done, op.is_fua()))
                })
                .collect();
            if writers.is_empty() {
                continue;
            }
            let all: BTreeSet<u64> = writers.iter().map(|(value, ..)| *value).collect();
            if writers.iter().any(|(_, done, fua)| *done && *fua) {
                cell.after_power_cut = all.clone();
            } else {
                cell.after_power_cut.extend(&all);
            }
            if writers.iter().any(|(_, done, _)| *done) {
                cell.now = all;
            } else {
                cell.now.extend(&all);
            }
        }
    }

    /// Nothing is under way: what is read now stays.
    fn settle(&mut self, at: u64, bytes: &[u8]) {
        for (cell, bytes) in (at / CELL..).zip(bytes.chunks(CELL as usize)) {
            let number = cell as usize;
            let stamp = stamp_of(bytes, number);
            let cell = &mut self.cells[number];
            assert!(
                cell.now.contains(&stamp),
                "cell {number} reads {stamp}, may be {:?}",
                cell.now
            );
            cell.now = BTreeSet::from([stamp]);
        }
    }

    /// The power was cut: what was acknowledged may be undone back to the last flush.
    fn cut(&mut self) {
        for cell in &mut self.cells {
            cell.now = cell.after_power_cut.clone();
        }
    }
}

/// How a life ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Close,
    /// SIGKILL, and a new daemon that resumes the lease.
    Killed,
    /// SIGKILL, and an attach with a new lease.
    KilledAndForgotten,
    /// The node restarts; the staging folder was memory.
    PowerCut,
    /// The node restarts; the staging folder is a disk, some of which is old.
    PowerCutWithDisk,
}

struct History {
    store: SimStore,
    model: Arc<Mutex<Model>>,
    folder: tempfile::TempDir,
    lease: LeaseId,
    boot: u64,
    disk: bool,
    caching: Caching,
    rng: SmallRng,
}

impl History {
    fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let store = SimStore::new(SIZE as usize, rng.random());
        store.blob().faults = match rng.random_range(0..3) {
            0 => Faults::default(),
            1 => Faults {
                refused: 5,
                unknown: 5,
                late: 5,
            },
            _ => Faults {
                refused: 10,
                unknown: 10,
                late: 20,
            },
        };
        store.blob().latency = Duration::from_micros(rng.random_range(0..20_000));
        Self {
            store,
            model: Arc::new(Mutex::new(Model::new())),
            folder: tempfile::tempdir().unwrap(),
            lease: LeaseId::random(),
            boot: 0,
            disk: rng.random_bool(0.5),
            caching: if rng.random_range(0..8) == 0 {
                Caching::ReadOnly
            } else {
                Caching::ReadWrite
            },
            rng,
        }
    }

    fn options(&self, keeper: tokio::runtime::Handle, resume: bool) -> OpenOptions {
        OpenOptions {
            caching: self.caching,
            staging: StagingOptions {
                dir: self.folder.path().to_owned(),
                size: 256 << 10,
                boot: Some(format!("boot-{}", self.boot)),
                survives_power_cut: Some(self.disk),
                recover: Recover::Replay,
                ..StagingOptions::default()
            },
            resume,
            break_lease: !resume,
            keeper: Some(keeper),
            ..OpenOptions::new(self.lease.clone())
        }
    }

    fn staging_file(&self) -> Option<PathBuf> {
        let mut files = std::fs::read_dir(self.folder.path()).unwrap();
        files.next().map(|entry| entry.unwrap().path())
    }

    /// One daemon's life.
    fn live(&mut self, end: End, resume: bool) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        let options = self.options(runtime.handle().clone(), resume);
        let batches = self.rng.random_range(1..40);
        let (store, model) = (self.store.clone(), Arc::clone(&self.model));
        let mut rng = SmallRng::seed_from_u64(self.rng.random());
        let file = Arc::new(Mutex::new(None::<Vec<u8>>));
        let volume = runtime.block_on(async {
            let volume = Volume::open(store, options).await.expect("opens");
            check_all(&volume, &model).await;
            for _ in 0..batches {
                run_batch(&volume, &model, &mut rng, None).await;
                if end == End::PowerCutWithDisk && rng.random_range(0..8) == 0 {
                    *file.lock().unwrap() =
                        self.staging_file().map(|path| std::fs::read(path).unwrap());
                }
                if rng.random_range(0..12) == 0 {
                    tokio::time::sleep(Duration::from_millis(rng.random_range(0..9000))).await;
                }
            }
            check_all(&volume, &model).await;
            if end == End::Close {
                tokio::time::timeout(STUCK, volume.close())
                    .await
                    .unwrap_or_else(|_| panic!("stuck closing: {:?}", volume.status()))
                    .expect("closes");
                return volume;
            }
            // Die in the middle of things.
            let steps = rng.random_range(0..30_000);
            run_batch(
                &volume,
                &model,
                &mut rng,
                Some(Duration::from_micros(steps)),
            )
            .await;
            volume
        });
        drop(runtime);
        drop(volume);
        match end {
            End::Close => {
                assert_eq!(self.staging_file(), None, "a clean close leaves nothing");
                let model = self.model.lock().unwrap();
                let blob = self.store.blob();
                for (number, bytes) in blob.bytes.chunks(CELL as usize).enumerate() {
                    let stamp = stamp_of(bytes, number);
                    assert!(
                        model.cells[number].now.contains(&stamp),
                        "cell {number} in the store"
                    );
                }
                drop(blob);
                drop(model);
                self.lease = LeaseId::random();
            }
            End::Killed => {}
            End::KilledAndForgotten => self.lease = LeaseId::random(),
            End::PowerCut => {
                if let Some(path) = self.staging_file() {
                    std::fs::remove_file(path).unwrap();
                }
                self.reboot();
            }
            End::PowerCutWithDisk => {
                if let (Some(path), Some(old)) = (self.staging_file(), file.lock().unwrap().take())
                {
                    age(&path, &old, &mut self.rng);
                }
                self.reboot();
            }
        }
    }

    fn reboot(&mut self) {
        self.model.lock().unwrap().cut();
        self.boot += 1;
        self.lease = LeaseId::random();
    }

    fn run(&mut self) {
        let mut resume = false;
        for _ in 0..self.rng.random_range(2..7) {
            let ends = if self.disk {
                [
                    End::Close,
                    End::Killed,
                    End::KilledAndForgotten,
                    End::PowerCutWithDisk,
                ]
            } else {
                [
                    End::Close,
                    End::Killed,
                    End::KilledAndForgotten,
                    End::PowerCut,
                ]
            };
            let end = ends[self.rng.random_range(0..ends.len())];
            // An epoch that could not be recorded before the kill is refused
            // by design; the history goes on by resuming then.
            let end = if end == End::KilledAndForgotten && !self.quiet() {
                End::Killed
            } else {
                end
            };
            let end = if end == End::PowerCutWithDisk && !self.quiet() {
                End::Killed
            } else {
                end
            };
            self.live(end, resume);
            resume = end == End::Killed;
        }
        self.live(End::Close, resume);
    }

    /// No fault makes the number rise.
    fn quiet(&self) -> bool {
        let faults = self.store.blob().faults;
        faults.unknown == 0 && faults.late == 0
    }
}

/// Takes each sector of the file at random from now or from an earlier time,
/// but for the header, which is always written durably.
fn age(path: &Path, old: &[u8], rng: &mut SmallRng) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let stale = rng.random_range(0.0..1.0);
    for at in (8192..old.len()).step_by(512) {
        if rng.random_bool(stale) {
            file.write_all_at(&old[at..(at + 512).min(old.len())], at as u64)
                .unwrap();
        }
    }
}

async fn check_all(volume: &Arc<Volume<SimStore>>, model: &Arc<Mutex<Model>>) {
    for at in (0..SIZE).step_by(64 << 10) {
        let bytes = volume.read(at, 64 << 10).await.expect("reads").to_bytes();
        model.lock().unwrap().settle(at, &bytes);
    }
}

/// Runs a few operations together, to their end or for `limit`.
async fn run_batch(
    volume: &Arc<Volume<SimStore>>,
    model: &Arc<Mutex<Model>>,
    rng: &mut SmallRng,
    limit: Option<Duration>,
) {
    let batch: Vec<Op> = {
        let mut model = model.lock().unwrap();
        (0..rng.random_range(1..6))
            .map(|_| model.draw(rng))
            .collect()
    };
    let outcome = Arc::new(Mutex::new((vec![false; batch.len()], Vec::new())));
    let mut tasks = tokio::task::JoinSet::new();
    for (number, op) in batch.iter().cloned().enumerate() {
        let (volume, outcome) = (Arc::clone(volume), Arc::clone(&outcome));
        let delay = Duration::from_micros(rng.random_range(0..8000));
        tasks.spawn(async move {
            tokio::time::sleep(delay).await;
            let result = match op {
                Op::Read { at, len } => match volume.read(at, len as u32).await {
                    Ok(data) => {
                        let bytes = data.to_bytes().to_vec();
                        outcome.lock().unwrap().1.push((at, bytes));
                        Ok(())
                    }
                    Err(error) => Err(error),
                },
                Op::Write {
                    at,
                    len,
                    stamp,
                    fua,
                } => volume.write(at, pattern(stamp, len), fua).await,
                Op::Zero { at, len, fua } => volume.write_zeroes(at, len, fua, false).await,
                Op::Trim { at, len, fua } => volume.trim(at, len, fua).await,
                Op::Flush => volume.flush().await,
            };
            result.expect("waits rather than fails");
            outcome.lock().unwrap().0[number] = true;
        });
    }
    let all = async {
        while tasks
            .join_next()
            .await
            .transpose()
            .expect("no panic")
            .is_some()
        {}
    };
    match limit {
        None => tokio::time::timeout(STUCK, all)
            .await
            .unwrap_or_else(|_| panic!("stuck: {:?} {batch:?}", volume.status())),
        Some(limit) => {
            // What is cut short here dies with the runtime.
            tokio::time::timeout(limit, all).await.ok();
        }
    }
    let (done, reads) = &*outcome.lock().unwrap();
    model.lock().unwrap().ran(&batch, done, reads);
    if limit.is_some() {
        tasks.detach_all();
    }
}

#[test]
fn histories_keep_every_promise() {
    let seeds: Vec<u64> = match std::env::var("CACHE_SEED") {
        Ok(seed) => vec![seed.parse().expect("a number")],
        Err(_) => {
            let histories =
                std::env::var("CACHE_HISTORIES").map_or(60, |n| n.parse().expect("a number"));
            let first: u64 = rand::random_range(0..1 << 40);
            (first..first + histories).collect()
        }
    };
    for seed in seeds {
        let history = std::panic::catch_unwind(|| History::new(seed).run());
        assert!(history.is_ok(), "replay with CACHE_SEED={seed}");
    }
}
