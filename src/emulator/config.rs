//! What an emulator is started with, and what can be changed while it runs.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use super::throttle::Caps;

/// The account name every emulator of this service knows.
pub const DEFAULT_ACCOUNT: &str = "devstoreaccount1";

/// Its key, published by Microsoft and no secret.
pub const DEFAULT_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// Where blobs are kept.
#[derive(Clone, Debug, Default)]
pub enum Storage {
    /// In memory; gone with the process.
    #[default]
    Memory,
    /// In sparse files below this directory; survives `kill -9`.
    Dir(PathBuf),
}

/// PEM files for TLS.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Certificate chain.
    pub cert: PathBuf,
    /// Private key.
    pub key: PathBuf,
}

/// What to start.
#[derive(Clone)]
pub struct Config {
    /// Address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where blobs are kept.
    pub storage: Storage,
    /// Account name.
    pub account: String,
    /// Account key in base64.
    pub key: String,
    /// Added to every request.
    pub latency: Duration,
    /// The latency varies by up to this much to both sides, uniformly.
    pub jitter: Duration,
    /// Seed of the jitter, and of fault rules that bring none.
    pub seed: u64,
    /// Requests a second per blob; 0 is no cap.
    pub iops: u64,
    /// Bytes a second per blob; 0 is no cap.
    pub bandwidth: u64,
    /// Certificate and key; plain HTTP without.
    pub tls: Option<TlsFiles>,
    /// Threads that serve; 0 is one per processor.
    pub threads: usize,
}

impl Default for Config {
    /// The well-known account, in memory, on a free port of 127.0.0.1.
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            storage: Storage::Memory,
            account: DEFAULT_ACCOUNT.into(),
            key: DEFAULT_KEY.into(),
            latency: Duration::ZERO,
            jitter: Duration::ZERO,
            seed: 0,
            iops: 0,
            bandwidth: 0,
            tls: None,
            threads: 0,
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("listen", &self.listen)
            .field("storage", &self.storage)
            .field("account", &self.account)
            .finish_non_exhaustive()
    }
}

/// A key that is no base64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the account key is not base64")]
pub struct KeyError;

/// An account key as an HMAC state that was keyed once.
#[derive(Clone)]
pub(super) struct Key(Hmac<Sha256>);

impl Key {
    pub(super) fn parse(text: &str) -> Result<Self, KeyError> {
        let bytes = STANDARD.decode(text.trim()).map_err(|_| KeyError)?;
        Hmac::new_from_slice(&bytes).map(Self).map_err(|_| KeyError)
    }

    /// Is `signature` (base64) the HMAC-SHA256 of `text`? In constant time.
    pub(super) fn verifies(&self, text: &str, signature: &str) -> bool {
        let mut mac = self.0.clone();
        mac.update(text.as_bytes());
        STANDARD
            .decode(signature)
            .is_ok_and(|bytes| mac.verify_slice(&bytes).is_ok())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// What can be changed while the emulator runs.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub latency: Duration,
    pub jitter: Duration,
    pub blob: Caps,
    pub account: Caps,
    pub queue: Duration,
    pub copy_bandwidth: u64,
    pub clock_skew: i64,
    pub shared_key_disabled: bool,
    pub https_required: bool,
    pub premium: bool,
    pub firewall: bool,
    pub keys: Vec<Key>,
}

impl Settings {
    pub(super) fn of(config: &Config) -> Result<Self, KeyError> {
        Ok(Self {
            latency: config.latency,
            jitter: config.jitter,
            blob: Caps {
                iops: config.iops,
                bandwidth: config.bandwidth,
            },
            account: Caps::default(),
            queue: Duration::from_millis(100),
            copy_bandwidth: 0,
            clock_skew: 0,
            shared_key_disabled: false,
            https_required: false,
            premium: false,
            firewall: false,
            keys: vec![Key::parse(&config.key)?],
        })
    }

    /// Takes over what `change` names.
    pub(super) fn apply(&mut self, change: &SettingsChange) -> Result<(), KeyError> {
        let keys = [&change.key, &change.second_key];
        let [first, second] = keys.map(|key| key.as_deref().filter(|key| !key.is_empty()));
        let (first, second) = (
            first.map(Key::parse).transpose()?,
            second.map(Key::parse).transpose()?,
        );
        if let Some(key) = first {
            self.keys[0] = key;
        }
        if change.second_key.is_some() {
            self.keys.truncate(1);
            self.keys.extend(second);
        }
        fn set<T: Copy>(slot: &mut T, value: Option<T>) {
            *slot = value.unwrap_or(*slot);
        }
        set(&mut self.latency, change.latency.map(|span| span.0));
        set(&mut self.jitter, change.jitter.map(|span| span.0));
        set(&mut self.queue, change.queue.map(|span| span.0));
        set(&mut self.blob.iops, change.iops);
        set(&mut self.blob.bandwidth, change.bandwidth);
        set(&mut self.account.iops, change.account_iops);
        set(&mut self.account.bandwidth, change.account_bandwidth);
        set(&mut self.copy_bandwidth, change.copy_bandwidth);
        set(&mut self.clock_skew, change.clock_skew);
        set(&mut self.shared_key_disabled, change.shared_key_disabled);
        set(&mut self.https_required, change.https_required);
        set(&mut self.premium, change.premium);
        set(&mut self.firewall, change.firewall);
        Ok(())
    }

