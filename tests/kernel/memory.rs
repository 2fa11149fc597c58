//! Living under one's own disk: a small guest writes several times its free
//! memory to volumes, through the page cache. The store is outside, so that its
//! memory does not count.

use crate::support::lane;
use crate::support::node::Store;

#[test]
fn more_than_memory_is_written_through_a_volume() {
    let store = Store::start();
    let endpoint = lane::seen_by_guest(&store.endpoint());
    let times = lane::number("DYSK_TIMES_MEMORY", 2).to_string();
    lane::run(
        "6.12",
        &["--memory", "192", "--timeout", "1800"],
        "memory",
        &[&times, &endpoint],
    );
}
