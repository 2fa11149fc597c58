//! An account's credentials while they change: which one to sign with, which
//! were refused, and where to get new ones.
//!
//! Azure accounts have two keys so that one can be replaced while the other is
//! in use. A request whose signature is refused (403 `AuthenticationFailed`) was
//! not executed, so it is signed again with another credential before anybody
//! hears of it: first with the others that are known, then with what the source
//! (a file, a mounted secret) holds by now.
//!
//! ## Invariants
//! - A credential that was refused less than [`REST`] ago is not tried. While
//!   all of them are, requests fail here without a question to the store; so a
//!   wrong key costs the store a handful of requests in [`REST`], however many
//!   callers wait.
//! - The source is read by one task at a time, at most once in [`REST`], on a
//!   thread that may block. Whoever needs the result waits for it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::credential::Credential;
use super::error::StorageError;
use super::source::CredentialSource;

/// Between two tries of a refused credential, and two readings of the source.
const REST: Duration = Duration::from_secs(1);

/// The credentials of one account, shared by all its handles.
pub(super) struct Keyring {
    account: String,
    state: Mutex<State>,
    /// Nothing was refused since something was accepted.
    calm: AtomicBool,
    /// Counts the readings of the source that are over.
    read: watch::Sender<u64>,
}

struct State {
    keys: Vec<Key>,
    /// The one in use.
    current: usize,
    source: Option<CredentialSource>,
    /// A reading of the source is under way.
    reading: bool,
    /// When the last one began.
    read_at: Option<Instant>,
    /// Why the last one yielded nothing that can be used.
    trouble: Option<String>,
    /// The store's newest refusal.
    refusal: Option<StorageError>,
}

struct Key {
    credential: Arc<Credential>,
    refused: Option<Instant>,
}

/// What to sign with.
pub(super) enum Pick {
    Credential(Arc<Credential>),
    /// All were refused a moment ago: the store's own words.
    Refused(Box<StorageError>),
}

fn keys(credentials: Vec<Credential>) -> Vec<Key> {
    let key = |credential| Key {
        credential: Arc::new(credential),
        refused: None,
    };
    credentials.into_iter().map(key).collect()
}

impl State {
    fn rests(&self, key: &Key) -> bool {
        key.refused.is_some_and(|at| at.elapsed() < REST)
    }

    /// Turns to a credential that was not refused lately.
    fn turn(&mut self) -> bool {
        let count = self.keys.len();
        let next = (0..count)
            .map(|step| (self.current + step) % count)
            .find(|at| !self.rests(&self.keys[*at]));
        self.current = next.unwrap_or(self.current);
        next.is_some()
    }
}

impl Keyring {
    /// At least one credential, the preferred one first.
    pub fn new(account: &str, credential: Credential) -> Self {
        Self {
            account: account.to_owned(),
            state: Mutex::new(State {
                keys: keys(vec![credential]),
                current: 0,
                source: None,
                reading: false,
                read_at: None,
                trouble: None,
                refusal: None,
            }),
            calm: AtomicBool::new(true),
            read: watch::Sender::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Held for look-ups only, by nobody who could panic half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces everything; `credentials` is not empty.
    pub fn replace(&self, credentials: Vec<Credential>, source: Option<CredentialSource>) {
        debug_assert!(!credentials.is_empty());
        let mut state = self.lock();
        state.keys = keys(credentials);
        state.current = 0;
        state.source = source;
        state.trouble = None;
        state.refusal = None;
        self.calm.store(true, Ordering::Release);
    }

    /// The credential in use.
    pub fn current(&self) -> Arc<Credential> {
        let state = self.lock();
        state.keys[state.current].credential.clone()
    }

    /// What to sign a request with.
    pub fn pick(&self) -> Pick {
        let mut state = self.lock();
        let refusal = state.refusal.clone();
        if !state.turn()
            && let Some(mut error) = refusal
        {
            if let Some(trouble) = &state.trouble {
                error.detail = format!("{}; {trouble}", error.detail);
            }
            return Pick::Refused(Box::new(error));
        }
        Pick::Credential(state.keys[state.current].credential.clone())
    }

    /// The store accepted `used`.
    pub fn accepted(&self, used: &Arc<Credential>) {
        let mut state = self.lock();
        if let Some(key) = state
            .keys
            .iter_mut()
            .find(|key| Arc::ptr_eq(&key.credential, used))
        {
            key.refused = None;
        }
        state.refusal = None;
        self.calm.store(true, Ordering::Release);
    }

    /// True while nothing was refused: there is nothing to tell `accepted`.
    pub fn is_calm(&self) -> bool {
        self.calm.load(Ordering::Acquire)
    }

    /// The store refused `used`. Says whether there is something else to try.
    pub async fn refused(self: &Arc<Self>, used: &Arc<Credential>, error: &StorageError) -> bool {
        let mut readings = self.read.subscribe();
        {
            let mut state = self.lock();
            state.refusal = Some(error.clone());
            self.calm.store(false, Ordering::Release);
            let before = state.current;
            let mut was_current = false;
            for (at, key) in state.keys.iter_mut().enumerate() {
                if Arc::ptr_eq(&key.credential, used) {
                    key.refused = Some(Instant::now());
                    was_current = at == before;
                }
            }
            if state.turn() {
                if was_current {
                    tracing::warn!(
                        account = self.account,
                        "the store refused the credential in use: trying another one"
                    );
                }
                return true;
            }
            let recent = state.read_at.is_some_and(|at| at.elapsed() < REST);
            if !state.reading {
                let Some(source) = state.source.clone().filter(|_| !recent) else {
                    return false;
                };
                state.reading = true;
                state.read_at = Some(Instant::now());
                tokio::spawn(read(Reading(Arc::clone(self)), source));
            }
        }
        // An error: the keyring itself is gone, and nobody asks any more.
        if readings.changed().await.is_err() {
            return false;
        }
        self.lock().turn()
    }

    /// Takes over what the source holds now; credentials that were known stay
    /// as they are.
    fn take_over(&self, loaded: Result<Vec<Credential>, String>) {
        let mut state = self.lock();
        let credentials = match loaded {
            Ok(credentials) => credentials,
            Err(trouble) => {
                tracing::error!(account = self.account, "cannot read credentials: {trouble}");
                state.trouble = Some(trouble);
                return;
            }
        };
        state.trouble = None;
        let mut fresh = keys(credentials);
        let mut news = false;
        for key in &mut fresh {
            let known = state
                .keys
                .iter()
                .find(|known| known.credential.is_same(&key.credential));
            match known {
                Some(known) => key.refused = known.refused,
                None => news = true,
            }
        }
        state.keys = fresh;
        state.current = 0;
        if news {
            tracing::info!(account = self.account, "took over new credentials");
        }
    }
}

/// A reading of the source that is under way, until it is dropped.
struct Reading(Arc<Keyring>);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.lock().reading = false;
        self.0.read.send_modify(|count| *count += 1);
    }
}

