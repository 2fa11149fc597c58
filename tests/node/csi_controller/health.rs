//! What the controller tells of volumes that are not well, and that DeleteVolume
//! takes no snapshots with it.

use std::collections::HashMap;
use std::time::Duration;

use dysk::blob::{Checksum, Conditions, PageBlob, Range};
use dysk::csi::v1::*;
use tonic::{Code, Status};

use super::{MIB, World, refused};

const DEADLINE: Duration = Duration::from_secs(10);

impl World {
    fn health(&self, id: &str) -> Result<Vec<(i32, String)>, Status> {
        let request = ControllerGetVolumeHealthRequest {
            volume_id: id.into(),
            secrets: HashMap::new(),
        };
        let mut client = self.client.clone();
        let answer = self
            .store
            .block_on(client.controller_get_volume_health(request))?;
        let health = answer.into_inner().volume_health.expect("health");
        assert_eq!(health.volume_id, id);
        let entries = health.health_statuses.into_iter();
        Ok(entries.map(|entry| (entry.status, entry.reason)).collect())
    }

    fn ill(&self, most: i32, token: &str) -> Result<(Vec<String>, String), Status> {
        let request = ControllerListVolumeHealthRequest {
            max_entries: most,
            starting_token: token.into(),
            secrets: HashMap::new(),
        };
        let mut client = self.client.clone();
        let answer = self
            .store
            .block_on(client.controller_list_volume_health(request))?
            .into_inner();
        let entries = answer.entries.into_iter();
        let ids = entries.map(|entry| {
            assert!(!entry.health_statuses.is_empty(), "{entry:?}");
            entry.volume_id
        });
        Ok((ids.collect(), answer.next_token))
    }

    /// The condition as ListVolumes and as ControllerGetVolume tells it.
    fn conditions(&self, id: &str) -> [VolumeCondition; 2] {
        let mut client = self.client.clone();
        let all = client.list_volumes(ListVolumesRequest::default());
        let all = self.store.block_on(all).expect("a list").into_inner();
        let listed = all.entries.into_iter().find(|entry| {
            let volume = entry.volume.as_ref().expect("a volume");
            volume.volume_id == id
        });
        let listed = listed.expect("listed").status.expect("a status");
        let one = ControllerGetVolumeRequest {
            volume_id: id.into(),
        };
        let one = self.store.block_on(client.controller_get_volume(one));
        let one = one.expect("there").into_inner().status.expect("a status");
        [listed.volume_condition, one.volume_condition].map(|told| told.expect("a condition"))
    }

    /// Makes the footer that of a VHD which grows with what is written to it
    /// ("Disk Type" and "Checksum", VHD image format specification): its blob
    /// holds no disk as it is.
    fn damage(&self, name: &str) {
        let blob: PageBlob = self.store.blob(name);
        let none = Conditions::default();
        self.store.block_on(async {
            let size = blob.properties(&none, DEADLINE).await.expect("there").size;
            let last = Range::at(size - 512, 512);
            let read = blob.get_range(last, Checksum::Off, &none, DEADLINE).await;
            let mut footer = read.expect("read").pieces.concat();
            footer[60..68].copy_from_slice(&[0, 0, 0, 3, 0, 0, 0, 0]);
            let sum: u32 = footer.iter().map(|byte| u32::from(*byte)).sum();
            footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
            blob.put_page(size - 512, footer.into(), Checksum::Off, &none, DEADLINE)
                .await
                .expect("written");
        });
    }
}

#[test]
fn a_blob_that_cannot_be_a_disk_is_told_and_a_good_one_is_not() {
    let world = World::start();
    let ids = ["a", "b", "c", "d"].map(|name| {
        let made = world.create(world.wanted(name, MIB));
        made.expect(name).volume_id
    });
    assert_eq!(
        world.ill(0, "").expect("a list"),
        (Vec::new(), String::new())
    );
    for name in ["b.vhd", "c.vhd", "d.vhd"] {
        world.damage(name);
    }
    assert_eq!(world.health(&ids[0]).expect("there"), []);
    let inaccessible = VolumeHealthErrorType::Inaccessible as i32;
    let told = world.health(&ids[1]).expect("there");
    assert_eq!(told, [(inaccessible, "UnusableBlob".to_owned())]);
    // ListVolumes and ControllerGetVolume say the same of each.
    let told = [&ids[0], &ids[1]].map(|id| world.conditions(id));
    assert!(told[0].iter().all(|one| !one.abnormal), "{told:?}");
    assert!(told[1].iter().all(|one| one.abnormal), "{told:?}");
    assert_eq!(told[1][0].message, told[1][1].message);
    let (page, token) = world.ill(2, "").expect("a page");
    assert_eq!(page, ids[1..3]);
    assert_eq!(
        world.ill(2, &token).expect("a page"),
        (ids[3..].to_vec(), String::new())
    );
    refused(world.health(""), Code::InvalidArgument);
    refused(
        world.health("devstoreaccount1/dysks/no.vhd"),
        Code::NotFound,
    );
    refused(world.ill(-1, ""), Code::InvalidArgument);
    refused(world.ill(0, "invalid-token"), Code::Aborted);
}

#[test]
fn a_volume_is_not_deleted_with_its_snapshots() {
    let world = World::start();
    let id = world
        .create(world.wanted("v", MIB))
        .expect("made")
        .volume_id;
    let taken = world.snapshot(&id, "one").expect("taken");
    let text = refused(world.delete(&id), Code::FailedPrecondition);
    assert!(text.contains("snapshots"), "{text}");
    assert_eq!(world.snapshot(&id, "one").expect("still there"), taken);
    let request = DeleteSnapshotRequest {
        snapshot_id: taken.snapshot_id,
        secrets: world.secrets(),
    };
    let mut client = world.client.clone();
    world
        .store
        .block_on(client.delete_snapshot(request))
        .expect("deleted");
    // What a copy that died has left is nobody's.
    let left = "copy to devstoreaccount1/dysks/gone.vhd";
    world.snapshot(&id, left).expect("taken");
    world.delete(&id).expect("deleted");
    assert!(!world.store.exists("v.vhd"));
}
