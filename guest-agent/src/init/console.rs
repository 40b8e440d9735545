//! The kernel's console, for what a person must see even when the worker never answers.

use std::fs::OpenOptions;
use std::io::{self, Write};

/// Level "error" (`<linux/kern_levels.h>`): the most talkative that `quiet loglevel=4` still shows.
const PREFIX: &str = "<3>dhow: ";
/// Bytes of text in a record. The kernel refuses records above 1024 bytes (`PRINTKRB_RECORD_MAX`).
const RECORD_LIMIT: usize = 900;
const KMSG: &str = "/dev/kmsg";

/// Writes `text` to the kernel's log and so to the console, a record a line. Falls back to standard
/// error, which is the console too until [`super::filesystems::redirect_stdio`].
pub(crate) fn error(text: &str) {
    let records = records(text);
    let kmsg = OpenOptions::new().write(true).open(KMSG);
    for record in records {
        let written = match &kmsg {
            Ok(file) => (&*file).write_all(record.as_bytes()),
            Err(error) => Err(io::Error::from(error.kind())),
        };
        if written.is_err() {
            // Nothing is left to tell it to.
            let _ = write!(io::stderr(), "{}", record.trim_start_matches("<3>"));
        }
    }
}

/// The records of a text: one a line, long lines cut in pieces, control characters escaped.
fn records(text: &str) -> Vec<String> {
    let mut records = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let mut record = PREFIX.to_owned();
        for char in line.chars() {
            if record.len() > RECORD_LIMIT {
                records.push(std::mem::replace(&mut record, PREFIX.to_owned()) + "\n");
            }
            if char.is_control() {
                record.extend(char.escape_default());
            } else {
                record.push(char);
            }
        }
        // Without it the kernel waits for the line's end, and shows the record with the next one.
        record.push('\n');
        records.push(record);
    }
    records
}

/// The console as a writer for the log: each write is one event.
#[derive(Clone, Copy)]
pub(crate) struct Console;

impl Write for Console {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        error(&String::from_utf8_lossy(event));
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_a_line_without_control_characters() {
        assert_eq!(records("one\n\ntwo\x1b[2J\r"), ["<3>dhow: one\n", "<3>dhow: two\\u{1b}[2J\\r\n"]);
    }

    #[test]
    fn long_lines_are_cut_below_the_kernels_limit() {
        let line = "ä\u{7}".repeat(2000);
        let records = records(&line);
        assert!(records.iter().all(|record| record.len() < 1024), "{records:?}");
        let joined: String =
            records.iter().map(|record| record.strip_prefix(PREFIX).unwrap().trim_end()).collect();
        assert_eq!(joined, "ä\\u{7}".repeat(2000));
    }
}
