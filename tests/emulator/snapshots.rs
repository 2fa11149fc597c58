//! Snapshots, the difference between them, lists, and deletes.

use crate::client::{Client, memory};

fn snapshot(client: &Client, blob: &str) -> String {
    client
        .put(&format!("dysks/{blob}?comp=snapshot"))
        .send()
        .expect_status(201)
        .header("x-ms-snapshot")
        .to_owned()
}

fn put(client: &Client, page: u64, byte: u8) {
    let call = client.page("a", page * 512, &[byte; 512]);
    call.send().expect_status(201);
}

#[test]
fn a_snapshot_stays_as_it_was() {
    let (_running, client) = memory();
    client.create("a", 1 << 20);
    put(&client, 0, 1);
    put(&client, 9, 1);
    let time = snapshot(&client, "a");
    put(&client, 0, 2);
    client.clear("a", 9 * 512, 512).send().expect_status(201);
    put(&client, 5, 2);
    let old = client.read(&format!("a?snapshot={time}"), 0, 1 << 20);
    assert_eq!((old[0], old[5 * 512], old[9 * 512]), (1, 0, 1));
    let new = client.read("a", 0, 1 << 20);
    assert_eq!((new[0], new[5 * 512], new[9 * 512]), (2, 2, 0));
    assert_eq!(
        client.ranges(&format!("dysks/a?comp=pagelist&snapshot={time}")),
        "0-511 4608-5119"
    );
    let write = client
        .put(&format!("dysks/a?comp=page&snapshot={time}"))
        .with("x-ms-page-write", "clear")
        .range(0, 512);
    assert_eq!(write.code(), "400 InvalidQueryParameterValue");
    assert_eq!(
        client
            .head("dysks/a?snapshot=2001-01-01T00:00:00.0000000Z")
            .code(),
        "404 BlobNotFound"
    );
}

#[test]
fn the_difference_lists_what_changed_and_what_was_cleared() {
    let (_running, client) = memory();
    client.create("a", 1 << 20);
    for page in [0, 1, 2, 10] {
        put(&client, page, 1);
    }
    let first = snapshot(&client, "a");
    put(&client, 1, 1); // the same bytes are a change too
    put(&client, 20, 2);
    let second = snapshot(&client, "a");
    client.clear("a", 0, 512).send().expect_status(201);
    client.clear("a", 15 * 512, 512).send().expect_status(201);
    put(&client, 21, 3);
    let diff = |target: &str, previous: &str| {
        client.ranges(&format!(
            "dysks/a?comp=pagelist{target}&prevsnapshot={previous}"
        ))
    };
    assert_eq!(
        diff(&format!("&snapshot={second}"), &first),
        "512-1023 10240-10751"
    );
    assert_eq!(diff("", &second), "c0-511 10752-11263");
    assert_eq!(diff("", &first), "c0-511 512-1023 10240-11263");
    assert_eq!(diff("&maxresults=1", &first), "c0-511 next=1");
    assert_eq!(diff("&marker=1", &first), "512-1023 10240-11263");
    // What a deleted snapshot had seen still counts between its neighbours.
    client
        .delete(&format!("dysks/a?snapshot={second}"))
        .send()
        .expect_status(202);
    assert_eq!(diff("", &first), "c0-511 512-1023 10240-11263");
    let code = |query: &str| client.get(&format!("dysks/a?comp=pagelist&{query}")).code();
    assert_eq!(
        code(&format!("prevsnapshot={second}")),
        "409 PreviousSnapshotNotFound"
    );
    let third = snapshot(&client, "a");
    assert_eq!(
        code(&format!("snapshot={first}&prevsnapshot={third}")),
        "400 PreviousSnapshotCannotBeNewer"
    );
    client.create("a", 1 << 20);
    assert_eq!(
        code(&format!("prevsnapshot={first}")),
        "409 BlobOverwritten"
    );
}

