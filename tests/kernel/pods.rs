//! Pods whose node loses its power, with csi-dysk on both nodes: their volumes
//! come up on the other one, with everything that was flushed. Part of the
//! scenario of `two_nodes` that waits for a dead node's leases anyway.

use std::collections::HashMap;
use std::future::{Ready, ready};
use std::io;
use std::net::TcpListener;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use dysk::csi::ControllerService;
use dysk::csi::v1::controller_server::Controller as _;
use dysk::csi::v1::node_client::NodeClient;
use dysk::csi::v1::*;
use dysk::emulator::{DEFAULT_ACCOUNT, DEFAULT_KEY};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tonic::codegen::Service;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::support::csi_node::{MIB, mounted, staging, target};
use crate::support::guest::Guest;
use crate::support::outside_store::{HOST, OutsideStore};

/// A stream that is there already, as a channel wants it.
struct Ours(Option<TcpStream>);

impl Service<Uri> for Ours {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Ready<io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let stream = self.0.take().map(TokioIo::new);
        ready(stream.ok_or_else(|| io::Error::other("the guest is gone")))
    }
}

/// The plugin of a node.
struct Plugin {
    client: NodeClient<Channel>,
    id: String,
}

impl Plugin {
    fn start(cluster: &Cluster, guest: &Guest, name: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        guest.run(&format!(
            "\"$DYSK_BIN/csi-dysk\" --mode node --endpoint unix://$work/csi.sock --node-id {name} \
             </dev/null >>$DYSK_RESULTS/csi.log 2>&1 & eventually 20 test -S $work/csi.sock; \
             python3 $DYSK_REPO/tests/kernel/guest/to_host.py $work/csi.sock {port} \
             </dev/null >>$DYSK_RESULTS/csi.log 2>&1 &"
        ));
        cluster.runtime.block_on(async {
            listener.set_nonblocking(true).expect("a socket");
            let listener = tokio::net::TcpListener::from_std(listener).expect("a socket");
            let accepted = tokio::time::timeout(Duration::from_secs(60), listener.accept());
            let (stream, _) = accepted.await.expect("the guest calls").expect("a line");
            let endpoint = Endpoint::from_static("http://localhost");
            let channel = endpoint.connect_with_connector(Ours(Some(stream)));
            let mut client = NodeClient::new(channel.await.expect("it connects"));
            let told = client.node_get_info(NodeGetInfoRequest {}).await;
            let id = told.expect("information").into_inner().node_id;
            Self { client, id }
        })
    }
}

/// The store, as the controller and the nodes call it.
struct Cluster {
    runtime: tokio::runtime::Runtime,
    port: u16,
}

