//! `dysk-emulator`: a page-blob service in one process, for demos and tests.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{ArgGroup, Parser};
use dysk::emulator::{Config, DEFAULT_ACCOUNT, DEFAULT_KEY, Emulator, Span, Storage, TlsFiles};
use dysk::size::ByteSize;
use tokio::signal::unix::{SignalKind, signal};

/// An Azure page-blob service for demos, tests and benches.
#[derive(Parser)]
#[command(version, group(ArgGroup::new("storage").required(true)))]
struct Args {
    /// Address to listen on; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:10000")]
    listen: SocketAddr,
    /// Keep blobs in memory
    #[arg(long, group = "storage")]
    memory: bool,
    /// Keep blobs in sparse files below this directory
    #[arg(long, group = "storage", value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Account name
    #[arg(long, default_value = DEFAULT_ACCOUNT)]
    account: String,
    /// Account key in base64, when it is no secret (others see arguments)
    #[arg(long, value_name = "BASE64", conflicts_with = "key_file")]
    key: Option<String>,
    /// File with the account key in base64; or set DYSK_EMULATOR_KEY
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// Added to every request, like 5ms or 250us
    #[arg(long, default_value = "0")]
    latency: Span,
    /// How much the latency varies, to both sides
    #[arg(long, default_value = "0")]
    jitter: Span,
    /// Seed of jitter and faults
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Requests a second per blob; 0 is no cap
    #[arg(long, default_value_t = 0)]
    iops: u64,
    /// Bytes a second per blob, like 60MiB; 0 is no cap
    #[arg(long, default_value = "0")]
    bandwidth: ByteSize,
    /// PEM file with the certificate chain: serve https
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// PEM file with the certificate's key
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

impl Args {
    fn config(self) -> anyhow::Result<Config> {
        let key = match (self.key, self.key_file) {
            (Some(key), _) => key,
            (None, Some(path)) => std::fs::read_to_string(&path)
                .with_context(|| format!("cannot read the key file {}", path.display()))?,
            (None, None) => {
                std::env::var("DYSK_EMULATOR_KEY").unwrap_or_else(|_| DEFAULT_KEY.into())
            }
        };
        Ok(Config {
            listen: self.listen,
            storage: self.dir.map_or(Storage::Memory, Storage::Dir),
            account: self.account,
            key,
            latency: self.latency.0,
            jitter: self.jitter.0,
            seed: self.seed,
            iops: self.iops,
            bandwidth: self.bandwidth.0,
            tls: self
                .tls_cert
                .zip(self.tls_key)
                .map(|(cert, key)| TlsFiles { cert, key }),
            threads: 0,
        })
    }
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dysk-emulator: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let running = Emulator::start(args.config()?)?;
        // Standard output is line buffered: whoever waits for it gets it now.
        writeln!(std::io::stdout(), "listening on {}", running.url())?;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        running.stop();
        Ok(())
    })
}
