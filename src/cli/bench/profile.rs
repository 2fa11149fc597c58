//! The jobs that a bench consists of.

use clap::ValueEnum;
use serde::Serialize;

/// What is to be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// Random reads and writes of 4 KiB and 128 KiB, 64 at a time, as kubestr has them.
    Kubestr,
    /// Commits one by one, and pages of 8 KiB.
    Database,
    /// Long sequential reads and writes.
    Stream,
}

/// One job of fio's.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    pub name: &'static str,
    /// fio's `rw`.
    pub rw: &'static str,
    /// Bytes in a request.
    pub block: u64,
    /// Requests at a time.
    pub depth: u32,
    /// What else fio is told.
    pub more: &'static [&'static str],
}

const fn job(name: &'static str, rw: &'static str, block: u64, depth: u32) -> Job {
    Job {
        name,
        rw,
        block,
        depth,
        more: &[],
    }
}

impl Profile {
    /// Its jobs, in order.
    pub fn jobs(self) -> &'static [Job] {
        const KUBESTR: [Job; 4] = [
            job("read_iops", "randread", 4 << 10, 64),
            job("write_iops", "randwrite", 4 << 10, 64),
            job("read_bw", "randread", 128 << 10, 64),
            job("write_bw", "randwrite", 128 << 10, 64),
        ];
        const DATABASE: [Job; 4] = [
            Job {
                more: &["--fsync=1"],
                ..job("commit", "write", 8 << 10, 1)
            },
            job("page_read", "randread", 8 << 10, 16),
            job("page_write", "randwrite", 8 << 10, 16),
            Job {
                more: &["--rwmixread=70"],
                ..job("mixed", "randrw", 8 << 10, 16)
            },
        ];
        const STREAM: [Job; 2] = [
            job("stream_read", "read", 1 << 20, 8),
            job("stream_write", "write", 1 << 20, 8),
        ];
        match self {
            Self::Kubestr => &KUBESTR,
            Self::Database => &DATABASE,
            Self::Stream => &STREAM,
        }
    }
}
