//! One call at a time for each volume: a second one is told to come again.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use tonic::Status;

/// The names of what is being worked on.
#[derive(Clone, Debug, Default)]
pub struct Locks(Arc<Mutex<HashSet<String>>>);

/// Held for the time of one call; given back when the call ends or is cancelled.
#[derive(Debug)]
pub struct Held {
    locks: Locks,
    name: String,
}

impl Locks {
    /// Takes `name`.
    ///
    /// # Errors
    /// ABORTED while another call has it.
    pub fn take(&self, name: &(impl ToString + ?Sized)) -> Result<Held, Status> {
        let name = name.to_string();
        let mut names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !names.insert(name.clone()) {
            return Err(Status::aborted(format!(
                "{name}: another call is working on it: try again"
            )));
        }
        drop(names);
        let locks = self.clone();
        Ok(Held { locks, name })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut names = self.locks.0.lock().unwrap_or_else(PoisonError::into_inner);
        names.remove(&self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_aborted_until_the_first_is_done() {
        let locks = Locks::default();
        let held = locks.take("a").expect("free");
        let refused = locks.take("a").expect_err("held");
        assert_eq!(refused.code(), tonic::Code::Aborted);
        let _other = locks.take("b").expect("free");
        drop(held);
        assert!(locks.take("a").is_ok());
    }
}
