//! What a bench prints: a row a measure, a column a way, each the median of its samples with the least and
//! the most.

use std::fmt::Write as _;

/// Samples of one measure on one way.
#[derive(Debug, Clone, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds one.
    pub fn add(&mut self, sample: f64) {
        self.0.push(sample);
    }

    /// The median; `None` without a sample. Of an even number the mean of the two in the middle.
    pub fn median(&self) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => None,
            length if length % 2 == 1 => Some(sorted[middle]),
            _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
        }
    }

    /// "MEDIAN (LEAST–MOST)".
    fn cell(&self) -> String {
        let Some(median) = self.median() else { return "—".to_owned() };
        let least = self.0.iter().copied().fold(f64::INFINITY, f64::min);
        let most = self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        match self.0.len() {
            1 => number(median),
            _ => format!("{} ({}–{})", number(median), number(least), number(most)),
        }
    }
}

/// With three digits that matter, and no more than people read.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// One measure.
#[derive(Debug)]
pub struct Row {
    /// What is measured, with its unit.
    pub name: String,
    /// A way's samples each, in the order of the table's columns.
    pub cells: Vec<Samples>,
}

/// Rows that share their columns.
#[derive(Debug)]
pub struct Table {
    columns: Vec<String>,
    rows: Vec<Row>,
}

impl Table {
    /// Without a row yet.
    pub fn new(columns: &[&str]) -> Self {
        Self { columns: columns.iter().map(|name| (*name).to_owned()).collect(), rows: Vec::new() }
    }

    /// Adds a row, and says it on standard error for those who wait.
    pub fn add(&mut self, row: Row) {
        let cells: Vec<_> = row.cells.iter().map(Samples::cell).collect();
        eprintln!("{}: {}", row.name, cells.join(" | "));
        self.rows.push(row);
    }

    /// Median of the row `name` in the column `column`.
    ///
    /// # Panics
    /// When there is none: goals must not be about what was not measured.
    pub fn median(&self, name: &str, column: &str) -> f64 {
        let at = self.columns.iter().position(|known| known == column);
        let row = self.rows.iter().find(|row| row.name == name);
        at.zip(row)
            .and_then(|(at, row)| row.cells.get(at)?.median())
            .unwrap_or_else(|| panic!("the bench did not measure {name:?} of {column:?}"))
    }
}

impl std::fmt::Display for Table {
    /// In Markdown.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let line = |name: &str, cells: Vec<String>| [vec![name.to_owned()], cells].concat();
        let mut lines = vec![line("", self.columns.clone())];
        for row in &self.rows {
            lines.push(line(&row.name, row.cells.iter().map(Samples::cell).collect()));
        }
        let width = |column: usize| {
            lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max()
        };
        let widths: Vec<usize> = (0..=self.columns.len()).map(|column| width(column).unwrap_or(0)).collect();
        let mut text = String::new();
        for (at, line) in lines.iter().enumerate() {
            for (cell, width) in line.iter().zip(&widths) {
                write!(text, "| {cell:width$} ")?;
            }
            text.push_str("|\n");
            if at == 0 {
                for width in &widths {
                    write!(text, "|{}", "-".repeat(width + 2))?;
                }
                text.push_str("|\n");
            }
        }
        f.write_str(&text)
    }
}
