//! Everything goes wrong between a loaded file system and its store, one thing
//! after the other: nobody is told an error, nothing is lost or garbled, and
//! once it is over the load goes on as before.

use std::time::{Duration, Instant};

use crate::support::guest::{Guest, Pending, Witness};
use crate::support::lane;
use crate::support::outside_store::{HOST, OutsideStore};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(120);
/// Throughput is compared over spans of this length.
const SPAN: Duration = Duration::from_secs(4);
/// Of the throughput before: a machine that others use as well is not steady.
const ENOUGH: f64 = 0.3;
const NAME: &str = "store.dysk.test";
/// An address of the store in the guest itself, which goes away later.
const OLD_ADDRESS: &str = "10.0.2.99";
const RECORDS: &str = "python3 $DYSK_REPO/tests/kernel/guest/records.py";
const RAW_LOAD: &str = "python3 $DYSK_REPO/tests/kernel/guest/raw_load.py";
/// The part of the raw disk behind fio's (first byte, length), its writers, and
/// the seed of what they write.
const BEHIND: &str = "$((48 << 20)) $((16 << 20)) 4 storms";

/// A guest under load: fio that verifies what it wrote, straight on one disk,
/// beside it writers that note what was acknowledged to them, and a writer that
/// has each record acknowledged, in ext4 on another.
struct Loaded {
    guest: Guest,
    witness: Witness,
    fio: Pending,
    raw: Pending,
    writer: Pending,
}

impl Loaded {
    fn start(store: &OutsideStore) -> Self {
        let port = store.port();
        let endpoint = format!("http://{NAME}:{port}/devstoreaccount1");
        let guest = Guest::boot("storms", "6.12", &[("endpoint", &endpoint)]);
        let witness = Witness::start();
        guest.run(&format!(
            "ip addr add {OLD_ADDRESS}/32 dev lo; echo {OLD_ADDRESS} {NAME} >>/etc/hosts; \
             python3 $DYSK_REPO/tests/kernel/guest/relay.py {OLD_ADDRESS} {port} </dev/null \
             >$work/relay.log 2>&1 & echo $! >$work/relay; \
             eventually 20 curl -s http://{NAME}:{port}/-/stats"
        ));
        guest.start_daemon();
        guest.run(
            "attach raw.vhd --create --size 64MiB --integrity crc64; \
             device=$(attach fs.vhd --create --size 256MiB --caching read-write --integrity crc64); \
             mkfs.ext4 -q $device; mount $device /mnt/a",
        );
        let fio = guest.start(
            "fio --name=verify --filename=/dev/dysk/raw --size=48M --rw=randwrite --bsrange=4k-64k \
             --ioengine=libaio --iodepth=16 --direct=1 --verify=crc32c --verify_fatal=1 \
             --do_verify=1 --verify_backlog=64 --time_based --runtime=36000 \
             --output=$work/fio.log & echo $! >$work/fio; wait $! || true; cat $work/fio.log",
        );
        let raw = guest.start(&format!(
            "touch $work/going; {RAW_LOAD} write /dev/dysk/raw {BEHIND} $work/acks $work/going"
        ));
        let writer = guest.start(&format!(
            "{RECORDS} write /mnt/a writer {} 0 & echo $! >$work/writer; wait $!",
            witness.port()
        ));
        witness.goes_on("writer", 10, PATIENCE);
        Self {
            guest,
            witness,
            fio,
            raw,
            writer,
        }
    }

    /// Bytes that both disks have moved so far, as the kernel counts.
    fn moved(&self) -> f64 {
        let sectors = self.guest.run(
            "cat $(readlink /dev/dysk/raw /dev/dysk/fs | sed 's|/dev/\\(.*\\)|/sys/block/\\1/stat|') \
             | awk '{ sum += $3 + $7 } END { print sum }'",
        );
        sectors.parse::<f64>().expect("a number") * 512.0
    }

    /// Bytes a second from now on.
    fn throughput(&self) -> f64 {
        let (from, began) = (self.moved(), Instant::now());
        std::thread::sleep(SPAN);
        (self.moved() - from) / began.elapsed().as_secs_f64()
    }

    /// The storm is over: the load comes back to what it was, to both disks.
    fn heals(&self, storm: &str, before: f64) {
        let over = Instant::now();
        self.witness.goes_on("writer", 5, PATIENCE);
        let first = over.elapsed();
        loop {
            let ratio = self.throughput() / before;
            let took = over.elapsed();
            if ratio >= ENOUGH {
                println!(
                    "figure: {storm}: records go on after {first:.1?}, after {took:.1?} \
                     throughput is {ratio:.2} of that before"
                );
                break;
            }
            assert!(took < PATIENCE, "{storm}: throughput stays at {ratio:.2}");
        }
        assert!(self.fio.is_running(), "{storm}: fio was told an error");
        assert!(
            self.raw.is_running(),
            "{storm}: a raw writer was told an error"
        );
        assert!(
            self.writer.is_running(),
            "{storm}: the writer was told an error"
        );
    }

