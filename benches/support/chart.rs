//! A bar for each target: how far the figure is from it.

use std::fmt::Write;

use serde_json::Value;

const ROW: usize = 26;
const LEFT: usize = 260;
const WIDTH: usize = 420;
/// Twice the target is as far as it shows.
const MOST: f64 = 2.0;

/// The targets of a report as SVG. Right of the line is better.
pub fn targets(report: &Value) -> String {
    let none = Vec::new();
    let rows = report["targets"].as_array().unwrap_or(&none);
    let height = ROW * (rows.len() + 2);
    let line = LEFT + WIDTH / 2;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{line}\" y=\"18\" text-anchor=\"middle\">target</text>\n",
        LEFT + WIDTH + 140
    );
    for (number, row) in rows.iter().enumerate() {
        let y = ROW * (number + 1) + 4;
        let field = |name: &str| row[name].as_f64().unwrap_or(0.0);
        let less = row["lessIsBetter"].as_bool().unwrap_or(false);
        let (median, target) = (field("median"), field("target"));
        let score = if less {
            target / median.max(1e-9)
        } else {
            median / target
        };
        let score = score.clamp(0.0, MOST);
        let bar = score / MOST * f64::from(u32::try_from(WIDTH).unwrap_or(1));
        let colour = if row["met"].as_bool().unwrap_or(false) {
            "#4a9"
        } else {
            "#c66"
        };
        let (what, unit) = (row["what"].as_str(), row["unit"].as_str());
        let (what, unit) = (what.unwrap_or(""), unit.unwrap_or(""));
        writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{what}</text>\n\
             <rect x=\"{LEFT}\" y=\"{y}\" width=\"{bar:.0}\" height=\"{}\" fill=\"{colour}\"/>\n\
             <text x=\"{}\" y=\"{}\">{median:.2} {unit} ({target} {unit})</text>",
            LEFT - 8,
            y + 13,
            ROW - 8,
            LEFT + WIDTH + 8,
            y + 13
        )
        .expect("writing to memory does not fail");
    }
    writeln!(
        svg,
        "<line x1=\"{line}\" x2=\"{line}\" y1=\"24\" y2=\"{}\" stroke=\"black\"/>\n</svg>",
        height - ROW / 2
    )
    .expect("writing to memory does not fail");
    svg
}
