//! `dyskctl`: one file per command group. `attach`, `detach`, `list` and
//! `status` are clients of the daemon; `create`, `delete` and `serve` go to the
//! store themselves and need no daemon; `resize` and `snapshot` ask the daemon
//! for what is attached here and the store for everything else.
//!
//! Standard output carries what was asked for and nothing else; an error is
//! one line on standard error. Exit codes: 0, 1 (it failed), 2 (usage), 130
//! (interrupted).

mod account;
mod attach;
mod bench;
mod copy;
mod credential;
mod detach;
mod error;
mod flexvolume;
mod here;
mod list;
mod output;
mod policy;
mod provision;
mod pv;
mod resize;
mod serve;
mod signals;
mod snapshot;
mod staging;
mod target;
mod top;
mod version;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;

use crate::node::api::{Format, RUN_DIR, SOCKET};
use crate::node::client::Client;
use crate::runtime;
use error::CliError;

/// Azure page blobs as Linux disks.
#[derive(Debug, Parser)]
#[command(name = "dyskctl", version, after_help = VOLUMES)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const VOLUMES: &str = "\
A volume is ACCOUNT/CONTAINER/BLOB, ACCOUNT/BLOB (in the container dysks) or a blob URL.
Credentials: --account-key-file FILE or --secret-dir DIR, or one of AZURE_STORAGE_KEY,
AZURE_STORAGE_SAS_TOKEN and AZURE_STORAGE_CONNECTION_STRING in the environment.";

/// Options of every command.
#[derive(Debug, Args)]
#[command(next_help_heading = "Everywhere")]
struct Global {
    /// The daemon's control socket
    #[arg(long, global = true, value_name = "PATH", default_value_os_t = default_socket())]
    socket: PathBuf,
    /// What to print
    #[arg(short, long, global = true, value_enum, default_value = "table")]
    output: Output,
    /// Tell on standard error what is being done; twice for more
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

impl Global {
    fn client(&self) -> Client {
        Client::new(&self.socket)
    }
}

fn default_socket() -> PathBuf {
    PathBuf::from(RUN_DIR).join(SOCKET)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Attach a volume and print its device
    Attach(attach::Options),
    /// Take a device from the kernel and give the volume back
    Detach(detach::Options),
    /// Have an attachment use other credentials, from now on
    Credential(credential::Options),
    /// Show what is attached
    List,
    /// Show one attachment in full
    Status(list::StatusOptions),
    /// Show live what each attached volume does
    Top(top::Options),
    /// Measure a disk or volume with fio's well-known jobs
    Bench(bench::Options),
    /// Make a page blob that is a disk (and its container)
    Create(provision::CreateOptions),
    /// Delete a volume's blob and its snapshots
    Delete(provision::DeleteOptions),
    /// Grow a volume, attached on this node or nowhere
    Resize(resize::Options),
    /// Take, list and delete snapshots of a volume
    #[command(subcommand)]
    Snapshot(snapshot::Command),
    /// Show unflushed writes left on this node, put them back or drop them
    #[command(subcommand)]
    Staging(staging::Command),
    /// Print a static PersistentVolume for a blob that is there already
    Pv(pv::Options),
    /// Answer the call-outs of a FlexVolume driver, as kubelet makes them
    Flexvolume(flexvolume::Options),
    /// Export a volume to NBD clients, without daemon or kernel
    Serve(serve::Options),
    /// Show the versions of dyskctl and dyskd
    Version,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FormatArg {
    Vhd,
    Raw,
}

impl From<FormatArg> for Format {
    fn from(format: FormatArg) -> Self {
        match format {
            FormatArg::Vhd => Self::Vhd,
            FormatArg::Raw => Self::Raw,
        }
    }
}

/// Runs `dyskctl` with the process's arguments.
#[must_use]
pub fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(refusal) => return error::usage(&refusal),
    };
    start_logging(&cli);
    let runtime = match cli.command {
        Command::Serve(_) => runtime::start(runtime::ONE_EXPORT),
        _ => tokio::runtime::Runtime::new(),
    };
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            return CliError::failed(format!("cannot start: {error}")).report();
        }
    };
    let result = runtime.block_on(run(cli));
    // What is left (a name look-up that nobody waits for) must not hold us.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}

async fn run(cli: Cli) -> Result<(), CliError> {
    let global = &cli.global;
    match cli.command {
        Command::Attach(options) => attach::run(global, options).await,
        Command::Detach(options) => detach::run(global, options).await,
        Command::Credential(options) => credential::run(global, options).await,
        Command::List => list::run(global).await,
        Command::Status(options) => list::status(global, options).await,
        Command::Top(options) => top::run(global, options).await,
        Command::Bench(options) => bench::run(global, options).await,
        Command::Create(options) => provision::create(global, options).await,
        Command::Delete(options) => provision::delete(global, options).await,
        Command::Resize(options) => resize::run(global, options).await,
        Command::Snapshot(command) => snapshot::run(global, command).await,
        Command::Staging(command) => staging::run(global, command),
        Command::Pv(options) => pv::run(global, options).await,
        Command::Flexvolume(options) => flexvolume::run(global, options).await,
        Command::Serve(options) => serve::run(global, options).await,
        Command::Version => version::run(global).await,
    }
}

/// Off unless asked for, so that an error stays one line; `serve` runs for
/// long and warns.
fn start_logging(cli: &Cli) {
    let quiet = match cli.command {
        Command::Serve(_) => "warn",
        _ => "off",
    };
    let level = match cli.global.verbose {
        0 => quiet,
        1 => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .init();
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn no_argument_takes_a_secret() {
        for command in Cli::command().get_subcommands() {
            for argument in command.get_arguments() {
                let id = argument.get_id().as_str();
                assert!(
                    !matches!(
                        id,
                        "key" | "account_key" | "sas" | "sas_token" | "connection_string"
                    ),
                    "{id}"
                );
                assert!(
                    argument.get_env().is_none(),
                    "{id} shows an environment variable"
                );
            }
        }
    }
}
