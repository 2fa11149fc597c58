//! Idle connections and the bound on how many there are.
//!
//! Invariant: connections in use plus idle ones never exceed the bound. A
//! connection is only made with a slot in hand and no idle one left, and goes
//! back to the idle ones before its slot is free again.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SemaphorePermit};

use super::connection::Connection;

/// A connection that was used within this time is taken as it is. A server
/// hangs up on connections that have been idle for seconds; when it ends itself
/// it loses what is under way as well. So the question to the kernel, a system
/// call for each request of a busy volume, would learn next to nothing.
const FRESH: Duration = Duration::from_millis(20);

/// The connections of one [`super::Account`] handle and its clones.
pub(super) struct Pool {
    slots: Semaphore,
    idle: Arc<Idle>,
}

struct Idle {
    timeout: Duration,
    list: Mutex<List>,
}

#[derive(Default)]
struct List {
    /// The most recently used one is last.
    // Boxed: a connection is large, and moved with every request.
    connections: VecDeque<Box<Connection>>,
    /// A task is waiting to close those that stay unused.
    reaping: bool,
}

/// The right to use one connection.
pub(super) struct Slot<'a> {
    pool: &'a Pool,
    _permit: SemaphorePermit<'a>,
}

impl Pool {
    /// At most `max` connections; none stays idle for longer than `timeout`.
    pub fn new(max: usize, timeout: Duration) -> Self {
        let max = max.clamp(1, Semaphore::MAX_PERMITS);
        Self {
            slots: Semaphore::new(max),
            idle: Arc::new(Idle {
                timeout,
                list: Mutex::default(),
            }),
        }
    }

    /// How long a connection may stay idle.
    pub fn idle_timeout(&self) -> Duration {
        self.idle.timeout
    }

    /// Waits for a slot, first come first served.
    pub async fn slot(&self) -> Slot<'_> {
        let permit = self
            .slots
            .acquire()
            .await
            .expect("the semaphore lives as long as the pool and is never closed");
        Slot {
            pool: self,
            _permit: permit,
        }
    }
}

impl Slot<'_> {
    /// The connection that became idle last and is still good, if any.
    pub async fn idle(&self) -> Option<Box<Connection>> {
        loop {
            let mut connection = self.pool.idle.lock().connections.pop_back()?;
            // Those that fail the look are closed here, not put back.
            if self.pool.idle.expired(&connection) {
                continue;
            }
            let good = if connection.idle_since.elapsed() < FRESH {
                connection.is_settled().await
            } else {
                connection.is_open().await
            };
            if good {
                return Some(connection);
            }
        }
    }

    /// Puts a connection back for the next request, if it can take one.
    pub async fn keep(self, mut connection: Box<Connection>) {
        if !connection.is_settled().await {
            return;
        }
        connection.idle_since = Instant::now();
        let idle = &self.pool.idle;
        let start_reaper = {
            let mut list = idle.lock();
            list.connections.push_back(connection);
            !std::mem::replace(&mut list.reaping, true)
        };
        if start_reaper {
            tokio::spawn(reap(Arc::downgrade(idle), idle.timeout));
        }
    }
}

impl Idle {
    fn lock(&self) -> MutexGuard<'_, List> {
        // No code that can panic runs under this lock.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Unused for longer than we or the server want to keep it. A server's
    /// limit is shortened so that a request does not cross its close.
    fn expired(&self, connection: &Connection) -> bool {
        let limit = match connection.keep_alive {
            Some(server) => self.timeout.min(server.saturating_sub(margin(server))),
            None => self.timeout,
        };
        connection.idle_since.elapsed() >= limit
    }
}

/// A second, or half of what the server grants when that is little.
fn margin(server: Duration) -> Duration {
    Duration::from_secs(1).min(server / 2)
}

/// Closes connections that nobody uses any more; ends when none is left.
async fn reap(idle: Weak<Idle>, interval: Duration) {
    let interval = interval.max(Duration::from_millis(10));
    loop {
        tokio::time::sleep(interval).await;
        let Some(idle) = idle.upgrade() else { return };
        let mut expired = Vec::new();
        let finished = {
            let mut list = idle.lock();
            // Oldest first, but a server's own limit may differ by connection.
            let mut index = 0;
            while index < list.connections.len() {
                if idle.expired(&list.connections[index]) {
                    expired.extend(list.connections.remove(index));
                } else {
                    index += 1;
                }
            }
            list.reaping = !list.connections.is_empty();
            !list.reaping
        };
        // Sockets are closed outside the lock.
        drop(expired);
        if finished {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_before_the_server_hangs_up() {
        for (server, limit) in [(5, 4), (120, 119), (2, 1), (0, 0)] {
            let server = Duration::from_secs(server);
            assert_eq!(server - margin(server), Duration::from_secs(limit));
        }
        let second = Duration::from_secs(1);
        assert_eq!(second - margin(second), second / 2);
    }
}
