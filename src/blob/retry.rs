//! Pauses between attempts.
use std::time::Duration;
/// Exponential backoff.
#[derive(Clone, Debug)]
pub struct Backoff {}
impl Backoff {
    /// x
    pub fn new(_first: Duration, _longest: Duration) -> Self {
        todo!()
    }
    /// x
    pub fn pause(&mut self, _retry_after: Option<Duration>) -> Duration {
        todo!()
    }
    /// x
    pub fn reset(&mut self) {
        todo!()
    }
}
