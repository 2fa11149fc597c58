//! Callers that leave in the middle of a call, and call again: at each of its
//! requests to the store, with that request executed already, and with it still
//! to be executed when the repeated call is long under way or done.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use dysk::csi::v1::group_controller_client::GroupControllerClient;
use dysk::csi::v1::volume_capability::access_mode::Mode;
use dysk::csi::v1::volume_content_source::{Type, VolumeSource};
use dysk::csi::v1::*;
use dysk::emulator::{Effect, Rule, Span};
use tonic::{Code, Status};

use super::{MIB, World, capability, connect};
use crate::support::node::eventually;

const NODE: &str = "node-a:0123456789ab";
/// For how long the request is held: longer than a call takes.
const HELD: Span = Span(Duration::from_millis(250));
/// More requests than any of these calls has.
const MANY: u64 = 100;

type Call<'a> = Pin<Box<dyn Future<Output = Result<(), Status>> + 'a>>;

/// Makes a call: the answer without what is in it.
macro_rules! call {
    ($client:expr, $method:ident, $request:expr) => {{
        let (mut client, request) = ($client, $request);
        Box::pin(async move { client.$method(request).await.map(drop) }) as Call<'_>
    }};
}

impl World {
    /// Calls, and leaves when the request after the first `spared` is at the
    /// store: whether there was one.
    fn leave(&self, spared: u64, executed: bool, call: Call<'_>) -> bool {
        let effect = Effect::Stall {
            delay: HELD,
            after: executed,
        };
        let faults = self.store.running.faults();
        faults.set(vec![Rule {
            skip: spared,
            ..Rule::any(effect).times(1)
        }]);
        let under_way = async {
            while faults.report()[0].struck == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let left = self.store.block_on(async {
            tokio::select! {
                biased;
                () = under_way => true,
                answer = call => {
                    answer.expect("not cut off");
                    false
                }
            }
        });
        faults.clear();
        left
    }

    /// Calls until the call that was left is no more, nor a lease it had; it must
    /// succeed then.
    fn repeat<'a>(&'a self, what: &str, call: impl Fn() -> Call<'a>) {
        eventually("the call that was left has ended", || {
            match self.store.block_on(call()) {
                Ok(()) => true,
                Err(status) => {
                    let again = matches!(status.code(), Code::Aborted | Code::Unavailable);
                    assert!(again, "{what}: {status}");
                    false
                }
            }
        });
    }

    /// What was held is executed.
    fn settled(&self) {
        eventually("nothing is held", || self.store.running.stats().held == 0);
    }

    /// Leaves a call at each of its requests and repeats it, each time for
    /// another volume: `begin` makes it, and `check` looks at what has become of
    /// it and takes it away.
    fn sweep<'a, T>(
        &'a self,
        what: &str,
        begin: impl Fn(&str) -> T,
        call: impl Fn(&T) -> Call<'a>,
        check: impl Fn(T),
    ) {
        let mut left = 0;
        for executed in [false, true] {
            for spared in 0..MANY {
                let volume = begin(&format!("v-{executed}-{spared}"));
                if !self.leave(spared, executed, call(&volume)) {
                    check(volume);
                    break;
                }
                left += 1;
                self.repeat(what, || call(&volume));
                self.settled();
                check(volume);
            }
        }
        assert!(left >= 4, "{what}: left {left} times only");
    }

    fn make(&self, name: &str) -> String {
        let made = self.create(self.wanted(name, MIB));
        made.expect(name).volume_id
    }

    fn listed(&self) -> Vec<String> {
        let mut client = self.client.clone();
        let all = client.list_volumes(ListVolumesRequest::default());
        let all = self.store.block_on(all).expect("a list").into_inner();
        let volumes = all.entries.into_iter().filter_map(|entry| entry.volume);
        volumes.map(|volume| volume.volume_id).collect()
    }

    fn publish_request(&self, id: &str) -> ControllerPublishVolumeRequest {
        ControllerPublishVolumeRequest {
            volume_id: id.into(),
            node_id: NODE.into(),
            volume_capability: Some(capability(Mode::SingleNodeWriter)),
            secrets: self.secrets(),
            ..ControllerPublishVolumeRequest::default()
        }
    }

    fn unpublish_request(&self, id: &str) -> ControllerUnpublishVolumeRequest {
        ControllerUnpublishVolumeRequest {
            volume_id: id.into(),
            node_id: NODE.into(),
            secrets: self.secrets(),
        }
    }

    fn published(&self, id: &str) -> Vec<String> {
        let mut client = self.client.clone();
        let request = ControllerGetVolumeRequest {
            volume_id: id.into(),
        };
        let told = self.store.block_on(client.controller_get_volume(request));
        let status = told.expect("there").into_inner().status;
        status.expect("a status").published_node_ids
    }
}

