//! The CSI controller from a client's side: a gRPC client on its UNIX socket,
//! the embedded store behind it.

mod authority;
mod cut_off;
mod groups;
mod health;
mod modifying;
mod publishing;

use std::collections::HashMap;
use std::path::PathBuf;

use crate::support::node::{ACCOUNT, KEY, Store};
use dysk::csi::server;
use dysk::csi::v1::controller_client::ControllerClient;
use dysk::csi::v1::identity_client::IdentityClient;
use dysk::csi::v1::volume_capability::{AccessMode, AccessType, MountVolume, access_mode};
use dysk::csi::v1::volume_content_source::{SnapshotSource, Type, VolumeSource};
use dysk::csi::v1::*;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

const MIB: i64 = 1 << 20;

/// A controller, its store and a client.
struct World {
    store: Store,
    client: ControllerClient<Channel>,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl World {
    fn start() -> Self {
        Self::with_node_limit(None)
    }

    /// Of a controller that publishes at most so many volumes to a node.
    fn with_node_limit(most: Option<u32>) -> Self {
        let store = Store::start();
        let dir = tempfile::tempdir().expect("a folder");
        let socket = dir.path().join("csi.sock");
        let channel = store.block_on(async {
            let listener = server::listen(&socket).await.expect("it listens");
            let secret = dir.path().join("secret");
            std::fs::create_dir(&secret).expect("a folder");
            for (key, value) in secrets_of(&store) {
                std::fs::write(secret.join(key), value).expect("written");
            }
            let controller = dysk::csi::ControllerService::with_default_secret(Some(secret))
                .with_node_limit(most);
            let services = server::Services {
                controller: Some(controller),
                ..server::Services::default()
            };
            tokio::spawn(server::serve(listener, services, std::future::pending()));
            connect(&socket).await
        });
        Self {
            store,
            client: ControllerClient::new(channel),
            socket,
            _dir: dir,
        }
    }

    fn secrets(&self) -> HashMap<String, String> {
        secrets_of(&self.store)
    }

    fn wanted(&self, name: &str, size: i64) -> CreateVolumeRequest {
        CreateVolumeRequest {
            name: name.into(),
            capacity_range: Some(CapacityRange {
                required_bytes: size,
                limit_bytes: 0,
            }),
            volume_capabilities: vec![capability(access_mode::Mode::SingleNodeWriter)],
            secrets: self.secrets(),
            ..CreateVolumeRequest::default()
        }
    }

    fn create(&self, wanted: CreateVolumeRequest) -> Result<Volume, Status> {
        let mut client = self.client.clone();
        let answer = self.store.block_on(client.create_volume(wanted))?;
        Ok(answer.into_inner().volume.expect("a volume"))
    }

    fn delete(&self, id: &str) -> Result<(), Status> {
        let request = DeleteVolumeRequest {
            volume_id: id.into(),
            secrets: self.secrets(),
        };
        let mut client = self.client.clone();
        self.store.block_on(client.delete_volume(request)).map(drop)
    }

    fn expand(&self, id: &str, size: i64) -> Result<i64, Status> {
        let request = ControllerExpandVolumeRequest {
            volume_id: id.into(),
            capacity_range: Some(CapacityRange {
                required_bytes: size,
                limit_bytes: 0,
            }),
            secrets: self.secrets(),
            volume_capability: None,
        };
        let mut client = self.client.clone();
        let answer = self
            .store
            .block_on(client.controller_expand_volume(request))?;
        assert!(answer.get_ref().node_expansion_required);
        Ok(answer.into_inner().capacity_bytes)
    }

    fn snapshot(&self, id: &str, name: &str) -> Result<Snapshot, Status> {
        let request = CreateSnapshotRequest {
            source_volume_id: id.into(),
            name: name.into(),
            secrets: self.secrets(),
            parameters: HashMap::new(),
        };
        let mut client = self.client.clone();
        let answer = self.store.block_on(client.create_snapshot(request))?;
        Ok(answer.into_inner().snapshot.expect("a snapshot"))
    }
}

fn secrets_of(store: &Store) -> HashMap<String, String> {
    [
        ("accountname", ACCOUNT.to_owned()),
        ("accountkey", KEY.to_owned()),
        ("endpoint", store.endpoint()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

async fn connect(socket: &std::path::Path) -> Channel {
    Endpoint::try_from(format!("unix://{}", socket.display()))
        .expect("an endpoint")
        .connect()
        .await
        .expect("it connects")
}

fn capability(mode: access_mode::Mode) -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Mount(MountVolume::default())),
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code) -> String {
    let status = answer.expect_err("refused");
    assert_eq!(status.code(), code, "{status}");
    assert!(!status.message().contains(KEY), "{status}");
    status.message().to_owned()
}

#[test]
fn it_says_who_it_is() {
    let world = World::start();
    world.store.block_on(async {
        let mut identity = IdentityClient::new(connect(&world.socket).await);
        let info = identity
            .get_plugin_info(GetPluginInfoRequest {})
            .await
            .expect("info");
        assert_eq!(info.into_inner().name, "csi-dysk");
        let probe = identity.probe(ProbeRequest {}).await.expect("a probe");
        assert_eq!(probe.into_inner().ready, Some(true));
    });
}

#[test]
fn volumes_are_made_once_and_deleted_for_good() {
    let world = World::start();
    let longest = "x".repeat(128);
    for name in ["pvc-1", "odd / n\u{e4}me=20..", "=h00", longest.as_str()] {
        let made = world.create(world.wanted(name, MIB + 1)).expect(name);
        assert_eq!(made.capacity_bytes, 2 * MIB);
        assert!(made.volume_id.len() <= 128);
        assert!(made.volume_id.starts_with("devstoreaccount1/dysks/"));
        let context = format!("{:?}", made.volume_context);
        assert!(!context.contains(KEY), "{context}");
        for _ in 0..3 {
            let again = world.create(world.wanted(name, MIB + 1)).expect(name);
            assert_eq!(again, made);
        }
        refused(
            world.create(world.wanted(name, 5 * MIB)),
            Code::AlreadyExists,
        );
        for _ in 0..3 {
            world.delete(&made.volume_id).expect("deleted");
        }
    }
    world.delete("no such handle").expect("nothing to delete");
    // Somebody else's blob is never taken.
    world.store.create("mine.vhd", 1 << 20);
    refused(world.create(world.wanted("mine", MIB)), Code::AlreadyExists);
    assert!(world.store.exists("mine.vhd"));
}

#[test]
fn wrong_input_is_refused_by_name() {
    let world = World::start();
    let wanted = || world.wanted("v", MIB);
    refused(
        world.create(CreateVolumeRequest {
            name: String::new(),
            ..wanted()
        }),
        Code::InvalidArgument,
    );
    refused(
        world.create(CreateVolumeRequest {
            volume_capabilities: Vec::new(),
            ..wanted()
        }),
        Code::InvalidArgument,
    );
    let many = vec![capability(access_mode::Mode::MultiNodeMultiWriter)];
    refused(
        world.create(CreateVolumeRequest {
            volume_capabilities: many,
            ..wanted()
        }),
        Code::InvalidArgument,
    );
    let mut parameters = wanted();
    parameters.parameters.insert("sku".into(), "x".into());
    let text = refused(world.create(parameters), Code::InvalidArgument);
    assert_eq!(text, "parameter sku: there is no such parameter");
    let mut secrets = wanted();
    secrets.secrets.remove("accountname");
    let text = refused(world.create(secrets), Code::InvalidArgument);
    assert!(text.contains("accountname is missing"), "{text}");
    let mut secrets = wanted();
    secrets
        .secrets
        .insert("accountkey".into(), "d3Jvbmc=".into());
    refused(world.create(secrets), Code::Unauthenticated);
    refused(world.create(world.wanted("v", 9 << 40)), Code::OutOfRange);
    refused(
        world.expand("devstoreaccount1/dysks/none.vhd", MIB),
        Code::NotFound,
    );
}

#[test]
fn only_what_is_known_is_confirmed() {
    let world = World::start();
    let id = world
        .create(world.wanted("v", MIB))
        .expect("made")
        .volume_id;
    let validate = |mode, parameters: &[(&str, &str)], mutable: &[(&str, &str)]| {
        let map = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
            let owned = |(k, v): &(&str, &str)| ((*k).to_owned(), (*v).to_owned());
            pairs.iter().map(owned).collect()
        };
        let request = ValidateVolumeCapabilitiesRequest {
            volume_id: id.clone(),
            volume_capabilities: vec![capability(mode)],
            parameters: map(parameters),
            mutable_parameters: map(mutable),
            secrets: world.secrets(),
            ..ValidateVolumeCapabilitiesRequest::default()
        };
        let mut client = world.client.clone();
        let answer = client.validate_volume_capabilities(request);
        let answer = world
            .store
            .block_on(answer)
            .expect("an answer")
            .into_inner();
        assert_eq!(answer.confirmed.is_some(), answer.message.is_empty());
        answer.message
    };
    let one = access_mode::Mode::SingleNodeWriter;
    let good = validate(one, &[("format", "vhd")], &[("iops", "500")]);
    assert_eq!(good, "");
    let many = validate(access_mode::Mode::MultiNodeMultiWriter, &[], &[]);
    assert!(many.contains("access mode"), "{many}");
    let unknown = validate(one, &[("sku", "x")], &[]);
    assert_eq!(unknown, "parameter sku: there is no such parameter");
    let fixed = validate(one, &[], &[("ioDeadline", "5m")]);
    assert!(fixed.starts_with("mutable parameter ioDeadline"), "{fixed}");
}

#[test]
fn volumes_grow_and_an_attached_one_is_left_to_its_node() {
    let world = World::start();
    let made = world.create(world.wanted("v", MIB)).expect("made");
    let id = &made.volume_id;
    assert_eq!(world.expand(id, 3 * MIB).expect("grown"), 3 * MIB);
    assert_eq!(world.expand(id, 2 * MIB).expect("large enough"), 3 * MIB);
    world.store.hold_lease("v.vhd");
    assert_eq!(world.expand(id, 5 * MIB).expect("the node's"), 5 * MIB);
    assert_eq!(world.expand(id, MIB).expect("as it is"), 3 * MIB);
    refused(world.delete(id), Code::FailedPrecondition);
}

#[test]
fn snapshots_and_copies() {
    let world = World::start();
    let a = world
        .create(world.wanted("a", MIB))
        .expect("made")
        .volume_id;
    let b = world
        .create(world.wanted("b", MIB))
        .expect("made")
        .volume_id;
    let one = world.snapshot(&a, "one").expect("taken");
    assert_eq!(world.snapshot(&a, "one").expect("found"), one);
    assert_eq!((one.size_bytes, one.ready_to_use), (MIB, true));
    refused(world.snapshot(&b, "one"), Code::AlreadyExists);
    world.snapshot(&b, "two").expect("taken");
    let mut client = world.client.clone();
    let mut list = |most, token: String, volume: &str| {
        let request = ListSnapshotsRequest {
            max_entries: most,
            starting_token: token,
            source_volume_id: volume.into(),
            snapshot_id: String::new(),
            secrets: world.secrets(),
        };
        world
            .store
            .block_on(client.list_snapshots(request))
            .expect("a list")
            .into_inner()
    };
    let first = list(1, String::new(), "");
    assert_eq!(
        (first.entries.len(), first.next_token.is_empty()),
        (1, false)
    );
    let second = list(1, first.next_token, "");
    assert_eq!((second.entries.len(), second.next_token.as_str()), (1, ""));
    assert_eq!(list(0, String::new(), &a).entries.len(), 1);

    let sources = [
        Type::Snapshot(SnapshotSource {
            snapshot_id: one.snapshot_id.clone(),
        }),
        Type::Volume(VolumeSource {
            volume_id: a.clone(),
        }),
    ];
    for (name, source) in ["from-snapshot", "from-volume"].into_iter().zip(sources) {
        let mut wanted = world.wanted(name, 2 * MIB);
        wanted.volume_content_source = Some(VolumeContentSource {
            r#type: Some(source),
        });
        let made = world.create(wanted.clone()).expect(name);
        assert_eq!(made.capacity_bytes, 2 * MIB);
        assert_eq!(world.create(wanted).expect(name), made);
        // The same name from nothing is another volume.
        refused(
            world.create(world.wanted(name, 2 * MIB)),
            Code::AlreadyExists,
        );
    }
    let mut client = world.client.clone();
    for _ in 0..2 {
        let request = DeleteSnapshotRequest {
            snapshot_id: one.snapshot_id.clone(),
            secrets: world.secrets(),
        };
        world
            .store
            .block_on(client.delete_snapshot(request))
            .expect("deleted");
    }
}

#[test]
fn volumes_are_listed_page_by_page_with_the_default_secret() {
    let world = World::start();
    let mut client = world.client.clone();
    let mut list = |most, token: &str| {
        let request = ListVolumesRequest {
            max_entries: most,
            starting_token: token.into(),
        };
        world
            .store
            .block_on(client.list_volumes(request))
            .map(tonic::Response::into_inner)
    };
    assert_eq!(list(0, "").expect("a list").entries.len(), 0);
    let ids: Vec<String> = ["a", "b", "c"]
        .map(|name| {
            world
                .create(world.wanted(name, MIB))
                .expect("made")
                .volume_id
        })
        .into();
    // Somebody else's blob is none of ours.
    world.store.create("mine.vhd", 1 << 20);
    let mut found = Vec::new();
    let mut token = String::new();
    loop {
        let page = list(2, &token).expect("a page");
        assert!(page.entries.len() <= 2);
        for entry in page.entries {
            let volume = entry.volume.expect("a volume");
            assert_eq!(volume.capacity_bytes, MIB);
            found.push(volume.volume_id);
        }
        token = page.next_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(found, ids);
    refused(list(0, "invalid-token"), Code::Aborted);
    let mut client = world.client.clone();
    let mut get = |id: &str| {
        let request = ControllerGetVolumeRequest {
            volume_id: id.into(),
        };
        world
            .store
            .block_on(client.controller_get_volume(request))
            .map(tonic::Response::into_inner)
    };
    world.store.hold_lease("b.vhd");
    for (id, told) in [(&ids[0], "not attached"), (&ids[1], "attached")] {
        let status = get(id).expect("it is there").status.expect("a status");
        let condition = status.volume_condition.expect("a condition");
        assert_eq!(
            (condition.abnormal, condition.message.as_str()),
            (false, told)
        );
    }
    refused(get("devstoreaccount1/dysks/none.vhd"), Code::NotFound);
}
