//! What is measured, against what, and the target: a table.

use std::collections::BTreeSet;

use crate::s3backer;

/// One line a row: what it is called; which of [`STORES`]; how fio or the raw
/// client loads it (direction, bytes, depth); who serves; what the figure is;
/// and the target.
const ROWS: &str = "
4k read, depth 1, 5 ms           | slow     | randread 4k 1    | dysk   | above raw    | <= 0.15
4k write, depth 1, 5 ms          | slow     | randwrite 4k 1   | dysk   | above raw    | <= 0.15
4k read, depth 32, 5 ms          | slow     | randread 4k 32   | dysk   | rate 6400    | >= 0.97
4k write, depth 32, 5 ms         | slow     | randwrite 4k 32  | dysk   | rate 6400    | >= 0.97
4k read, depth 64, 5 ms          | slow     | randread 4k 64   | dysk   | rate 12800   | >= 0.97
4k write, depth 64, 5 ms         | slow     | randwrite 4k 64  | dysk   | rate 12800   | >= 0.97
raw 4k read, depth 32, 5 ms      | slow     | randread 4k 32   | raw    | rate 6400    | >= 0.97
raw 4k read, depth 64, 5 ms      | slow     | randread 4k 64   | raw    | rate 12800   | >= 0.97
no store, depth 1, 5 ms          | slow     | randread 4k 1    | delay  | above raw    | <= 0.15
no store, depth 32, 5 ms         | slow     | randread 4k 32   | delay  | rate 6400    | >= 0.97
no store, depth 64, 5 ms         | slow     | randread 4k 64   | delay  | rate 12800   | >= 0.97
4k read, depth 32, 0 ms          | fast     | randread 4k 32   | dysk   | of raw       | >= 0.55
4k write, depth 32, 0 ms         | fast     | randwrite 4k 32  | dysk   | of raw       | >= 0.55
1m read, depth 4, 0 ms           | fast     | read 1m 4        | dysk   | of raw       | >= 0.60
1m write, depth 4, 0 ms          | fast     | write 1m 4       | dysk   | of raw       | >= 0.60
cpu per 4k read                  | fast     | randread 4k 32   | dysk   | cpu          | <= 20
cpu per 4k write                 | fast     | randwrite 4k 32  | dysk   | cpu          | <= 20
cpu per 4k read, TLS             | tls      | randread 4k 32   | dysk   | cpu          | <= 25
cpu per 4k write, TLS            | tls      | randwrite 4k 32  | dysk   | cpu          | <= 25
cached 4k write, depth 1         | fast     | randwrite 4k 1   | cached | of memory    | >= 0.90
cached 4k write, depth 32        | fast     | randwrite 4k 32  | cached | of memory    | >= 0.90
cached 4k read, depth 32         | fast     | randread 4k 32   | cached | of memory    | >= 0.90
never-written 4k read, depth 32  | fast     | randread 4k 32   | empty  | of memory    | >= 0.90
never-written 128k read, depth 8 | fast     | randread 128k 8  | empty  | of memory    | >= 0.90
cached 1m write: puts a GiB      | stream   | write 1m 8       | stream | puts         | <= 300
cached 128k write: puts a GiB    | stream   | write 128k 32    | stream | puts         | <= 300
4k read at P20's cap             | p20      | randread 4k 64   | dysk   | rate 2300    | >= 0.99
4k read at P20's cap: refused    | p20      | randread 4k 64   | dysk   | refused      | <= 0.01
1m read at P20's cap             | p20      | read 1m 8        | dysk   | rate 143.05  | >= 0.99
1m read at P20's cap: refused    | p20      | read 1m 8        | dysk   | refused      | <= 0.01
4k write at standard's cap       | standard | randwrite 4k 64  | dysk   | rate 500     | >= 0.99
4k write at standard's: refused  | standard | randwrite 4k 64  | dysk   | refused      | <= 0.01
4m read at standard's cap        | standard | read 4m 2        | dysk   | rate 15      | >= 0.95
4m read at standard's: refused   | standard | read 4m 2        | dysk   | refused      | <= 0.01
512k write at standard's cap     | standard | write 512k 8     | dysk   | rate 120     | >= 0.99
512k write at standard's: refused| standard | write 512k 8     | dysk   | refused      | <= 0.01
";

/// A store of its own for some rows: an emulator.
#[derive(Debug)]
pub struct Store {
    pub name: &'static str,
    /// In milliseconds.
    pub latency: u32,
    /// Requests and bytes a second; 0 is no cap.
    pub caps: (u64, u64),
    pub tls: bool,
}

const fn store(name: &'static str, latency: u32, caps: (u64, u64), tls: bool) -> Store {
    Store {
        name,
        latency,
        caps,
        tls,
    }
}

/// P20 and standard page blobs have the caps that Azure documents for them.
pub const STORES: [Store; 6] = [
    store("slow", 5, (0, 0), false),
    store("fast", 0, (0, 0), false),
    store("tls", 0, (0, 0), true),
    store("stream", 5, (0, 0), false),
    store("p20", 5, (2300, 150_000_000), false),
    store("standard", 5, (500, 60 << 20), false),
];

/// A job as fio and the raw client know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Load {
    pub rw: &'static str,
    /// Bytes of a request.
    pub block: u64,
    pub depth: u32,
}