#[test]
fn volumes_are_made_and_deleted() {
    let world = World::start();
    let id = |name: &str| format!("devstoreaccount1/dysks/{name}.vhd");
    world.sweep(
        "CreateVolume",
        str::to_owned,
        |name| {
            let request = world.wanted(name, MIB);
            call!(world.client.clone(), create_volume, request)
        },
        |name| {
            assert_eq!(world.listed(), [id(&name)]);
            world.expand(&id(&name), MIB).expect("a disk");
            world.delete(&id(&name)).expect("deleted");
        },
    );
    world.sweep(
        "DeleteVolume",
        |name| world.make(name),
        |id| {
            let request = DeleteVolumeRequest {
                volume_id: id.clone(),
                secrets: world.secrets(),
            };
            call!(world.client.clone(), delete_volume, request)
        },
        |_| assert!(world.listed().is_empty()),
    );
}

#[test]
fn volumes_are_copied() {
    let world = World::start();
    let source = world.make("source");
    world.sweep(
        "CreateVolume from a volume",
        str::to_owned,
        |name| {
            let mut request = world.wanted(name, 2 * MIB);
            request.volume_content_source = Some(VolumeContentSource {
                r#type: Some(Type::Volume(VolumeSource {
                    volume_id: source.clone(),
                })),
            });
            call!(world.client.clone(), create_volume, request)
        },
        |name| {
            let copy = format!("devstoreaccount1/dysks/{name}.vhd");
            assert_eq!(world.listed(), [source.clone(), copy.clone()]);
            world.delete(&copy).expect("deleted");
        },
    );
    // Nothing that the copies needed keeps it.
    world.delete(&source).expect("deleted");
    assert!(world.listed().is_empty());
}

#[test]
fn snapshots_are_taken_and_deleted() {
    let world = World::start();
    let blob = |id: &str| id.rsplit('/').next().expect("a name").to_owned();
    world.sweep(
        "CreateSnapshot",
        |name| world.make(name),
        |id| {
            let request = CreateSnapshotRequest {
                source_volume_id: id.clone(),
                name: "s".into(),
                secrets: world.secrets(),
                ..CreateSnapshotRequest::default()
            };
            call!(world.client.clone(), create_snapshot, request)
        },
        |id| {
            let told = world.snapshot(&id, "s").expect("found");
            assert_eq!(world.snapshot(&id, "s").expect("found"), told);
            world.delete_snapshot(&told.snapshot_id).expect("deleted");
            // Also what nobody was told of.
            assert_eq!(world.snapshots_of(&blob(&id)), 0);
            world.delete(&id).expect("without snapshots");
        },
    );
    world.sweep(
        "DeleteSnapshot",
        |name| {
            let id = world.make(name);
            (id.clone(), world.snapshot(&id, "s").expect("taken"))
        },
        |(_, snapshot)| {
            let request = DeleteSnapshotRequest {
                snapshot_id: snapshot.snapshot_id.clone(),
                secrets: world.secrets(),
            };
            call!(world.client.clone(), delete_snapshot, request)
        },
        |(id, _)| world.delete(&id).expect("without snapshots"),
    );
}

