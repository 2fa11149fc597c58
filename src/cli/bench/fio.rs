//! Running fio, and reading what it found.

use std::io::{ErrorKind, IsTerminal, Write};
use std::process::{Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;
use tokio::time::Instant;

use super::profile::Job;
use super::report::Row;
use crate::cli::error::{CliError, note};
use crate::cli::signals::Signals;

/// Left out of the figures at the beginning of a job.
const RAMP: Duration = Duration::from_secs(2);
/// Jobs shorter than this have none.
const SHORT: Duration = Duration::from_secs(5);

/// What fio runs on.
pub struct On {
    /// `--filename=...` or `--uri=...`.
    pub place: String,
    pub engine: &'static str,
    /// Past the page cache.
    pub direct: bool,
    /// Bytes from the beginning that it may use.
    pub size: u64,
}

/// fio is there.
pub async fn check() -> Result<(), CliError> {
    engines().await.map(drop)
}

async fn engines() -> Result<String, CliError> {
    let asked = Command::new("fio").arg("--enghelp").output().await;
    let output = asked.map_err(|error| cannot_start(&error))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The first of `wanted` that this fio has.
pub async fn engine(wanted: &[&'static str]) -> Result<&'static str, CliError> {
    let there = engines().await?;
    let has = |engine: &&&'static str| there.split_whitespace().any(|one| one == **engine);
    wanted.iter().find(has).copied().ok_or_else(|| {
        CliError::failed(format!(
            "this fio has no engine {}: install your distribution's fio, \
             or bench a device",
            wanted.join(" or ")
        ))
    })
}

fn cannot_start(error: &std::io::Error) -> CliError {
    match error.kind() {
        ErrorKind::NotFound => CliError::failed("fio is not installed: apt install fio"),
        _ => CliError::failed(format!("cannot run fio: {error}")),
    }
}

fn command(on: &On, name: &str) -> Command {
    let mut command = Command::new("fio");
    command
        .arg(format!("--name={name}"))
        // An engine's own options are known after its name alone.
        .arg(format!("--ioengine={}", on.engine))
        .arg(&on.place)
        .arg(format!("--direct={}", u8::from(on.direct)))
        .arg(format!("--size={}", on.size))
        .args(["--thread", "--randrepeat=0", "--refill_buffers"])
        .args(["--eta=never", "--output-format=json"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // The terminal's Ctrl-C is ours alone: we end it, and wait for it.
        .process_group(0)
        .kill_on_drop(true);
    command
}

/// Writes all of it once.
pub async fn fill(on: &On, signals: &mut Signals) -> Result<(), CliError> {
    let mut fio = command(on, "fill");
    fio.args(["--rw=write", "--bs=1M", "--iodepth=16"]);
    let what = format!("writing {} MiB first", on.size >> 20);
    finish(fio, &what, None, signals).await.map(drop)
}

/// Runs `job` for `runtime`; `of` says the how-manieth it is.
pub async fn run(
    on: &On,
    job: &Job,
    runtime: Duration,
    of: &str,
    signals: &mut Signals,
) -> Result<Vec<Row>, CliError> {
    let ramp = if runtime < SHORT {
        Duration::ZERO
    } else {
        RAMP
    };
    let mut fio = command(on, job.name);
    fio.arg(format!("--rw={}", job.rw))
        .arg(format!("--bs={}", job.block))
        .arg(format!("--iodepth={}", job.depth))
        .arg(format!("--runtime={}s", runtime.as_secs()))
        .arg(format!("--ramp_time={}s", ramp.as_secs()))
        .arg("--time_based")
        .args(job.more);
    let what = format!("{} ({of})", job.name);
    let found = finish(fio, &what, Some(ramp + runtime), signals).await?;
    rows(job, &found)
        .ok_or_else(|| CliError::failed(format!("{}: fio reports no figures", job.name)))
}

async fn finish(
    mut fio: Command,
    what: &str,
    takes: Option<Duration>,
    signals: &mut Signals,
) -> Result<Value, CliError> {
    let child = fio.spawn().map_err(|error| cannot_start(&error))?;
    let group = child.id().and_then(|id| i32::try_from(id).ok());
    let progress = Progress::new(what, takes);
    let mut ended = std::pin::pin!(child.wait_with_output());
    let mut interrupted = false;
    let output = loop {
        tokio::select! {
            output = &mut ended => break output,
            () = signals.next(), if !interrupted => {
                interrupted = true;
                end(group);
            }
            () = tokio::time::sleep(Duration::from_secs(1)) => progress.show(),
        }
    };
    progress.clear();
    if interrupted {
        // It has ended: nothing of it is under way any more.
        return Err(CliError::interrupted(
            "interrupted; nothing of the bench is left",
        ));
    }
    let output = output.map_err(|error| CliError::failed(format!("fio: {error}")))?;
    parse(&output, what)
}

fn end(group: Option<i32>) {
    let group = group.and_then(rustix::process::Pid::from_raw);
    if let Some(group) = group
        && let Err(error) =
            rustix::process::kill_process_group(group, rustix::process::Signal::KILL)
    {
        // It has just ended by itself.
        tracing::debug!(%error, "cannot end fio");
    }
}

fn parse(output: &Output, what: &str) -> Result<Value, CliError> {
    let text = String::from_utf8_lossy(&output.stdout);
    // An engine may say a word of its own before the report.
    let report = text.find('{').and_then(|at| {
        let mut values = serde_json::Deserializer::from_str(&text[at..]).into_iter();
        values.next()?.ok()
    });
    let report: Option<Value> = report;
    let error = report
        .as_ref()
        .and_then(|report| report["jobs"][0]["error"].as_u64())
        .unwrap_or(0);
    match report {
        Some(mut report) if output.status.success() && error == 0 => Ok(report["jobs"][0].take()),
        _ => {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.lines().find(|line| !line.trim().is_empty());
            let said = said.map_or_else(|| output.status.to_string(), str::to_owned);
            Err(CliError::failed(format!("{what}: fio failed: {said}")))
        }
    }
}

/// The rows of a job: one, or one for each direction.
fn rows(job: &Job, found: &Value) -> Option<Vec<Row>> {
    let mixed = job.rw == "randrw";
    let directions = ["read", "write"].into_iter();
    let rows = directions.filter_map(|direction| {
        let side = &found[direction];
        if side["total_ios"].as_u64()? == 0 {
            return None;
        }
        let percentile = |name: &str| {
            let nanoseconds = side["clat_ns"]["percentile"][name].as_f64()?;
            Some(nanoseconds / 1e9)
        };
        let name = if mixed {
            format!("{}_{direction}", job.name)
        } else {
            job.name.to_owned()
        };
        Some(Row {
            name,
            direction,
            block: job.block,
            depth: job.depth,
            iops_min: side["iops_min"].as_f64()?,
            iops: side["iops"].as_f64()?,
            iops_max: side["iops_max"].as_f64()?,
            bytes_per_second: side["bw_bytes"].as_f64()?,
            p50: percentile("50.000000")?,
            p99: percentile("99.000000")?,
        })
    });
    let rows: Vec<_> = rows.collect();
    (!rows.is_empty()).then_some(rows)
}

/// Tells on standard error how far it is.
struct Progress {
    what: String,
    takes: Option<Duration>,
    begun: Instant,
    screen: bool,
}

impl Progress {
    fn new(what: &str, takes: Option<Duration>) -> Self {
        let screen = std::io::stderr().is_terminal();
        let progress = Self {
            what: what.to_owned(),
            takes,
            begun: Instant::now(),
            screen,
        };
        match (screen, takes) {
            (true, _) => progress.show(),
            (false, Some(takes)) => note(&format!("{what}: {} s", takes.as_secs())),
            (false, None) => note(what),
        }
        progress
    }

    fn show(&self) {
        if !self.screen {
            return;
        }
        let gone = self.begun.elapsed().as_secs();
        let of = self
            .takes
            .map_or_else(String::new, |takes| format!(" of {}", takes.as_secs()));
        say(&format!("\r\x1b[K{}: {gone}{of} s", self.what));
    }

    fn clear(&self) {
        if self.screen {
            say("\r\x1b[K");
        }
    }
}

fn say(text: &str) {
    let mut err = std::io::stderr();
    // With standard error gone there is nobody left to tell.
    drop(err.write_all(text.as_bytes()).and_then(|()| err.flush()));
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;
    use crate::cli::bench::profile::Profile;

    const REPORT: &str = r#"nbd: something of its own
{ "jobs": [ { "error": 0,
    "read": { "total_ios": 10, "iops": 5.5, "iops_min": 4, "iops_max": 7, "bw_bytes": 22528,
              "clat_ns": { "percentile": { "50.000000": 5000000, "99.000000": 9000000 } } },
    "write": { "total_ios": 0 } } ] }
and behind it"#;

    fn output(code: i32, text: &str, error: &str) -> Output {
        Output {
            status: ExitStatus::from_raw(code << 8),
            stdout: text.into(),
            stderr: error.into(),
        }
    }

    #[test]
    fn reads_a_report_between_other_words() {
        let found = parse(&output(0, REPORT, ""), "x").expect("a report");
        let job = &Profile::Kubestr.jobs()[0];
        let rows = rows(job, &found).expect("figures");
        let [row] = rows.as_slice() else {
            panic!("{rows:?}");
        };
        assert_eq!(
            (row.name.as_str(), row.iops, row.p99),
            ("read_iops", 5.5, 0.009)
        );
    }

    #[test]
    fn a_failure_is_told_in_fio_s_words() {
        for (output, words) in [
            (
                output(1, "", "fio: no space left\nmore"),
                "fio: no space left",
            ),
            (
                output(0, &REPORT.replace("\"error\": 0", "\"error\": 5"), "bad"),
                "bad",
            ),
            (output(1, "", ""), "exit status: 1"),
        ] {
            let error = parse(&output, "read_iops").expect_err("it failed");
            assert_eq!(error.to_string(), format!("read_iops: fio failed: {words}"));
        }
    }
}
