//! A pod that writes, and what is to be found of it afterwards.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::eventually;

/// A pod that writes: records of 4 KiB, each synced before the next.
pub struct Writer {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU32>,
    thread: std::thread::JoinHandle<()>,
}

const RECORD: usize = 4096;

fn record(number: u32) -> Vec<u8> {
    number.to_le_bytes().repeat(RECORD / 4)
}

impl Writer {
    pub fn start(path: PathBuf) -> Self {
        let (stop, written) = (Arc::<AtomicBool>::default(), Arc::<AtomicU32>::default());
        let mut file = File::create(&path).expect("a file");
        let (told, count) = (stop.clone(), written.clone());
        let thread = std::thread::spawn(move || {
            for number in 0.. {
                if told.load(Ordering::Acquire) {
                    return;
                }
                file.write_all(&record(number)).expect("written");
                file.sync_data().expect("synced");
                count.store(number + 1, Ordering::Release);
            }
        });
        Self {
            path,
            stop,
            written,
            thread,
        }
    }

    /// Waits for some more records.
    #[track_caller]
    pub fn goes_on(&self) {
        let before = self.written.load(Ordering::Acquire);
        eventually("the pod writes on", || {
            assert!(!self.thread.is_finished(), "the pod was told an error");
            self.written.load(Ordering::Acquire) > before + 5
        });
    }

    /// Ends it; answers with where and how many records it wrote.
    pub fn end(self) -> (PathBuf, u32) {
        self.stop.store(true, Ordering::Release);
        self.thread.join().expect("no error was told");
        (self.path, self.written.load(Ordering::Acquire))
    }
}

/// All records are there, and nothing else.
#[track_caller]
pub fn check_records(path: &Path, written: u32) {
    let found = fs::read(path).expect("there");
    assert_eq!(found.len(), written as usize * RECORD);
    for (number, found) in (0..).zip(found.chunks(RECORD)) {
        assert!(found == record(number), "record {number} is another");
    }
}
