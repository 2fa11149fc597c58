//! Large buffers, used again.
//!
//! A payload of a megabyte in a fresh buffer costs a page fault for each of its
//! pages, together more than copying it. So the buffers of the last payloads are
//! kept for the next, up to [`MOST_KEPT`] bytes in the process, and those that
//! nobody needed for a while are given back to the node.
//!
//! The C library cannot do that for us: memory that is locked it cannot take out
//! of its heaps, so it would keep what the busiest moment took. From [`LARGE`] on
//! each buffer is mapped by itself ([`set_up_allocator`]), whose end is its end.

use std::convert::Infallible;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;

/// Payloads of at least this many bytes get a buffer that is used again.
pub const LARGE: usize = 1 << 20;

/// Most bytes kept for the next payloads, in the whole process.
pub const MOST_KEPT: usize = 4 << 20;

/// Buffers that nobody needed for so long are given back.
const UNUSED: Duration = Duration::from_secs(2);

/// See [`keep_heap_ends`].
#[cfg(target_env = "gnu")]
const HEAP_END: usize = 16 << 20;

static POOL: Mutex<Pool> = Mutex::new(Pool::new());

/// Buffers of one size.
#[derive(Debug)]
struct Shelf {
    room: usize,
    buffers: Vec<Vec<u8>>,
    /// The fewest that lay here since the last look: so many were not needed.
    fewest: usize,
}

#[derive(Debug)]
struct Pool([Shelf; 3]);

impl Shelf {
    const fn new(room: usize) -> Self {
        Self {
            room,
            buffers: Vec::new(),
            fewest: 0,
        }
    }

    fn take(&mut self) -> Option<Vec<u8>> {
        let buffer = self.buffers.pop();
        self.fewest = self.fewest.min(self.buffers.len());
        buffer
    }

    fn take_unused(&mut self) -> Vec<Vec<u8>> {
        let unused = self.buffers.split_off(self.buffers.len() - self.fewest);
        self.fewest = self.buffers.len();
        unused
    }
}

impl Pool {
    const fn new() -> Self {
        Self([
            Shelf::new(LARGE),
            Shelf::new(2 * LARGE),
            Shelf::new(4 * LARGE),
        ])
    }

    fn kept(&self) -> usize {
        let of = |shelf: &Shelf| shelf.buffers.len() * shelf.room;
        self.0.iter().map(of).sum()
    }

    /// A kept buffer with room for `len` bytes, [`LARGE`] or more, or how much room
    /// a new one is to have.
    fn take(&mut self, len: usize) -> Result<Vec<u8>, usize> {
        let shelf = self.0.iter_mut().find(|shelf| shelf.room >= len);
        shelf.map_or(Err(len), |shelf| shelf.take().ok_or(shelf.room))
    }

    /// Keeps `buffer` if it is of use and there is room.
    fn put(&mut self, mut buffer: Vec<u8>) -> Option<Vec<u8>> {
        let full = self.kept() + buffer.capacity() > MOST_KEPT;
        let room = buffer.capacity();
        match self.0.iter_mut().find(|shelf| shelf.room == room) {
            Some(shelf) if !full => {
                buffer.clear();
                shelf.buffers.push(buffer);
                None
            }
            _ => Some(buffer),
        }
    }
}

/// Never poisoned: nothing in there panics.
fn locked(pool: &Mutex<Pool>) -> MutexGuard<'_, Pool> {
    pool.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A payload's bytes, to be filled as a [`Vec`]. Dropped, whether shared before or
/// not, a large one leaves its memory to another payload.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    pool: &'static Mutex<Pool>,
}

impl Default for Buffer {
    /// Empty, without room.
    fn default() -> Self {
        Vec::new().into()
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, pool: &POOL }
    }
}

impl Deref for Buffer {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes.capacity() >= LARGE {
            let refused = locked(self.pool).put(std::mem::take(&mut self.bytes));
            // Unmapped without the lock.
            drop(refused);
        }
    }
}

impl Buffer {
    /// An empty one with room for `len` bytes.
    #[must_use]
    pub fn with_room(len: usize) -> Self {
        if len < LARGE {
            return Vec::with_capacity(len).into();
        }
        let found = locked(&POOL).take(len);
        found.unwrap_or_else(Vec::with_capacity).into()
    }

    /// What is in it, to be shared.
    #[must_use]
    pub fn share(mut self) -> Bytes {
        if self.bytes.capacity() < LARGE {
            return std::mem::take(&mut self.bytes).into();
        }
        Bytes::from_owner(self)
    }
}

/// Gives back, for as long as it is polled, what nobody has needed for a while.
pub async fn give_back_unused() -> Infallible {
    loop {
        tokio::time::sleep(UNUSED).await;
        let unused = locked(&POOL).0.each_mut().map(Shelf::take_unused);
        drop(unused);
    }
}

/// Has the C library map every buffer of [`LARGE`] bytes and more by itself,
/// whatever was freed before. False when it refuses.
#[cfg(target_env = "gnu")]
pub fn set_up_allocator() -> bool {
    tell_allocator(libc::M_MMAP_THRESHOLD, LARGE)
}

/// Has the C library keep 16 MiB at the end of each of its heaps, and not give
/// them back and fetch them again with every answer: there come and go the pieces
/// in which answers are read, some hundred kilobytes each. Of no use to a process
/// whose memory is locked, which loses nothing there. False when it refuses.
#[cfg(target_env = "gnu")]
pub fn keep_heap_ends() -> bool {
    tell_allocator(libc::M_TRIM_THRESHOLD, HEAP_END)
}

