//! The daemon as a service of systemd: what it tells the service manager, what
//! it leaves with it over a restart, and the signs of life it owes. Follows
//! sd_notify(3) and sd_listen_fds(3); nothing here needs systemd to be there.
//!
//! | file | what it holds |
//! |---|---|
//! | [`notify`] | messages to the service manager |
//! | [`stored`] | parked connections in its file descriptor store |
//! | [`watch`] | readiness, status, the watchdog |

mod notify;
mod stored;
mod watch;

use std::ffi::OsString;
use std::time::Duration;

pub use notify::Notifier;
pub use stored::Received;
pub(super) use stored::{keep, take_up};
pub(super) use watch::{tell_ready, tell_status, watchdog};

/// The service manager as this process was told of it.
#[derive(Debug, Default)]
pub struct Service {
    /// Where to send messages; none when nobody listens.
    pub notifier: Option<Notifier>,
    /// How often it wants a sign of life.
    pub watchdog: Option<Duration>,
    /// Descriptors that an earlier process left with it.
    pub received: Vec<Received>,
}

impl Service {
    /// Reads it from the environment and takes the descriptors over. To be
    /// called once, first thing, before anything else opens a descriptor.
    #[must_use]
    pub fn of_process() -> Self {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let for_us =
            |name: &str| variable(name).is_none_or(|pid| *pid == *std::process::id().to_string());
        Self {
            notifier: variable("NOTIFY_SOCKET").and_then(|socket| Notifier::new(&socket)),
            watchdog: variable("WATCHDOG_USEC")
                .filter(|_| for_us("WATCHDOG_PID"))
                .and_then(|usec: OsString| usec.to_str()?.parse().ok())
                .filter(|usec| *usec > 0)
                .map(Duration::from_micros),
            received: match variable("LISTEN_PID") {
                Some(pid) if *pid == *std::process::id().to_string() => stored::receive(
                    variable("LISTEN_FDS").as_deref(),
                    variable("LISTEN_FDNAMES").as_deref(),
                ),
                _ => Vec::new(),
            },
        }
    }
}
