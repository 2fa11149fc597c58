//! A raw page blob in an emulator within this process.

use std::time::Duration;

use dysk::blob::vhd::Layout;
use dysk::blob::{Account, AccountConfig, Credential, PageBlob, SharedKey};
use dysk::emulator::{Config, DEFAULT_ACCOUNT, DEFAULT_KEY, Emulator, Running};
use dysk::volume::create;

const DEADLINE: Duration = Duration::from_secs(5);

/// Starts an emulator and makes an empty blob of `size` bytes in it.
pub async fn blob(name: &str, size: u64) -> (Running, PageBlob) {
    let emulator = Emulator::start(Config::default()).expect("the emulator starts");
    let account = Account::new(AccountConfig {
        name: DEFAULT_ACCOUNT.into(),
        endpoint: emulator.url().into(),
        credential: Credential::SharedKey(SharedKey::from_base64(DEFAULT_KEY).expect("a key")),
        ca_file: None,
        connect_timeout: DEADLINE,
        max_connections: 64,
        idle_timeout: Duration::from_secs(30),
    })
    .expect("a good configuration");
    account
        .create_container("dysks", DEADLINE)
        .await
        .expect("the container is made");
    let blob = account.page_blob("dysks", name);
    create(&blob, size, Layout::Raw, DEADLINE)
        .await
        .expect("the blob is made");
    (emulator, blob)
}
