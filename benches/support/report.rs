//! The report of a bench: a table for people, and the same as JSON.

use serde_json::{Value, json};

use crate::processes::Measured;
use crate::rows::{Figure, Row, Run, STORES, Who};

/// All rounds of all runs.
pub struct Figures<'a> {
    pub runs: &'a [Run],
    /// Of each run, its rounds.
    pub measured: &'a [Vec<Measured>],
}

/// Least, median and most.
struct Spread {
    values: Vec<f64>,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        Self { values }
    }

    fn least(&self) -> f64 {
        self.values[0]
    }

    fn median(&self) -> f64 {
        self.values[self.values.len() / 2]
    }

    fn most(&self) -> f64 {
        self.values[self.values.len() - 1]
    }
}

impl Figures<'_> {
    fn of(&self, run: Run) -> &[Measured] {
        let at = self.runs.iter().position(|one| *one == run);
        &self.measured[at.expect("it ran")]
    }

    /// The row's figure in each round.
    fn figure(&self, row: &Row) -> Spread {
        let rounds = self.of(row.run).iter().enumerate();
        let other = |who: Who| self.of(Run { who, ..row.run });
        Spread::of(rounds.map(|(round, one)| match row.figure {
            Figure::Of(who) => one.iops / other(who)[round].iops,
            Figure::Above(who) => one.mean_ms - other(who)[round].mean_ms,
            Figure::Rate(rate) => one.iops / rate,
            Figure::Cpu => one.cpu_us,
            Figure::Refused => one.refused,
            Figure::Puts => one.puts,
        }))
    }

    /// The least CPU time a request in any of the rows about that.
    pub fn cpu_of(&self, rows: &[Row]) -> Option<f64> {
        let rows = rows.iter().filter(|row| matches!(row.figure, Figure::Cpu));
        let medians = rows.map(|row| self.figure(row).median());
        medians.min_by(f64::total_cmp)
    }

    /// Prints the targets; gives them back as JSON.
    pub fn targets(&self, rows: &[Row]) -> Vec<Value> {
        println!(
            "{:<34} {:>10} {:>8} {:>8} {:>8}   {:>10}  ",
            "", "median", "least", "most", "target", "absolute"
        );
        let target = |row: &Row| {
            let seen = self.figure(row);
            let absolute = Spread::of(self.of(row.run).iter().map(|one| one.iops)).median();
            target(row, &seen, absolute)
        };
        rows.iter().map(target).collect()
    }

    /// Prints what each run did and cost; gives it back as JSON.
    pub fn loads(&self) -> Vec<Value> {
        println!(
            "\n{:<40} {:>10} {:>10} {:>10} {:>8} {:>8} {:>8}",
            "IOPS", "least", "median", "most", "cpu us", "store us", "fio us"
        );
        let load = |(run, measured): (&Run, &Vec<Measured>)| {
            let iops = Spread::of(measured.iter().map(|one| one.iops));
            let cost = |of: fn(&Measured) -> f64| Spread::of(measured.iter().map(of)).median();
            let (cpu, store, fio) = (
                cost(|one| one.cpu_us),
                cost(|one| one.store_us),
                cost(|one| one.fio_us),
            );
            println!(
                "{:<40} {:>10.0} {:>10.0} {:>10.0} {cpu:>8.1} {store:>8.1} {fio:>8.1}",
                run.name(),
                iops.least(),
                iops.median(),
                iops.most(),
            );
            json!({
                "who": run.who.name(), "rw": run.load.rw, "block": run.load.block,
                "depth": run.load.depth, "store": STORES[run.store].name,
                "storeLatencyMs": STORES[run.store].latency, "iops": iops.values,
                "cpuMicroseconds": cpu, "storeMicroseconds": store, "fioMicroseconds": fio,
            })
        };
        self.runs.iter().zip(self.measured).map(load).collect()
    }
}

fn target(row: &Row, seen: &Spread, absolute: f64) -> Value {
    let median = seen.median();
    let met = if row.less {
        median <= row.target
    } else {
        median >= row.target
    };
    let (unit, sign) = (row.figure.unit(), if row.less { "<=" } else { ">=" });
    println!(
        "{:<34} {median:>8.2}{unit:<2} {:>8.2} {:>8.2} {:>7} {:<6} {absolute:>7.0}/s  {}",
        row.what,
        seen.least(),
        seen.most(),
        sign,
        row.target,
        if met { "met" } else { "MISSED" }
    );
    json!({
        "what": row.what, "median": median, "least": seen.least(), "most": seen.most(),
        "target": row.target, "unit": unit, "lessIsBetter": row.less, "met": met,
        "iops": absolute,
    })
}

/// A figure that is no ratio of runs, in the same form.
pub fn single(what: &str, seen: f64, unit: &str, most: f64) -> Value {
    let met = seen <= most;
    println!(
        "{what:<34} {seen:>8.2} {unit:<19} {:>7} {most:<6} {}",
        "<=",
        if met { "met" } else { "MISSED" }
    );
    json!({
        "what": what, "median": seen, "least": seen, "most": seen, "target": most,
        "unit": unit, "lessIsBetter": true, "met": met,
    })
}
