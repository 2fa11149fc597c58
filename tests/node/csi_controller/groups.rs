//! Snapshots of several volumes at one moment, of volumes that are attached and
//! written to meanwhile.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use dysk::blob::{Checksum, Conditions, LeaseId, Range};
use dysk::csi::v1::group_controller_client::GroupControllerClient;
use dysk::csi::v1::volume_content_source::{SnapshotSource, Type};
use dysk::csi::v1::*;
use dysk::device::BlockDevice;
use dysk::emulator::{Effect, Operation, Rule, Span};
use dysk::node::account::open_blob;
use dysk::volume::{GroupError, OpenOptions, Volume, create_group, list_snapshots};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::{MIB, World, refused};
use crate::support::node::eventually;

const DEADLINE: Duration = Duration::from_secs(10);

impl World {
    fn groups(&self) -> GroupControllerClient<Channel> {
        let channel = self.store.block_on(super::connect(&self.socket));
        GroupControllerClient::new(channel)
    }

    pub(super) fn group(
        &self,
        name: &str,
        volumes: &[&str],
    ) -> Result<VolumeGroupSnapshot, Status> {
        let request = CreateVolumeGroupSnapshotRequest {
            name: name.into(),
            source_volume_ids: volumes.iter().map(ToString::to_string).collect(),
            secrets: self.secrets(),
            parameters: HashMap::new(),
        };
        let mut client = self.groups();
        let answer = self
            .store
            .block_on(client.create_volume_group_snapshot(request))?;
        Ok(answer.into_inner().group_snapshot.expect("a group"))
    }

    fn get_group(&self, id: &str, snapshots: &[&str]) -> Result<VolumeGroupSnapshot, Status> {
        let request = GetVolumeGroupSnapshotRequest {
            group_snapshot_id: id.into(),
            snapshot_ids: snapshots.iter().map(ToString::to_string).collect(),
            secrets: self.secrets(),
        };
        let mut client = self.groups();
        let answer = self
            .store
            .block_on(client.get_volume_group_snapshot(request))?;
        Ok(answer.into_inner().group_snapshot.expect("a group"))
    }

    pub(super) fn delete_group(&self, id: &str, snapshots: &[&str]) -> Result<(), Status> {
        let request = DeleteVolumeGroupSnapshotRequest {
            group_snapshot_id: id.into(),
            snapshot_ids: snapshots.iter().map(ToString::to_string).collect(),
            secrets: self.secrets(),
        };
        let mut client = self.groups();
        self.store
            .block_on(client.delete_volume_group_snapshot(request))
            .map(drop)
    }

    pub(super) fn delete_snapshot(&self, id: &str) -> Result<(), Status> {
        let request = DeleteSnapshotRequest {
            snapshot_id: id.into(),
            secrets: self.secrets(),
        };
        let mut client = self.client.clone();
        self.store
            .block_on(client.delete_snapshot(request))
            .map(drop)
    }

    /// Attached as by a daemon.
    fn opened(&self, blob: &str) -> Arc<Volume> {
        let blob = self.store.blob(blob);
        let opened = Volume::open(blob, OpenOptions::new(LeaseId::random()));
        self.store.block_on(opened).expect("it opens")
    }

    fn fill(&self, volume: &Volume, byte: u8) {
        let data = bytes::Bytes::from(vec![byte; 4096]);
        self.store
            .block_on(volume.write(0, data, false))
            .expect("written");
    }

    /// The first byte of a snapshot.
    fn first_byte(&self, snapshot: &Snapshot) -> u8 {
        let (volume, time) = snapshot.snapshot_id.split_once('@').expect("a handle");
        let name = volume.rsplit('/').next().expect("a blob");
        let blob = self.store.blob(name).at_snapshot(time);
        let none = Conditions::default();
        let read = blob.get_range(Range::at(0, 512), Checksum::Off, &none, DEADLINE);
        self.store.block_on(read).expect("read").pieces[0][0]
    }

    pub(super) fn snapshots_of(&self, blob: &str) -> usize {
        let blob = self.store.blob(blob);
        let listed = self.store.block_on(list_snapshots(&blob, DEADLINE));
        listed.expect("a list").len()
    }

    fn rules(&self, rules: Vec<Rule>) {
        self.store.running.faults().set(rules);
    }
}

