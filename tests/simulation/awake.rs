//! Who is to be polled: a waker that tells the driver.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Wake;

use tokio::sync::Notify;

pub struct Awake {
    pub ready: AtomicBool,
    pub driver: Arc<Notify>,
}

impl Wake for Awake {
    fn wake(self: Arc<Self>) {
        self.ready.store(true, Ordering::Relaxed);
        self.driver.notify_one();
    }
}
