//! The node's numbers from outside: `dyskctl top`, `/v1/stats` and what
//! Prometheus reads, against I/O whose amount is known.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use crate::support::node::{ACCOUNT, Ctl, Node, Store};
use serde_json::{Value, json};

const READS: u64 = 7;
const WRITES: u64 = 5;

/// A volume `vol1` of 1 MiB, written and read in 4 KiB blocks.
fn used(store: &Store, node: &Node) -> Ctl {
    let ctl = node.ctl();
    store.create("vol1.vhd", 1 << 20);
    let volume = format!("{ACCOUNT}/dysks/vol1.vhd");
    let attach = ["attach", &volume, "--endpoint", &store.endpoint()];
    let device = ctl.run(&attach).ok().trim().to_owned();
    let io = |direction: &str, blocks: u64| {
        let fio = std::process::Command::new("fio")
            .args(["--name=one", "--ioengine=nbd", "--bs=4k", "--iodepth=1"])
            .arg(format!("--uri=nbd+unix:///?socket={device}"))
            .arg(format!("--rw={direction}"))
            .arg(format!("--size={}", blocks * 4096))
            .output()
            .expect("fio runs");
        assert!(fio.status.success(), "{fio:?}");
    };
    io("write", WRITES);
    io("read", READS);
    ctl
}

fn get(mut stream: impl Read + Write, path: &str) -> (String, String) {
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: dysk\r\nConnection: close\r\n\r\n"
    )
    .expect("asked");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answered");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    (head.to_lowercase(), body.to_owned())
}

/// A scrape, parsed as strictly as the text format's description has it:
/// HELP and TYPE before a family's samples, families and series once, values
/// that are numbers, histograms that add up.
struct Scrape {
    types: BTreeMap<String, String>,
    samples: BTreeMap<String, f64>,
}

impl Scrape {
    fn parse(text: &str) -> Self {
        assert!(text.ends_with('\n'));
        let (mut types, mut samples) = (BTreeMap::new(), BTreeMap::new());
        let (mut helped, mut family) = (BTreeSet::new(), String::new());
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').expect("a help");
                assert!(help.ends_with('.'), "{line}");
                assert!(helped.insert(name.to_owned()), "{name} twice");
                family = name.to_owned();
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect("a type");
                assert_eq!(name, family, "the type follows its help");
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                types.insert(name.to_owned(), kind.to_owned());
            } else {
                let (series, value) = line.rsplit_once(' ').expect("a value");
                let name = series.split('{').next().expect("a name");
                let valid = |c: char| c.is_ascii_lowercase() || c == '_';
                assert!(name.chars().all(valid), "{name}");
                let suffixes: &[&str] = match types.get(&family).map(String::as_str) {
                    Some("histogram") => &["_bucket", "_sum", "_count"],
                    Some(_) => &[""],
                    None => panic!("{line} before its type"),
                };
                let own = suffixes.iter().any(|s| *name == format!("{family}{s}"));
                assert!(own, "{line} within {family}");
                Self::check_labels(series);
                let value = value.parse().expect("a number");
                let before = samples.insert(series.to_owned(), value);
                assert_eq!(before, None, "{series} twice");
            }
        }
        let scrape = Self { types, samples };
        scrape.check_histograms(text);
        scrape
    }

    fn check_labels(series: &str) {
        let Some((_, labels)) = series.split_once('{') else {
            return;
        };
        let labels = labels.strip_suffix('}').expect("a closing brace");
        for label in labels.split("\",") {
            let (name, value) = label.split_once("=\"").expect("name=\"value\"");
            assert!(!name.is_empty() && !value.contains('\n'), "{series}");
        }
    }

    fn check_histograms(&self, text: &str) {
        let (mut last, mut count) = (0.0, 0);
        for line in text.lines().filter(|line| line.contains("_bucket{")) {
            let value: f64 = line
                .rsplit_once(' ')
                .expect("a value")
                .1
                .parse()
                .expect("a number");
            if line.contains("le=\"0.000064\"") {
                last = 0.0;
            }
            assert!(value >= last, "{line}: buckets are cumulative");
            last = value;
            if let Some((series, _)) = line.split_once(",le=\"+Inf\"}") {
                let total = format!("{}}}", series.replacen("_bucket{", "_count{", 1));
                assert_eq!(self.samples.get(&total), Some(&value), "{total}");
                count += 1;
            }
        }
        assert!(count > 0);
    }

    fn volume(&self, name: &str, label: &str) -> f64 {
        let volume = format!("name=\"vol1\",volume=\"{ACCOUNT}/dysks/vol1.vhd\"");
        let comma = if label.is_empty() { "" } else { "," };
        let series = format!("{name}{{{volume}{comma}{label}}}");
        *self
            .samples
            .get(&series)
            .unwrap_or_else(|| panic!("{series} is missing"))
    }
}

