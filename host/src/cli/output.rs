//! What a person or a script reads: tables, JSON, escaped text, and writes that may fail.

use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags};
use serde::Serialize;

use super::errors::CommandError;

/// Blanks between two columns.
const GAP: &str = "  ";

/// Writes all of `bytes`, also to a file that somebody has made non-blocking.
///
/// # Errors
/// What write(2) says.
pub fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => {
                let mut ready = [PollFd::new(&fd, PollFlags::OUT)];
                match rustix::event::poll(&mut ready, None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Writes text to standard output.
///
/// # Errors
/// [`CommandError::Output`]; a broken pipe among them counts as success in the end.
pub fn print(text: &str) -> Result<(), CommandError> {
    write_all(io::stdout().as_fd(), text.as_bytes()).map_err(CommandError::Output)
}

/// Writes one line of JSON to standard output.
///
/// # Errors
/// As [`print()`].
pub fn print_json<T: Serialize>(value: &T) -> Result<(), CommandError> {
    let mut line = serde_json::to_string(value).map_err(|error| CommandError::Output(error.into()))?;
    line.push('\n');
    print(&line)
}

/// Writes a line to standard error. Nobody can be told where that fails.
pub fn say(line: &str) {
    let _ = write_all(io::stderr().as_fd(), format!("{line}\n").as_bytes());
}

/// `text` with every control character written out, so that it cannot steer a terminal.
#[must_use]
pub fn escape(text: &str) -> String {
    escape_but(text, &[])
}

/// As [`escape`], but newlines and tabs stay.
#[must_use]
pub fn escape_lines(text: &str) -> String {
    escape_but(text, &['\n', '\t'])
}

fn escape_but(text: &str, kept: &[char]) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        // Also those that reorder or hide what follows (Unicode bidi controls).
        let hostile = character.is_control()
            || matches!(character, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}');
        if hostile && !kept.contains(&character) {
            escaped.extend(character.escape_default());
        } else {
            escaped.push(character);
        }
    }
    escaped
}

/// An aligned table with a line of headers; cells are escaped.
#[must_use]
pub fn table(headers: &[&str], rows: &[Vec<String>]) -> String {
    let lines: Vec<Vec<String>> = std::iter::once(headers.iter().map(|cell| (*cell).to_owned()).collect())
        .chain(rows.iter().map(|row| row.iter().map(|cell| escape(cell)).collect()))
        .collect();
    align(&lines)
}

/// Names and values, aligned; values are escaped. A value of several lines stays in its column, so
/// that none of them looks like another name.
#[must_use]
pub fn pairs(pairs: &[(&str, String)]) -> String {
    let mut lines: Vec<Vec<String>> = Vec::new();
    for (name, value) in pairs {
        for (number, line) in value.lines().enumerate() {
            let name = if number == 0 { *name } else { "" };
            lines.push(vec![name.to_owned(), escape(line)]);
        }
    }
    align(&lines)
}

fn align(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let mut row = String::new();
        for (cell, width) in line.iter().zip(&widths) {
            let _ = write!(row, "{cell:width$}{GAP}");
        }
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

/// Bytes as a person reads them, in binary units.
#[must_use]
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut scaled = count as f64;
    while scaled >= 1024.0 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    match scaled {
        // One digit where it says something: 1.5 GiB, but 2 GiB and 512 MiB.
        scaled if scaled < 10.0 && (scaled * 10.0).round() % 10.0 != 0.0 => {
            format!("{scaled:.1} {}", UNITS[unit])
        }
        scaled => format!("{scaled:.0} {}", UNITS[unit]),
    }
}

/// MiB as a person reads them.
#[must_use]
pub fn mib(count: u64) -> String {
    bytes(count.saturating_mul(1 << 20))
}

/// A time span as a person reads it.
#[must_use]
pub fn span(milliseconds: u64) -> String {
    let seconds = milliseconds / 1000;
    match seconds {
        0..60 => format!("{}.{} s", seconds, milliseconds % 1000 / 100),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86400, seconds % 86400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_steers_the_terminal() {
        assert_eq!(escape("a\u{1b}[31mb\r\n\u{9b}1\u{202e}é"), "a\\u{1b}[31mb\\r\\n\\u{9b}1\\u{202e}é");
        assert_eq!(escape_lines("a\tb\n\u{7}"), "a\tb\n\\u{7}");
    }

    #[test]
    fn columns_are_aligned_and_lines_have_no_blanks_at_their_end() {
        let rows = vec![vec!["é".to_owned(), "x\ny".to_owned()], vec!["long".to_owned(), String::new()]];
        assert_eq!(table(&["A", "B"], &rows), "A     B\né     x\\ny\nlong\n");
        assert_eq!(pairs(&[("a", "1".to_owned()), ("long", "2".to_owned())]), "a     1\nlong  2\n");
        let several = [("a", "1\n2\u{7}".to_owned()), ("b", "3".to_owned())];
        assert_eq!(pairs(&several), "a  1\n   2\\u{7}\nb  3\n");
    }

    #[test]
    fn numbers_are_short() {
        let sizes =
            [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2 << 30, "2 GiB"), (100 << 30, "100 GiB")];
        for (count, text) in sizes {
            assert_eq!(bytes(count), text);
        }
        let spans =
            [(950, "0.9 s"), (61_000, "1 min 1 s"), (3_660_000, "1 h 1 min"), (90_000_000, "1 d 1 h")];
        for (milliseconds, text) in spans {
            assert_eq!(span(milliseconds), text);
        }
    }
}
