//! Settings that are changed after a volume was made: taken up by the daemon
//! that has it attached, which no call of the controller reaches.

use std::collections::HashMap;

use dysk::csi::v1::*;
use dysk::node::api::AttachRequest;
use dysk::node::client::Client;
use dysk::volume::Caching;
use tonic::{Code, Status};

use super::{MIB, World, refused};
use crate::support::node::Node;

fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    pairs.iter().map(owned).collect()
}

impl World {
    fn modify(&self, id: &str, settings: &[(&str, &str)]) -> Result<(), Status> {
        let request = ControllerModifyVolumeRequest {
            volume_id: id.into(),
            secrets: self.secrets(),
            mutable_parameters: map(settings),
        };
        let mut client = self.client.clone();
        self.store
            .block_on(client.controller_modify_volume(request))
            .map(drop)
    }

    fn condition(&self, id: &str) -> String {
        let request = ControllerGetVolumeRequest {
            volume_id: id.into(),
        };
        let mut client = self.client.clone();
        let answer = self.store.block_on(client.controller_get_volume(request));
        let status = answer.expect("there").into_inner().status;
        let condition = status.and_then(|status| status.volume_condition);
        condition.expect("a condition").message
    }
}

#[test]
fn settings_are_taken_up_by_the_daemon_that_has_it_attached() {
    let world = World::start();
    let made = world.create(world.wanted("v", MIB)).expect("made");
    let id = &made.volume_id;
    refused(world.modify(id, &[("tier", "P4")]), Code::InvalidArgument);
    refused(world.modify(id, &[("iops", "1")]), Code::InvalidArgument);
    refused(world.modify("nowhere", &[("iops", "500")]), Code::NotFound);
    world.modify(id, &[]).expect("nothing to do");
    assert_eq!(world.condition(id), "not attached");
    world
        .modify(id, &[("iops", "500")])
        .expect("from the next attach on");
    assert_eq!(
        world.condition(id),
        "not attached; iops 500 from the next attach on"
    );

    let mut node = Node::start();
    let request = AttachRequest {
        name: "v".parse().expect("a name"),
        account: world.store.spec(),
        container: "dysks".into(),
        blob: "v.vhd".into(),
        read_only: false,
        policy: dysk::node::policy::Policy::default(),
        connections: None,
        break_lease: false,
        recover: dysk::volume::Recover::default(),
        create: None,
        reuse: false,
        holder: None,
        follow_settings: true,
    };
    let daemon = Client::new(node.socket());
    let attached = world.store.block_on(daemon.attach(&request, |_| {}));
    attached.expect("attached");
    // Its success says that the daemon goes by them.
    let wished = [
        ("iops", "100"),
        ("bandwidth", "2MiB"),
        ("cachingMode", "read-only"),
    ];
    world.modify(id, &wished).expect("taken up");
    let limits = |world: &World| {
        let there = world.store.block_on(daemon.status(&request.name));
        let there = there.expect("attached");
        assert_eq!(there.caching, Caching::None);
        (there.limits.iops, there.limits.bandwidth)
    };
    assert_eq!(limits(&world), (Some(100), Some(2 << 20)));
    let told = world.condition(id);
    let settings = "attached; cachingMode read-only, iops 100, bandwidth 2097152 since ";
    assert!(told.starts_with(settings), "{told}");
    assert!(
        told.ends_with(", the caching mode from the next attach on"),
        "{told}"
    );
    let record = std::fs::read_to_string(node.record("v")).expect("a record");
    assert!(record.contains("\"iops\": 100"), "a restart forgets it");
    world.modify(id, &wished).expect("the same once more");

    let detached = world.store.block_on(daemon.detach(&request.name, false));
    detached.expect("detached");
    node.stop();
    world.delete(id).expect("deleted");
    assert!(!world.store.exists("v.vhd.settings"), "the wish is left");
}

#[test]
fn a_tier_is_for_premium_accounts() {
    let world = World::start();
    let mut wanted = world.wanted("v", MIB);
    wanted.parameters = map(&[("tier", "P10")]);
    let text = refused(world.create(wanted.clone()), Code::InvalidArgument);
    assert!(text.starts_with("parameter tier P10: "), "{text}");
    assert!(!world.store.exists("v.vhd"), "something is left");
    let premium = dysk::emulator::SettingsChange {
        premium: Some(true),
        ..dysk::emulator::SettingsChange::default()
    };
    world.store.running.change(&premium).expect("changed");
    world.create(wanted).expect("made");
}
