//! The node's numbers as Prometheus reads them: text exposition format,
//! version 0.0.4.
//!
//! Counters begin at 0 when a volume is opened, so after a restart of the
//! daemon too; `rate()` knows that. Bounds of the histograms are powers of two
//! of microseconds, at which the counts are exact.

use std::fmt::{self, Write};
use std::time::Duration;

use super::api::VolumeNumbers;
use crate::metrics::Metered;
use crate::volume::{CacheStatus, VolumeStats};

/// The `Content-Type` that goes with it.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Bounds of histograms: 64 us to 67 s.
const BOUNDS: std::ops::RangeInclusive<u32> = 6..=26;

/// The daemon's own numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Process {
    /// User and system time.
    pub cpu: Duration,
    /// Bytes of memory in use.
    pub resident: u64,
}

impl Process {
    /// Those of this process; zeroes where the system does not say.
    #[must_use]
    pub fn now() -> Self {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // The second field, in brackets, may hold spaces.
        let fields: Vec<u64> = stat.rsplit(") ").next().map_or_else(Vec::new, |rest| {
            let fields = rest.split_whitespace();
            fields.map(|field| field.parse().unwrap_or(0)).collect()
        });
        let field = |number: usize| fields.get(number - 3).copied().unwrap_or(0);
        let ticks = rustix::param::clock_ticks_per_second().max(1);
        Self {
            cpu: Duration::from_millis((field(14) + field(15)) * 1000 / ticks),
            resident: field(24) * rustix::param::page_size() as u64,
        }
    }
}

/// One family: its help, its type, then its samples.
struct Family<'a> {
    text: &'a mut String,
    name: &'static str,
}

type Done = Result<(), fmt::Error>;

impl<'a> Family<'a> {
    fn new(
        text: &'a mut String,
        name: &'static str,
        kind: &str,
        help: &str,
    ) -> Result<Self, fmt::Error> {
        writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}")?;
        Ok(Self { text, name })
    }

    fn sample(&mut self, suffix: &str, labels: &str, value: impl fmt::Display) -> Done {
        let name = self.name;
        if labels.is_empty() {
            return writeln!(self.text, "{name}{suffix} {value}");
        }
        writeln!(self.text, "{name}{suffix}{{{labels}}} {value}")
    }

    fn histogram(&mut self, labels: &str, metered: &Metered) -> Done {
        let latency = &metered.latency;
        for power in BOUNDS {
            let bound = Duration::from_micros(1 << power);
            let labels = format!("{labels},le=\"{}\"", bound.as_secs_f64());
            self.sample("_bucket", &labels, latency.at_most(bound))?;
        }
        let all = latency.count();
        self.sample("_bucket", &format!("{labels},le=\"+Inf\""), all)?;
        let sum = Duration::from_micros(latency.microseconds);
        self.sample("_sum", labels, sum.as_secs_f64())?;
        self.sample("_count", labels, all)
    }
}

/// A label's value: `\`, `"` and line feed are escaped.
fn escape(value: &str) -> String {
    let escaped = value.replace('\\', "\\\\").replace('"', "\\\"");
    escaped.replace('\n', "\\n")
}

/// The numbers of all volumes, and of the daemon.
#[must_use]
pub fn text(volumes: &[VolumeNumbers], process: Process) -> String {
    let mut text = String::new();
    write_all(&mut text, volumes, process).expect("writing to memory does not fail");
    text
}