async fn read(reading: Reading, source: CredentialSource) {
    let keyring = &reading.0;
    let account = keyring.account.clone();
    let load = move || {
        let loaded = source.load().map_err(|error| error.to_string())?;
        loaded.of(&account)
    };
    let loaded = match tokio::task::spawn_blocking(load).await {
        Ok(loaded) => loaded,
        Err(error) => Err(format!("the reader died: {error}")),
    };
    keyring.take_over(loaded);
}

#[cfg(test)]
mod tests {
    use super::super::credential::SharedKey;
    use super::super::error::Failure;
    use super::super::types::BlobAddress;
    use super::*;

    fn credential(text: &str) -> Credential {
        Credential::SharedKey(SharedKey::from_base64(text).expect("a key"))
    }

    fn refusal() -> StorageError {
        let address = BlobAddress::new("acct", "dysks", "vol1");
        let failure = Failure::Status {
            status: 403,
            code: "AuthenticationFailed".into(),
        };
        StorageError::new("put page 0+512", &address, failure)
    }

    fn picked(keyring: &Keyring) -> Option<Arc<Credential>> {
        match keyring.pick() {
            Pick::Credential(credential) => Some(credential),
            Pick::Refused(_) => None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn turns_to_the_other_key_and_rests_when_both_are_refused() {
        let keyring = Arc::new(Keyring::new("acct", Credential::Anonymous));
        keyring.replace(vec![credential("AAAA"), credential("BBBB")], None);
        let first = picked(&keyring).expect("a key");
        assert!(keyring.refused(&first, &refusal()).await, "the other one");
        let second = picked(&keyring).expect("a key");
        assert!(second.is_same(&credential("BBBB")));
        // One that was signed before the turn comes back refused: no turn more.
        assert!(keyring.refused(&first, &refusal()).await);
        assert!(Arc::ptr_eq(&picked(&keyring).expect("a key"), &second));
        assert!(!keyring.refused(&second, &refusal()).await, "none is left");
        assert!(picked(&keyring).is_none(), "the store is left alone");
        tokio::time::advance(REST).await;
        let again = picked(&keyring).expect("after a rest");
        keyring.accepted(&again);
        assert!(keyring.is_calm());
    }

    #[tokio::test]
    async fn one_reading_serves_everybody_and_finds_the_new_key() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("key");
        std::fs::write(&file, "BBBB").expect("written");
        let keyring = Arc::new(Keyring::new("acct", Credential::Anonymous));
        keyring.replace(
            vec![credential("AAAA")],
            Some(CredentialSource::KeyFile(file)),
        );
        let old = picked(&keyring).expect("a key");
        let error = refusal();
        let all = (0..8).map(|_| keyring.refused(&old, &error));
        let all = futures_util::future::join_all(all).await;
        assert_eq!(all, [true; 8]);
        assert!(
            picked(&keyring)
                .expect("a key")
                .is_same(&credential("BBBB"))
        );
        assert_eq!(*keyring.read.borrow(), 1, "read once");
    }

    #[tokio::test]
    async fn a_source_that_cannot_be_read_is_named_beside_the_refusal() {
        let keyring = Arc::new(Keyring::new("acct", Credential::Anonymous));
        keyring.replace(
            vec![credential("AAAA")],
            Some(CredentialSource::KeyFile("/nowhere/key".into())),
        );
        let old = picked(&keyring).expect("a key");
        assert!(!keyring.refused(&old, &refusal()).await);
        let Pick::Refused(error) = keyring.pick() else {
            panic!("nothing can be used");
        };
        assert!(error.to_string().contains("/nowhere/key"), "{error}");
    }
}