/// Who serves the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Who {
    /// Nobody: it goes to the store from a raw client.
    Raw,
    /// `dyskctl serve` of a volume that is filled.
    Dysk,
    /// The same with `--caching read-write`, staged in memory.
    Cached,
    /// Of a volume nobody wrote to.
    Empty,
    /// Cached again, of a volume that is larger than its cache and is written
    /// once from one end to the other.
    Stream,
    Memory,
    /// `Memory` after as long a wait as the store's latency: what the client and
    /// its socket take of what is left.
    Delay,
    Null,
    Qemu,
    /// What one would script: nbdkit's Python plugin with Azure's SDK.
    Script,
    /// Objects of an S3 store in the place of page blobs.
    S3backer,
}

impl Who {
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw client",
            Self::Dysk => "dysk",
            Self::Cached => "dysk read-write",
            Self::Empty => "dysk, never written",
            Self::Stream => "dysk read-write",
            Self::Memory => "nbdkit memory",
            Self::Delay => "nbdkit memory, delay",
            Self::Null => "nbdkit null",
            Self::Qemu => "qemu-nbd",
            Self::Script => "nbdkit python, Azure SDK",
            Self::S3backer => "s3backer, no cache",
        }
    }

    fn parse(text: &str) -> Self {
        match text {
            "raw" => Self::Raw,
            "dysk" => Self::Dysk,
            "cached" => Self::Cached,
            "empty" => Self::Empty,
            "stream" => Self::Stream,
            "memory" => Self::Memory,
            "delay" => Self::Delay,
            other => panic!("nobody is called {other}"),
        }
    }
}

/// What the figure of a row is.
#[derive(Clone, Copy, Debug)]
pub enum Figure {
    /// IOPS as a share of another one's in the same round.
    Of(Who),
    /// Milliseconds of mean latency above another one's in the same round.
    Above(Who),
    /// IOPS as a share of this.
    Rate(f64),
    /// Microseconds of the server's CPU time a request.
    Cpu,
    /// Share of the store's requests that it refused.
    Refused,
    /// Put Pages for each GiB written.
    Puts,
}

impl Figure {
    pub fn unit(self) -> &'static str {
        match self {
            Self::Above(_) => "ms",
            Self::Cpu => "us",
            _ => "",
        }
    }

    fn parse(text: &str) -> Self {
        match text.split_once(' ').unwrap_or((text, "")) {
            ("of", who) => Self::Of(Who::parse(who)),
            ("above", who) => Self::Above(Who::parse(who)),
            ("rate", rate) => Self::Rate(rate.parse().expect("requests a second")),
            ("cpu", "") => Self::Cpu,
            ("refused", "") => Self::Refused,
            ("puts", "") => Self::Puts,
            _ => panic!("nothing is measured as {text}"),
        }
    }
}

/// One row of the table.
#[derive(Debug)]
pub struct Row {
    pub what: &'static str,
    pub run: Run,
    pub figure: Figure,
    /// The figure is to be at most the target, not at least.
    pub less: bool,
    pub target: f64,
}

/// One thing to run in each round. They run in this order, so that those held
/// against each other are neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// Of [`STORES`].
    pub store: usize,
    pub load: Load,
    pub who: Who,
}

impl Run {
    pub fn name(&self) -> String {
        let Load { rw, block, depth } = self.load;
        let (who, store) = (self.who.name(), STORES[self.store].name);
        format!("{who} {rw} {}k x{depth} {store}", block >> 10)
    }
}

fn load(text: &'static str) -> Load {
    let words: Vec<&'static str> = text.split_whitespace().collect();
    let [rw, block, depth] = words[..] else {
        panic!("a load is a direction, a size and a depth: {text}");
    };
    let block: dysk::size::ByteSize = block.parse().expect("a size");
    Load {
        rw,
        block: block.0,
        depth: depth.parse().expect("a depth"),
    }
}

/// The table, as far as its rows have `only` in their name.
pub fn rows(only: &str) -> Vec<Row> {
    let lines = ROWS.lines().filter(|line| line.contains(only));
    lines
        .filter(|line| !line.is_empty())
        .map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let [what, store, loaded, who, figure, target] = cells[..] else {
                panic!("a row has six cells: {line}");
            };
            let named = STORES.iter().position(|one| one.name == store);
            let (sign, target) = target.split_once(' ').expect("a sign and a number");
            Row {
                what,
                run: Run {
                    store: named.unwrap_or_else(|| panic!("no store is called {store}")),
                    who: Who::parse(who),
                    load: load(loaded),
                },
                figure: Figure::parse(figure),
                less: sign == "<=",
                target: target.parse().expect("a number"),
            }
        })
        .collect()
}

/// What has to run in a round, each once though several rows may ask for it:
/// the rows' own, what they are held against, and where that is `nbdkit
/// memory` the other peers beside it; at the latency of a store, what one
/// would script, and s3backer where it can be mounted.
pub fn runs(rows: &[Row]) -> Vec<Run> {
    let mut runs = BTreeSet::new();
    for row in rows {
        runs.insert(row.run);
        let mut by = |who| runs.insert(Run { who, ..row.run });
        if STORES[row.run.store].name == "slow" {
            by(Who::Script);
            if s3backer::is_possible() {
                by(Who::S3backer);
            }
        }
        match row.figure {
            Figure::Of(Who::Memory) => {
                for peer in [Who::Memory, Who::Null, Who::Qemu] {
                    by(peer);
                }
            }
            Figure::Of(other) | Figure::Above(other) => {
                by(other);
            }
            _ => {}
        }
    }
    runs.into_iter().collect()
}
