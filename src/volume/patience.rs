//! How long opening, creating and deleting bear with a store in trouble: a
//! person waits for them.

use std::time::Duration;

use tokio::time::Instant;

use crate::blob::retry::Backoff;
use crate::blob::{Advice, Failure, StorageError};

/// With a store that throttles or fails.
const WITH_TROUBLE: Duration = Duration::from_secs(20);
/// With one that cannot be reached at all: a wrong address should be told soon.
const WITH_SILENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// The patience with one operation.
#[derive(Debug)]
pub struct Patience {
    began: Instant,
    backoff: Backoff,
}

impl Patience {
    /// Begins now.
    pub fn begin() -> Self {
        Self {
            began: Instant::now(),
            backoff: Backoff::new(PAUSE, LONGEST_PAUSE),
        }
    }

    /// After a failed attempt at something that is safe to repeat: pauses, or
    /// hands the error back when it is final or patience is at its end.
    ///
    /// # Errors
    /// The same error.
    pub async fn after(&mut self, error: StorageError) -> Result<(), StorageError> {
        let patience = match (&error.failure, error.advice()) {
            (_, Advice::GiveUp | Advice::Reauthenticate) => return Err(error),
            (Failure::Dns | Failure::Connect | Failure::Tls, _) => WITH_SILENCE,
            _ => WITH_TROUBLE,
        };
        let pause = self.backoff.pause(error.retry_after);
        if self.began.elapsed() + pause > patience {
            return Err(error);
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// As [`Self::after`]; an error that only says that the blob has `changed`
    /// since it was looked at is borne like trouble.
    ///
    /// # Errors
    /// The same error.
    pub async fn after_change(
        &mut self,
        error: StorageError,
        changed: bool,
    ) -> Result<(), StorageError> {
        if !changed {
            return self.after(error).await;
        }
        let pause = self.backoff.pause(None);
        if self.began.elapsed() + pause > WITH_TROUBLE {
            return Err(error);
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

/// Repeats an attempt (an expression that makes a future) with [`Patience`].
macro_rules! patiently {
    ($attempt:expr) => {{
        let mut patience = $crate::volume::patience::Patience::begin();
        loop {
            match $attempt.await {
                Ok(value) => break Ok(value),
                Err(error) => {
                    if let Err(error) = patience.after(error).await {
                        break Err(error);
                    }
                }
            }
        }
    }};
}

pub(super) use patiently;