impl Cluster {
    fn secrets(&self, host: &str) -> HashMap<String, String> {
        let endpoint = format!("http://{host}:{}/{DEFAULT_ACCOUNT}", self.port);
        [
            ("accountname", DEFAULT_ACCOUNT),
            ("accountkey", DEFAULT_KEY),
            ("endpoint", &endpoint),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
    }

    fn create(&self, name: &str) -> Volume {
        let call = CreateVolumeRequest {
            name: name.into(),
            capacity_range: Some(CapacityRange {
                required_bytes: 32 * MIB,
                limit_bytes: 0,
            }),
            volume_capabilities: vec![mounted("ext4")],
            secrets: self.secrets("127.0.0.1"),
            ..CreateVolumeRequest::default()
        };
        let controller = ControllerService::default();
        let made = self
            .runtime
            .block_on(controller.create_volume(Request::new(call)));
        made.expect("made").into_inner().volume.expect("a volume")
    }

    /// ControllerPublishVolume; answers with the publish context.
    fn give(&self, volume: &Volume, node: &str) -> HashMap<String, String> {
        let call = ControllerPublishVolumeRequest {
            volume_id: volume.volume_id.clone(),
            node_id: node.into(),
            volume_capability: Some(mounted("ext4")),
            secrets: self.secrets("127.0.0.1"),
            ..ControllerPublishVolumeRequest::default()
        };
        let controller = ControllerService::default();
        let given = self
            .runtime
            .block_on(controller.controller_publish_volume(Request::new(call)));
        given.expect("published").into_inner().publish_context
    }

    /// ControllerUnpublishVolume.
    fn take(&self, volume: &Volume, node: &str) {
        let call = ControllerUnpublishVolumeRequest {
            volume_id: volume.volume_id.clone(),
            node_id: node.into(),
            secrets: self.secrets("127.0.0.1"),
        };
        let controller = ControllerService::default();
        self.runtime
            .block_on(controller.controller_unpublish_volume(Request::new(call)))
            .expect("unpublished");
    }

    /// NodeStageVolume, once, and NodePublishVolume.
    fn bring(
        &self,
        volume: &Volume,
        plugin: &Plugin,
        given: &HashMap<String, String>,
    ) -> Result<(), Status> {
        let staging = staging(volume).display().to_string();
        let stage = NodeStageVolumeRequest {
            volume_id: volume.volume_id.clone(),
            publish_context: given.clone(),
            staging_target_path: staging.clone(),
            volume_capability: Some(mounted("ext4")),
            secrets: self.secrets(HOST),
            volume_context: volume.volume_context.clone(),
        };
        let publish = NodePublishVolumeRequest {
            volume_id: volume.volume_id.clone(),
            publish_context: given.clone(),
            staging_target_path: staging,
            target_path: target(&pod(volume)).display().to_string(),
            volume_capability: Some(mounted("ext4")),
            volume_context: volume.volume_context.clone(),
            ..NodePublishVolumeRequest::default()
        };
        let mut client = plugin.client.clone();
        self.runtime.block_on(async {
            client.node_stage_volume(stage).await?;
            client.node_publish_volume(publish).await
        })?;
        Ok(())
    }

    /// NodeUnpublishVolume and NodeUnstageVolume.
    fn remove(&self, volume: &Volume, plugin: &Plugin) {
        let unpublish = NodeUnpublishVolumeRequest {
            volume_id: volume.volume_id.clone(),
            target_path: target(&pod(volume)).display().to_string(),
        };
        let unstage = NodeUnstageVolumeRequest {
            volume_id: volume.volume_id.clone(),
            staging_target_path: staging(volume).display().to_string(),
        };
        let mut client = plugin.client.clone();
        self.runtime.block_on(async {
            let unpublished = client.node_unpublish_volume(unpublish).await;
            unpublished.expect("unpublished");
            let unstaged = client.node_unstage_volume(unstage).await;
            unstaged.expect("unstaged");
        });
    }
}

fn pod(volume: &Volume) -> String {
    let name = volume.volume_id.rsplit('/').next().expect("a name");
    format!("pod-{name}")
}

/// Two pods on the first node: one of a cluster that leaves it to the lease who
/// has a volume, one of a cluster with attachRequired.
pub struct Pods {
    cluster: Cluster,
    second: Plugin,
    first: String,
    left: Volume,
    given: Volume,
}

impl Pods {
    /// Both write to their volumes and flush.
    pub fn run(store: &OutsideStore, first: &Guest, second: &Guest) -> Self {
        let cluster = Cluster {
            runtime: tokio::runtime::Runtime::new().expect("a runtime"),
            port: store.port(),
        };
        let one = Plugin::start(&cluster, first, "first");
        let second = Plugin::start(&cluster, second, "second");
        let (left, given) = (cluster.create("left"), cluster.create("given"));
        let context = cluster.give(&given, &one.id);
        for (volume, context) in [(&left, HashMap::new()), (&given, context)] {
            let brought = cluster.bring(volume, &one, &context);
            brought.expect("staged and published on the first node");
            let folder = target(&pod(volume)).display().to_string();
            first.run(&format!(
                "echo kept >{folder}/file; sync {folder}/file {folder}"
            ));
        }
        Self {
            cluster,
            second,
            first: one.id,
            left,
            given,
        }
    }

    /// The first node has no power since `since`: `limits` are how long a pod
    /// waits for its volume without and with ControllerUnpublishVolume.
    pub fn move_to(&self, second: &Guest, since: Instant, limits: (Duration, Duration)) {
        std::thread::scope(|scope| {
            scope.spawn(|| self.bring(&self.left, &HashMap::new(), second, since, limits.0));
            scope.spawn(|| {
                self.cluster.take(&self.given, &self.first);
                let context = self.cluster.give(&self.given, &self.second.id);
                self.bring(&self.given, &context, second, since, limits.1);
            });
        });
    }

    fn bring(
        &self,
        volume: &Volume,
        context: &HashMap<String, String>,
        second: &Guest,
        since: Instant,
        limit: Duration,
    ) {
        let brought = self.cluster.bring(volume, &self.second, context);
        brought.expect("staged and published on the second node");
        let took = since.elapsed();
        let pod = pod(volume);
        println!("figure: {pod}: has its volume on the second node after {took:.1?}");
        assert!(took < limit, "{pod}: {took:?}");
        let folder = target(&pod).display().to_string();
        let kept = second.run(&format!(
            "cat {folder}/file; echo more >>{folder}/file; sync {folder}/file"
        ));
        assert_eq!(kept, "kept", "{pod}: what was flushed is lost");
        self.cluster.remove(volume, &self.second);
    }
}
