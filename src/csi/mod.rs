//! The CSI driver `csi-dysk`: identity and controller services on a UNIX
//! socket. What they do to the store lives in `volume` and `blob`; here are
//! the specification's rules: names, idempotence, sizes, error codes.

mod capability;
mod controller;
mod failure;
pub mod handle;
mod identity;
mod locks;
mod parameters;
mod secrets;
pub mod server;
mod snapshots;
mod volumes;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

pub use controller::ControllerService;
pub use identity::IdentityService;

/// The driver's name, in the cluster and in GetPluginInfo.
pub const DRIVER: &str = "csi-dysk";

/// The messages and services of the specification, as compiled from
/// `proto/csi.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, rust_2018_idioms)]
pub mod v1 {
    tonic::include_proto!("csi.v1");
}

/// Which services the process offers beside the identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// The controller: makes, grows, snapshots and deletes volumes.
    Controller,
}

/// The CSI driver for page blobs as disks.
#[derive(Debug, Parser)]
#[command(name = DRIVER, version)]
pub struct Options {
    /// Which services to offer
    #[arg(long, value_enum)]
    mode: Mode,
    /// Where to listen: unix:///PATH
    #[arg(long, value_name = "URL", value_parser = socket_path)]
    endpoint: PathBuf,
}

fn socket_path(text: &str) -> Result<PathBuf, String> {
    let path = text.strip_prefix("unix://").unwrap_or(text);
    if path.starts_with('/') {
        Ok(PathBuf::from(path))
    } else {
        Err("write unix:///PATH".into())
    }
}

/// Runs `csi-dysk` with these arguments, the program's name among them, until
/// SIGTERM or SIGINT.
///
/// # Errors
/// The socket cannot be used, or serving fails.
pub fn main(arguments: Vec<OsString>) -> Result<ExitCode, anyhow::Error> {
    let options = match Options::try_parse_from(arguments) {
        Ok(options) => options,
        Err(refusal) => {
            refusal.print()?;
            let code = u8::try_from(refusal.exit_code()).unwrap_or(2);
            return Ok(ExitCode::from(code));
        }
    };
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(server::run(&options.endpoint))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_unix_sockets() {
        for text in ["unix:///csi/csi.sock", "/csi/csi.sock"] {
            assert_eq!(socket_path(text), Ok(PathBuf::from("/csi/csi.sock")));
        }
        for text in ["tcp://127.0.0.1:1", "unix://csi.sock", ""] {
            assert!(socket_path(text).is_err(), "{text}");
        }
    }
}
