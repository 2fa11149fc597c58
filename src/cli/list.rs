//! `dyskctl list` and `dyskctl status`.

use clap::Args;

use super::error::CliError;
use super::{Global, Output, output};
use crate::blob::vhd::Layout;
use crate::node::api::{Attachment, State};
use crate::node::name::AttachmentName;
use crate::size::ByteSize;

const HEADER: [&str; 7] = [
    "Type",
    "Name",
    "VHD",
    "SizeGB",
    "AccountName",
    "Path",
    "Device",
];

pub async fn run(global: &Global) -> Result<(), CliError> {
    let attachments = global.client().list().await?;
    match global.output {
        Output::Json => output::json(&attachments),
        Output::Table => {
            let rows: Vec<_> = attachments.iter().map(row).collect();
            output::table(HEADER, &rows)
        }
    }
}

fn row(attachment: &Attachment) -> [String; 7] {
    let unknown = || "-".to_owned();
    let device = attachment
        .device
        .as_ref()
        .map(|device| device.display().to_string());
    let device = match (device, attachment.state) {
        (Some(device), State::Attached) => device,
        (Some(device), state) => format!("{device} ({state})"),
        (None, state) => format!("({state})"),
    };
    let device = match (&attachment.fenced, unflushed(attachment)) {
        (None, None) => device,
        (Some(_), None) => format!("{device} (fenced)"),
        (None, Some(kept)) => format!("{device} ({kept})"),
        (Some(_), Some(kept)) => format!("{device} (fenced, {kept})"),
    };
    [
        if attachment.read_only { "R" } else { "RW" }.into(),
        attachment.name.to_string(),
        attachment.layout.map_or_else(unknown, |layout| {
            if layout == Layout::Raw { "No" } else { "Yes" }.into()
        }),
        attachment.size.map_or_else(unknown, gibibytes),
        attachment.account.clone(),
        format!("{}/{}", attachment.container, attachment.blob),
        device,
    ]
}

/// How much is kept out of the way of this volume.
fn unflushed(attachment: &Attachment) -> Option<String> {
    let bytes: u64 = attachment
        .kept_aside
        .iter()
        .map(|aside| aside.dirty_bytes)
        .sum();
    (bytes > 0).then(|| format!("{bytes} unflushed bytes kept aside"))
}

/// Bytes in GiB, with three places where it is no whole number: enough for a
/// disk of 1 MiB, and never rounded to nothing.
fn gibibytes(bytes: u64) -> String {
    const GIB: u64 = 1 << 30;
    if bytes.is_multiple_of(GIB) {
        return (bytes / GIB).to_string();
    }
    let thousandths = (u128::from(bytes) * 1000).div_ceil(u128::from(GIB));
    let text = format!("{}.{:03}", thousandths / 1000, thousandths % 1000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[derive(Debug, Args)]
pub struct StatusOptions {
    /// The attachment's name
    name: String,
}

pub async fn status(global: &Global, options: StatusOptions) -> Result<(), CliError> {
    let name: AttachmentName = options.name.parse()?;
    let attachment = global.client().status(&name).await?;
    match global.output {
        Output::Json => output::json(&attachment),
        Output::Table => output::fields(&fields(&attachment)),
    }
}

fn fields(attachment: &Attachment) -> Vec<(&'static str, String)> {
    let path = |path: &Option<std::path::PathBuf>| {
        path.as_ref()
            .map_or_else(|| "-".into(), |path| path.display().to_string())
    };
    let mut state = attachment.state.to_string();
    if let Some(reason) = &attachment.reason {
        state = format!("{state}: {reason}");
    }
    let layout = match attachment.layout {
        None => "-",
        Some(Layout::Raw) => "raw",
        Some(Layout::Vhd) => "vhd",
        Some(Layout::LegacyVhd) => "vhd (legacy)",
    };
    vec![
        ("name", attachment.name.to_string()),
        ("state", state),
        (
            "volume",
            format!(
                "{}/{}/{}",
                attachment.account, attachment.container, attachment.blob
            ),
        ),
        ("endpoint", attachment.endpoint.clone()),
        (
            "size",
            attachment.size.map_or_else(
                || "-".into(),
                |size| format!("{size} bytes ({})", ByteSize(size)),
            ),
        ),
        ("format", layout.into()),
        (
            "access",
            if attachment.read_only {
                "read-only"
            } else {
                "read-write"
            }
            .into(),
        ),
        (
            "fenced",
            attachment.fenced.clone().unwrap_or_else(|| "no".into()),
        ),
        ("unflushed", waiting(attachment)),
        ("kept aside", aside(attachment)),
        (
            "blocked",
            attachment.blocked.clone().unwrap_or_else(|| "no".into()),
        ),
        (
            "throttled",
            attachment
                .throttled
                .as_ref()
                .map_or_else(|| "no".into(), ToString::to_string),
        ),
        ("device", path(&attachment.device)),
        ("link", path(&attachment.link)),
        ("connections", attachment.connections.to_string()),
        ("attached since", attachment.since.to_string()),
        ("requests finished", attachment.completed.to_string()),
        ("requests under way", attachment.in_flight.to_string()),
        ("store requests", attachment.store_requests.to_string()),
        ("refused by store", attachment.refused.to_string()),
        ("id", attachment.id.clone()),
    ]
}

/// What waits in the cache for its way to the store.
fn waiting(attachment: &Attachment) -> String {
    match &attachment.cache {
        Some(cache) if cache.dirty_bytes > 0 && cache.set_aside.is_none() => {
            format!("{} bytes", cache.dirty_bytes)
        }
        _ => "no".into(),
    }
}

/// What will not go there by itself.
fn aside(attachment: &Attachment) -> String {
    let kept = attachment.kept_aside.iter();
    let kept: Vec<_> = kept
        .map(|aside| format!("{} bytes in {}", aside.dirty_bytes, aside.path.display()))
        .collect();
    if kept.is_empty() {
        return "no".into();
    }
    format!("{} (see `dyskctl staging`)", kept.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_never_truncated_to_whole_gibibytes() {
        for (bytes, text) in [
            (32 << 30, "32"),
            (3 << 29, "1.5"),
            (64 << 20, "0.063"),
            (512, "0.001"),
            ((8 << 40) - 512, "8192"),
        ] {
            assert_eq!(gibibytes(bytes), text, "{bytes}");
        }
    }
}