fn write_all(text: &mut String, volumes: &[VolumeNumbers], process: Process) -> Done {
    let labelled: Vec<(String, &VolumeStats)> = volumes
        .iter()
        .map(|one| {
            let (name, volume) = (escape(one.name.as_str()), escape(&one.volume));
            (format!("name=\"{name}\",volume=\"{volume}\""), &one.stats)
        })
        .collect();
    let version = env!("CARGO_PKG_VERSION");
    Family::new(text, "dysk_build_info", "gauge", "The daemon's version.")?.sample(
        "",
        &format!("version=\"{version}\""),
        1,
    )?;
    requests(text, &labelled)?;
    to_store(text, &labelled)?;
    states(text, &labelled)?;
    caches(text, &labelled)?;
    Family::new(
        text,
        "process_cpu_seconds_total",
        "counter",
        "User and system time of the daemon.",
    )?
    .sample("", "", process.cpu.as_secs_f64())?;
    Family::new(
        text,
        "process_resident_memory_bytes",
        "gauge",
        "Memory of the daemon.",
    )?
    .sample("", "", process.resident)
}

type Labelled<'a> = [(String, &'a VolumeStats)];

fn requests(text: &mut String, volumes: &Labelled<'_>) -> Done {
    let mut of_kinds = OfKinds {
        text,
        volumes,
        label: "op",
        kinds: |stats| stats.served().to_vec(),
    };
    of_kinds.histogram(
        "dysk_volume_io_seconds",
        "Latency of the disk's requests, from the kernel's request to our answer.",
    )?;
    of_kinds.counter(
        "dysk_volume_io_bytes_total",
        "Bytes of the disk's requests that succeeded.",
        |metered| metered.bytes,
    )?;
    of_kinds.counter(
        "dysk_volume_io_errors_total",
        "The disk's requests that ended in an error.",
        |metered| metered.errors,
    )?;
    gauge(
        text,
        "dysk_volume_io_in_flight",
        "The disk's requests under way.",
        volumes,
        |stats| Some(stats.in_flight),
    )
}

fn to_store(text: &mut String, volumes: &Labelled<'_>) -> Done {
    let mut of_kinds = OfKinds {
        text,
        volumes,
        label: "request",
        kinds: |stats| stats.sent().to_vec(),
    };
    of_kinds.histogram(
        "dysk_volume_store_seconds",
        "Latency of requests to the store, each attempt for itself.",
    )?;
    of_kinds.counter(
        "dysk_volume_store_errors_total",
        "Attempts that did not succeed; they are repeated.",
        |metered| metered.errors,
    )?;
    of_kinds.kinds = |stats| stats.sent()[..2].to_vec();
    of_kinds.counter(
        "dysk_volume_store_bytes_total",
        "Bytes fetched from the store (get) and sent to it (put).",
        |metered| metered.bytes,
    )?;
    counter(
        text,
        "dysk_volume_store_refused_total",
        "Attempts that the store refused because there were too many.",
        volumes,
        |stats| Some(stats.refused),
    )
}

/// A request's kind, as metrics name it, and what was counted of it.
type Kind<'a> = (&'static str, &'a Metered);

/// Families with a sample for each volume and kind of request.
struct OfKinds<'a> {
    text: &'a mut String,
    volumes: &'a Labelled<'a>,
    /// The kind's.
    label: &'static str,
    kinds: fn(&VolumeStats) -> Vec<Kind<'_>>,
}

impl OfKinds<'_> {
    fn histogram(&mut self, name: &'static str, help: &str) -> Done {
        self.family(name, "histogram", help, |family, labels, metered| {
            family.histogram(labels, metered)
        })
    }

    fn counter(&mut self, name: &'static str, help: &str, of: fn(&Metered) -> u64) -> Done {
        self.family(name, "counter", help, |family, labels, metered| {
            family.sample("", labels, of(metered))
        })
    }

    fn family(
        &mut self,
        name: &'static str,
        kind: &str,
        help: &str,
        mut write: impl FnMut(&mut Family<'_>, &str, &Metered) -> Done,
    ) -> Done {
        let mut family = Family::new(self.text, name, kind, help)?;
        for (labels, stats) in self.volumes {
            for (kind, metered) in (self.kinds)(stats) {
                let labels = format!("{labels},{}=\"{kind}\"", self.label);
                write(&mut family, &labels, metered)?;
            }
        }
        Ok(())
    }
}

