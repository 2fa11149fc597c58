//! The Controller service: which calls there are. What they do is in
//! [`super::volumes`] and [`super::snapshots`].

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::capability;
use super::handle::Handle;
use super::locks::Locks;
use super::parameters::{self, Parameters};
use super::publishing::NodeLimit;
use super::v1::controller_server::Controller;
use super::v1::controller_service_capability::{Rpc, Type, rpc};
use super::v1::validate_volume_capabilities_response::Confirmed;
use super::v1::*;
use super::{failure, health, listing, modify, publishing, secrets, snapshots, volumes};

/// The controller. It keeps nothing but which volumes it works on.
#[derive(Clone, Debug, Default)]
pub struct ControllerService {
    pub(super) locks: Locks,
    /// The Secret of calls that bring none, as a folder.
    default: Option<PathBuf>,
    /// Of each node.
    limit: Option<Arc<NodeLimit>>,
}

impl ControllerService {
    /// One with a default Secret, mounted at `folder`: only it can list
    /// volumes, whose requests bring none.
    #[must_use]
    pub fn with_default_secret(folder: Option<PathBuf>) -> Self {
        Self {
            default: folder,
            ..Self::default()
        }
    }

    /// The same, that publishes at most so many volumes to a node; as many as
    /// it is asked for when `None`.
    #[must_use]
    pub fn with_node_limit(self, most: Option<u32>) -> Self {
        let limit = most.map(|most| Arc::new(NodeLimit::new(most)));
        Self { limit, ..self }
    }

    /// The default Secret.
    async fn secret(&self, what: &str) -> Result<HashMap<String, String>, Status> {
        let Some(folder) = self.default.clone() else {
            return Err(Status::unimplemented(format!(
                "{what} takes a default secret: start csi-dysk with --secrets-dir"
            )));
        };
        tokio::task::spawn_blocking(move || secrets::read(&folder))
            .await
            .map_err(|error| Status::internal(format!("the call died: {error}")))?
    }

    /// Those of the request, or the default ones.
    pub(super) async fn fill(&self, given: &mut HashMap<String, String>) -> Result<(), Status> {
        if given.is_empty() && self.default.is_some() {
            *given = self.secret("").await?;
        }
        Ok(())
    }
}

/// What is offered beside, where there is a default Secret.
const WITH_SECRET: [rpc::Type; 6] = [
    rpc::Type::GetVolumeHealth,
    rpc::Type::ListVolumeHealth,
    rpc::Type::ListVolumes,
    rpc::Type::ListVolumesPublishedNodes,
    rpc::Type::GetVolume,
    rpc::Type::VolumeCondition,
];

