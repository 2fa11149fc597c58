//! The Node service: a volume's way from the store to a pod's path on this
//! node. The disk itself is the daemon's; here are its filesystem and its
//! mounts. Nothing is kept that a restart could lose: what was done is read
//! from the daemon and from the kernel's mount table.
//!
//! A call runs to its end whether its caller waits or not; until then a
//! repetition is told ABORTED.

mod attach;
mod health;
mod publish;
mod stage;
mod stats;

use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tonic::{Request, Response, Status};

use super::locks::Locks;
use super::v1::node_server::Node as NodeCalls;
use super::v1::node_service_capability::{Rpc, Type, rpc};
use super::v1::volume_capability::access_mode::Mode;
use super::v1::volume_capability::{AccessMode, AccessType};
use super::v1::*;
use super::{capability, failure, node_id, publishing};
use crate::filesystem::Kind;
use crate::node::AttachmentName;
use crate::node::client::Client;

/// Memory of the node for each volume that it is said to take: queue, caches'
/// bookkeeping and the kernel's own.
const MEMORY_PER_VOLUME: u64 = 32 << 20;
/// The least and the most that are said without being told.
const USUAL_LIMIT: (u64, u64) = (16, 512);

/// What is offered.
const OFFERED: [rpc::Type; 7] = [
    rpc::Type::StageUnstageVolume,
    rpc::Type::GetVolumeStats,
    rpc::Type::ExpandVolume,
    rpc::Type::VolumeCondition,
    rpc::Type::GetVolumeHealth,
    rpc::Type::GetStorageHealth,
    rpc::Type::SingleNodeMultiWriter,
];

/// The node: its daemon, and which volumes are being worked on.
#[derive(Debug)]
struct Node {
    daemon: Client,
    id: String,
    /// Most volumes; from the node's memory when not told.
    limit: Option<u32>,
    locks: Locks,
    /// Which credential the daemon was handed last, hashed.
    handed: Mutex<HashMap<AttachmentName, [u8; 32]>>,
    /// What could not be staged.
    refused: health::Refused,
}

impl Node {
    fn handed(&self) -> std::sync::MutexGuard<'_, HashMap<AttachmentName, [u8; 32]>> {
        self.handed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, name: &AttachmentName, digest: &[u8; 32]) {
        self.handed().insert(name.clone(), *digest);
    }

    fn remembers(&self, name: &AttachmentName, digest: &[u8; 32]) -> bool {
        self.handed().get(name) == Some(digest)
    }

    /// Refuses what was published to another node.
    fn is_meant(&self, published: &HashMap<String, String>) -> Result<(), Status> {
        match published.get(publishing::NODE) {
            Some(other) if *other != self.id => Err(Status::failed_precondition(format!(
                "published to {other}, and this node is {}",
                self.id
            ))),
            _ => Ok(()),
        }
    }

    fn forget(&self, name: &AttachmentName) {
        self.handed().remove(name);
    }
}

/// The Node service.
#[derive(Clone, Debug)]
pub struct NodeService(Arc<Node>);

impl NodeService {
    /// That of the node called `name`, whose daemon listens at `socket`; `limit`
    /// is the most volumes it takes, by its memory when `None`.
    #[must_use]
    pub fn new(name: &str, socket: &Path, limit: Option<u32>) -> Self {
        Self(Arc::new(Node {
            daemon: Client::new(socket),
            id: node_id::of_this_machine(name),
            limit,
            locks: Locks::default(),
            handed: Mutex::default(),
            refused: health::Refused::default(),
        }))
    }

    /// Runs `work` to its end, and answers with it if somebody still waits.
    async fn run<T, F>(&self, work: impl FnOnce(Arc<Node>) -> F) -> Result<Response<T>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Status>> + Send + 'static,
    {
        match tokio::spawn(work(Arc::clone(&self.0))).await {
            Ok(answer) => answer.map(Response::new),
            Err(error) => Err(Status::internal(format!("the call died: {error}"))),
        }
    }
}

/// How a volume is to be used.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Want {
    Block {
        mode: Mode,
    },
    Mount {
        kind: Kind,
        options: Vec<String>,
        mode: Mode,
    },
}