fn states(text: &mut String, volumes: &Labelled<'_>) -> Done {
    type Of = fn(&VolumeStats) -> u64;
    let gauges: [(&'static str, &str, Of); 4] = [
        ("dysk_volume_size_bytes", "Usable size of the disk.", |s| {
            s.size
        }),
        (
            "dysk_volume_throttled",
            "1 while requests wait because the store throttles.",
            |s| s.throttled.into(),
        ),
        (
            "dysk_volume_blocked",
            "1 while requests wait because the store refuses access.",
            |s| s.blocked.into(),
        ),
        (
            "dysk_volume_fenced",
            "1 when another holder has taken the disk, for good.",
            |s| s.fenced.into(),
        ),
    ];
    for (name, help, of) in gauges {
        gauge(text, name, help, volumes, |stats| Some(of(stats)))?;
    }
    Ok(())
}

fn caches(text: &mut String, volumes: &Labelled<'_>) -> Done {
    type Of = fn(&CacheStatus) -> u64;
    let counters: [(&'static str, &str, Of); 2] = [
        (
            "dysk_volume_cache_hits_total",
            "Reads answered without the store.",
            |cache| cache.hits,
        ),
        (
            "dysk_volume_cache_misses_total",
            "Reads that needed the store.",
            |cache| cache.misses,
        ),
    ];
    for (name, help, of) in counters {
        counter(text, name, help, volumes, |s| s.cache.as_ref().map(of))?;
    }
    let gauges: [(&'static str, &str, Of); 3] = [
        (
            "dysk_volume_cache_dirty_bytes",
            "Acknowledged bytes that the store may not have yet.",
            |cache| cache.dirty_bytes,
        ),
        ("dysk_volume_cache_used_bytes", "Bytes cached.", |cache| {
            cache.cached_bytes
        }),
        (
            "dysk_volume_cache_capacity_bytes",
            "The most that can be cached.",
            |cache| cache.capacity_bytes,
        ),
    ];
    for (name, help, of) in gauges {
        gauge(text, name, help, volumes, |s| s.cache.as_ref().map(of))?;
    }
    Ok(())
}

fn counter(
    text: &mut String,
    name: &'static str,
    help: &str,
    volumes: &Labelled<'_>,
    of: impl Fn(&VolumeStats) -> Option<u64>,
) -> Done {
    one_each(Family::new(text, name, "counter", help)?, volumes, of)
}

fn gauge(
    text: &mut String,
    name: &'static str,
    help: &str,
    volumes: &Labelled<'_>,
    of: impl Fn(&VolumeStats) -> Option<u64>,
) -> Done {
    one_each(Family::new(text, name, "gauge", help)?, volumes, of)
}

fn one_each(
    mut family: Family<'_>,
    volumes: &Labelled<'_>,
    of: impl Fn(&VolumeStats) -> Option<u64>,
) -> Done {
    for (labels, stats) in volumes {
        if let Some(value) = of(stats) {
            family.sample("", labels, value)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_memory() {
        assert!(Process::now().resident > 1 << 20);
    }

    #[test]
    fn labels_are_escaped() {
        assert_eq!(escape("a\\b\"c\nd"), "a\\\\b\\\"c\\nd");
    }

    #[test]
    fn without_volumes_the_daemon_is_still_told_of() {
        let process = Process {
            cpu: Duration::from_millis(1500),
            resident: 4096,
        };
        let told = text(&[], process);
        let samples: Vec<_> = told.lines().filter(|l| !l.starts_with('#')).collect();
        let build = format!(
            "dysk_build_info{{version=\"{}\"}} 1",
            env!("CARGO_PKG_VERSION")
        );
        assert_eq!(
            samples,
            [
                build.as_str(),
                "process_cpu_seconds_total 1.5",
                "process_resident_memory_bytes 4096"
            ]
        );
    }
}
