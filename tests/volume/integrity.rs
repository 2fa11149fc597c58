//! Bytes that change on their way, in either direction: with checksums on they
//! are never returned and never stored, and nobody is told an error; with
//! checksums off the same damage goes through, so these tests can see it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use dysk::blob::vhd::Layout;
use dysk::blob::{
    Account, AccountConfig, Checksum, Conditions, Credential, LeaseId, PageBlob, Range, SharedKey,
};
use dysk::device::BlockDevice;
use dysk::emulator::{
    Config, DEFAULT_ACCOUNT, DEFAULT_KEY, Effect, Emulator, Operation, Rule, Running,
};
use dysk::volume::{OpenOptions, Volume, create};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const DEADLINE: Duration = Duration::from_secs(5);
const LEN: usize = 64 << 10;
/// What is written: nothing else on the wire looks like it.
const MARK: [u8; 16] = [0xd5; 16];

/// A wire to the store that flips a bit of what is written, `flips` times.
struct Wire {
    url: String,
    flips: Arc<AtomicU32>,
}

impl Wire {
    async fn to(emulator: &Running) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let own = listener.local_addr().expect("an address");
        let there = emulator.address();
        let url = emulator.url().replace(&there.to_string(), &own.to_string());
        let flips = Arc::new(AtomicU32::new(0));
        let wire = Arc::clone(&flips);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let far = TcpStream::connect(there).await.expect("the store listens");
                let wire = Arc::clone(&wire);
                let (mut near_read, mut near_write) = near.into_split();
                let (mut far_read, mut far_write) = far.into_split();
                tokio::spawn(async move {
                    let mut buffer = vec![0; 32 << 10];
                    while let Ok(count @ 1..) = near_read.read(&mut buffer).await {
                        flip(&mut buffer[..count], &wire);
                        if far_write.write_all(&buffer[..count]).await.is_err() {
                            return;
                        }
                    }
                });
                tokio::spawn(async move {
                    // Ends with either side.
                    drop(tokio::io::copy(&mut far_read, &mut near_write).await);
                });
            }
        });
        Self { url, flips }
    }
}

fn flip(bytes: &mut [u8], flips: &AtomicU32) {
    let Some(at) = bytes.windows(MARK.len()).position(|part| part == MARK) else {
        return;
    };
    let left = flips.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
        left.checked_sub(1)
    });
    if left.is_ok() {
        bytes[at] ^= 1;
    }
}

fn blob(url: &str) -> PageBlob {
    let account = Account::new(AccountConfig {
        name: DEFAULT_ACCOUNT.into(),
        endpoint: url.into(),
        credential: Credential::SharedKey(SharedKey::from_base64(DEFAULT_KEY).expect("a key")),
        ca_file: None,
        connect_timeout: DEADLINE,
        max_connections: 8,
        idle_timeout: Duration::from_secs(30),
    });
    account
        .expect("a good configuration")
        .page_blob("dysks", "integrity.img")
}

/// A store, a wire to it, and a volume behind the wire.
async fn set_up(integrity: Checksum) -> (Running, Wire, Arc<Volume>) {
    let emulator = Emulator::start(Config::default()).expect("the emulator starts");
    let wire = Wire::to(&emulator).await;
    let direct = blob(emulator.url());
    let made = direct.account().create_container("dysks", DEADLINE).await;
    made.expect("the container is made");
    create(&direct, 1 << 20, Layout::Raw, DEADLINE)
        .await
        .expect("the blob is made");
    let options = OpenOptions {
        integrity,
        ..OpenOptions::new(LeaseId::random())
    };
    let volume = Volume::open(blob(&wire.url), options).await.expect("opens");
    (emulator, wire, volume)
}

fn data() -> Bytes {
    Bytes::from(vec![MARK[0]; LEN])
}

/// Bytes that differ from what was written.
fn wrong(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte != MARK[0]).count()
}

async fn read_damaged(integrity: Checksum, times: u64) -> (usize, u64) {
    let (emulator, _wire, volume) = set_up(integrity).await;
    volume.write(0, data(), false).await.expect("writes");
    let corrupt = Effect::Corrupt { bytes: 1 };
    let rule = Rule::on(Operation::GetBlob, corrupt).times(times);
    emulator.faults().set(vec![rule]);
    let len = u32::try_from(LEN).expect("small");
    let read = volume.read(0, len).await.expect("nobody is told an error");
    let struck = emulator.faults().report()[0].struck;
    volume.close().await.expect("closes");
    (wrong(&read.to_bytes()), struck)
}

#[tokio::test]
async fn damaged_reads_are_read_again() {
    for integrity in [Checksum::Md5, Checksum::Crc64] {
        assert_eq!(read_damaged(integrity, 3).await, (0, 3), "{integrity:?}");
    }
    // The contrast.
    assert_eq!(read_damaged(Checksum::Off, 1).await, (1, 1));
}

async fn write_damaged(integrity: Checksum, times: u32) -> (usize, u32) {
    let (emulator, wire, volume) = set_up(integrity).await;
    wire.flips.store(times, Ordering::SeqCst);
    let written = volume.write(0, data(), false).await;
    written.expect("nobody is told an error");
    volume.close().await.expect("closes");
    let range = Range::at(0, LEN as u64);
    let stored = blob(emulator.url())
        .get_range(range, Checksum::Off, &Conditions::default(), DEADLINE)
        .await
        .expect("reads");
    let left = wire.flips.load(Ordering::SeqCst);
    (wrong(&stored.pieces.concat()), left)
}

#[tokio::test]
async fn damaged_writes_are_refused_by_the_store_and_sent_again() {
    for integrity in [Checksum::Md5, Checksum::Crc64] {
        assert_eq!(write_damaged(integrity, 2).await, (0, 0), "{integrity:?}");
    }
    // The contrast.
    assert_eq!(write_damaged(Checksum::Off, 1).await, (1, 0));
}