/// What is offered.
const OFFERED: [rpc::Type; 11] = [
    rpc::Type::CreateDeleteVolume,
    rpc::Type::PublishUnpublishVolume,
    rpc::Type::PublishReadonly,
    rpc::Type::CreateDeleteSnapshot,
    rpc::Type::ListSnapshots,
    rpc::Type::GetSnapshot,
    rpc::Type::GetCapacity,
    rpc::Type::CloneVolume,
    rpc::Type::ExpandVolume,
    rpc::Type::ModifyVolume,
    rpc::Type::SingleNodeMultiWriter,
];

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        let mut asked = request.into_inner();
        self.fill(&mut asked.secrets).await?;
        let volume = volumes::create(&self.locks, asked).await?;
        Ok(Response::new(CreateVolumeResponse {
            volume: Some(volume),
        }))
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let mut asked = request.into_inner();
        self.fill(&mut asked.secrets).await?;
        volumes::delete(&self.locks, asked).await?;
        Ok(Response::new(DeleteVolumeResponse {}))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<ControllerExpandVolumeRequest>,
    ) -> Result<Response<ControllerExpandVolumeResponse>, Status> {
        let mut asked = request.into_inner();
        self.fill(&mut asked.secrets).await?;
        volumes::expand(&self.locks, asked).await.map(Response::new)
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<ValidateVolumeCapabilitiesResponse>, Status> {
        let mut asked = request.into_inner();
        self.fill(&mut asked.secrets).await?;
        failure::given(&asked.volume_id, "volume id")?;
        if asked.volume_capabilities.is_empty() {
            return Err(Status::invalid_argument("volume capabilities are missing"));
        }
        let handle = Handle::named(&asked.volume_id)?;
        let context = &asked.volume_context;
        let account = secrets::open(
            &asked.secrets,
            context.get("endpoint").map(String::as_str),
            context.get("realm").map(String::as_str),
        )
        .await?;
        volumes::look(&account, &handle).await?;
        // What is not known is not confirmed.
        let parameters = Parameters::parse(&asked.parameters).map(drop);
        let mutable = parameters::settings(&asked.mutable_parameters).map(drop);
        let refused = asked
            .volume_capabilities
            .iter()
            .find_map(capability::unsupported)
            .or_else(|| parameters.err().map(|error| error.message().to_owned()))
            .or_else(|| mutable.err().map(|error| error.message().to_owned()));
        let answer = match refused {
            Some(message) => ValidateVolumeCapabilitiesResponse {
                confirmed: None,
                message,
            },
            None => ValidateVolumeCapabilitiesResponse {
                confirmed: Some(Confirmed {
                    volume_context: asked.volume_context,
                    volume_capabilities: asked.volume_capabilities,
                    parameters: asked.parameters,
                    mutable_parameters: asked.mutable_parameters,
                }),
                message: String::new(),
            },
        };
        Ok(Response::new(answer))
    }

    async fn controller_get_capabilities(
        &self,
        _request: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        let more = self.default.iter().flat_map(|_| WITH_SECRET);
        let all = OFFERED.into_iter().chain(more);
        let capabilities = all.map(|offered| ControllerServiceCapability {
            r#type: Some(Type::Rpc(Rpc {
                r#type: offered.into(),
            })),
        });
        Ok(Response::new(ControllerGetCapabilitiesResponse {
            capabilities: capabilities.collect(),
        }))
    }

    async fn create_snapshot(
        &self,
        request: Request<CreateSnapshotRequest>,
    ) -> Result<Response<CreateSnapshotResponse>, Status> {
        let mut asked = request.into_inner();
        self.fill(&mut asked.secrets).await?;
        let snapshot = snapshots::create(&self.locks, asked).await?;
        Ok(Response::new(CreateSnapshotResponse {
            snapshot: Some(snapshot),
        }))
    }

    async fn delete_snapshot(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        let mut asked = request.into_inner();
        self.fill(&mut asked.secrets).await?;
        snapshots::delete(&self.locks, asked).await?;
        Ok(Response::new(DeleteSnapshotResponse {}))
    }

    async fn list_snapshots(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListSnapshotsResponse>, Status> {
        let mut asked = request.into_inner();
        self.fill(&mut asked.secrets).await?;
        snapshots::list(asked).await.map(Response::new)
    }

    async fn get_snapshot(
        &self,
        request: Request<GetSnapshotRequest>,
    ) -> Result<Response<GetSnapshotResponse>, Status> {
        let mut asked = request.into_inner();
        self.fill(&mut asked.secrets).await?;
        let snapshot = snapshots::get(asked).await?;
        Ok(Response::new(GetSnapshotResponse {
            snapshot: Some(snapshot),
        }))
    }

    async fn controller_publish_volume(
        &self,
        request: Request<ControllerPublishVolumeRequest>,
    ) -> Result<Response<ControllerPublishVolumeResponse>, Status> {
        let mut asked = request.into_inner();
        self.fill(&mut asked.secrets).await?;
        publishing::publish(&self.locks, self.limit.as_deref(), asked)
            .await
            .map(Response::new)
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<ControllerUnpublishVolumeResponse>, Status> {
        let mut asked = request.into_inner();
        self.fill(&mut asked.secrets).await?;
        publishing::unpublish(&self.locks, asked).await?;
        Ok(Response::new(ControllerUnpublishVolumeResponse {}))
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        let secret = self.secret("ListVolumes").await?;
        listing::list(&secret, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn get_capacity(
        &self,
        request: Request<GetCapacityRequest>,
    ) -> Result<Response<GetCapacityResponse>, Status> {
        listing::capacity(request.get_ref()).map(Response::new)
    }

    async fn controller_get_volume(
        &self,
        request: Request<ControllerGetVolumeRequest>,
    ) -> Result<Response<ControllerGetVolumeResponse>, Status> {
        let secret = self.secret("ControllerGetVolume").await?;
        listing::get(&secret, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn controller_modify_volume(
        &self,
        request: Request<ControllerModifyVolumeRequest>,
    ) -> Result<Response<ControllerModifyVolumeResponse>, Status> {
        let mut asked = request.into_inner();
        self.fill(&mut asked.secrets).await?;
        modify::modify(&self.locks, asked).await?;
        Ok(Response::new(ControllerModifyVolumeResponse {}))
    }

    async fn controller_list_volume_health(
        &self,
        request: Request<ControllerListVolumeHealthRequest>,
    ) -> Result<Response<ControllerListVolumeHealthResponse>, Status> {
        let mut asked = request.into_inner();
        self.fill(&mut asked.secrets).await?;
        health::list(&asked.secrets, asked.max_entries, &asked.starting_token)
            .await
            .map(Response::new)
    }

    async fn controller_get_volume_health(
        &self,
        request: Request<ControllerGetVolumeHealthRequest>,
    ) -> Result<Response<ControllerGetVolumeHealthResponse>, Status> {
        let mut asked = request.into_inner();
        failure::given(&asked.volume_id, "volume id")?;
        self.fill(&mut asked.secrets).await?;
        health::get(&asked.secrets, &asked.volume_id)
            .await
            .map(Response::new)
    }
}
