//! `dyskctl version`: its own version, then the daemon's; an error when that
//! cannot be had, so that it also tells whether the daemon is there.

use serde::Serialize;

use super::error::CliError;
use super::{Global, Output, output};

#[derive(Serialize)]
struct Versions {
    dyskctl: &'static str,
    dyskd: Option<String>,
}

pub async fn run(global: &Global) -> Result<(), CliError> {
    let answer = global.client().version().await;
    let dyskctl = env!("CARGO_PKG_VERSION");
    let dyskd = answer.as_ref().ok().map(|answer| answer.version.clone());
    match (global.output, &dyskd) {
        (Output::Json, _) => output::json(&Versions { dyskctl, dyskd })?,
        (Output::Table, Some(dyskd)) => {
            output::print(&format!("dyskctl {dyskctl}\ndyskd {dyskd}\n"))?;
        }
        (Output::Table, None) => output::line(format!("dyskctl {dyskctl}"))?,
    }
    answer.map(drop).map_err(CliError::from)
}
