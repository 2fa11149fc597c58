//! What cannot work says why in one line and says what to do, with the right
//! exit code, and leaves nothing attached, leased or half-created.

use crate::support::node::{ACCOUNT, Ctl, KEY, Node, Store};
use dysk::blob::LeaseState;
use dysk::emulator::{Effect, Operation, Rule, SettingsChange};

/// A store with one volume, `vol1.vhd`, and a daemon.
fn set_up() -> (Store, Node) {
    let store = Store::start();
    store.create("vol1.vhd", 64 << 20);
    (store, Node::start())
}

fn volume(blob: &str) -> String {
    format!("{ACCOUNT}/dysks/{blob}")
}

/// The commands that go to the store for an existing volume, which must all
/// say the same.
fn at_the_store(ctl: &Ctl, node: &Node, volume: &str, endpoint: &str, line: &str) {
    let socket = node.dir.path().join("serve.sock");
    let socket = socket.to_str().expect("utf-8");
    ctl.run(&["attach", volume, "--endpoint", endpoint])
        .fails(line);
    ctl.run(&["serve", volume, "--endpoint", endpoint, "--unix", socket])
        .fails(line);
    assert!(!std::path::Path::new(socket).exists(), "the socket is left");
    node.assert_empty();
}

#[test]
fn a_wrong_key() {
    let (store, node) = set_up();
    let ctl = node
        .ctl()
        .with(&[("AZURE_STORAGE_KEY", "d3JvbmcgYnV0IGdvb2QgYmFzZTY0")]);
    let line = "get blob properties on devstoreaccount1/dysks/vol1.vhd: 403 AuthenticationFailed: \
                the key is not one of account devstoreaccount1's keys: check it, it may have been rotated";
    at_the_store(&ctl, &node, &volume("vol1.vhd"), &store.endpoint(), line);
    ctl.run(&[
        "delete",
        &volume("vol1.vhd"),
        "--endpoint",
        &store.endpoint(),
    ])
    .fails(line);
    assert_eq!(store.lease("vol1.vhd"), LeaseState::Available);
}

#[test]
fn a_key_that_is_none() {
    let (store, node) = set_up();
    let ctl = node.ctl().with(&[("AZURE_STORAGE_KEY", "not base64!")]);
    let said = ctl.run(&[
        "attach",
        &volume("vol1.vhd"),
        "--endpoint",
        &store.endpoint(),
    ]);
    said.fails(
        "the key from the environment: the account key is not base64: \
         copy it whole, it is 88 characters and ends in ==",
    );
    node.assert_empty();
}

#[test]
fn a_missing_blob() {
    let (store, node) = set_up();
    at_the_store(
        &node.ctl(),
        &node,
        &volume("none.vhd"),
        &store.endpoint(),
        "get blob properties on devstoreaccount1/dysks/none.vhd: 404 BlobNotFound: \
         there is no such blob: check its name or create it",
    );
}

#[test]
fn a_missing_container() {
    let (store, node) = set_up();
    at_the_store(
        &node.ctl(),
        &node,
        &format!("{ACCOUNT}/nowhere/vol1.vhd"),
        &store.endpoint(),
        "get blob properties on devstoreaccount1/nowhere/vol1.vhd: 404 ContainerNotFound: \
         there is no container nowhere: check its name or create it",
    );
}

#[test]
fn a_blob_that_is_no_page_blob() {
    let (store, node) = set_up();
    store.put_block_blob("text.vhd");
    at_the_store(
        &node.ctl(),
        &node,
        &volume("text.vhd"),
        &store.endpoint(),
        "devstoreaccount1/dysks/text.vhd: not a page blob: only page blobs can be disks",
    );
    assert_eq!(store.lease("text.vhd"), LeaseState::Available);
}

#[test]
fn a_lease_held_elsewhere() {
    let (store, node) = set_up();
    store.hold_lease("vol1.vhd");
    at_the_store(
        &node.ctl(),
        &node,
        &volume("vol1.vhd"),
        &store.endpoint(),
        "devstoreaccount1/dysks/vol1.vhd: leased elsewhere: \
         detach it where it is attached, or take it over with --break-lease",
    );
    node.ctl()
        .run(&[
            "delete",
            &volume("vol1.vhd"),
            "--endpoint",
            &store.endpoint(),
        ])
        .fails(
            "devstoreaccount1/dysks/vol1.vhd: leased elsewhere: \
             detach it where it is attached before deleting it",
        );
    assert_eq!(store.lease("vol1.vhd"), LeaseState::Leased);
    assert!(store.exists("vol1.vhd"));
}

