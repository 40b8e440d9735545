//! Logs of the host's processes: bounded files, and their ends for error messages.
//!
//! Whoever writes to one has it open for appending, so it can be cut at any time. A log is cut, never
//! replaced: the writer would go on in the old file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A log above this is cut, in bytes: the guest fills its console's as fast as it likes.
const LIMIT: u64 = 4 << 20;
/// What is kept of its end, beside it as `.log.1`.
const KEPT: u64 = 1 << 20;

/// Opens a log for appending; an overlong one is cut first.
///
/// # Errors
/// As open(2).
pub fn open(path: &Path) -> io::Result<File> {
    cut(path, LIMIT);
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// Cuts the overlong logs in a folder.
pub fn bound(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            cut(&path, LIMIT);
        }
    }
}

/// Cuts a log that is above `limit`. A full disk keeps nothing of it, but must not keep it from being
/// cut.
fn cut(path: &Path, limit: u64) {
    let length = log_length(path);
    if length <= limit {
        return;
    }
    let cut = || -> io::Result<()> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let kept = keep_end(&file, &path.with_extension("log.1"), length.saturating_sub(KEPT));
        file.set_len(0)?;
        kept
    };
    if let Err(error) = cut() {
        tracing::warn!(%error, path = %path.display(), "a log was not cut, or its end not kept");
    }
}

fn keep_end(file: &File, target: &Path, from: u64) -> io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = file;
    file.seek(SeekFrom::Start(from))?;
    let mut end = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(target)?;
    io::copy(&mut file.take(KEPT), &mut end).map(drop)
}

/// Length of a log in bytes; 0 where there is none.
pub fn log_length(path: &Path) -> u64 {
    path.metadata().map_or(0, |meta| meta.len())
}

/// The last `lines` lines of a log, on lines of their own, control characters escaped; empty where
/// there is none.
pub fn log_end(path: &Path, lines: usize) -> String {
    log_end_after(path, 0, lines)
}

/// As [`log_end`], of what follows the first `skipped` bytes.
pub fn log_end_after(path: &Path, skipped: u64, lines: usize) -> String {
    /// As many bytes as the lines at the end of a log can be expected to have.
    const WINDOW: u64 = 16 << 10;
    let read = || -> io::Result<Vec<u8>> {
        use std::io::{Read, Seek, SeekFrom};
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        // Cut since then: all of it is new.
        let skipped = if length < skipped { 0 } else { skipped };
        file.seek(SeekFrom::Start(length.saturating_sub(WINDOW).max(skipped)))?;
        let mut bytes = Vec::new();
        file.take(WINDOW).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let Ok(bytes) = read() else {
        return String::new();
    };
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<_> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    if all.is_empty() {
        return String::new();
    }
    let end = &all[all.len().saturating_sub(lines)..];
    let escaped: String = end.iter().flat_map(|line| ["\n  | ".to_owned(), escape(line)]).collect();
    format!("; the end of {}:{escaped}", path.display())
}

fn escape(line: &str) -> String {
    line.chars()
        .flat_map(|character| {
            let escaped: Box<dyn Iterator<Item = char>> = if character.is_control() && character != '\t' {
                Box::new(character.escape_default())
            } else {
                Box::new(std::iter::once(character))
            };
            escaped
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn an_overlong_log_is_cut_under_its_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut writer = open(&path).unwrap();
        let line = [b'x'; 1023];
        for _ in 0..=LIMIT / 1024 {
            writer.write_all(&line).and_then(|()| writer.write_all(b"\n")).unwrap();
        }
        writer.write_all(b"the last line\n").unwrap();
        let other = dir.path().join("other.txt");
        std::fs::write(&other, vec![0; 5 << 20]).unwrap();
        bound(dir.path());
        assert_eq!((log_length(&path), log_length(&other)), (0, 5 << 20));
        let kept = std::fs::read(path.with_extension("log.1")).unwrap();
        assert_eq!(kept.len() as u64, KEPT);
        assert!(kept.ends_with(b"\nthe last line\n"));
        writer.write_all(b"on\n").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"on\n");
    }

    #[test]
    fn the_end_of_a_log_is_escaped_and_may_leave_out_its_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qemu.log");
        assert_eq!(log_end(&path, 5), "");
        std::fs::write(&path, "old\n").unwrap();
        let noted = log_length(&path);
        assert_eq!(log_end_after(&path, noted, 5), "");
        std::fs::write(&path, "old\none\n\n\x1b[2Jtwo\r\n").unwrap();
        assert!(log_end_after(&path, noted, 5).ends_with(":\n  | one\n  | \\u{1b}[2Jtwo"));
        assert!(!log_end(&path, 1).contains("one"));
        // It was cut, and says something again.
        assert!(log_end_after(&path, 1000, 5).contains("two"));
    }
}
