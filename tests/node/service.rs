//! The daemon as a service: what the service manager hears, whatever the store
//! does, and the table of disks that are attached at its start.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use crate::support::node::{KEY, Node, Store};
use dysk::emulator::{Effect, Rule, Span};
use dysk::node::daemon::{Config, Daemon};
use dysk::node::service::{Notifier, Service};
use tokio::sync::oneshot;

const WATCHDOG: Duration = Duration::from_millis(300);

struct Manager(UnixDatagram);

impl Manager {
    /// The next message that has `what`, and no other than those before it.
    fn hears(&self, what: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut text = [0; 1000];
        while Instant::now() < deadline {
            if let Ok(length) = self.0.recv(&mut text)
                && String::from_utf8_lossy(&text[..length]).contains(what)
            {
                return;
            }
        }
        panic!("never heard of {what}");
    }

    fn forget(&self) {
        self.0.set_nonblocking(true).expect("set");
        while self.0.recv(&mut [0; 1000]).is_ok() {}
        self.0.set_nonblocking(false).expect("set");
    }
}

#[test]
fn the_service_manager_hears_what_is_true() {
    let (store, node) = (Store::start(), Node::prepare());
    store.create("tab.vhd", 1 << 20);
    let path = |name: &str| node.dir.path().join(name);
    std::fs::write(path("key"), KEY).expect("written");
    let mode = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path("key"), mode).expect("set");
    let (url, key) = (store.endpoint(), path("key"));
    let table = format!(
        "nonsense\nghost {url}/dysks/ghost.vhd key-file={key}\ntab {url}/dysks/tab.vhd key-file={key}\n",
        key = key.display()
    );
    std::fs::write(path("dysktab"), table).expect("written");
    let socket = UnixDatagram::bind(path("notify")).expect("binds");
    socket
        .set_read_timeout(Some(Duration::from_secs(1)))
        .expect("set");
    let manager = Manager(socket);
    let service = Service {
        notifier: Notifier::new(path("notify").as_os_str()),
        watchdog: Some(WATCHDOG),
        received: Vec::new(),
    };
    let config = Config {
        dysktab: Some(path("dysktab")),
        ..node.config()
    };
    let (stop, stopped) = oneshot::channel::<()>();
    let transport = node.transport.clone();
    let daemon = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            let daemon = Daemon::start_as(config, transport, service).await;
            let daemon = daemon.expect("the daemon starts");
            daemon.run(async { drop(stopped.await) }).await;
        });
        runtime.shutdown_background();
    });
    manager.hears("READY=1");
    manager.hears("STATUS=1 attached");
    assert!(node.ctl().run(&["status", "tab"]).ok().contains("tab.vhd"));

    // A store that does not answer is no reason to be killed.
    let stall = Effect::Stall {
        delay: Span(Duration::from_secs(3600)),
        after: false,
    };
    store.running.faults().set(vec![Rule::any(stall)]);
    manager.forget();
    for _ in 0..5 {
        manager.hears("WATCHDOG=1");
    }
    store.running.faults().clear();
    store.running.cut_connections();

    // A control API that nobody can reach is.
    let control = node.socket();
    std::fs::rename(&control, path("away")).expect("moved");
    std::thread::sleep(2 * WATCHDOG);
    manager.forget();
    std::thread::sleep(2 * WATCHDOG);
    manager.0.set_nonblocking(true).expect("set");
    let mut text = [0; 1000];
    while let Ok(length) = manager.0.recv(&mut text) {
        let text = String::from_utf8_lossy(&text[..length]);
        assert!(!text.contains("WATCHDOG"), "{text}");
    }
    manager.0.set_nonblocking(false).expect("set");
    std::fs::rename(path("away"), &control).expect("moved back");
    manager.hears("WATCHDOG=1");

    drop(stop);
    manager.hears("STOPPING=1");
    daemon.join().expect("the daemon ends well");
    assert_eq!(store.lease("tab.vhd"), dysk::blob::LeaseState::Available);
}
