//! Tables of measured variants, with where they come from.
//!
//! A table counts only for the processor, the target and the version it was made with.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The version of the format, and of the variants that kernels have.
const VERSION: u32 = 1;
/// More entries or candidates than any model has are damage.
const MOST: usize = 1 << 16;

/// One measured variant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Candidate {
    /// Its parameters.
    pub variant: String,
    /// Measured microseconds.
    pub measured: f64,
    /// Predicted microseconds.
    pub predicted: f64,
}

/// The variants of one operation with its operand types.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// What is computed.
    pub contract: String,
    /// The fastest variant.
    pub chosen: String,
    /// What the cost model would have chosen.
    pub model: String,
    /// How much slower that is, as a share of the best time.
    pub regret: f64,
    /// Everything that was measured, in the order of the operation.
    pub candidates: Vec<Candidate>,
}

/// What was measured on one machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// Version of the format.
    pub version: u32,
    /// Version of the program.
    pub program: String,
    /// Name of the processor.
    pub processor: String,
    /// The target of the code.
    pub target: String,
    /// Threads that shared the grid.
    pub threads: usize,
    /// The day, `YYYY-MM-DD` in UTC.
    pub date: String,
    /// Geometric mean over the entries of `1 + regret`, less one.
    pub regret: f64,
    /// One for each operation with more than one variant.
    pub entries: Vec<Entry>,
}

/// Why a text is no table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableError(String);

impl fmt::Display for TableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it is no tuning table: {}; make one with chimerac tune", self.0)
    }
}

impl std::error::Error for TableError {}

impl Table {
    /// A table without entries, of today.
    pub fn new(target: &str, threads: usize) -> Table {
        Table {
            version: VERSION,
            program: env!("CARGO_PKG_VERSION").to_owned(),
            processor: chimera_codegen::processor(),
            target: target.to_owned(),
            threads,
            date: today(),
            regret: 0.0,
            entries: vec![],
        }
    }

    /// The table of a text.
    ///
    /// # Errors
    /// When it is damaged. Another version is none: [`Table::fits`] tells.
    pub fn from_json(text: &str) -> Result<Table, TableError> {
        let table: Table = serde_json::from_str(text).map_err(|e| TableError(e.to_string()))?;
        let good = |x: f64| x.is_finite() && x >= 0.0;
        for e in &table.entries {
            let fail = |why: &str| Err(TableError(format!("entry {}: {why}", e.contract)));
            if !e.candidates.iter().all(|c| good(c.measured) && good(c.predicted)) {
                return fail("found times that are not positive numbers");
            }
            if !e.candidates.iter().any(|c| c.variant == e.chosen) {
                return fail("the chosen variant is not among the candidates");
            }
            if e.candidates.len() > MOST {
                return fail("found more candidates than an operation has");
            }
        }
        if table.entries.len() > MOST {
            return Err(TableError(format!("found {} entries, expected at most {MOST}", table.entries.len())));
        }
        Ok(table)
    }

    /// The text of a table.
    ///
    /// # Panics
    /// Never: all its parts have a form in JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("strings and numbers") + "\n"
    }

    /// Whether the table counts for plans for `target` on this machine.
    ///
    /// # Errors
    /// What differs.
    pub fn fits(&self, target: &str) -> Result<(), String> {
        let here = Table::new(target, self.threads);
        let compare = |what: &str, found: &str, expected: &str| match found == expected {
            true => Ok(()),
            false => Err(format!("the tuning table is for {what} {found}, expected {expected}")),
        };
        compare("version", &self.version.to_string(), &here.version.to_string())?;
        compare("program version", &self.program, &here.program)?;
        compare("processor", &self.processor, &here.processor)?;
        compare("target", &self.target, target)
    }

    /// The entry of a contract.
    pub fn entry(&self, contract: &str) -> Option<&Entry> {
        self.entries.iter().find(|e| e.contract == contract)
    }

    /// Add an entry.
    pub fn add(&mut self, entry: Entry) {
        self.entries.push(entry);
        let logs: f64 = self.entries.iter().map(|e| (1.0 + e.regret).ln()).sum();
        self.regret = (logs / self.entries.len() as f64).exp() - 1.0;
    }
}

/// The day in UTC by the civil calendar.
fn today() -> String {
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_secs());
    let (year, month, day) = civil(seconds / 86_400);
    format!("{year:04}-{month:02}-{day:02}")
}

/// Year, month and day of a number of days since 1970-01-01.
fn civil(days: u64) -> (u64, u64, u64) {
    // Years begin in March, so that the leap day is the last one; an era has 400 years.
    let z = days + 719_468;
    let (era, of_era) = (z / 146_097, z % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let (day, january) = (of_year - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    (era * 400 + year + u64::from(january <= 2), january, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut t = Table::new("x86-64-v3", 2);
        let candidate = |variant: &str, measured| Candidate { variant: variant.into(), measured, predicted: 2.5 };
        for regret in [0.0, 0.21] {
            t.add(Entry {
                contract: format!("product(m={regret})"),
                chosen: "tile=2".into(),
                model: "tile=1".into(),
                regret,
                candidates: vec![candidate("tile=1", 3.0), candidate("tile=2", 1.5)],
            });
        }
        t
    }

    #[test]
    fn days_of_the_calendar() {
        let days = [(0, (1970, 1, 1)), (59, (1970, 3, 1)), (11_016, (2000, 2, 29)), (19_782, (2024, 2, 29))];
        days.iter().for_each(|&(n, date)| assert_eq!(civil(n), date));
    }

    #[test]
    fn tables_round_trip_and_say_for_whom_they_are() {
        let t = table();
        assert_eq!(Table::from_json(&t.to_json()), Ok(t.clone()));
        assert!((t.regret - 0.1).abs() < 1e-6, "{}", t.regret);
        assert_eq!(t.fits("x86-64-v3"), Ok(()));
        type Change = fn(&mut Table);
        let cases: [(&str, Change); 4] = [
            ("processor Abacus", |t| t.processor = "Abacus".into()),
            ("target x86-64-v4", |t| t.target = "x86-64-v4".into()),
            ("version 9", |t| t.version = 9),
            ("program version 0.0", |t| t.program = "0.0".into()),
        ];
        for (word, change) in cases {
            let mut other = t.clone();
            change(&mut other);
            let why = other.fits("x86-64-v3").unwrap_err();
            assert!(why.contains(word), "{why}");
        }
    }

    #[test]
    fn damage_is_an_error() {
        let text = table().to_json();
        for bad in [
            text[..text.len() / 2].to_owned(),
            text.replace("\"threads\"", "\"treads\""),
            text.replace("\"chosen\": \"tile=2\"", "\"chosen\": \"tile=7\""),
            text.replace("\"measured\": 1.5", "\"measured\": -1.5"),
            "[]".to_owned(),
        ] {
            let e = Table::from_json(&bad).unwrap_err().to_string();
            assert!(e.contains("no tuning table") && e.contains("chimerac tune"), "{e}");
        }
    }
}
