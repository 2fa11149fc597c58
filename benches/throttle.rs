//! A volume at the caps of page blobs: the share of the cap that is used and of
//! requests that are refused, with the limits and with them switched off.
//!
//! Prints a table, and JSON into `build/bench/throttle.json`. Asserts nothing.

#[path = "../tests/support/load.rs"]
mod load;
#[path = "../tests/support/node.rs"]
mod node;

use std::path::Path;

use dysk::emulator::SettingsChange;
use dysk::volume::AccountPace;
use load::measure;
use serde_json::json;

/// Name, requests/s, bytes/s, bytes of a request.
const CASES: [(&str, u64, u64, u64); 5] = [
    ("standard, 4 KiB", 500, 60 << 20, 4096),
    ("standard, 512 KiB", 500, 60 << 20, 512 << 10),
    ("P10, 4 KiB", 500, 100_000_000, 4096),
    ("P20, 4 KiB", 2300, 150_000_000, 4096),
    ("P20, 256 KiB", 2300, 150_000_000, 256 << 10),
];

fn main() {
    println!("128 writers, store latency 5 ms; the best round and all refusals");
    println!(
        "{:<20} {:>10} {:>10} {:>10} {:>20}",
        "", "cap", "used", "refused", "refused without"
    );
    let mut rows = Vec::new();
    for (name, iops, bandwidth, bytes) in CASES {
        let caps = SettingsChange {
            iops: Some(iops),
            bandwidth: Some(bandwidth),
            ..SettingsChange::default()
        };
        let cap = (iops as f64).min(bandwidth as f64 / bytes as f64);
        let (used, refused) = measure(&caps, cap, bytes, &AccountPace::default());
        let (used_without, without) = measure(&caps, cap, bytes, &AccountPace::off());
        println!(
            "{name:<20} {cap:>8.0}/s {:>8.1} % {:>8.2} % {:>18.1} %",
            100.0 * used,
            100.0 * refused,
            100.0 * without
        );
        rows.push(json!({
            "case": name, "cap": cap, "used": used, "refused": refused,
            "usedWithout": used_without, "refusedWithout": without,
        }));
    }
    let out = Path::new(env!("CARGO_MANIFEST_DIR")).join("build/bench");
    std::fs::create_dir_all(&out).expect("build/bench can be made");
    let report = json!({ "rows": rows });
    std::fs::write(out.join("throttle.json"), format!("{report:#}\n"))
        .expect("the report is written");
}
