//! Which nodes may attach a volume, and whose lease is ended for that: the
//! nodes are volumes opened as the daemon opens them.

use std::sync::Arc;
use std::time::Duration;

use dysk::blob::{LeaseId, LeaseState};
use dysk::csi::v1::volume_capability::access_mode::Mode;
use dysk::csi::v1::*;
use dysk::device::BlockDevice;
use dysk::volume::{OpenOptions, PublishError, Volume};
use tonic::{Code, Status};

use super::{MIB, World, capability, refused};

const A: &str = "node-a:0123456789ab";
const B: &str = "node-b:0123456789ab";
const DEADLINE: Duration = Duration::from_secs(10);

impl World {
    fn publish(&self, id: &str, node: &str, mode: Mode, readonly: bool) -> Result<String, Status> {
        let request = ControllerPublishVolumeRequest {
            volume_id: id.into(),
            node_id: node.into(),
            volume_capability: Some(capability(mode)),
            readonly,
            secrets: self.secrets(),
            ..ControllerPublishVolumeRequest::default()
        };
        let mut client = self.client.clone();
        let answer = self
            .store
            .block_on(client.controller_publish_volume(request))?;
        let context = answer.into_inner().publish_context;
        assert_eq!(context["node"], node);
        Ok(context["access"].clone())
    }

    fn write(&self, id: &str, node: &str) -> Result<String, Status> {
        self.publish(id, node, Mode::SingleNodeWriter, false)
    }

    fn unpublish(&self, id: &str, node: &str) -> Result<(), Status> {
        let request = ControllerUnpublishVolumeRequest {
            volume_id: id.into(),
            node_id: node.into(),
            secrets: self.secrets(),
        };
        let mut client = self.client.clone();
        self.store
            .block_on(client.controller_unpublish_volume(request))
            .map(drop)
    }

    /// The nodes as ListVolumes and ControllerGetVolume tell them.
    fn nodes(&self, id: &str) -> Vec<String> {
        let mut client = self.client.clone();
        let one = ControllerGetVolumeRequest {
            volume_id: id.into(),
        };
        let one = self
            .store
            .block_on(client.controller_get_volume(one))
            .expect("there");
        let told = one
            .into_inner()
            .status
            .expect("a status")
            .published_node_ids;
        let all = client.list_volumes(ListVolumesRequest::default());
        let all = self
            .store
            .block_on(all)
            .expect("a list")
            .into_inner()
            .entries;
        let listed = all.into_iter().find(|entry| {
            entry
                .volume
                .as_ref()
                .is_some_and(|volume| volume.volume_id == id)
        });
        let status = listed.and_then(|entry| entry.status).expect("listed");
        assert_eq!(status.published_node_ids, told);
        told
    }

    /// Attached as by the daemon of `node`.
    fn attach(&self, blob: &str, node: &str) -> Result<Arc<Volume>, PublishError> {
        let options = OpenOptions::new(LeaseId::random());
        let blob = self.store.blob(blob);
        self.store.block_on(async {
            let volume = Volume::open(blob, options).await.expect("it opens");
            match volume.name_holder(node).await {
                Ok(()) => Ok(volume),
                Err(error) => {
                    volume.close().await.expect("closed");
                    Err(error)
                }
            }
        })
    }

    fn writes(&self, volume: &Volume) -> bool {
        let data = bytes::Bytes::from(vec![7; 4096]);
        let write = volume.write(0, data, false);
        self.store.block_on(write).is_ok()
    }
}

fn made(world: &World) -> String {
    world
        .create(world.wanted("v", MIB))
        .expect("made")
        .volume_id
}

#[test]
fn a_full_node_takes_no_more_volumes_and_keeps_those_it_has() {
    let world = World::with_node_limit(Some(2));
    let ids = ["a", "b", "c", "d"].map(|name| {
        let made = world.create(world.wanted(name, MIB));
        made.expect(name).volume_id
    });
    // All at once, so that they meet while they count.
    let published = std::thread::scope(|scope| {
        let calls = ids.each_ref().map(|id| scope.spawn(|| world.write(id, A)));
        calls.map(|call| call.join().expect("it ends"))
    });
    let (has, refusals): (Vec<_>, Vec<_>) = ids.iter().zip(published).partition(|(_, p)| p.is_ok());
    assert_eq!(has.len(), 2, "{refusals:?}");
    let left: Vec<_> = refusals.iter().map(|(id, _)| *id).collect();
    for (_, refusal) in refusals {
        let said = refused(refusal, Code::ResourceExhausted);
        assert!(said.contains("node-a:0123456789ab has 2"), "{said}");
    }
    // What it has is no new one; and another node has places of its own.
    world.write(has[0].0, A).expect("published before");
    world.write(left[0], B).expect("another node");
    world.unpublish(has[0].0, A).expect("unpublished");
    world.write(left[1], A).expect("there is room");
}

