//! The Identity service.

use std::collections::HashMap;
use std::path::Path;

use tonic::{Request, Response, Status};

use super::DRIVER;
use super::v1::identity_server::Identity;
use super::v1::plugin_capability::{Service, Type, VolumeExpansion, service, volume_expansion};
use super::v1::*;
use crate::node::client::Client;

/// Identity of a process, and of the daemon beside it where it has one.
#[derive(Debug, Default)]
pub struct IdentityService {
    daemon: Option<Client>,
}

impl IdentityService {
    /// That of a node's process, whose daemon listens at `socket`.
    #[must_use]
    pub fn of_node(socket: &Path) -> Self {
        Self {
            daemon: Some(Client::new(socket)),
        }
    }
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _request: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: DRIVER.into(),
            vendor_version: env!("CARGO_PKG_VERSION").into(),
            manifest: HashMap::new(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _request: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let types = [
            Type::Service(Service {
                r#type: service::Type::ControllerService.into(),
            }),
            Type::Service(Service {
                r#type: service::Type::GroupControllerService.into(),
            }),
            Type::VolumeExpansion(VolumeExpansion {
                r#type: volume_expansion::Type::Online.into(),
            }),
        ];
        let capabilities = types.map(|kind| PluginCapability { r#type: Some(kind) });
        Ok(Response::new(GetPluginCapabilitiesResponse {
            capabilities: capabilities.into(),
        }))
    }

    /// The controller keeps nothing and asks the store at each call, with that
    /// call's own secret: while it answers, it is ready. A node is ready while
    /// its daemon answers and is not stopping.
    async fn probe(
        &self,
        _request: Request<ProbeRequest>,
    ) -> Result<Response<ProbeResponse>, Status> {
        let ready = match &self.daemon {
            None => true,
            Some(daemon) => match daemon.health().await {
                Ok(health) => health.status == "ok",
                Err(error) => {
                    tracing::warn!(%error, "not ready");
                    false
                }
            },
        };
        Ok(Response::new(ProbeResponse { ready: Some(ready) }))
    }
}