    /// All settings but the keys.
    pub(super) fn report(&self) -> SettingsChange {
        SettingsChange {
            latency: Some(Span(self.latency)),
            jitter: Some(Span(self.jitter)),
            queue: Some(Span(self.queue)),
            iops: Some(self.blob.iops),
            bandwidth: Some(self.blob.bandwidth),
            account_iops: Some(self.account.iops),
            account_bandwidth: Some(self.account.bandwidth),
            copy_bandwidth: Some(self.copy_bandwidth),
            clock_skew: Some(self.clock_skew),
            shared_key_disabled: Some(self.shared_key_disabled),
            https_required: Some(self.https_required),
            premium: Some(self.premium),
            firewall: Some(self.firewall),
            key: None,
            second_key: None,
        }
    }
}

/// A change of settings: what is `None` stays as it is. This is the JSON of
/// `/-/settings`, names in camel case.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct SettingsChange {
    /// Added to every request.
    pub latency: Option<Span>,
    /// The latency varies by up to this much to both sides.
    pub jitter: Option<Span>,
    /// Longest wait for a cap before a request is refused with 503; 100 ms at first.
    pub queue: Option<Span>,
    /// Requests a second per blob; 0 is no cap.
    pub iops: Option<u64>,
    /// Bytes a second per blob; 0 is no cap.
    pub bandwidth: Option<u64>,
    /// Requests a second for the account; 0 is no cap.
    pub account_iops: Option<u64>,
    /// Bytes a second for the account; 0 is no cap.
    pub account_bandwidth: Option<u64>,
    /// Bytes a second of each Copy Blob; 0 is no cap.
    pub copy_bandwidth: Option<u64>,
    /// Seconds by which the service's clock is ahead (behind, when negative).
    pub clock_skew: Option<i64>,
    /// Answer 403 KeyBasedAuthenticationNotPermitted to Shared Key and to SAS signed by it.
    pub shared_key_disabled: Option<bool>,
    /// Answer 400 AccountRequiresHttps to plain HTTP.
    pub https_required: Option<bool>,
    /// Take the tiers of premium page blobs (which limit nothing here); a
    /// standard account refuses them.
    pub premium: Option<bool>,
    /// Answer 403 AuthorizationFailure to everybody.
    pub firewall: Option<bool>,
    /// Replaces the account key. Never shown.
    #[serde(skip_serializing)]
    pub key: Option<String>,
    /// Sets a second account key that is good too; "" takes it away. Never shown.
    #[serde(skip_serializing)]
    pub second_key: Option<String>,
}

impl fmt::Debug for SettingsChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SettingsChange").finish_non_exhaustive()
    }
}

/// A duration: in JSON a number of milliseconds or a text such as `5ms`,
/// `250us`, `1.5s`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span(pub Duration);

/// A text that is no duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a duration: write a number with us, ms or s, like 5ms")]
pub struct ParseSpanError(String);

impl std::str::FromStr for Span {
    type Err = ParseSpanError;

    fn from_str(text: &str) -> Result<Self, ParseSpanError> {
        let error = || ParseSpanError(text.to_owned());
        let end = text
            .find(|c: char| c.is_ascii_alphabetic())
            .unwrap_or(text.len());
        let number: f64 = text[..end].trim().parse().map_err(|_| error())?;
        let unit = match &text[end..] {
            "us" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "" if number == 0.0 => 1.0,
            _ => return Err(error()),
        };
        Duration::try_from_secs_f64(number * unit)
            .map(Self)
            .map_err(|_| error())
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = self.0.as_micros();
        if micros.is_multiple_of(1000) {
            write!(f, "{}ms", micros / 1000)
        } else {
            write!(f, "{micros}us")
        }
    }
}

impl Serialize for Span {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Millis(u64),
            Text(String),
        }
        match Either::deserialize(deserializer)? {
            Either::Millis(millis) => Ok(Self(Duration::from_millis(millis))),
            Either::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_durations() {
        for (text, micros) in [
            ("5ms", 5_000),
            ("250us", 250),
            ("1.5s", 1_500_000),
            ("0", 0),
            ("2 s", 2_000_000),
        ] {
            let span: Span = text.parse().expect(text);
            assert_eq!(span.0, Duration::from_micros(micros), "{text}");
        }
        for text in ["", "5", "5m", "-1ms", "ms", "infs"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
        assert_eq!(Span(Duration::from_micros(1500)).to_string(), "1500us");
        assert_eq!(Span(Duration::from_secs(2)).to_string(), "2000ms");
    }

    #[test]
    fn keys_rotate_and_never_show() {
        let mut settings = Settings::of(&Config::default()).expect("the default key");
        let known = "known";
        let mut signer = Key::parse(DEFAULT_KEY).expect("base64").0;
        signer.update(known.as_bytes());
        let signature = STANDARD.encode(signer.finalize().into_bytes());
        assert!(settings.keys[0].verifies(known, &signature));
        let change: SettingsChange =
            serde_json::from_str(r#"{"key":"AAAA","secondKey":"AAAB","latency":"2ms"}"#)
                .expect("settings");
        settings.apply(&change).expect("base64");
        assert_eq!(settings.keys.len(), 2);
        assert!(!settings.keys[0].verifies(known, &signature));
        let shown =
            serde_json::to_string(&settings.report()).expect("json") + &format!("{settings:?}");
        assert!(shown.contains("2ms") && !shown.contains("AAAA"), "{shown}");
    }
}