#[test]
fn one_node_writes_or_many_read() {
    let world = World::start();
    let id = made(&world);
    refused(world.write("", A), Code::InvalidArgument);
    refused(world.write(&id, ""), Code::InvalidArgument);
    refused(world.write(&id, "node-a"), Code::NotFound);
    refused(
        world.write("devstoreaccount1/dysks/no.vhd", A),
        Code::NotFound,
    );
    for _ in 0..3 {
        assert_eq!(world.write(&id, A).expect("published"), "rw");
    }
    assert_eq!(world.nodes(&id), [A]);
    let reader = |node| world.publish(&id, node, Mode::MultiNodeReaderOnly, false);
    refused(
        world.publish(&id, A, Mode::SingleNodeWriter, true),
        Code::AlreadyExists,
    );
    let text = refused(world.write(&id, B), Code::FailedPrecondition);
    assert!(text.contains(A), "{text}");
    refused(reader(B), Code::FailedPrecondition);
    world.unpublish(&id, B).expect("it never was");
    assert_eq!(world.nodes(&id), [A]);
    for _ in 0..3 {
        world.unpublish(&id, A).expect("unpublished");
    }
    assert_eq!(world.nodes(&id), Vec::<String>::new());
    for node in [A, B] {
        assert_eq!(reader(node).expect("published"), "ro");
    }
    assert_eq!(world.nodes(&id), [A, B]);
    refused(
        world.write(&id, "node-c:0123456789ab"),
        Code::FailedPrecondition,
    );
    world.unpublish(&id, A).expect("unpublished");
    assert_eq!(world.nodes(&id), [B]);
    world.unpublish(&id, "").expect("everywhere");
    assert_eq!(world.nodes(&id), Vec::<String>::new());
    world.delete(&id).expect("deleted");
    world.unpublish(&id, A).expect("gone altogether");
    world
        .unpublish("no such handle", A)
        .expect("gone altogether");
}

#[test]
fn a_dead_node_s_lease_is_ended_and_no_other() {
    let world = World::start();
    let id = made(&world);
    world.write(&id, A).expect("published");
    let refusal = world.attach("v.vhd", B).expect_err("not published to it");
    assert!(
        matches!(refusal, PublishError::NotPublished { .. }),
        "{refusal}"
    );
    assert_eq!(world.store.lease("v.vhd"), LeaseState::Available);
    let first = world.attach("v.vhd", A).expect("attached");
    assert!(world.writes(&first));
    // Its controller cannot publish it elsewhere, and a wrong unpublish does
    // nothing.
    refused(world.write(&id, B), Code::FailedPrecondition);
    world.unpublish(&id, B).expect("it never was");
    assert!(world.writes(&first));

    world.unpublish(&id, A).expect("its node is gone");
    assert_eq!(world.store.lease("v.vhd"), LeaseState::Available);
    world.write(&id, B).expect("published");
    let second = world.attach("v.vhd", B).expect("at once");
    assert!(!world.writes(&first), "it wrote after it was taken away");
    // Late and twice.
    for _ in 0..3 {
        world.unpublish(&id, A).expect("nothing to do");
    }
    assert!(world.writes(&second));
    assert_eq!(world.nodes(&id), [B]);
    world.store.block_on(second.close()).expect("closed");
    world.unpublish(&id, B).expect("unpublished");
}

/// The node that the volume is published to does not hold it; somebody does.
#[test]
fn a_lease_of_somebody_else_stays() {
    let world = World::start();
    let id = made(&world);
    world.write(&id, A).expect("published");
    // One that was attached before, and is detached: its mark names a lease
    // that has ended.
    let before = world.attach("v.vhd", A).expect("attached");
    world.store.block_on(before.close()).expect("closed");
    let blob = world.store.blob("v.vhd");
    let other = world.store.hold_lease("v.vhd");
    let text = refused(world.unpublish(&id, A), Code::FailedPrecondition);
    assert!(text.contains("somebody else"), "{text}");
    world
        .store
        .block_on(blob.renew_lease(&other, DEADLINE))
        .expect("it is still held");
    assert_eq!(world.nodes(&id), [A], "nothing was changed");
    world
        .store
        .block_on(blob.release_lease(&other, DEADLINE))
        .expect("released");
    world.unpublish(&id, A).expect("unpublished");
    world.store.hold_lease("v.vhd");
    refused(world.write(&id, A), Code::FailedPrecondition);
    world.unpublish(&id, A).expect("nothing to do");
}

/// A publish that was given up is still on its way while its node is
/// unpublished: bound to what it saw, it comes too late.
#[test]
fn an_unpublish_with_nothing_to_do_keeps_a_late_publish_out() {
    let world = World::start();
    let id = made(&world);
    let blob = world.store.blob("v.vhd");
    let none = dysk::blob::Conditions::default();
    let seen = |world: &World| {
        let properties = blob.properties(&none, DEADLINE);
        world.store.block_on(properties).expect("there")
    };
    let before = seen(&world);
    world.unpublish(&id, A).expect("nothing to do");
    let late = dysk::blob::Conditions {
        if_match: Some(before.etag),
        ..none.clone()
    };
    let set = blob.set_metadata(&before.metadata, &late, DEADLINE);
    let error = world.store.block_on(set).expect_err("too late");
    assert_eq!(error.code(), "ConditionNotMet");
    assert_eq!(seen(&world).metadata, before.metadata);
}
