//! The gRPC server on its UNIX socket.

use std::future::Future;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Server;

use super::authority::Repaired;
use super::v1::controller_server::ControllerServer;
use super::v1::group_controller_server::GroupControllerServer;
use super::v1::identity_server::IdentityServer;
use super::v1::node_server::NodeServer;
use super::{ControllerService, IdentityService, NodeService};

/// How long, and how often, a socket is looked at before it counts as in use: a
/// child of a killed process, between its fork and its exec, holds its listener
/// for a moment longer.
const LOOKS: u32 = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// Listens at `path`. A socket that nobody listens at any more is replaced; one
/// that stays in use for two seconds, and anything that is no socket, is not.
///
/// # Errors
/// The path is taken or cannot be made.
pub async fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
        Ok(there) if !there.file_type().is_socket() => {
            return Err(io::Error::other("it is there and no socket"));
        }
        Ok(_) => {
            let mut looks = 0;
            while UnixStream::connect(path).await.is_ok() {
                looks += 1;
                if looks == LOOKS {
                    return Err(io::Error::other("another process listens there"));
                }
                tokio::time::sleep(BETWEEN_LOOKS).await;
            }
            std::fs::remove_file(path)?;
        }
    }
    UnixListener::bind(path)
}

/// What a process offers.
#[derive(Debug, Default)]
pub struct Services {
    /// In every mode.
    pub identity: IdentityService,
    /// The controller.
    pub controller: Option<ControllerService>,
    /// The node.
    pub node: Option<NodeService>,
}

/// Serves `services` until `stop` is done and the calls under way have
/// ended.
///
/// # Errors
/// The socket fails.
pub async fn serve(
    listener: UnixListener,
    services: Services,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let incoming = futures_util::stream::unfold(listener, |listener| async move {
        let accepted = listener.accept().await;
        let accepted = accepted.map(|(stream, _)| Repaired::new(stream));
        Some((accepted, listener))
    });
    Server::builder()
        .add_service(IdentityServer::new(services.identity))
        .add_optional_service(services.controller.clone().map(GroupControllerServer::new))
        .add_optional_service(services.controller.map(ControllerServer::new))
        .add_optional_service(services.node.map(NodeServer::new))
        .serve_with_incoming_shutdown(incoming, stop)
        .await
}

/// Serves at `path` until SIGTERM or SIGINT.
///
/// # Errors
/// The socket cannot be used, or serving fails.
pub async fn run(path: &Path, services: Services) -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    let listener = listen(path)
        .await
        .with_context(|| format!("cannot listen at {}", path.display()))?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    serve(listener, services, stop).await?;
    // Nobody listens any more; a successor need not find that out.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "cannot remove the socket");
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_left_socket_is_replaced_and_one_in_use_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("csi.sock");
        let first = listen(&path).await.expect("nothing is there");
        let refusal = listen(&path).await.expect_err("in use");
        assert!(refusal.to_string().contains("another process"), "{refusal}");
        // Somebody holds it a moment longer than the process that died.
        let holder = tokio::spawn(async move {
            tokio::time::sleep(BETWEEN_LOOKS * (LOOKS / 2)).await;
            drop(first);
        });
        listen(&path).await.expect("left behind");
        holder.await.expect("it ends");
        std::fs::remove_file(&path).expect("there");
        std::fs::write(&path, "").expect("written");
        let refusal = listen(&path).await.expect_err("a file");
        assert!(refusal.to_string().contains("no socket"), "{refusal}");
    }
}
