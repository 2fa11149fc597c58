//! The CSI driver `csi-dysk`: identity, controller and node services on a UNIX
//! socket. What they do to the store lives in `volume` and `blob`; here are
//! the specification's rules: names, idempotence, sizes, error codes.

mod authority;
mod capability;
mod controller;
mod failure;
mod groups;
pub mod handle;
mod health;
mod identity;
mod listing;
mod locks;
mod modify;
pub mod node;
mod node_id;
mod parameters;
mod publishing;
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
pub use node::NodeService;
use server::Services;

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
    /// The node: volumes from the store to a pod's path. Runs as root beside
    /// dyskd.
    Node,
    /// Both.
    All,
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
    /// What the cluster calls this node; for the node service
    #[arg(
        long,
        value_name = "NODE",
        required_if_eq_any([("mode", "node"), ("mode", "all")]),
        value_parser = clap::builder::NonEmptyStringValueParser::new()
    )]
    node_id: Option<String>,
    /// Where dyskd listens; for the node service
    #[arg(long, value_name = "PATH", default_value = "/run/dysk/dyskd.sock")]
    dyskd_socket: PathBuf,
    /// A Secret mounted as a folder, for calls that bring none; for the
    /// controller
    #[arg(long, value_name = "DIR")]
    secrets_dir: Option<PathBuf>,
    /// The most volumes a node takes. What a node says, which goes by its memory
    /// when this is left out; a controller publishes no more to one when told
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_volumes: Option<u32>,
}

impl Options {
    fn services(&self) -> Services {
        let node = self
            .node_id
            .as_ref()
            .filter(|_| self.mode != Mode::Controller);
        Services {
            controller: (self.mode != Mode::Node)
                .then(|| ControllerService::with_default_secret(self.secrets_dir.clone()))
                .map(|controller| controller.with_node_limit(self.max_volumes)),
            node: node.map(|id| NodeService::new(id, &self.dyskd_socket, self.max_volumes)),
            identity: match self.mode {
                Mode::Controller => IdentityService::default(),
                _ => IdentityService::of_node(&self.dyskd_socket),
            },
        }
    }
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
        .block_on(server::run(&options.endpoint, options.services()))?;
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