    /// Ends the load, and compares with what the store alone has.
    fn compare(self) {
        let Self {
            guest,
            witness,
            fio,
            raw,
            writer,
        } = self;
        guest.run("kill -INT $(<$work/fio); rm $work/going; kill $(<$work/writer)");
        let report = fio.answer(PATIENCE).expect("the guest is there").out;
        assert!(
            report.contains("err= 0") && !report.contains("verify: bad"),
            "{report}"
        );
        let raw = raw.answer(PATIENCE).expect("the guest is there");
        assert!(raw.succeeded(), "{raw:?}");
        writer.answer(PATIENCE).expect("the guest is there");
        guest.no_kernel_errors();
        let last = witness.count("writer") - 1;
        let said = guest.run(&format!(
            "umount /mnt/a; dyskctl detach fs; dyskctl detach raw; device=$(attach fs.vhd); \
             e2fsck -fn $device >/dev/null; mount $device /mnt/a; {RECORDS} check /mnt/a {last}; \
             umount /mnt/a; dyskctl detach fs; attach raw.vhd >/dev/null; \
             {RAW_LOAD} check /dev/dysk/raw {BEHIND} $work/acks; dyskctl detach raw"
        ));
        println!("    {said}");
    }
}

/// Three of ten requests fail, in every way there is: each rule is asked in
/// turn, so that 1 - 0.94 * 0.96 * 0.96 * ... = 0.30 of them are struck.
fn errors(store: &OutsideStore) {
    let status = |probability: f64, status: u16, code: &str, applied: bool| {
        json!({"probability": probability, "effect":
            {"kind": "status", "status": status, "code": code, "applied": applied}})
    };
    store.faults(&json!([
        status(0.06, 503, "ServerBusy", false),
        status(0.04, 500, "OperationTimedOut", true),
        status(0.04, 500, "InternalError", false),
        status(0.03, 429, "TooManyRequests", false),
        {"probability": 0.05, "effect": {"kind": "reset-before"}},
        {"probability": 0.04, "effect": {"kind": "reset-after"}},
        {"probability": 0.04, "effect": {"kind": "late", "delay": "500ms"}},
        {"probability": 0.03, "effect": {"kind": "stall", "delay": "1s"}},
        {"probability": 0.02, "effect": {"kind": "stall", "delay": "1s", "after": true}},
        {"operation": "get-blob", "probability": 0.1, "effect": {"kind": "corrupt", "bytes": 1}},
        {"operation": "get-blob", "probability": 0.05, "effect": {"kind": "truncate"}},
    ]));
    std::thread::sleep(Duration::from_secs(12));
    let struck = store.stats()["faults"].clone();
    println!("    faults that struck: {struck}");
    // Every request comes to the first rule.
    let rules = serde_json::from_str::<Value>(&store.admin("GET", "faults", "")).expect("JSON");
    let rules = rules.as_array().expect("the rules").clone();
    let sum = rules
        .iter()
        .map(|rule| rule["struck"].as_f64().expect("a count"));
    let share = sum.sum::<f64>() / rules[0]["matched"].as_f64().expect("a count");
    println!("    {:.0} % of the requests", share * 100.0);
    assert!(share >= 0.27, "{rules:?}");
    let kinds = struck.as_object().map_or(0, serde_json::Map::len);
    assert!(kinds >= 6, "of every kind: {struck}");
    store.no_faults();
}

/// One request in fifty takes half a minute.
fn spikes(store: &OutsideStore) {
    store.faults(&json!([
        {"probability": 0.02, "effect": {"kind": "latency", "latency": "30s"}},
        {"probability": 0.1, "effect": {"kind": "latency", "latency": "2s"}},
    ]));
    std::thread::sleep(Duration::from_secs(12));
    store.no_faults();
}

#[test]
fn storms_cost_no_error_and_no_data() {
    let _timed = lane::timed("storms");
    let outage = Duration::from_secs(lane::number("DYSK_OUTAGE_SECONDS", 20));
    let mut store = OutsideStore::start(&["--latency", "2ms"]);
    let loaded = Loaded::start(&store);
    let before = loaded.throughput();
    println!("figure: {:.1} MB/s before the storms", before / 1e6);

    errors(&store);
    loaded.heals("30 % errors", before);

    spikes(&store);
    loaded.heals("spikes to 30 s", before);

    store.freeze();
    std::thread::sleep(outage);
    store.thaw();
    loaded.heals("outage", before);

    store.kill();
    std::thread::sleep(outage / 4);
    store.restart();
    loaded.heals("store restarted", before);

    loaded.guest.run(&format!(
        "kill $(<$work/relay); ip addr del {OLD_ADDRESS}/32 dev lo; \
         sed 's/^{OLD_ADDRESS} /{HOST} /' /etc/hosts >$work/hosts; cat $work/hosts >/etc/hosts"
    ));
    loaded.heals("store moved to another address", before);

    loaded.compare();
}
