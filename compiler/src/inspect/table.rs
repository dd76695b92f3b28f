//! Tables and numbers as text.
//!
//! A column whose cells are all numbers is flush right; trailing blanks are never written.

use std::fmt::{self, Write};

/// Rows of cells below a head.
#[derive(Clone, Debug)]
pub(super) struct Table {
    head: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(head: &[&'static str]) -> Table {
        Table { head: head.to_vec(), rows: vec![] }
    }

    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<String> = cells.into_iter().collect();
        assert_eq!(cells.len(), self.head.len(), "a row has one cell for every column");
        self.rows.push(cells);
    }
}

fn is_number(cell: &str) -> bool {
    cell.is_empty() || cell.starts_with(|c: char| c.is_ascii_digit() || c == '-')
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cells = |at: usize| self.rows.iter().map(move |r| r[at].as_str());
        let columns: Vec<(usize, bool)> = (0..self.head.len())
            .map(|at| {
                let width = cells(at).chain([self.head[at]]).map(|c| c.chars().count()).max().unwrap_or(0);
                (width, !self.rows.is_empty() && cells(at).all(is_number))
            })
            .collect();
        let mut line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut text = String::from(" ");
            for (cell, &(width, right)) in cells.zip(&columns) {
                match right {
                    true => write!(text, " {cell:>width$}")?,
                    false => write!(text, " {cell:width$}")?,
                }
                text.push(' ');
            }
            writeln!(f, "{}", text.trim_end())
        };
        line(&mut self.head.iter().copied())?;
        self.rows.iter().try_for_each(|row| line(&mut row.iter().map(String::as_str)))
    }
}

/// Bytes in decimal units.
pub(super) fn bytes(n: u64) -> String {
    scaled(n, &["B", "kB", "MB", "GB", "TB"])
}

/// A count with a decimal unit.
pub(super) fn count(n: u64) -> String {
    scaled(n, &["", "k", "M", "G", "T", "P"]).trim_end().to_owned()
}

fn scaled(n: u64, units: &[&str]) -> String {
    let (mut value, mut at) = (n as f64, 0);
    while value >= 999.95 && at + 1 < units.len() {
        value /= 1000.0;
        at += 1;
    }
    match at {
        0 => format!("{n} {}", units[0]),
        _ => format!("{value:.1} {}", units[at]),
    }
}

/// A share of a whole in percent.
pub(super) fn percent(part: u64, whole: u64) -> String {
    match whole {
        0 => "-".to_owned(),
        _ => format!("{:.1} %", 100.0 * part as f64 / whole as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_flush_right_and_words_left() {
        let mut table = Table::new(&["name", "bytes"]);
        table.row(["a".to_owned(), bytes(12)]);
        table.row(["long".to_owned(), bytes(3_456_000)]);
        assert_eq!(table.to_string(), "  name   bytes\n  a       12 B\n  long  3.5 MB\n");
    }

    #[test]
    fn units_carry_over() {
        let shown = [0, 999, 1000, 999_949, 999_950, 1 << 40].map(bytes);
        assert_eq!(shown, ["0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "1.1 TB"]);
        assert_eq!(count(12), "12");
        assert_eq!(count(2_300_000_000), "2.3 G");
        assert_eq!((percent(1, 8), percent(1, 0)), ("12.5 %".to_owned(), "-".to_owned()));
    }
}