/// Settings of the account and its service that refuse everything.
#[test]
fn an_account_that_refuses() {
    let (store, node) = set_up();
    let cases = [
        (
            SettingsChange {
                shared_key_disabled: Some(true),
                ..SettingsChange::default()
            },
            "403 KeyBasedAuthenticationNotPermitted",
        ),
        (
            SettingsChange {
                shared_key_disabled: Some(false),
                https_required: Some(true),
                ..SettingsChange::default()
            },
            "400 AccountRequiresHttps",
        ),
        (
            SettingsChange {
                https_required: Some(false),
                firewall: Some(true),
                ..SettingsChange::default()
            },
            "403 AuthorizationFailure",
        ),
        (
            SettingsChange {
                firewall: Some(false),
                clock_skew: Some(3600),
                ..SettingsChange::default()
            },
            "403 AuthenticationFailed",
        ),
    ];
    for (change, code) in cases {
        store.running.change(&change).expect("the setting is taken");
        let arguments = [
            "attach",
            &volume("vol1.vhd"),
            "--endpoint",
            &store.endpoint(),
        ];
        let said = node.ctl().run(&arguments);
        let start =
            format!("dyskctl: get blob properties on devstoreaccount1/dysks/vol1.vhd: {code}: ");
        assert!(said.err.starts_with(&start), "{said:?}");
        assert!(said.err.len() > start.len() + 20, "a remedy: {said:?}");
        assert_eq!(
            (said.err.lines().count(), said.code),
            (1, Some(1)),
            "{said:?}"
        );
        node.assert_empty();
    }
    let back = SettingsChange {
        clock_skew: Some(0),
        ..SettingsChange::default()
    };
    store.running.change(&back).expect("the setting is taken");
    assert_eq!(store.lease("vol1.vhd"), LeaseState::Available);
}

#[test]
fn a_store_that_is_not_there() {
    let (_, node) = set_up();
    at_the_store(
        &node.ctl(),
        &node,
        &volume("vol1.vhd"),
        "http://127.0.0.1:1",
        "get blob properties on devstoreaccount1/dysks/vol1.vhd: cannot connect: 127.0.0.1:1: \
         Connection refused (os error 111); check that the store listens there and that no \
         firewall stands between",
    );
    let said = node.ctl().run(&[
        "attach",
        &volume("vol1.vhd"),
        "--endpoint",
        "http://no-such-host.invalid",
    ]);
    assert!(
        said.err.starts_with(
            "dyskctl: get blob properties on devstoreaccount1/dysks/vol1.vhd: \
             host name not found: no-such-host.invalid: "
        ),
        "{said:?}"
    );
    assert_eq!(
        (said.err.lines().count(), said.code),
        (1, Some(1)),
        "{said:?}"
    );
    node.assert_empty();
}

#[test]
fn no_daemon() {
    let node = Node::prepare();
    let line = format!(
        "dyskd is not running (no answer at {}): start it with `systemctl start dyskd`, \
         or name its socket with --socket",
        node.socket().display()
    );
    let ctl = node.ctl();
    ctl.run(&["list"]).fails(&line);
    ctl.run(&["status", "vol1"]).fails(&line);
    ctl.run(&["detach", "vol1"]).fails(&line);
    ctl.run(&["detach", "/dev/nbd0"]).fails(&line);
    ctl.run(&["attach", &volume("vol1.vhd")]).fails(&line);
}

#[test]
fn a_node_that_cannot_attach() {
    let (store, node) = set_up();
    let reason = "the kernel has no nbd driver loaded: run `modprobe nbd nbds_max=0`";
    node.transport.set(|b| b.unable = Some(reason.into()));
    let endpoint = store.endpoint();
    let attach = |blob: &str, more: &[&str]| {
        let volume = volume(blob);
        let mut arguments = vec!["attach", &volume, "--endpoint", &endpoint];
        arguments.extend(more);
        node.ctl().run(&arguments).fails(reason);
    };
    attach("vol1.vhd", &[]);
    attach("new.vhd", &["--create", "--size", "1MiB"]);
    assert!(!store.exists("new.vhd"));
    assert_eq!(store.lease("vol1.vhd"), LeaseState::Available);
    node.assert_empty();
}

