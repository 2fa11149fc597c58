//! csi-dysk: the Kubernetes driver, to come.

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match dysk::csi::run(&arguments) {
        // Nobody reads it: no error.
        Ok(line) => {
            drop(writeln!(std::io::stdout(), "{line}"));
            ExitCode::SUCCESS
        }
        Err(line) => {
            drop(writeln!(std::io::stderr(), "csi-dysk: {line}"));
            ExitCode::from(2)
        }
    }
}
