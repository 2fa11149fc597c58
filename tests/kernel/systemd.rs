//! A node with the units as shipped, on a guest that boots systemd: dysktab
//! and fstab at boot, every kind of restart, a shutdown in the right order.
//! The store is outside, so that what the node left behind can be seen.

use crate::support::lane;
use crate::support::node::Store;
use dysk::blob::LeaseState;

#[test]
fn a_node_restarts_its_daemon_shuts_down_and_boots_again() {
    let store = Store::start();
    for disk in ["data.vhd", "cached.vhd"] {
        store.create(disk, 256 << 20);
    }
    let endpoint = lane::seen_by_guest(&store.endpoint());
    let options = ["--systemd", "--nbd", "later", "--timeout", "900"];
    for boot in ["first", "second"] {
        lane::run("6.12", &options, "systemd", &[boot, &endpoint]);
        for disk in ["data.vhd", "cached.vhd"] {
            assert_eq!(
                store.lease(disk),
                LeaseState::Available,
                "{boot} shutdown: {disk} was unmounted and given back"
            );
        }
    }
}