#[test]
fn a_device_that_does_not_come_takes_everything_back() {
    let (store, node) = set_up();
    let reason = "nbd0 not ready: there is no /dev/nbd0: mount devtmpfs there, or the host's /dev";
    node.transport.set(|b| b.broken = Some(reason.into()));
    let endpoint = store.endpoint();
    let attach = |blob: &str, more: &[&str]| {
        let volume = volume(blob);
        let mut arguments = vec!["attach", &volume, "--endpoint", &endpoint];
        arguments.extend(more);
        node.ctl().run(&arguments)
    };
    attach("vol1.vhd", &[]).fails(reason);
    assert_eq!(store.lease("vol1.vhd"), LeaseState::Available);
    attach("new.vhd", &["--create", "--size", "1MiB"]).fails(reason);
    assert!(!store.exists("new.vhd"), "the new blob is left");
    node.ctl().run(&["list", "-o", "json"]).says("[]\n");
    node.assert_empty();
    // The name is free, and so is the blob's.
    node.transport.set(|b| b.broken = None);
    assert_eq!(
        attach("new.vhd", &["--create", "--size", "1MiB"]).code,
        Some(0)
    );
}

#[test]
fn names_and_volumes_in_use() {
    let (store, node) = set_up();
    store.create("vol2.vhd", 1 << 20);
    let endpoint = store.endpoint();
    let ctl = node.ctl();
    let attach = |arguments: &[&str]| {
        let mut all = vec!["attach", "--endpoint", &endpoint];
        all.extend(arguments);
        ctl.run(&all)
    };
    let device = attach(&[&volume("vol1.vhd")]).ok().trim().to_owned();
    attach(&[&volume("vol2.vhd"), "--name", "vol1"]).fails(
        "name vol1 is in use by devstoreaccount1/dysks/vol1.vhd: \
         choose another with --name, or detach it first",
    );
    let line = format!(
        "blob devstoreaccount1/dysks/vol1.vhd is attached already as vol1 at {device}: \
         use that, or detach it first"
    );
    attach(&[&volume("vol1.vhd"), "--name", "again"]).fails(&line);
    attach(&[&volume("vol1.vhd")]).fails(&line);
    attach(&[&volume("vol2.vhd"), "--create", "--size", "1MiB"]).fails(
        "devstoreaccount1/dysks/vol2.vhd: there is a blob of this name already: \
         choose another, or delete it first",
    );
    assert!(
        store.exists("vol2.vhd"),
        "a blob that is not ours is never removed"
    );
    assert_eq!(store.lease("vol2.vhd"), LeaseState::Available);
    ctl.run(&["detach", "vol1"]).says("");
    node.assert_empty();
}

#[test]
fn what_is_not_attached() {
    let node = Node::start();
    let ctl = node.ctl();
    let line = "nothing is attached as vol9: see `dyskctl list`";
    ctl.run(&["detach", "vol9"]).fails(line);
    ctl.run(&["detach", "vol9", "--force"]).fails(line);
    ctl.run(&["status", "vol9"]).fails(line);
    ctl.run(&["detach", "/dev/nbd4000"])
        .fails("/dev/nbd4000 is not attached by dyskd: see `dyskctl list`");
    ctl.run(&["detach", "../vol9"]).fails(
        "name \"../vol9\" is not usable: take 1 to 63 of A-Z a-z 0-9 . _ -, \
         the first no dot or dash",
    );
}

#[test]
fn sizes_that_no_disk_can_have() {
    let (store, node) = set_up();
    let endpoint = store.endpoint();
    for (size, line) in [
        ("1000", "size 1000 is no multiple of 512 bytes: use 1024"),
        ("0", "size 0: a disk needs at least 512 bytes"),
        (
            "8TiB",
            "size 8796093022208 is more than a page blob holds: \
             use at most 8796093021696 (8 TiB with the footer)",
        ),
    ] {
        let volume = volume("sized.vhd");
        let ctl = node.ctl();
        ctl.run(&["create", &volume, "--size", size, "--endpoint", &endpoint])
            .fails(line);
        ctl.run(&[
            "attach",
            &volume,
            "--create",
            "--size",
            size,
            "--endpoint",
            &endpoint,
        ])
        .fails(line);
        assert!(!store.exists("sized.vhd"));
    }
    node.assert_empty();
}

