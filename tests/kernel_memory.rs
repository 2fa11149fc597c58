//! Living under one's own disk: a small guest writes several times its memory
//! to a volume, through the page cache. The store is outside, so that its
//! memory does not count.

#[path = "support/lane.rs"]
mod lane;
#[path = "support/node.rs"]
mod node;

use node::Store;

fn more_than_memory(caching: &str) {
    let store = Store::start();
    store.create("memory.vhd", 2 << 30);
    let endpoint = lane::seen_by_guest(&store.endpoint());
    lane::run(
        "6.12",
        &["--memory", "256", "--timeout", "1800"],
        "memory",
        &[caching, &endpoint],
    );
}

#[test]
#[ignore = "long on an emulated processor: make soak runs it"]
fn more_than_memory_is_written_through_a_volume() {
    more_than_memory("none");
}

#[test]
#[ignore = "long on an emulated processor: make soak runs it"]
fn more_than_memory_is_written_through_a_volume_that_caches() {
    more_than_memory("read-write");
}
