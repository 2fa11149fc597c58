//! The CSI node's part above the kernel: raw block volumes of daemons whose
//! devices are sockets. Which node may have a volume, and which Secret its
//! requests are signed with.

use std::collections::HashMap;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use dysk::csi::v1::controller_server::Controller as _;
use dysk::csi::v1::node_server::Node as _;
use dysk::csi::v1::volume_capability::{AccessMode, AccessType, BlockVolume, access_mode::Mode};
use dysk::csi::v1::*;
use dysk::csi::{ControllerService, NodeService};
use dysk::node::api::Attachment;
use dysk::node::client::Client;
use tonic::{Code, Request, Status};

use crate::support::node::{ACCOUNT, KEY, Node, Store, eventually};

const ROTATED: &str = "cm90YXRlZCBrZXkgb2YgdGhlIGFjY291bnQsIHNlY3JldA==";
const ID: &str = "devstoreaccount1/dysks/v.vhd";
/// A lease lasts for 60 s.
const LEASE: Duration = Duration::from_secs(60);

fn block(mode: Mode) -> Option<VolumeCapability> {
    Some(VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Block(BlockVolume {})),
    })
}

fn secret(store: &Store, key: &str) -> HashMap<String, String> {
    [
        ("accountname", ACCOUNT.to_owned()),
        ("accountkey", key.to_owned()),
        ("endpoint", store.endpoint()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

/// A machine of the cluster: its daemon, and the plugin beside it.
struct Machine {
    daemon: Node,
    plugin: NodeService,
    id: String,
}

impl Machine {
    fn start(store: &Store, name: &str) -> Self {
        let daemon = Node::start();
        let plugin = NodeService::new(name, &daemon.socket(), None);
        let told = store.block_on(plugin.node_get_info(Request::new(NodeGetInfoRequest {})));
        let id = told.expect("information").into_inner().node_id;
        Self { daemon, plugin, id }
    }

    fn staging(&self) -> String {
        let path = self.daemon.dir.path().join("staging");
        path.to_str().expect("a UTF-8 path").to_owned()
    }

    /// What kubelet's call is, with what ControllerPublishVolume answered.
    fn call(
        &self,
        store: &Store,
        key: &str,
        published: &HashMap<String, String>,
    ) -> NodeStageVolumeRequest {
        NodeStageVolumeRequest {
            volume_id: ID.into(),
            publish_context: published.clone(),
            staging_target_path: self.staging(),
            volume_capability: block(Mode::SingleNodeWriter),
            secrets: secret(store, key),
            volume_context: HashMap::new(),
        }
    }

    fn stage(
        &self,
        store: &Store,
        key: &str,
        published: &HashMap<String, String>,
    ) -> Result<(), Status> {
        let call = Request::new(self.call(store, key, published));
        store
            .block_on(self.plugin.node_stage_volume(call))
            .map(drop)
    }

    fn unstage(&self, store: &Store) -> Result<(), Status> {
        let call = NodeUnstageVolumeRequest {
            volume_id: ID.into(),
            staging_target_path: self.staging(),
        };
        let call = Request::new(call);
        store
            .block_on(self.plugin.node_unstage_volume(call))
            .map(drop)
    }

    fn attachment(&self, store: &Store) -> Attachment {
        let all = store.block_on(Client::new(self.daemon.socket()).list());
        all.expect("a list").into_iter().next().expect("attached")
    }

    /// What is wrong with the volume, in a word each.
    fn health(&self, store: &Store) -> Result<Vec<String>, Status> {
        let call = Request::new(NodeGetVolumeHealthRequest {
            volume_id: ID.into(),
            ..NodeGetVolumeHealthRequest::default()
        });
        let answer = store.block_on(self.plugin.node_get_volume_health(call))?;
        let health = answer.into_inner().volume_health.expect("health");
        assert_eq!(health.volume_id, ID);
        let entries = health.health_statuses.into_iter();
        Ok(entries.map(|entry| entry.reason).collect())
    }

    /// What is wrong with the stores, likewise.
    fn stores(&self, store: &Store) -> Vec<String> {
        stores(store, &self.plugin)
    }

    fn device(&self, store: &Store) -> std::path::PathBuf {
        self.attachment(store).device.expect("a device")
    }
}

fn stores(store: &Store, plugin: &NodeService) -> Vec<String> {
    let call = Request::new(NodeGetStorageHealthRequest::default());
    let answer = store.block_on(plugin.node_get_storage_health(call));
    let all = answer.expect("health").into_inner().backend_health;
    all.into_iter().map(|one| one.reason).collect()
}

/// Writes and flushes through a device.
fn write(device: &Path, byte: u8) -> std::io::Result<()> {
    let mut stream = UnixStream::connect(device)?;
    let export = nbd::client::handshake(&mut stream, b"")?;
    let mut client = nbd::client::NbdClient::new(&mut stream, &export);
    client.seek(SeekFrom::Start(4096))?;
    client.write_all(&[byte; 4096])
}

fn publish(store: &Store, node: &str) -> Result<HashMap<String, String>, Status> {
    let call = ControllerPublishVolumeRequest {
        volume_id: ID.into(),
        node_id: node.into(),
        volume_capability: block(Mode::SingleNodeWriter),
        secrets: secret(store, KEY),
        ..ControllerPublishVolumeRequest::default()
    };
    let controller = ControllerService::default();
    let answer = store.block_on(controller.controller_publish_volume(Request::new(call)))?;
    Ok(answer.into_inner().publish_context)
}

fn unpublish(store: &Store, node: &str) {
    let call = ControllerUnpublishVolumeRequest {
        volume_id: ID.into(),
        node_id: node.into(),
        secrets: secret(store, KEY),
    };
    let controller = ControllerService::default();
    store
        .block_on(controller.controller_unpublish_volume(Request::new(call)))
        .expect("unpublished");
}

/// The cluster declares a node gone that still runs: the next has the volume
/// at once, and what the first one writes is refused.
#[test]
fn an_unpublished_node_is_fenced_and_the_next_has_the_volume_at_once() {
    let store = Store::start();
    store.create("v.vhd", 1 << 20);
    let (first, second) = (Machine::start(&store, "a"), Machine::start(&store, "b"));
    let context = publish(&store, &first.id).expect("published");
    // To this node and no other.
    let unknown = second.health(&store).expect_err("nobody asked for it");
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    let refused = second.stage(&store, KEY, &context).expect_err("another's");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert_eq!(second.health(&store).expect("known"), ["StagingRefused"]);
    first.stage(&store, KEY, &context).expect("staged");
    let device = first.device(&store);
    write(&device, 0xaa).expect("it has the volume");
    assert!(first.health(&store).expect("known").is_empty());
    let refused = publish(&store, &second.id).expect_err("one node writes");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");

    let since = Instant::now();
    unpublish(&store, &first.id);
    let context = publish(&store, &second.id).expect("published");
    second.stage(&store, KEY, &context).expect("staged");
    let took = since.elapsed();
    // The first one's lease, left alone, is never less than its renewals keep it.
    assert!(took < LEASE / 4, "waited for the lease: {took:?}");
    write(&second.device(&store), 0xbb).expect("it has the volume");
    write(&device, 0xcc).expect_err("taken away");
    eventually("it is told", || first.attachment(&store).fenced.is_some());
    assert_eq!(first.health(&store).expect("known"), ["Fenced"]);
    assert!(second.health(&store).expect("known").is_empty());
    // It is told so without waiting for the lease.
    let since = Instant::now();
    let context = HashMap::from([("node".to_owned(), first.id.clone())]);
    let refused = first.stage(&store, KEY, &context).expect_err("taken away");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(since.elapsed() < LEASE / 4, "{:?}", since.elapsed());
    // Late and twice: nothing of the second's.
    unpublish(&store, &first.id);
    write(&second.device(&store), 0xbb).expect("it has the volume");
    first.unstage(&store).expect("nothing is left there");
    write(&second.device(&store), 0xbb).expect("it has the volume");
    second.unstage(&store).expect("unstaged");
}

/// Without the controller's word a stage waits, and it is the lease that ends.
#[test]
fn a_lease_of_a_node_that_is_there_is_waited_for_and_never_broken() {
    let store = Store::start();
    store.create("v.vhd", 1 << 20);
    let (first, second) = (Machine::start(&store, "a"), Machine::start(&store, "b"));
    let alone = HashMap::new();
    first.stage(&store, KEY, &alone).expect("staged");
    let device = first.device(&store);
    let call = Request::new(second.call(&store, KEY, &alone));
    let plugin = second.plugin.clone();
    let runtime = store.block_on(async { tokio::runtime::Handle::current() });
    let waiting = runtime.spawn(async move { plugin.node_stage_volume(call).await });
    eventually("it waits", || {
        let all = store.block_on(Client::new(second.daemon.socket()).list());
        !all.expect("a list").is_empty()
    });
    for _ in 0..3 {
        write(&device, 0xaa).expect("it keeps the volume");
    }
    assert!(!waiting.is_finished(), "two nodes have it");
    // Given back, it is had at once.
    let since = Instant::now();
    first.unstage(&store).expect("unstaged");
    let staged = store.block_on(waiting).expect("it ends");
    staged.expect("staged");
    assert!(since.elapsed() < LEASE / 4, "{:?}", since.elapsed());
    write(&second.device(&store), 0xbb).expect("it has the volume");
}

/// Requests that the store refuses because of the key wait, and go on with the
/// Secret of the next call, as kubelet repeats it.
#[test]
fn a_rotated_secret_reaches_a_volume_in_use() {
    let store = Store::start();
    store.create("v.vhd", 1 << 20);
    let machine = Machine::start(&store, "a");
    let alone = HashMap::new();
    machine.stage(&store, KEY, &alone).expect("staged");
    let device = machine.device(&store);
    write(&device, 1).expect("written");
    let change = dysk::emulator::SettingsChange {
        key: Some(ROTATED.into()),
        ..dysk::emulator::SettingsChange::default()
    };
    store.running.change(&change).expect("rotated");
    let writing = std::thread::spawn({
        let device = device.clone();
        move || write(&device, 2)
    });
    eventually("it waits for a credential", || {
        machine.attachment(&store).blocked.is_some()
    });
    assert_eq!(
        machine.health(&store).expect("known"),
        ["StoreRefusesAccess"]
    );
    assert_eq!(machine.stores(&store), ["StoreRefusesAccess"]);
    // The old Secret once more does not help, and is not a step back.
    machine.stage(&store, KEY, &alone).ok();
    assert!(!writing.is_finished(), "it was told an error");
    machine.stage(&store, ROTATED, &alone).expect("handed on");
    writing.join().expect("it ends").expect("written");
    eventually("all is well", || {
        machine.attachment(&store).blocked.is_none()
    });
    // A wrong one is refused, and what works goes on.
    let wrong = machine.stage(&store, KEY, &alone).expect_err("the old key");
    assert!(!wrong.message().contains(KEY), "the key is told");
    assert!(
        machine.health(&store).expect("known").is_empty(),
        "it works"
    );
    assert!(machine.stores(&store).is_empty());
    write(&device, 3).expect("written");
    // Over a restart of the plugin, which remembers nothing.
    let plugin = NodeService::new("a", &machine.daemon.socket(), None);
    let call = Request::new(machine.call(&store, ROTATED, &alone));
    store
        .block_on(plugin.node_stage_volume(call))
        .expect("there already");
    write(&device, 4).expect("written");
}

/// A daemon that does not answer: its volumes are out of reach, and it is not
/// said that they were well or are not there.
#[test]
fn without_its_daemon_a_node_reaches_no_store() {
    let store = Store::start();
    let nowhere = tempfile::tempdir().expect("a folder");
    let plugin = NodeService::new("a", &nowhere.path().join("dyskd.sock"), None);
    assert_eq!(stores(&store, &plugin), ["DaemonSilent"]);
    let call = Request::new(NodeGetVolumeHealthRequest {
        volume_id: ID.into(),
        ..NodeGetVolumeHealthRequest::default()
    });
    let unknown = store.block_on(plugin.node_get_volume_health(call));
    assert_eq!(unknown.expect_err("unknown").code(), Code::Unavailable);
}
