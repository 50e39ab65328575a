//! Ratios, groups and bars.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::record::{Column, Record};

/// A set of rows whose ratios are held against bars.
struct Group {
    title: &'static str,
    has: fn(&str) -> bool,
    /// TCG's time divided by ours must be at least this, as geometric mean.
    tcg: f64,
    /// Our time divided by the native one must be at most this, as geometric mean.
    native: Option<f64>,
    /// No row may be slower than under TCG.
    every: bool,
}

const GROUPS: [Group; 12] = [
    Group { title: "boot to init", has: |row| row == "boot", tcg: 1.0, native: None, every: false },
    Group {
        title: "int without smc, atomic",
        has: |row| row.starts_with("int_") && row != "int_smc" && row != "int_atomic",
        tcg: 3.5,
        native: Some(2.2),
        every: false,
    },
    Group {
        title: "fp, simd",
        has: |row| row.starts_with("fp_") || row.starts_with("simd_"),
        tcg: 15.0,
        native: Some(1.5),
        every: false,
    },
    Group {
        title: "mem_rep, mem_libc",
        has: |row| row == "mem_rep" || row == "mem_libc",
        tcg: 10.0,
        native: None,
        every: false,
    },
    Group {
        title: "mem_seq, mem_rand",
        has: |row| row == "mem_seq" || row == "mem_rand",
        tcg: 1.0,
        native: None,
        every: true,
    },
    Group { title: "int_smc", has: |row| row == "int_smc", tcg: 5.0, native: None, every: false },
    Group { title: "os", has: |row| row.starts_with("os_"), tcg: 2.5, native: None, every: true },
    Group { title: "32-bit code", has: |row| row.starts_with("i386_"), tcg: 1.0, native: None, every: true },
    Group { title: "disks", has: |row| row.starts_with("io_"), tcg: 2.0, native: None, every: true },
    Group { title: "networks", has: |row| row.starts_with("net_"), tcg: 2.0, native: None, every: true },
    Group { title: "real programs", has: |row| row.starts_with("real_"), tcg: 4.0, native: None, every: true },
    Group { title: "firmware to GRUB", has: |row| row.starts_with("firmware_"), tcg: 1.0, native: None, every: true },
];

/// Work of `int_sha256` on one CPU and of `smp_sha256` on each of two, in the same unit.
const SHA256_WORK: (f64, f64) = (98304.0, 65536.0);
/// Two CPUs must do at least this much more than one.
const SCALING: f64 = 1.8;
/// An idle guest may take this much of a CPU, in percent, and this much memory beyond its own, in MB.
const IDLE: (f64, f64) = (1.0, 200.0);

/// The table of a record, to be printed.
pub(super) struct Table<'a>(&'a Record);

impl<'a> Table<'a> {
    pub(super) fn new(record: &'a Record) -> Self {
        Self(record)
    }
}

/// How much slower `a` is than `b` in a row: a ratio of times, or of rates the other way round.
fn slower(record: &Record, row: &str, a: Column, b: Column) -> Option<f64> {
    let (a, b) = (record.median(row, a)?, record.median(row, b)?);
    let ratio = if row.ends_with("MB/s") { b / a } else { a / b };
    ratio.is_finite().then_some(ratio)
}

fn geometric_mean(ratios: &[f64]) -> Option<f64> {
    let sum: f64 = ratios.iter().map(|ratio| ratio.ln()).sum();
    (!ratios.is_empty()).then(|| (sum / ratios.len() as f64).exp())
}

/// How much more two CPUs do than one.
fn scaling(record: &Record, column: Column) -> Option<f64> {
    let one = SHA256_WORK.0 / record.median("2cpus_int_sha256", column)?;
    let two = 2.0 * SHA256_WORK.1 / record.median("smp_sha256", column)?;
    Some(two / one)
}