impl Want {
    fn of(asked: Option<&VolumeCapability>) -> Result<Self, Status> {
        let asked =
            asked.ok_or_else(|| Status::invalid_argument("volume capability is missing"))?;
        if let Some(reason) = capability::unsupported(asked) {
            return Err(Status::invalid_argument(reason));
        }
        let mode = asked
            .access_mode
            .as_ref()
            .map_or(Mode::Unknown, AccessMode::mode);
        match &asked.access_type {
            Some(AccessType::Mount(mount)) => Ok(Self::Mount {
                kind: mount.fs_type.parse().map_err(Status::invalid_argument)?,
                options: mount.mount_flags.clone(),
                mode,
            }),
            _ => Ok(Self::Block { mode }),
        }
    }

    fn mode(&self) -> Mode {
        match self {
            Self::Block { mode } | Self::Mount { mode, .. } => *mode,
        }
    }

    /// No lease is taken and nothing can be written.
    fn reads_only(&self) -> bool {
        matches!(
            self.mode(),
            Mode::SingleNodeReaderOnly | Mode::MultiNodeReaderOnly
        )
    }

    /// At one path only.
    fn is_alone(&self) -> bool {
        self.mode() == Mode::SingleNodeSingleWriter
    }
}

/// An absolute path of a request.
fn path(what: &str, text: &str) -> Result<PathBuf, Status> {
    failure::given(text, what)?;
    let path = PathBuf::from(text);
    let plain = path.is_absolute()
        && path
            .components()
            .all(|part| part != std::path::Component::ParentDir);
    if !plain || path.file_name().is_none() {
        return Err(Status::invalid_argument(format!(
            "{what} {text}: write an absolute path"
        )));
    }
    Ok(path)
}

/// The memory of this machine in bytes.
fn memory() -> u64 {
    let seen = rustix::system::sysinfo();
    #[allow(
        clippy::unnecessary_fallible_conversions,
        clippy::useless_conversion,
        reason = "the field's width is the platform's"
    )]
    let pages = u64::try_from(seen.totalram).unwrap_or(u64::MAX);
    pages.saturating_mul(u64::from(seen.mem_unit))
}

#[tonic::async_trait]
impl NodeCalls for NodeService {
    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        self.run(|node| async move {
            let asked = request.into_inner();
            let volume_id = asked.volume_id.clone();
            let answer = stage::stage(&node, asked).await;
            node.refused.staged(&volume_id, &answer);
            answer.map(|()| NodeStageVolumeResponse {})
        })
        .await
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        self.run(|node| async move {
            let asked = request.into_inner();
            let volume_id = asked.volume_id.clone();
            stage::unstage(&node, asked).await?;
            node.refused.forget(&volume_id);
            Ok(NodeUnstageVolumeResponse {})
        })
        .await
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        self.run(|node| async move {
            publish::publish(&node, request.into_inner()).await?;
            Ok(NodePublishVolumeResponse {})
        })
        .await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        self.run(|node| async move {
            publish::unpublish(&node, request.into_inner()).await?;
            Ok(NodeUnpublishVolumeResponse {})
        })
        .await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        self.run(|node| async move { stats::stats(&node, request.into_inner()).await })
            .await
    }

    async fn node_expand_volume(
        &self,
        request: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        self.run(|node| async move { stats::expand(&node, request.into_inner()).await })
            .await
    }

    async fn node_get_volume_health(
        &self,
        request: Request<NodeGetVolumeHealthRequest>,
    ) -> Result<Response<NodeGetVolumeHealthResponse>, Status> {
        self.run(|node| async move { health::of_volume(&node, request.into_inner()).await })
            .await
    }

    async fn node_get_storage_health(
        &self,
        _request: Request<NodeGetStorageHealthRequest>,
    ) -> Result<Response<NodeGetStorageHealthResponse>, Status> {
        self.run(|node| async move { Ok(health::of_storage(&node).await) })
            .await
    }

    async fn node_get_capabilities(
        &self,
        _request: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let capabilities = OFFERED.map(|offered| NodeServiceCapability {
            r#type: Some(Type::Rpc(Rpc {
                r#type: offered.into(),
            })),
        });
        Ok(Response::new(NodeGetCapabilitiesResponse {
            capabilities: capabilities.into(),
        }))
    }

    async fn node_get_info(
        &self,
        _request: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        let (least, most) = USUAL_LIMIT;
        let by_memory = (memory() / MEMORY_PER_VOLUME).clamp(least, most);
        let limit = self.0.limit.map_or(by_memory, u64::from);
        Ok(Response::new(NodeGetInfoResponse {
            node_id: self.0.id.clone(),
            max_volumes_per_node: i64::try_from(limit).unwrap_or(i64::MAX),
            accessible_topology: None,
        }))
    }
}
/// Runs what blocks, off the runtime's threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Status::internal(format!("the call died: {error}"))))
}
