//! How a command fails: one line on standard error and an exit code.

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use clap::error::ErrorKind;

use super::output;
use crate::node::NodeError;
use crate::node::client::ClientError;
use crate::node::name::NameError;

/// A command that did not do what it was asked.
#[derive(Debug)]
pub struct CliError {
    text: String,
    code: u8,
}

impl CliError {
    /// It failed: exit code 1.
    pub fn failed(text: impl fmt::Display) -> Self {
        Self {
            text: text.to_string(),
            code: 1,
        }
    }

    /// It failed, and the answer on standard output says why.
    pub fn told() -> Self {
        Self {
            text: String::new(),
            code: 1,
        }
    }

    /// The person interrupted it: exit code 130, as shells have it.
    pub fn interrupted(text: impl fmt::Display) -> Self {
        Self {
            text: text.to_string(),
            code: 130,
        }
    }

    /// The person does not want what was asked for any more.
    pub fn is_interrupt(&self) -> bool {
        self.code == 130
    }

    /// Prints the line; the exit code that goes with it.
    pub fn report(&self) -> ExitCode {
        // Texts come from many floors; whatever they hold, this is one line.
        let line = self.text.split_whitespace().collect::<Vec<_>>().join(" ");
        if !line.is_empty() {
            say(&line);
        }
        ExitCode::from(self.code)
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

macro_rules! failures {
    ($($error:ty),+) => {$(
        impl From<$error> for CliError {
            fn from(error: $error) -> Self {
                Self::failed(error)
            }
        }
    )+};
}

failures!(NodeError, ClientError, NameError);

/// Prints help and version as they are, and anything else as one line.
pub fn usage(refusal: &clap::Error) -> ExitCode {
    let text = refusal.render().to_string();
    if matches!(
        refusal.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    ) {
        return match output::print(&text) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => error.report(),
        };
    }
    if refusal.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        // The whole help is what somebody who typed nothing needs.
        drop(std::io::stderr().write_all(text.as_bytes()));
        return ExitCode::from(2);
    }
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let reason = ["\n\n  tip:", "\n\nUsage:", "\n\nFor more information"]
        .iter()
        .fold(text, |text, end| text.split(end).next().unwrap_or(text));
    let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
    say(&format!("{reason}; see --help"));
    ExitCode::from(2)
}

/// A line for the person, on standard error, beside what was asked for.
pub fn note(line: &str) {
    say(line);
}

fn say(line: &str) {
    // With standard error gone there is nobody left to tell.
    drop(writeln!(std::io::stderr(), "dyskctl: {line}"));
}
