//! The network between a guest and the store, to be severed and healed. What
//! was sent while it was severed arrives when it heals: late.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Passes connections on to a port of this machine.
pub struct Proxy {
    port: u16,
    gate: Arc<Gate>,
}

#[derive(Default)]
struct Gate {
    severed: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn set(&self, severed: bool) {
        *self.severed.lock().unwrap_or_else(PoisonError::into_inner) = severed;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let mut severed = self.severed.lock().unwrap_or_else(PoisonError::into_inner);
        while *severed {
            severed = self
                .changed
                .wait(severed)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Proxy {
    /// In front of `port` of this machine, on a free one.
    pub fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let own = listener.local_addr().expect("bound").port();
        let gate = Arc::new(Gate::default());
        let shared = Arc::clone(&gate);
        std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let gate = Arc::clone(&shared);
                std::thread::spawn(move || {
                    // A store that is away looks like a connection that ends.
                    if let Ok(far) = TcpStream::connect(("127.0.0.1", port)) {
                        join(near, far, &gate);
                    }
                });
            }
        });
        Self { port: own, gate }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Nothing gets through any more; nobody is told.
    pub fn sever(&self) {
        self.gate.set(true);
    }

    /// What is on its way arrives, and all else after it.
    pub fn heal(&self) {
        self.gate.set(false);
    }
}

fn join(near: TcpStream, far: TcpStream, gate: &Arc<Gate>) {
    let (Ok(near_too), Ok(far_too)) = (near.try_clone(), far.try_clone()) else {
        return;
    };
    let back = Arc::clone(gate);
    std::thread::spawn(move || pump(far_too, near_too, &back));
    pump(near, far, gate);
}

/// Ends with either side; the other direction notices by itself.
fn pump(mut from: TcpStream, mut to: TcpStream, gate: &Gate) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        gate.pass();
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    gate.pass();
    // It may be closed already.
    drop(to.shutdown(Shutdown::Write));
}
