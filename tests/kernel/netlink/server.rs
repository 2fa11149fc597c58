//! The smallest NBD server that can be broken on purpose: a disk in memory,
//! one blocking thread a connection, simple replies (proto.md, transmission
//! phase).

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use dysk::nbd::kernel::sockets::is_abandoned;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;

/// A disk in memory and what was done to it.
#[derive(Default)]
pub struct Disk {
    bytes: Mutex<Vec<u8>>,
    pub writes: AtomicU32,
    pub flushes: AtomicU32,
    /// So many writes are never answered.
    pub swallow: AtomicU32,
    serving: Mutex<Vec<UnixStream>>,
}

impl Disk {
    pub fn new(size: usize) -> Arc<Self> {
        let disk = Self::default();
        disk.resize(size);
        Arc::new(disk)
    }

    pub fn resize(&self, size: usize) {
        self.bytes.lock().unwrap().resize(size, 0);
    }

    pub fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        self.bytes.lock().unwrap()[offset..offset + len].to_vec()
    }

    /// Serves every stream until its end.
    pub fn serve(self: &Arc<Self>, streams: Vec<UnixStream>) {
        for stream in streams {
            stream.set_nonblocking(false).unwrap();
            self.serving
                .lock()
                .unwrap()
                .push(stream.try_clone().unwrap());
            let disk = Arc::clone(self);
            thread::spawn(move || match disk.connection(stream) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                Err(error) => println!("server: {error}"),
            });
        }
    }

    /// How many of the connections the kernel still holds its end of.
    pub fn live(&self) -> usize {
        let serving = self.serving.lock().unwrap();
        serving
            .iter()
            .filter(|stream| !is_abandoned(stream.as_fd()).unwrap())
            .count()
    }

    /// Cuts every connection, as a dying server does.
    pub fn die(&self) {
        for stream in self.serving.lock().unwrap().drain(..) {
            // A connection the kernel has shut already is as dead.
            if let Err(error) = stream.shutdown(Shutdown::Both) {
                assert_eq!(error.kind(), io::ErrorKind::NotConnected);
            }
        }
    }

    fn connection(&self, mut stream: UnixStream) -> io::Result<()> {
        loop {
            let mut header = [0u8; 28];
            stream.read_exact(&mut header)?;
            let field = |at: usize, len: usize| {
                header[at..at + len]
                    .iter()
                    .fold(0u64, |sum, byte| sum << 8 | u64::from(*byte))
            };
            assert_eq!(field(0, 4), u64::from(REQUEST_MAGIC));
            let kind = field(6, 2) as u16;
            let (offset, len) = (field(16, 8) as usize, field(24, 4) as usize);
            let mut data = Vec::new();
            match kind {
                READ => data = self.bytes(offset, len),
                WRITE => {
                    let mut payload = vec![0; len];
                    stream.read_exact(&mut payload)?;
                    self.writes.fetch_add(1, Ordering::SeqCst);
                    self.bytes.lock().unwrap()[offset..offset + len].copy_from_slice(&payload);
                    if self.swallow_one() {
                        continue;
                    }
                }
                FLUSH => {
                    self.flushes.fetch_add(1, Ordering::SeqCst);
                }
                DISCONNECT => return Ok(()),
                other => panic!("request type {other} was not offered"),
            }
            let mut reply = REPLY_MAGIC.to_be_bytes().to_vec();
            reply.extend_from_slice(&0u32.to_be_bytes());
            reply.extend_from_slice(&header[8..16]);
            reply.extend_from_slice(&data);
            stream.write_all(&reply)?;
        }
    }

    fn swallow_one(&self) -> bool {
        self.swallow
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                left.checked_sub(1)
            })
            .is_ok()
    }
}