#[test]
fn usage() {
    let ctl = Ctl::new(std::path::Path::new("/nonexistent/dyskd.sock"));
    for (arguments, line) in [
        (
            &["create", "a/dysks/b", "--size", "many"][..],
            "invalid value 'many' for '--size <SIZE>': \"many\" is not a size: write a whole \
             number with an optional unit, like 512, 64KiB or 32GiB; see --help",
        ),
        (
            &["create", "a/dysks/b"],
            "the following required arguments were not provided: --size <SIZE>; see --help",
        ),
        (
            &["attach", "a/dysks/b", "--create"],
            "the following required arguments were not provided: --size <SIZE>; see --help",
        ),
        (
            &["attach", "a/dysks/b", "--name", "-x/y"],
            "unexpected argument '-x' found; see --help",
        ),
        (
            &["attach", "a/dysks/b", "--connections", "99"],
            "invalid value '99' for '--connections <N>': 99 is not in 1..=16; see --help",
        ),
        (
            &["attach", "a/dysks/b", "--key", KEY],
            "unexpected argument '--key' found; see --help",
        ),
        (
            &["serve", "a/dysks/b"],
            "the following required arguments were not provided: \
             <--unix <PATH>|--listen <ADDR>>; see --help",
        ),
    ] {
        ctl.run(arguments).fails_with(2, line);
    }
    let nothing = ctl.run(&[]);
    assert_eq!(nothing.code, Some(2));
}

#[test]
fn credentials_that_are_not_there_or_another_account_s() {
    let node = Node::prepare();
    let dir = node.dir.path();
    std::fs::write(dir.join("accountname"), "other\n").expect("write");
    std::fs::write(dir.join("accountkey"), KEY).expect("write");
    let dir = dir.to_str().expect("utf-8");
    let bare = node.ctl().with(&[]);
    bare.run(&["delete", "acct/dysks/b.vhd"]).fails(
        "no credentials: use --account-key-file or --secret-dir, or set AZURE_STORAGE_KEY, \
         AZURE_STORAGE_SAS_TOKEN or AZURE_STORAGE_CONNECTION_STRING",
    );
    bare.run(&["delete", "acct/dysks/b.vhd", "--secret-dir", dir])
        .fails(&format!(
            "volume \"acct/dysks/b.vhd\" is in account acct, but the secret in {dir} names other: \
         use the credentials of acct"
        ));
    let said = bare.run(&[
        "delete",
        "acct/dysks/b.vhd",
        "--account-key-file",
        "/nonexistent/key",
    ]);
    assert!(said.err.contains("/nonexistent/key"), "{said:?}");
    assert_eq!((said.code, said.err.lines().count()), (Some(1), 1));
    node.ctl().run(&["delete", "b.vhd"]).fails(
        "volume \"b.vhd\" names no account: write ACCOUNT/CONTAINER/BLOB, \
         or set AZURE_STORAGE_ACCOUNT",
    );
    let two = [
        ("AZURE_STORAGE_ACCOUNT", "other"),
        ("AZURE_STORAGE_KEY", KEY),
    ];
    node.ctl().with(&two).run(&["delete", "acct/dysks/b.vhd"]).fails(
        "volume \"acct/dysks/b.vhd\" is in account acct, but AZURE_STORAGE_ACCOUNT names other: \
         use the credentials of acct",
    );
}

#[test]
fn options_that_contradict_each_other() {
    let (store, node) = set_up();
    let endpoint = store.endpoint();
    let volume = volume("vol1.vhd");
    let uncached = "nothing is cached with --caching none: leave out --staging-dir and \
                    --cache-size, or choose read-only or read-write";
    for (options, line) in [
        (vec!["--cache-size", "1MiB"], uncached),
        (vec!["--staging-dir", "/ssd"], uncached),
        (
            vec!["--caching", "read-write", "--staging-dir", "ssd"],
            "the staging folder must be an absolute path",
        ),
        (
            vec!["--io-deadline", "0s"],
            "an i/o deadline of 0 fails every request: leave out --io-deadline to wait for ever",
        ),
    ] {
        for place in [vec!["attach"], vec!["serve", "--unix", "/nonexistent/x"]] {
            let common = [volume.as_str(), "--endpoint", endpoint.as_str()];
            let arguments: Vec<&str> = [&place[..], &common, &options].concat();
            node.ctl().run(&arguments).fails(line);
        }
    }
}

/// A throttled store is borne with; one that fails for good is told.
#[test]
fn a_store_that_fails_half_way_through_an_open() {
    let (store, node) = set_up();
    let refuse = Effect::status(409, "FeatureVersionMismatch");
    store
        .running
        .faults()
        .set(vec![Rule::on(Operation::SetBlobProperties, refuse)]);
    let said = node.ctl().run(&[
        "attach",
        &volume("vol1.vhd"),
        "--endpoint",
        &store.endpoint(),
    ]);
    assert!(
        said.err
            .contains("devstoreaccount1/dysks/vol1.vhd: 409 FeatureVersionMismatch"),
        "{said:?}"
    );
    assert_eq!((said.code, said.err.lines().count()), (Some(1), 1));
    assert_eq!(
        store.lease("vol1.vhd"),
        LeaseState::Available,
        "the lease is given back"
    );
    node.assert_empty();
}
