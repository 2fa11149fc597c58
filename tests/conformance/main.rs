//! One list of checks on a page-blob service, run against every store at
//! hand: our emulator and Azurite, both over HTTP and HTTPS, and a real account
//! when `DYSK_TEST_ACCOUNT` and `DYSK_TEST_KEY` are set.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use dysk::blob::sas::{Grant, account_sas};
use dysk::blob::{
    Account, AccountConfig, BlobType, Checksum, Conditions, CopyStatus, Credential,
    DeleteSnapshots, ETag, Effect, LeaseId, LeaseState, PageBlob, Range, SequenceNumber, SharedKey,
    StorageError,
};
use dysk::emulator::{Config, Emulator, TlsFiles};

#[path = "../support/azurite.rs"]
mod azurite;

mod access;
mod data;
mod objects;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The bound on every attempt of the suite.
const SOON: Duration = Duration::from_secs(30);

/// A store under test.
#[derive(Clone)]
struct Store {
    account: Account,
    config: AccountConfig,
    key: SharedKey,
    container: String,
}

impl Store {
    fn new(name: &str, key: &str, endpoint: &str, ca_file: Option<std::path::PathBuf>) -> Self {
        let key = SharedKey::from_base64(key).expect("a key");
        let config = AccountConfig {
            name: name.to_owned(),
            endpoint: endpoint.to_owned(),
            credential: Credential::SharedKey(key.clone()),
            ca_file,
            connect_timeout: Duration::from_secs(10),
            max_connections: 8,
            idle_timeout: Duration::from_secs(60),
        };
        Self {
            account: Account::new(config.clone()).expect("a configuration"),
            config,
            key,
            container: format!("conformance-{}", LeaseId::random().as_str()),
        }
    }

    /// The same store for somebody with other credentials.
    fn with(&self, credential: Credential) -> Account {
        Account::new(AccountConfig {
            credential,
            ..self.config.clone()
        })
        .expect("a configuration")
    }

    fn named(&self, name: &str) -> PageBlob {
        self.account.page_blob(&self.container, name)
    }

    /// A new blob of `size` bytes with a name of its own.
    async fn blob(&self, size: u64) -> PageBlob {
        let blob = self.named(&format!("{}.vhd", LeaseId::random().as_str()));
        blob.create(size, &[], &Conditions::not_existing(), SOON)
            .await
            .expect("a new blob");
        blob
    }

    fn grant(&self, permissions: &str) -> Grant {
        Grant {
            permissions: permissions.into(),
            start: None,
            expiry: SystemTime::now() + Duration::from_secs(3600),
            https_only: self.config.endpoint.starts_with("https"),
        }
    }
}

fn any() -> Conditions {
    Conditions::default()
}

fn pattern(len: u64, seed: u8) -> Bytes {
    (0..len)
        .map(|at| (at % 251) as u8 ^ (at >> 9).to_le_bytes()[0] ^ seed)
        .collect()
}

async fn put(blob: &PageBlob, offset: u64, data: &Bytes) {
    blob.put_page(offset, data.clone(), Checksum::Off, &any(), SOON)
        .await
        .expect("put page");
}

async fn get(blob: &PageBlob, range: Range) -> Bytes {
    let read = blob
        .get_range(range, Checksum::Off, &any(), SOON)
        .await
        .expect("get blob");
    read.pieces.concat().into()
}

/// The error of a request that must be refused with one of `codes`.
fn refused<T: std::fmt::Debug>(
    result: Result<T, StorageError>,
    status: u16,
    codes: &[&str],
) -> StorageError {
    let error = result.expect_err("it must be refused");
    assert_eq!(error.status(), Some(status), "{error}");
    assert!(codes.contains(&error.code()), "{error}");
    assert_eq!(error.effect(), Effect::NotApplied);
    error
}

type Check = fn(Store) -> Pin<Box<dyn Future<Output = ()> + Send>>;

macro_rules! checks {
    ($($module:ident::$name:ident),* $(,)?) => {
        &[$((stringify!($name), |store| Box::pin($module::$name(store)))),*]
    };
}

