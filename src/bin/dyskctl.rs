//! dyskctl: attach page blobs as disks, and what goes with it.

use std::process::ExitCode;

fn main() -> ExitCode {
    dysk::cli::main()
}