fn two(world: &World) -> [String; 2] {
    ["a", "b"].map(|name| {
        let made = world.create(world.wanted(name, MIB));
        made.expect(name).volume_id
    })
}

fn ids(group: &VolumeGroupSnapshot) -> Vec<&str> {
    let snapshots = group.snapshots.iter();
    snapshots.map(|one| one.snapshot_id.as_str()).collect()
}

/// Takes a group while its volumes are written to; answers with the first byte
/// of each one's snapshot. The second one's snapshot comes late, when both were
/// written to again: it would have a write that came after one that the first
/// one's lacks. `late` is how it is held.
fn grouped_under_writes(late: Effect) -> Vec<u8> {
    let world = World::start();
    let [a, b] = two(&world);
    let (first, second) = (world.opened("a.vhd"), world.opened("b.vhd"));
    world.fill(&first, 1);
    world.fill(&second, 1);
    world.rules(vec![
        Rule::on(Operation::SnapshotBlob, late)
            .blob("b.vhd")
            .times(1),
    ]);
    let group = std::thread::scope(|scope| {
        let taking = scope.spawn(|| world.group("g", &[&a, &b]));
        eventually("the first one's snapshot is taken", || {
            world.snapshots_of("a.vhd") == 1
        });
        world.fill(&first, 2);
        world.fill(&second, 2);
        taking.join().expect("it ends")
    });
    let group = group.expect("taken");
    assert_eq!(world.store.running.faults().report()[0].struck, 1);
    let bytes = group
        .snapshots
        .iter()
        .map(|snapshot| world.first_byte(snapshot))
        .collect();
    // Nothing is left of a round that did not succeed.
    assert_eq!(
        (world.snapshots_of("a.vhd"), world.snapshots_of("b.vhd")),
        (1, 1)
    );
    for volume in [first, second] {
        world.store.block_on(volume.close()).expect("closed");
    }
    bytes
}

const LATE: Span = Span(Duration::from_millis(1500));

#[test]
fn a_group_is_of_one_moment_though_its_volumes_are_written_to() {
    let bytes = grouped_under_writes(Effect::Stall {
        delay: LATE,
        after: false,
    });
    assert!(bytes[0] >= bytes[1], "not of one moment: {bytes:?}");
}

/// What the test above sees where no snapshot is bound to what its blob held
/// when the round began.
#[test]
fn without_its_condition_a_group_would_be_of_two_moments() {
    let bytes = grouped_under_writes(Effect::Unconditional { delay: LATE });
    assert_eq!(bytes, [1, 2]);
}