const CHECKS: &[(&str, Check)] = checks![
    objects::containers,
    objects::creation,
    data::reads_and_writes,
    data::alignment,
    data::size_limits,
    data::huge_blobs,
    objects::odd_names,
    data::md5,
    data::crc64,
    data::clearing,
    data::page_ranges,
    data::page_range_paging,
    data::page_range_diff,
    access::sequence_numbers,
    data::resizing,
    access::leases,
    access::lease_expiry,
    objects::snapshots,
    objects::copies,
    objects::copies_are_independent,
    objects::put_page_from_url,
    access::conditional_headers,
    objects::metadata,
    objects::listing,
    access::shared_access_signatures,
    access::wrong_key,
    access::not_found,
    data::concurrency,
];

/// What Azurite is known not to do as the service does.
const AZURITE_SKIPS: &[&str] = &[
    "size_limits",
    "crc64",
    "page_range_paging",
    "page_range_diff",
    "copies_are_independent",
    "put_page_from_url",
];

/// Runs all checks at once against `store`, in a container of their own.
fn conform(store: &Store, skips: &[&str]) {
    for skip in skips {
        assert!(CHECKS.iter().any(|(name, _)| name == skip), "{skip}?");
        println!("skipped: {skip}");
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let failed = runtime.block_on(async {
        let container = &store.container;
        store
            .account
            .create_container(container, SOON)
            .await
            .expect("a container");
        let mut running = Vec::new();
        for &(name, check) in CHECKS {
            if !skips.contains(&name) {
                running.push((name, tokio::spawn(check(store.clone()))));
            }
        }
        let mut failed = Vec::new();
        for (name, check) in running {
            match check.await {
                Ok(()) => println!("passed: {name}"),
                Err(_) => failed.push(name),
            }
        }
        store
            .account
            .delete_container(container, SOON)
            .await
            .expect("the container is removed");
        failed
    });
    assert!(failed.is_empty(), "failed: {failed:?}");
}

#[test]
fn the_emulator_conforms() {
    let config = Config::default();
    let (account, key) = (config.account.clone(), config.key.clone());
    let server = Emulator::start(config).expect("an emulator");
    conform(&Store::new(&account, &key, server.url(), None), &[]);
}

#[test]
fn the_emulator_conforms_over_https() {
    let certificates = azurite::Certificates::make();
    let config = Config {
        tls: Some(TlsFiles {
            cert: certificates.certificate(),
            key: certificates.key(),
        }),
        ..Config::default()
    };
    let (account, key) = (config.account.clone(), config.key.clone());
    let server = Emulator::start(config).expect("an emulator");
    let ca_file = Some(certificates.authority());
    conform(&Store::new(&account, &key, server.url(), ca_file), &[]);
}

#[test]
fn azurite_conforms() {
    let server = azurite::Azurite::start(None);
    let store = Store::new(azurite::ACCOUNT, azurite::KEY, &server.endpoint, None);
    conform(&store, AZURITE_SKIPS);
}

#[test]
fn azurite_conforms_over_https() {
    let certificates = azurite::Certificates::make();
    let server = azurite::Azurite::start(Some(&certificates));
    let store = Store::new(
        azurite::ACCOUNT,
        azurite::KEY,
        &server.endpoint,
        Some(certificates.authority()),
    );
    conform(&store, AZURITE_SKIPS);

    // Without the authority nobody is trusted, and the remedy is named.
    let stranger = Store::new(azurite::ACCOUNT, azurite::KEY, &server.endpoint, None);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let error = runtime
        .block_on(stranger.account.container_exists("dysks", SOON))
        .expect_err("nobody vouches for it");
    assert_eq!(error.failure, dysk::blob::Failure::Tls);
    assert_eq!(error.effect(), Effect::NotApplied);
    assert!(error.to_string().contains("--ca-file"), "{error}");
}

#[test]
fn a_real_account_conforms() {
    let (Ok(account), Ok(key)) = (
        std::env::var("DYSK_TEST_ACCOUNT"),
        std::env::var("DYSK_TEST_KEY"),
    ) else {
        println!("skipped: DYSK_TEST_ACCOUNT and DYSK_TEST_KEY name no account");
        return;
    };
    let endpoint = std::env::var("DYSK_TEST_ENDPOINT")
        .unwrap_or_else(|_| format!("https://{account}.blob.core.windows.net"));
    conform(&Store::new(&account, &key, &endpoint, None), &[]);
}
