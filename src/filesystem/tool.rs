//! Running the system's tools: never in the runtime's threads, never for ever,
//! and never beyond this process: a mkfs that outlived the plugin would write
//! over what the next plugin makes.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use tokio::process::Command;

/// For what reads or writes a few blocks.
pub const QUICK: Duration = Duration::from_secs(60);
/// For making or growing a filesystem on a slow store.
pub const SLOW: Duration = Duration::from_secs(600);
/// The most of a tool's words that goes into an error.
const MOST_WORDS: usize = 400;

/// A tool that did not do its work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ToolError {
    /// It is not installed, or cannot be run.
    #[error("cannot run {tool}: {reason}")]
    Start {
        /// Its name.
        tool: String,
        /// Why.
        reason: String,
    },
    /// It took too long and was killed.
    #[error("{tool} took longer than {limit:?} and was stopped: is the store reachable?")]
    Late {
        /// Its name.
        tool: String,
        /// Its limit.
        limit: Duration,
    },
    /// It failed.
    #[error("{tool}: {status}: {words}")]
    Failed {
        /// Its name.
        tool: String,
        /// How it ended.
        status: String,
        /// What it said, on one line.
        words: String,
    },
}

/// How a tool ended that was there and came to an end in time.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it printed.
    pub out: String,
    /// What it complained of, on one line.
    pub words: String,
}

/// Runs `tool` to its end, whatever its exit status. One that is late is
/// killed, and waited for: when this returns, it does nothing any more. It is
/// killed too when this process dies.
///
/// # Errors
/// It cannot be run, or was late.
pub async fn ended(tool: &str, arguments: &[&str], limit: Duration) -> Result<Ended, ToolError> {
    let start = |error: std::io::Error| ToolError::Start {
        tool: tool.to_owned(),
        reason: error.to_string(),
    };
    let mut command = Command::new(tool);
    command
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let dies_with_us =
        || rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(Into::into);
    // SAFETY: between fork and exec this makes one system call; it takes no
    // lock and no memory, nor does turning its error code into an error.
    unsafe { command.pre_exec(dies_with_us) };
    let child = command.spawn().map_err(start)?;
    let id = child.id();
    let mut output = std::pin::pin!(child.wait_with_output());
    let in_time = tokio::time::timeout(limit, &mut output).await;
    let output = match in_time {
        Ok(output) => output.map_err(start)?,
        Err(_) => {
            let pid = id.and_then(|id| i32::try_from(id).ok());
            if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw)
                && let Err(error) = rustix::process::kill_process(pid, Signal::KILL)
            {
                tracing::warn!(tool, %error, "cannot stop a tool that is late");
            }
            tracing::warn!(tool, ?limit, "a tool is late and told to stop");
            output.await.map_err(start)?;
            return Err(ToolError::Late {
                tool: tool.to_owned(),
                limit,
            });
        }
    };
    let words = one_line(&output.stderr);
    Ok(Ended {
        status: output.status,
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        words,
    })
}

/// Runs `tool`, which must succeed; answers with what it printed.
///
/// # Errors
/// As [`ended`], or it failed.
pub async fn run(tool: &str, arguments: &[&str], limit: Duration) -> Result<String, ToolError> {
    let ended = ended(tool, arguments, limit).await?;
    if ended.status.success() {
        return Ok(ended.out);
    }
    Err(failed(tool, &ended))
}

/// The error of a tool that ended so.
#[must_use]
pub fn failed(tool: &str, ended: &Ended) -> ToolError {
    ToolError::Failed {
        tool: tool.to_owned(),
        status: ended.status.to_string(),
        words: ended.words.clone(),
    }
}

fn one_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().take(MOST_WORDS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tools_succeed_fail_are_missing_or_late() {
        assert_eq!(run("echo", &["a"], QUICK).await, Ok("a\n".into()));
        let failed = run("sh", &["-c", "echo no >&2; exit 3"], QUICK).await;
        assert_eq!(
            failed.expect_err("it fails").to_string(),
            "sh: exit status: 3: no"
        );
        let missing = run("no-such-tool-of-ours", &[], QUICK).await;
        assert!(
            matches!(missing, Err(ToolError::Start { .. })),
            "{missing:?}"
        );
        let late = run("sleep", &["1000"], Duration::from_millis(50)).await;
        assert!(matches!(late, Err(ToolError::Late { .. })), "{late:?}");
    }
}