#[test]
fn a_shrink_shows_in_the_difference() {
    let (_running, client) = memory();
    client.create("a", 8192);
    client.page("a", 0, &[1; 8192]).send().expect_status(201);
    let time = snapshot(&client, "a");
    for size in [4096, 8192] {
        client
            .put("dysks/a?comp=properties")
            .with("x-ms-blob-content-length", size)
            .send()
            .expect_status(200);
    }
    assert_eq!(
        client.ranges(&format!("dysks/a?comp=pagelist&prevsnapshot={time}")),
        "c4096-8191"
    );
}

#[test]
fn deletes_know_about_snapshots() {
    let (_running, client) = memory();
    client.create("a", 512);
    let (one, two) = (snapshot(&client, "a"), snapshot(&client, "a"));
    assert!(one < two);
    assert_eq!(client.delete("dysks/a").code(), "409 SnapshotsPresent");
    client
        .delete(&format!("dysks/a?snapshot={one}"))
        .send()
        .expect_status(202);
    let delete = |what: &str| client.delete("dysks/a").with("x-ms-delete-snapshots", what);
    assert_eq!(delete("all").code(), "400 InvalidHeaderValue");
    delete("only").send().expect_status(202);
    assert_eq!(
        client.head(&format!("dysks/a?snapshot={two}")).code(),
        "404 BlobNotFound"
    );
    snapshot(&client, "a");
    delete("include").send().expect_status(202);
    assert_eq!(client.head("dysks/a").code(), "404 BlobNotFound");
    assert_eq!(client.delete("dysks/a").code(), "404 BlobNotFound");
    client.create("a", 512);
    client.delete("dysks/a").send().expect_status(202);
}

#[test]
fn lists_come_in_pages_with_snapshots_and_prefixes() {
    let (_running, client) = memory();
    for name in ["disk/1", "disk/2", "other"] {
        client.create(name, 512);
    }
    let time = snapshot(&client, "disk/1");
    let list = |query: &str| {
        let text = client
            .get(&format!("dysks?restype=container&comp=list{query}"))
            .send()
            .expect_status(200)
            .text();
        let names: Vec<String> = text
            .split('<')
            .filter_map(|part| match part.split_once('>') {
                Some(("Name" | "Snapshot", text)) => Some(text.to_owned()),
                Some(("NextMarker", text)) if !text.is_empty() => Some(format!("next={text}")),
                _ => None,
            })
            .collect();
        names
    };
    assert_eq!(list(""), ["disk/1", "disk/2", "other"]);
    assert_eq!(list("&prefix=disk/"), ["disk/1", "disk/2"]);
    assert_eq!(list("&delimiter=/"), ["disk/", "other"]);
    let all = list("&include=snapshots");
    assert_eq!(all, ["disk/1", &time, "disk/1", "disk/2", "other"]);
    let mut seen = Vec::new();
    let mut marker = String::new();
    loop {
        let mut page = list(&format!("&include=snapshots&maxresults=1&marker={marker}"));
        let next = page.iter().position(|name| name.starts_with("next="));
        let next = next.map(|at| page.remove(at));
        seen.extend(page);
        match next {
            Some(next) => marker = next["next=".len()..].to_owned(),
            None => break,
        }
    }
    assert_eq!(seen, all);
    let containers = client.get("?comp=list").send().expect_status(200).text();
    assert!(containers.contains("<Name>dysks</Name>"), "{containers}");
}

#[test]
fn containers_come_and_go() {
    let (_running, client) = memory();
    assert_eq!(
        client.put("dysks?restype=container").code(),
        "409 ContainerAlreadyExists"
    );
    assert_eq!(
        client.put("Bad_Name?restype=container").code(),
        "400 InvalidResourceName"
    );
    client.create("a", 512);
    assert_eq!(client.get("dysks?restype=container").code(), "200");
    assert_eq!(client.delete("dysks?restype=container").code(), "202");
    assert_eq!(
        client.get("dysks?restype=container").code(),
        "404 ContainerNotFound"
    );
    assert_eq!(client.head("dysks/a").code(), "404 ContainerNotFound");
    assert_eq!(client.put("dysks?restype=container").code(), "201");
    assert_eq!(client.head("dysks/a").code(), "404 BlobNotFound");
}