#[test]
fn a_disk_written_without_a_pause_is_told_and_nothing_is_left() {
    let world = World::start();
    let [_, _] = two(&world);
    let volume = world.opened("b.vhd");
    // Every snapshot of it comes after another write.
    let stall = Effect::Stall {
        delay: Span(Duration::from_millis(20)),
        after: false,
    };
    world.rules(vec![Rule::on(Operation::SnapshotBlob, stall).blob("b.vhd")]);
    let (account, _) = world
        .store
        .block_on(open_blob(&world.store.spec(), "dysks", "a.vhd"))
        .expect("it opens");
    let disks: BTreeSet<String> = ["a.vhd", "b.vhd"].map(str::to_owned).into();
    let error = world.store.block_on(async {
        let writing = async {
            for n in (0..=u8::MAX).cycle() {
                let data = bytes::Bytes::from(vec![n; 4096]);
                volume.write(0, data, false).await.expect("written");
            }
        };
        let patience = Duration::from_millis(300);
        let taking = create_group(
            &account,
            "dysks",
            &disks,
            ("g", "group g"),
            patience,
            DEADLINE,
        );
        tokio::select! {
            () = writing => unreachable!("it writes for ever"),
            taken = taking => taken.expect_err("never a pause"),
        }
    });
    let GroupError::Written { disks: which, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(which, &["devstoreaccount1/dysks/b.vhd"], "{error}");
    assert_eq!(
        (world.snapshots_of("a.vhd"), world.snapshots_of("b.vhd")),
        (0, 0)
    );
    world.store.block_on(volume.close()).expect("closed");
}

#[test]
fn answers_are_lost_and_a_group_is_made_once() {
    let world = World::start();
    let [a, b] = two(&world);
    for (n, effect) in [
        Effect::ResetAfter,
        Effect::ResetBefore,
        Effect::late(Duration::from_millis(200)),
        Effect::status(503, "ServerBusy"),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("g{n}");
        world.rules(vec![Rule::on(Operation::SnapshotBlob, effect).times(1)]);
        let made = world.group(&name, &[&a, &b]).expect("taken");
        assert_eq!(world.store.running.faults().report()[0].struck, 1);
        world.rules(Vec::new());
        // Whoever asks again has the same, whatever came late.
        eventually("late requests are judged", || {
            let late = world.store.running.stats().late;
            late.scheduled == late.applied + late.refused
        });
        assert_eq!(world.group(&name, &[&b, &a]).expect("found"), made);
        world
            .delete_group(&made.group_snapshot_id, &ids(&made))
            .expect("deleted");
        assert_eq!(
            (world.snapshots_of("a.vhd"), world.snapshots_of("b.vhd")),
            (0, 0)
        );
    }
}

#[test]
fn groups_are_named_found_restored_and_deleted_as_a_whole() {
    let world = World::start();
    let [a, b] = two(&world);
    let c = world.create(world.wanted("c", MIB)).expect("c").volume_id;
    refused(world.group("", &[&a]), Code::InvalidArgument);
    refused(world.group("g", &[]), Code::InvalidArgument);
    refused(
        world.group("g", &[&a, "devstoreaccount1/dysks/no.vhd"]),
        Code::NotFound,
    );
    let mut elsewhere = world.wanted("d", MIB);
    elsewhere
        .parameters
        .insert("container".into(), "others".into());
    let d = world.create(elsewhere).expect("d").volume_id;
    refused(world.group("g", &[&a, &d]), Code::FailedPrecondition);

    let group = world.group("g", &[&a, &b]).expect("taken");
    let id = group.group_snapshot_id.as_str();
    assert!(group.ready_to_use && group.creation_time.is_some());
    let of: Vec<_> = group
        .snapshots
        .iter()
        .map(|one| &one.source_volume_id)
        .collect();
    assert_eq!(of, [&a, &b]);
    assert!(
        group
            .snapshots
            .iter()
            .all(|one| one.group_snapshot_id == id)
    );
    refused(world.group("g", &[&a, &c]), Code::AlreadyExists);
    refused(world.group("g", &[&a]), Code::AlreadyExists);
    assert_eq!(world.get_group(id, &[]).expect("there"), group);
    assert_eq!(world.get_group(id, &ids(&group)).expect("there"), group);

    // A snapshot of the same name is another thing, and no part of the group.
    let single = world.snapshot(&a, "g").expect("taken");
    assert_eq!(single.group_snapshot_id, "");
    refused(
        world.get_group(id, &[&single.snapshot_id]),
        Code::InvalidArgument,
    );
    refused(
        world.delete_group(id, &[&single.snapshot_id]),
        Code::InvalidArgument,
    );
    refused(
        world.delete_group(id, &ids(&group)[..1]),
        Code::InvalidArgument,
    );
    refused(world.get_group("nowhere", &[]), Code::NotFound);

    // Its members are snapshots as any, but for their end.
    let mut wanted = world.wanted("restored", MIB);
    wanted.volume_content_source = Some(VolumeContentSource {
        r#type: Some(Type::Snapshot(SnapshotSource {
            snapshot_id: group.snapshots[1].snapshot_id.clone(),
        })),
    });
    let restored = world.create(wanted).expect("restored").volume_id;
    let of_restored = world.snapshot(&restored, "of it").expect("taken");
    assert_eq!(of_restored.group_snapshot_id, "");
    for one in ids(&group) {
        refused(world.delete_snapshot(one), Code::InvalidArgument);
    }
    refused(world.delete(&b), Code::FailedPrecondition);

    for _ in 0..2 {
        world.delete_group(id, &ids(&group)).expect("deleted");
    }
    refused(world.get_group(id, &[]), Code::NotFound);
    world.delete(&b).expect("without snapshots");
    assert_eq!(world.snapshots_of("a.vhd"), 1, "the single one");
    world
        .delete_group("nowhere", &[])
        .expect("nothing to delete");
}