/// A group's means, and the rows that are slower than under TCG.
fn judge(record: &Record, group: &Group) -> (Option<f64>, Option<f64>, Vec<String>) {
    let rows: Vec<_> = record.rows.iter().filter(|row| (group.has)(row)).collect();
    let ratios = |a, b| rows.iter().filter_map(|row| slower(record, row, a, b)).collect::<Vec<_>>();
    let tcg = geometric_mean(&ratios(Column::Tcg, Column::Bhyve));
    let native = geometric_mean(&ratios(Column::Bhyve, Column::Native));
    let slow = |row: &&&String| slower(record, row, Column::Tcg, Column::Bhyve).is_some_and(|ratio| ratio < 1.0);
    (tcg, native, rows.iter().filter(slow).map(|row| (**row).clone()).collect())
}

fn verdict(good: bool) -> &'static str {
    if good { "ok" } else { "BELOW" }
}

fn number(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) if value >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.3}"),
    }
}

fn factor(value: Option<f64>) -> String {
    value.map_or_else(|| "-".into(), |value| format!("{value:.2}"))
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let record = self.0;
        let head = ["workload", "native", "TCG", "ours", "ours/native", "TCG/ours", "spread"];
        let [name, a, b, c, d, e, g] = head;
        writeln!(f, "{name:<24} {a:>9} {b:>9} {c:>9} {d:>11} {e:>9} {g:>7}")?;
        for row in &record.rows {
            let median = |column| number(record.median(row, column));
            let native = factor(slower(record, row, Column::Bhyve, Column::Native));
            let tcg = factor(slower(record, row, Column::Tcg, Column::Bhyve));
            let (native_time, tcg_time, ours) = (median(Column::Native), median(Column::Tcg), median(Column::Bhyve));
            let spread = spread(record.samples(row, Column::Bhyve));
            writeln!(f, "{row:<24} {native_time:>9} {tcg_time:>9} {ours:>9} {native:>11} {tcg:>9} {spread:>7}")?;
        }
        writeln!(f, "\n{:<28} {:>9} {:>9} {:>12} {:>9}", "geometric means", "TCG/ours", "bar", "ours/native", "bar")?;
        for group in &GROUPS {
            let (tcg, native, slow) = judge(record, group);
            let Some(native_or_tcg) = tcg.or(native) else { continue };
            let _ = native_or_tcg;
            let mut good = tcg.is_none_or(|tcg| tcg >= group.tcg);
            good &= group.native.zip(native).is_none_or(|(bar, native)| native <= bar);
            good &= !group.every || slow.is_empty();
            let (tcg, native, bar) = (factor(tcg), factor(native), factor(group.native));
            let title = group.title;
            write!(f, "{title:<28} {tcg:>9} {:>9.2} {native:>12} {bar:>9}  {}", group.tcg, verdict(good))?;
            if group.every && !slow.is_empty() {
                write!(f, " (slower than TCG: {})", slow.join(", "))?;
            }
            writeln!(f)?;
        }
        self.other_bars(f)
    }
}

impl Table<'_> {
    fn other_bars(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let record = self.0;
        if let Some(ours) = scaling(record, Column::Bhyve) {
            let [native, tcg] = [Column::Native, Column::Tcg].map(|column| factor(scaling(record, column)));
            let verdict = verdict(ours >= SCALING);
            writeln!(f, "two CPUs against one: {ours:.2} (native {native}, TCG {tcg}; bar {SCALING})  {verdict}")?;
        }
        for (row, bar, unit) in [("idle_cpu %", IDLE.0, "% of a CPU"), ("idle_rss MB", IDLE.1, "MB")] {
            if let Some(ours) = record.median(row, Column::Bhyve) {
                let tcg = factor(record.median(row, Column::Tcg));
                let verdict = verdict(ours < bar);
                writeln!(f, "{row}: {ours:.2} {unit} (TCG {tcg}; bar {bar})  {verdict}")?;
            }
        }
        Ok(())
    }
}

/// How far samples lie apart, as part of their median.
fn spread(samples: &[f64]) -> String {
    let (least, most) =
        samples.iter().fold((f64::MAX, 0.0f64), |(least, most), &value| (least.min(value), most.max(value)));
    if samples.len() < 2 || most <= 0.0 { "-".into() } else { format!("{:.0}%", (most - least) / most * 100.0) }
}