#[test]
fn groups_are_taken_and_deleted() {
    let world = World::start();
    let groups = || {
        let channel = world.store.block_on(connect(&world.socket));
        GroupControllerClient::new(channel)
    };
    let gone = |ids: [String; 2]| {
        for id in ids {
            world.delete(&id).expect("without snapshots");
        }
    };
    let two = |name: &str| ["a", "b"].map(|end| world.make(&format!("{name}-{end}")));
    world.sweep(
        "CreateVolumeGroupSnapshot",
        two,
        |ids| {
            let request = CreateVolumeGroupSnapshotRequest {
                name: ids[0].clone(),
                source_volume_ids: ids.to_vec(),
                secrets: world.secrets(),
                ..CreateVolumeGroupSnapshotRequest::default()
            };
            call!(groups(), create_volume_group_snapshot, request)
        },
        |ids| {
            let both = [ids[0].as_str(), ids[1].as_str()];
            let group = world.group(&ids[0], &both).expect("found");
            assert_eq!(world.group(&ids[0], &both).expect("found"), group);
            world
                .delete_group(&group.group_snapshot_id, &[])
                .expect("deleted");
            gone(ids);
        },
    );
    world.sweep(
        "DeleteVolumeGroupSnapshot",
        |name| {
            let ids = two(name);
            let group = world.group(name, &[&ids[0], &ids[1]]).expect("taken");
            (ids, group.group_snapshot_id)
        },
        |(_, id)| {
            let request = DeleteVolumeGroupSnapshotRequest {
                group_snapshot_id: id.clone(),
                secrets: world.secrets(),
                ..DeleteVolumeGroupSnapshotRequest::default()
            };
            call!(groups(), delete_volume_group_snapshot, request)
        },
        |(ids, _)| gone(ids),
    );
}

#[test]
fn volumes_grow_and_are_modified() {
    let world = World::start();
    world.sweep(
        "ControllerExpandVolume",
        |name| world.make(name),
        |id| {
            let request = ControllerExpandVolumeRequest {
                volume_id: id.clone(),
                capacity_range: Some(CapacityRange {
                    required_bytes: 3 * MIB,
                    limit_bytes: 0,
                }),
                secrets: world.secrets(),
                ..ControllerExpandVolumeRequest::default()
            };
            call!(world.client.clone(), controller_expand_volume, request)
        },
        |id| {
            // A lease that was just about to be given back is taken for a node's,
            // which would do it.
            eventually("it has grown", || {
                world.expand(&id, 3 * MIB).expect("grown");
                world.expand(&id, MIB).expect("large enough") == 3 * MIB
            });
            // Nobody's lease is left.
            world.delete(&id).expect("deleted");
        },
    );
    world.sweep(
        "ControllerModifyVolume",
        |name| world.make(name),
        |id| {
            let request = ControllerModifyVolumeRequest {
                volume_id: id.clone(),
                secrets: world.secrets(),
                mutable_parameters: [("iops".to_owned(), "500".to_owned())].into(),
            };
            call!(world.client.clone(), controller_modify_volume, request)
        },
        |id| {
            let wish = format!("{}.settings", id.rsplit('/').next().expect("a name"));
            assert!(world.store.exists(&wish));
            world.delete(&id).expect("deleted");
            assert!(!world.store.exists(&wish));
        },
    );
}

#[test]
fn nodes_are_given_volumes_and_give_them_back() {
    let world = World::start();
    let back = |id: String| {
        let unpublish = world.unpublish_request(&id);
        let mut client = world.client.clone();
        let taken = client.controller_unpublish_volume(unpublish);
        world.store.block_on(taken).expect("unpublished");
        world.delete(&id).expect("deleted");
    };
    world.sweep(
        "ControllerPublishVolume",
        |name| world.make(name),
        |id| {
            let request = world.publish_request(id);
            call!(world.client.clone(), controller_publish_volume, request)
        },
        |id| {
            assert_eq!(world.published(&id), [NODE]);
            back(id);
        },
    );
    world.sweep(
        "ControllerUnpublishVolume",
        |name| {
            let id = world.make(name);
            let mut client = world.client.clone();
            let given = client.controller_publish_volume(world.publish_request(&id));
            world.store.block_on(given).expect("published");
            id
        },
        |id| {
            let request = world.unpublish_request(id);
            call!(world.client.clone(), controller_unpublish_volume, request)
        },
        |id| {
            assert!(world.published(&id).is_empty());
            back(id);
        },
    );
    // Given up rather than repeated: what comes late gives it to nobody.
    for spared in 0..MANY {
        let id = world.make(&format!("given-up-{spared}"));
        let request = world.publish_request(&id);
        let call = call!(world.client.clone(), controller_publish_volume, request);
        let left = world.leave(spared, false, call);
        world.repeat("ControllerUnpublishVolume", || {
            let request = world.unpublish_request(&id);
            call!(world.client.clone(), controller_unpublish_volume, request)
        });
        world.settled();
        assert!(world.published(&id).is_empty(), "after {spared} requests");
        world.delete(&id).expect("deleted");
        if !left {
            assert!(spared >= 2, "it has more requests than {spared}");
            return;
        }
    }
}
