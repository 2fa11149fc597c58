//! SIGINT and SIGTERM, for commands that have to tidy up after themselves.

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::error::CliError;

/// From here on these signals do not end the process by themselves.
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    pub fn new() -> Result<Self, CliError> {
        let wait = |kind| {
            signal(kind)
                .map_err(|error| CliError::failed(format!("cannot wait for signals: {error}")))
        };
        Ok(Self {
            interrupt: wait(SignalKind::interrupt())?,
            terminate: wait(SignalKind::terminate())?,
        })
    }

    /// Waits for the next one.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
