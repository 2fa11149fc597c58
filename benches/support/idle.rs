//! Memory of attachments that do nothing: volumes of 8 TiB, each with the two
//! connections that the kernel has, in a process of their own.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use dysk::blob::{Account, AccountConfig, Conditions, Credential, LeaseId, SharedKey};
use dysk::emulator::{DEFAULT_ACCOUNT, DEFAULT_KEY};
use dysk::nbd::transmission::{ByteBudget, Limits, Session, Stop, transmit};
use dysk::nbd::wire::request::{Command as Nbd, RequestHeader};
use dysk::volume::{AccountPace, OpenOptions, Volume};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;

const SIZE: u64 = 8 << 40;
const CONNECTIONS: usize = 2;
const DEADLINE: Duration = Duration::from_secs(10);

/// KiB for each of `count` attachments.
pub fn measure(store: SocketAddr, count: u32) -> f64 {
    let own = Command::new(std::env::current_exe().expect("this bench"))
        .args(["idle", &store.to_string(), &count.to_string()])
        .output()
        .expect("it runs");
    assert!(own.status.success(), "{own:?}");
    let text = String::from_utf8_lossy(&own.stdout);
    text.trim().parse().expect("a number")
}

/// Attaches `count` volumes of the store at `address`, one by one, and prints
/// by how many KiB each made the process grow.
pub fn attach(address: &str, count: &str) {
    let count: u32 = count.parse().expect("a number");
    let endpoint = format!("http://{address}/{DEFAULT_ACCOUNT}");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let (_stop, stopped) = watch::channel(Stop::Run);
        let pace = AccountPace::default();
        let first = attachment(&endpoint, 0, &pace, &stopped).await;
        let before = resident();
        let mut attached = vec![first];
        for number in 1..=count {
            attached.push(attachment(&endpoint, number, &pace, &stopped).await);
        }
        let grown = resident() - before;
        println!("{}", grown / f64::from(count));
        for (volume, connections) in attached {
            drop(connections);
            volume.close().await.expect("the lease is released");
        }
    });
}

/// One that has served a read on each of its connections.
async fn attachment(
    endpoint: &str,
    number: u32,
    pace: &AccountPace,
    stopped: &watch::Receiver<Stop>,
) -> (Arc<Volume>, Vec<UnixStream>) {
    let account = Account::new(AccountConfig {
        name: DEFAULT_ACCOUNT.into(),
        endpoint: endpoint.into(),
        credential: Credential::SharedKey(SharedKey::from_base64(DEFAULT_KEY).expect("a key")),
        ca_file: None,
        connect_timeout: Duration::from_secs(5),
        max_connections: 128,
        idle_timeout: Duration::from_secs(30),
    });
    let account = account.expect("it can work");
    let blob = account.page_blob("dysks", &format!("idle-{number}.vhd"));
    blob.create(SIZE, &[], &Conditions::default(), DEADLINE)
        .await
        .expect("room for nothing");
    let options = OpenOptions {
        pace: Some(pace.clone()),
        ..OpenOptions::new(LeaseId::random())
    };
    let volume = Volume::open(blob, options).await.expect("it opens");
    let limits = Limits {
        budget: ByteBudget::new(64 << 20),
        ..Limits::default()
    };
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        let (mut kernel, ours) = UnixStream::pair().expect("two sockets");
        let session = Session::kernel(limits.clone());
        tokio::spawn(transmit(ours, volume.clone(), session, stopped.clone()));
        let request = RequestHeader {
            flags: 0,
            command: Nbd::Read.code(),
            cookie: 1,
            offset: 0,
            length: 4096,
        };
        kernel.write_all(&request.encode()).await.expect("sent");
        let mut reply = [0; 16 + 4096];
        kernel.read_exact(&mut reply).await.expect("answered");
        connections.push(kernel);
    }
    (volume, connections)
}

/// KiB of this process that are in memory.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|rest| rest.split_whitespace().next());
    number.and_then(|text| text.parse().ok()).expect("KiB")
}
