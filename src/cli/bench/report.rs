//! What a bench found, as a table and as JSON.

use serde::Serialize;

use super::profile::Profile;
use crate::cli::error::CliError;
use crate::cli::output;

/// All of a bench.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub target: String,
    pub profile: Profile,
    /// fio's engine.
    pub engine: String,
    /// Past the page cache.
    pub direct: bool,
    /// Bytes of the disk that were used.
    pub size: u64,
    pub jobs: Vec<Row>,
}

/// One direction of one job.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    pub name: String,
    pub direction: &'static str,
    /// Bytes in a request.
    pub block: u64,
    pub depth: u32,
    pub iops_min: f64,
    pub iops: f64,
    pub iops_max: f64,
    pub bytes_per_second: f64,
    /// Latencies, in seconds.
    pub p50: f64,
    pub p99: f64,
}

const HEADER: [&str; 9] = [
    "Job", "Block", "Depth", "IOPS min", "IOPS avg", "IOPS max", "MB/s", "p50", "p99",
];

impl Report {
    pub fn print(&self) -> Result<(), CliError> {
        let rows: Vec<_> = self.jobs.iter().map(Row::cells).collect();
        output::table(HEADER, &rows)
    }
}

impl Row {
    fn cells(&self) -> [String; 9] {
        let latency = |seconds: f64| format!("{:.2}ms", seconds * 1e3);
        [
            self.name.clone(),
            format!("{}k", self.block >> 10),
            self.depth.to_string(),
            format!("{:.0}", self.iops_min),
            format!("{:.0}", self.iops),
            format!("{:.0}", self.iops_max),
            format!("{:.1}", self.bytes_per_second / 1e6),
            latency(self.p50),
            latency(self.p99),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_what_people_compare() {
        let row = Row {
            name: "read_iops".into(),
            direction: "read",
            block: 4096,
            depth: 64,
            iops_min: 480.0,
            iops: 499.6,
            iops_max: 512.0,
            bytes_per_second: 2_046_361.6,
            p50: 0.1279,
            p99: 0.131,
        };
        assert_eq!(
            row.cells(),
            [
                "read_iops",
                "4k",
                "64",
                "480",
                "500",
                "512",
                "2.0",
                "127.90ms",
                "131.00ms"
            ]
        );
    }
}