/// See mallopt(3).
#[cfg(target_env = "gnu")]
fn tell_allocator(setting: libc::c_int, bytes: usize) -> bool {
    let bytes = i32::try_from(bytes).expect("some megabytes");
    // SAFETY: it takes two numbers and no pointer, and the C library locks what
    // it changes.
    unsafe { libc::mallopt(setting, bytes) == 1 }
}

/// Other C libraries have no such settings.
#[cfg(not(target_env = "gnu"))]
pub fn set_up_allocator() -> bool {
    true
}

/// Other C libraries have no such settings.
#[cfg(not(target_env = "gnu"))]
pub fn keep_heap_ends() -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(room: usize) -> Vec<u8> {
        let mut buffer = Vec::with_capacity(room);
        buffer.push(1);
        buffer
    }

    #[test]
    fn a_buffer_serves_what_fits_and_is_empty_again() {
        let mut pool = Pool::new();
        assert_eq!(pool.take(LARGE + 1), Err(2 * LARGE), "a new one");
        assert_eq!(pool.put(full(2 * LARGE)), None);
        assert_eq!(pool.take(LARGE), Err(LARGE), "of another size");
        assert_eq!(pool.take(LARGE + 1), Ok(Vec::new()));
        assert_eq!(pool.take(4 * LARGE + 1), Err(4 * LARGE + 1), "huge");
        assert!(pool.put(full(LARGE + 1)).is_some(), "of no use");
    }

    #[test]
    fn no_more_is_kept_than_there_is_room_for() {
        let mut pool = Pool::new();
        let refused = (0..3).filter_map(|_| pool.put(full(2 * LARGE))).count();
        assert_eq!((refused, pool.kept()), (1, MOST_KEPT));
        assert!(pool.put(full(LARGE)).is_some());
    }

    #[test]
    fn what_was_not_needed_between_two_looks_is_given_back() {
        let mut pool = Pool::new();
        for _ in 0..3 {
            pool.put(full(LARGE));
        }
        let [shelf, ..] = &mut pool.0;
        assert_eq!(shelf.take_unused().len(), 0, "used until now");
        let taken = shelf.take().expect("there");
        shelf.buffers.push(taken);
        assert_eq!(shelf.take_unused().len(), 2);
        assert_eq!(shelf.take_unused().len(), 1);
        assert_eq!(shelf.take_unused().len(), 0);
    }

    fn of(pool: &'static Mutex<Pool>) -> Buffer {
        let bytes = full(LARGE);
        Buffer { bytes, pool }
    }

    #[test]
    fn shared_bytes_leave_their_buffer_when_the_last_one_goes() {
        static OWN: Mutex<Pool> = Mutex::new(Pool::new());
        let mut buffer = of(&OWN);
        buffer.resize(LARGE, 7);
        let bytes = buffer.share();
        let part = bytes.slice(1..3);
        drop(bytes);
        assert_eq!(&part[..], [7, 7]);
        assert_eq!(locked(&OWN).kept(), 0);
        drop(part);
        assert_eq!(locked(&OWN).kept(), LARGE);
    }

    #[test]
    fn a_buffer_that_was_never_shared_is_kept_as_well() {
        static OWN: Mutex<Pool> = Mutex::new(Pool::new());
        drop(of(&OWN));
        assert_eq!(locked(&OWN).kept(), LARGE);
    }
}

#[cfg(all(test, target_env = "gnu"))]
mod allocator_tests {
    use super::*;
    use std::process::Command;

    const BUFFER: usize = 2 * LARGE;
    const BUFFERS: usize = 64;
    const THIS: &str =
        "buffers::allocator_tests::large_buffers_are_given_back_where_they_would_be_kept";
    /// Tells the test that it runs in a process of its own, and what to look at.
    const ALONE: &str = "DYSK_TEST_LARGE_BUFFERS";

    /// Bytes that the C library keeps for the next time.
    fn kept() -> usize {
        // SAFETY: it takes nothing, and returns numbers.
        unsafe { libc::mallinfo2() }.fordblks
    }

    /// What stays when large buffers are freed that were in use at once.
    fn left_over() -> usize {
        // What the C library takes for a sign that such sizes are usual.
        drop(std::hint::black_box(vec![1u8; BUFFER]));
        let before = kept();
        let pair = |_| (vec![1u8; BUFFER], vec![1u8; 64]);
        let pairs: Vec<_> = (0..BUFFERS).map(pair).collect();
        let (large, small): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        drop(std::hint::black_box(large));
        let left = kept().saturating_sub(before);
        drop(std::hint::black_box(small));
        left
    }

    /// Looks at heaps in which nobody was before: those of a process of its own,
    /// whose environment does not speak to the C library.
    fn alone(what: &str) {
        let mut command = Command::new(std::env::current_exe().expect("this test's path"));
        command.args(["--exact", THIS]).env(ALONE, what);
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("MALLOC_") || text == "GLIBC_TUNABLES" {
                command.env_remove(name);
            }
        }
        let output = command.output().expect("the test runs again");
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && told.contains("1 passed"),
            "{what}: {told}"
        );
    }

    #[test]
    fn large_buffers_are_given_back_where_they_would_be_kept() {
        let all = BUFFER * BUFFERS;
        match std::env::var(ALONE).ok().as_deref() {
            Some("kept") => assert!(left_over() > all / 2),
            Some("given back") => {
                assert!(set_up_allocator());
                assert!(left_over() < all / 2);
            }
            _ => ["kept", "given back"].into_iter().for_each(alone),
        }
    }
}