#[test]
fn prometheus_reads_what_happened() {
    let (store, mut node) = (Store::start(), Node::prepare());
    node.metrics = Some("127.0.0.1:0".parse().expect("an address"));
    node.run();
    drop(used(&store, &node));
    let socket = UnixStream::connect(node.socket()).expect("the control socket");
    let (head, body) = get(socket, "/metrics");
    assert!(head.starts_with("http/1.1 200"), "{head}");
    assert!(
        head.contains("content-type: text/plain; version=0.0.4"),
        "{head}"
    );
    let scrape = Scrape::parse(&body);
    for (name, label, expected) in [
        ("dysk_volume_io_seconds_count", "op=\"read\"", READS),
        ("dysk_volume_io_seconds_count", "op=\"write\"", WRITES),
        ("dysk_volume_io_bytes_total", "op=\"read\"", READS * 4096),
        ("dysk_volume_io_bytes_total", "op=\"write\"", WRITES * 4096),
        ("dysk_volume_io_errors_total", "op=\"write\"", 0),
        ("dysk_volume_io_in_flight", "", 0),
        ("dysk_volume_store_seconds_count", "request=\"put\"", WRITES),
        (
            "dysk_volume_store_bytes_total",
            "request=\"put\"",
            WRITES * 4096,
        ),
        ("dysk_volume_size_bytes", "", 1 << 20),
        ("dysk_volume_fenced", "", 0),
        ("dysk_volume_throttled", "", 0),
    ] {
        #[allow(clippy::cast_precision_loss)]
        let expected = expected as f64;
        assert_eq!(scrape.volume(name, label), expected, "{name} {label}");
    }
    assert!(scrape.volume("dysk_volume_io_seconds_sum", "op=\"read\"") > 0.0);
    assert!(
        !body.contains("dysk_volume_cache_hits_total{"),
        "it has no cache"
    );
    assert!(scrape.samples["process_resident_memory_bytes"] > 0.0);
    assert_eq!(scrape.types["process_cpu_seconds_total"], "counter");

    let address = node.scraped.expect("it listens");
    let connect = || TcpStream::connect(address).expect("connects");
    let (head, body) = get(connect(), "/metrics");
    assert!(head.starts_with("http/1.1 200"), "{head}");
    Scrape::parse(&body);
    // The control API is not for whoever reaches the address.
    let (head, _) = get(connect(), "/v1/attachments");
    assert!(head.starts_with("http/1.1 404"), "{head}");
}

#[test]
fn top_prints_once_where_nobody_watches() {
    let (store, node) = (Store::start(), Node::start());
    let header = "Name  r/s  w/s  rMB/s  wMB/s  r p50  r p99  w p50  w p99  InFlight  CacheHit  Store/s  Req/IO  State\n";
    let top = ["top", "--interval", "100ms"];
    node.ctl().run(&top).says(header);
    let ctl = used(&store, &node);
    ctl.run(&top).says(&format!(
        "{header}vol1  0    0    0      0      -      -      -      -      0         -         0        -       ok\n"
    ));
    let mut once = top.to_vec();
    once.extend(["--once", "-o", "json"]);
    let seen: Value = serde_json::from_str(ctl.run(&once).ok()).expect("json");
    let nothing = json!({ "p50": null, "p99": null });
    assert_eq!(
        seen,
        json!([{
            "name": "vol1", "volume": format!("{ACCOUNT}/dysks/vol1.vhd"),
            "readsPerSecond": 0.0, "writesPerSecond": 0.0,
            "readBytesPerSecond": 0.0, "writtenBytesPerSecond": 0.0,
            "readLatency": nothing, "writeLatency": nothing,
            "inFlight": 0, "cacheHits": null, "dirtyBytes": 0,
            "storeRequestsPerSecond": 0.0, "storeRequestsPerIo": null,
            "refusedPerSecond": 0.0, "state": "ok",
        }])
    );
    ctl.run(&["top", "--interval", "1ms"]).fails_with(
        2,
        "invalid value '1ms' for '--interval <DURATION>': an interval is 100ms to 1h; see --help",
    );
}

#[test]
fn top_needs_the_daemon() {
    let node = Node::prepare();
    let missing = node.socket();
    node.ctl().run(&["top"]).fails(&format!(
        "dyskd is not running (no answer at {}): start it with `systemctl start dyskd`, or name its socket with --socket",
        missing.display()
    ));
}
