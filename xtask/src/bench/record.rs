//! What was measured, by workload and column.

use std::collections::{BTreeMap, BTreeSet};

/// Where something ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Column {
    Native,
    Tcg,
    Bhyve,
}

impl Column {
    pub(super) const ALL: [Self; 3] = [Self::Native, Self::Tcg, Self::Bhyve];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Tcg => "tcg",
            Self::Bhyve => "bhyve",
        }
    }
}

/// Samples and checksums of all rounds.
#[derive(Debug, Default)]
pub(super) struct Record {
    /// Workloads in the order of their first appearance.
    pub(super) rows: Vec<String>,
    samples: BTreeMap<(String, Column), Vec<f64>>,
    sums: BTreeMap<String, BTreeMap<String, BTreeSet<Column>>>,
}

impl Record {
    /// Adds a sample: seconds, or what the row's name ends with.
    pub(super) fn add(&mut self, column: Column, row: &str, value: f64) {
        if !self.rows.iter().any(|known| known == row) {
            self.rows.push(row.to_owned());
        }
        self.samples.entry((row.to_owned(), column)).or_default().push(value);
    }

    /// Adds what a guest printed: `BENCH NAME SECONDS CHECKSUM` and `RATE NAME MB/S`.
    pub(super) fn lines(&mut self, column: Column, lines: &[String], prefix: &str) {
        for line in lines {
            let mut words = line.split_whitespace();
            let kind = words.next();
            let (Some(name), Some(value)) = (words.next(), words.next().and_then(|word| word.parse().ok())) else {
                continue;
            };
            match kind {
                Some("BENCH") => {
                    let prefix = if name.starts_with("smp_") { "" } else { prefix };
                    let row = format!("{prefix}{name}");
                    self.add(column, &row, value);
                    if let Some(sum) = words.next() {
                        let sums = self.sums.entry(name.to_owned()).or_default();
                        sums.entry(sum.to_owned()).or_default().insert(column);
                    }
                }
                Some("RATE") => self.add(column, &format!("{prefix}{name} MB/s"), value),
                _ => {}
            }
        }
    }

    /// Whether a column has any sample.
    pub(super) fn has(&self, column: Column) -> bool {
        self.samples.keys().any(|(_, known)| *known == column)
    }

    /// All samples of a row.
    pub(super) fn samples(&self, row: &str, column: Column) -> &[f64] {
        self.samples.get(&(row.to_owned(), column)).map_or(&[], Vec::as_slice)
    }

    /// The median of a row.
    pub(super) fn median(&self, row: &str, column: Column) -> Option<f64> {
        let mut samples = self.samples(row, column).to_vec();
        samples.sort_by(f64::total_cmp);
        let middle = samples.len() / 2;
        match samples.len() {
            0 => None,
            n if n % 2 == 1 => samples.get(middle).copied(),
            _ => Some((samples.get(middle - 1)? + samples.get(middle)?) / 2.0),
        }
    }

    /// The checksums of a row, with the columns that had them.
    pub(super) fn sums(&self, row: &str) -> Option<&BTreeMap<String, BTreeSet<Column>>> {
        self.sums.get(row)
    }

    /// A line for every workload whose checksum is not the same everywhere.
    pub(super) fn mismatches(&self) -> Vec<String> {
        let different = self.sums.iter().filter(|(_, sums)| sums.len() > 1);
        let describe = |(row, sums): (&String, &BTreeMap<String, BTreeSet<Column>>)| {
            let each = sums.iter().map(|(sum, columns)| {
                let names: Vec<_> = columns.iter().map(|column| column.name()).collect();
                format!("{sum} ({})", names.join(", "))
            });
            format!("WRONG: {row} has different checksums: {}", each.collect::<Vec<_>>().join(" and "))
        };
        different.map(describe).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_samples() {
        let mut record = Record::default();
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        record.lines(Column::Native, &lines("BENCH a 1.5 ff\nnoise\nRATE b 200\nBENCH c skip\n"), "");
        record.lines(Column::Native, &lines("BENCH a 0.5 ff\n"), "");
        record.lines(Column::Bhyve, &lines("BENCH a 3 ff\nBENCH a 4 ff\nBENCH a 9 ff"), "");
        assert_eq!(record.rows, ["a", "b MB/s"]);
        assert_eq!(record.median("a", Column::Native), Some(1.0));
        assert_eq!(record.median("a", Column::Bhyve), Some(4.0));
        assert_eq!(record.median("b MB/s", Column::Native), Some(200.0));
        assert_eq!(record.median("a", Column::Tcg), None);
        assert!(record.mismatches().is_empty() && !record.has(Column::Tcg));
        record.lines(Column::Tcg, &lines("BENCH a 5 fe"), "2cpus_");
        let wrong = record.mismatches();
        assert_eq!(wrong, ["WRONG: a has different checksums: fe (tcg) and ff (native, bhyve)"]);
    }
}
