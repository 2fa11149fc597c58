//! `dyskctl top`: what each volume does, interval by interval.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::error::CliError;
use super::{Global, Output, output};
use crate::metrics::Latencies;
use crate::node::api::{Stats, VolumeNumbers};
use crate::volume::VolumeStats;

/// Home, and clear to the end of the screen.
const CLEAR: &str = "\x1b[H\x1b[J";

#[derive(Debug, Args)]
pub struct Options {
    /// Look at one interval and end; so it does where standard output is no terminal
    #[arg(long)]
    once: bool,
    /// How long an interval is
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = interval)]
    interval: Duration,
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = crate::cli::policy::duration(text)?;
    let allowed = Duration::from_millis(100)..=Duration::from_secs(3600);
    if !allowed.contains(&interval) {
        return Err("an interval is 100ms to 1h".into());
    }
    Ok(interval)
}

pub async fn run(global: &Global, options: Options) -> Result<(), CliError> {
    let client = global.client();
    let screen = global.output == Output::Table && std::io::stdout().is_terminal();
    let mut before = client.stats().await?;
    loop {
        tokio::select! {
            // Nobody who leaves has failed.
            _ = tokio::signal::ctrl_c() => return Ok(()),
            () = tokio::time::sleep(options.interval) => {}
        }
        let now = client.stats().await?;
        let rates = rates(&before, &now);
        if global.output == Output::Json {
            return output::json(&rates);
        }
        if !screen || options.once {
            return table(&rates);
        }
        output::print(CLEAR)?;
        table(&rates)?;
        before = now;
    }
}

/// One volume's interval.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Rates {
    name: String,
    volume: String,
    reads_per_second: f64,
    writes_per_second: f64,
    read_bytes_per_second: f64,
    written_bytes_per_second: f64,
    read_latency: Latency,
    write_latency: Latency,
    in_flight: u64,
    /// Share of reads that the cache answered; `null` without one, or without reads.
    cache_hits: Option<f64>,
    dirty_bytes: u64,
    store_requests_per_second: f64,
    /// To the store for each read and write; `null` without any.
    store_requests_per_io: Option<f64>,
    refused_per_second: f64,
    state: &'static str,
}

/// In seconds; `null` when there was nothing.
#[derive(Debug, Serialize)]
struct Latency {
    p50: Option<f64>,
    p99: Option<f64>,
}

impl Latency {
    fn of(latencies: &Latencies) -> Self {
        let at = |quantile| latencies.quantile(quantile).map(|l| l.as_secs_f64());
        Self {
            p50: at(0.5),
            p99: at(0.99),
        }
    }
}

fn rates(before: &Stats, now: &Stats) -> Vec<Rates> {
    let seconds = Duration::from_micros(now.at.saturating_sub(before.at).max(1)).as_secs_f64();
    let earlier: HashMap<&str, &VolumeStats> = before
        .volumes
        .iter()
        .map(|one| (one.id.as_str(), &one.stats))
        .collect();
    let volumes = now.volumes.iter();
    volumes
        .map(|one| {
            // One that was opened since then counts from nothing.
            rate(one, earlier.get(one.id.as_str()).copied(), seconds)
        })
        .collect()
}

fn rate(one: &VolumeNumbers, before: Option<&VolumeStats>, seconds: f64) -> Rates {
    let stats = &one.stats;
    let since = |of: fn(&VolumeStats) -> &crate::metrics::Metered| match before {
        Some(before) => of(stats).since(of(before)),
        None => of(stats).clone(),
    };
    let (read, write) = (since(|s| &s.read), since(|s| &s.write));
    let sent =
        |stats: &VolumeStats| -> u64 { stats.sent().iter().map(|(_, m)| m.latency.count()).sum() };
    let grown = |of: &dyn Fn(&VolumeStats) -> u64| of(stats).saturating_sub(before.map_or(0, of));
    let (reads, writes) = (read.latency.count(), write.latency.count());
    let sent = grown(&sent);
    let cached = |of: fn(&crate::volume::CacheStatus) -> u64| {
        grown(&|stats| stats.cache.as_ref().map_or(0, of))
    };
    let (hits, misses) = (cached(|c| c.hits), cached(|c| c.misses));
    let state = if stats.fenced {
        "fenced"
    } else if stats.blocked {
        "blocked"
    } else if stats.throttled {
        "throttled"
    } else {
        "ok"
    };
    Rates {
        name: one.name.to_string(),
        volume: one.volume.clone(),
        reads_per_second: reads as f64 / seconds,
        writes_per_second: writes as f64 / seconds,
        read_bytes_per_second: read.bytes as f64 / seconds,
        written_bytes_per_second: write.bytes as f64 / seconds,
        read_latency: Latency::of(&read.latency),
        write_latency: Latency::of(&write.latency),
        in_flight: stats.in_flight,
        cache_hits: share(hits, hits + misses),
        dirty_bytes: stats.cache.as_ref().map_or(0, |cache| cache.dirty_bytes),
        store_requests_per_second: sent as f64 / seconds,
        store_requests_per_io: share(sent, reads + writes),
        refused_per_second: grown(&|stats| stats.refused) as f64 / seconds,
        state,
    }
}

fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

const HEADER: [&str; 14] = [
    "Name", "r/s", "w/s", "rMB/s", "wMB/s", "r p50", "r p99", "w p50", "w p99", "InFlight",
    "CacheHit", "Store/s", "Req/IO", "State",
];

fn table(rates: &[Rates]) -> Result<(), CliError> {
    let rows: Vec<_> = rates.iter().map(row).collect();
    output::table(HEADER, &rows)
}

fn row(rates: &Rates) -> [String; 14] {
    let unknown = || "-".to_owned();
    [
        rates.name.clone(),
        number(rates.reads_per_second),
        number(rates.writes_per_second),
        number(rates.read_bytes_per_second / 1e6),
        number(rates.written_bytes_per_second / 1e6),
        milliseconds(rates.read_latency.p50),
        milliseconds(rates.read_latency.p99),
        milliseconds(rates.write_latency.p50),
        milliseconds(rates.write_latency.p99),
        rates.in_flight.to_string(),
        rates
            .cache_hits
            .map_or_else(unknown, |share| format!("{:.0}%", share * 100.0)),
        number(rates.store_requests_per_second),
        rates.store_requests_per_io.map_or_else(unknown, number),
        rates.state.to_owned(),
    ]
}

/// Three figures are enough to look at.
fn number(value: f64) -> String {
    if value == 0.0 {
        "0".into()
    } else if value < 9.95 {
        format!("{value:.2}")
    } else {
        format!("{value:.0}")
    }
}

fn milliseconds(seconds: Option<f64>) -> String {
    seconds.map_or_else(|| "-".into(), |s| format!("{}ms", number(s * 1e3)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metered;

    fn look(at: u64, reads: u64, gets: u64) -> Stats {
        let metered = |count: u64| Metered {
            bytes: count * 4096,
            errors: 0,
            latency: Latencies {
                buckets: vec![(5120, count)],
                microseconds: count * 5000,
            },
        };
        let none = serde_json::to_value(Metered::default()).expect("serializes");
        let mut stats = serde_json::json!({
            "size": 1 << 20, "inFlight": 3, "refused": 0,
            "throttled": true, "blocked": false, "fenced": false,
        });
        for kind in [
            "read",
            "write",
            "flush",
            "trim",
            "zeroes",
            "extents",
            "storeGet",
            "storePut",
            "storeClear",
            "storeRanges",
        ] {
            stats[kind] = none.clone();
        }
        let mut stats: VolumeStats = serde_json::from_value(stats).expect("parses");
        stats.read = metered(reads);
        stats.store_get = metered(gets);
        Stats {
            at,
            volumes: vec![VolumeNumbers {
                name: "vol1".parse().expect("a name"),
                id: "1".into(),
                volume: "acct/dysks/vol1.vhd".into(),
                stats,
            }],
        }
    }

    #[test]
    fn shows_what_an_interval_brought() {
        let (before, now) = (look(1_000_000, 1000, 500), look(3_000_000, 3000, 1000));
        let rates = rates(&before, &now);
        assert_eq!(
            row(&rates[0]),
            [
                "vol1",
                "1000",
                "0",
                "4.10",
                "0",
                "5.12ms",
                "5.12ms",
                "-",
                "-",
                "3",
                "-",
                "250",
                "0.25",
                "throttled"
            ]
        );
    }

    #[test]
    fn a_volume_attached_again_counts_from_nothing() {
        let (mut before, now) = (look(0, 5000, 5000), look(1_000_000, 10, 10));
        before.volumes[0].id = "0".into();
        assert_eq!(number(rates(&before, &now)[0].reads_per_second), "10");
    }
}