/// Everything that was measured, for programs.
pub(super) fn write_json(record: &Record, path: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(&to_json(record)).context("cannot write JSON")?;
    fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}

fn to_json(record: &Record) -> Value {
    let rows = record.rows.iter().map(|row| {
        let mut value = json!({
            "name": row,
            "unit": if row.ends_with("MB/s") { "MB/s" } else if row.starts_with("idle_") { "" } else { "s" },
            "ours_native": slower(record, row, Column::Bhyve, Column::Native),
            "tcg_ours": slower(record, row, Column::Tcg, Column::Bhyve),
        });
        for column in Column::ALL {
            value[column.name()] = json!({
                "median": record.median(row, column),
                "samples": record.samples(row, column),
            });
        }
        if let Some(sums) = record.sums(row) {
            value["checksums"] = json!(sums.keys().collect::<Vec<_>>());
        }
        value
    });
    let groups = GROUPS.iter().map(|group| {
        let (tcg, native, slow) = judge(record, group);
        json!({
            "name": group.title, "tcg_ours": tcg, "tcg_ours_bar": group.tcg,
            "ours_native": native, "ours_native_bar": group.native, "slower_than_tcg": slow,
        })
    });
    json!({
        "rows": rows.collect::<Vec<_>>(),
        "groups": groups.collect::<Vec<_>>(),
        "scaling": scaling(record, Column::Bhyve),
        "mismatches": record.mismatches(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let mut record = Record::default();
        for (column, values) in
            [(Column::Native, [1.0, 2.0, 100.0]), (Column::Tcg, [8.0, 4.0, 10.0]), (Column::Bhyve, [2.0, 8.0, 50.0])]
        {
            for (row, value) in ["int_sieve", "os_pipe", "real_ssl MB/s"].into_iter().zip(values) {
                record.add(column, row, value);
            }
        }
        record
    }

    #[test]
    fn ratios_say_how_much_slower() {
        let record = record();
        assert_eq!(slower(&record, "int_sieve", Column::Bhyve, Column::Native), Some(2.0));
        assert_eq!(slower(&record, "int_sieve", Column::Tcg, Column::Bhyve), Some(4.0));
        assert_eq!(slower(&record, "real_ssl MB/s", Column::Tcg, Column::Bhyve), Some(5.0));
        assert_eq!(slower(&record, "nothing", Column::Tcg, Column::Bhyve), None);
        assert_eq!(geometric_mean(&[2.0, 8.0]).map(|mean| mean.round()), Some(4.0));
        assert_eq!(geometric_mean(&[]), None);
    }

    #[test]
    fn the_table_shows_rows_and_bars() {
        let text = Table::new(&record()).to_string();
        assert!(
            text.contains("int_sieve                    1.000     8.000     2.000        2.00      4.00"),
            "{text}"
        );
        assert!(text.contains("  BELOW (slower than TCG: os_pipe)"), "{text}");
        let int = text.lines().find(|line| line.starts_with("int without")).unwrap();
        assert!(int.ends_with("  ok"), "{int}");
        assert!(!text.contains("fp, simd"), "no such rows were measured: {text}");
    }

    #[test]
    fn two_cpus_are_held_against_one() {
        let mut record = record();
        record.add(Column::Bhyve, "2cpus_int_sha256", 3.0);
        record.add(Column::Bhyve, "smp_sha256", 2.0);
        assert_eq!(scaling(&record, Column::Bhyve), Some(2.0));
        record.add(Column::Bhyve, "idle_cpu %", 0.5);
        let text = Table::new(&record).to_string();
        assert!(text.contains("two CPUs against one: 2.00"), "{text}");
        assert!(text.contains("idle_cpu %: 0.50 % of a CPU (TCG -; bar 1)  ok"), "{text}");
    }

    #[test]
    fn programs_can_read_it() {
        let value = to_json(&record());
        assert_eq!(value["rows"][0]["tcg_ours"], 4.0);
        assert_eq!(value["rows"][2]["unit"], "MB/s");
        assert_eq!(value["groups"][1]["tcg_ours"], 4.0);
        assert_eq!(value["mismatches"], json!([]));
    }
}
