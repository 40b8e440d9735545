//! A daemon's log file: opened for it, kept below a size, its end shown when the daemon fails.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::text::escape;

/// Size from which a log is cut, in bytes. Its end of that size at the most stays as `….log.1`.
const LIMIT: u64 = 4 << 20;
/// Bytes and lines that are shown of a log's end.
const SHOWN: (u64, usize) = (2048, 3);

/// One daemon's log.
#[derive(Debug, Clone)]
pub struct Log {
    path: PathBuf,
}

impl Log {
    /// The log in the file `path`, which need not be there.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// For the daemon's output. With `O_APPEND` the daemon writes at the new end after a cut. When
    /// the disk refuses, the daemon starts without a log rather than not at all; a write that fails
    /// later is the daemon's to ignore, as Go's loggers do.
    ///
    /// # Errors
    /// When not even /dev/null can be opened.
    pub fn open(&self) -> io::Result<File> {
        let mut append = File::options();
        append.append(true).create(true);
        append.open(&self.path).or_else(|error| {
            tracing::warn!(%error, path = %self.path.display(), "a daemon starts without its log");
            append.create(false).open("/dev/null")
        })
    }

    /// Whether it has become too long.
    #[must_use]
    pub fn is_too_long(&self) -> bool {
        self.length() > LIMIT
    }

    /// Cuts the log when it has become too long. What is written between copy and cut is lost.
    pub fn bound(&self) {
        match self.cut(LIMIT) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(%error, path = %self.path.display(), "cannot cut a log"),
        }
    }

    fn cut(&self, limit: u64) -> io::Result<()> {
        if std::fs::metadata(&self.path)?.len() <= limit {
            return Ok(());
        }
        let mut log = File::options().read(true).write(true).open(&self.path)?;
        // The previous part goes first: on a full disk its space is needed.
        let mut previous = self.path.clone().into_os_string();
        previous.push(".1");
        super::store::absent_is_fine(std::fs::remove_file(&previous))?;
        let copied = File::create(&previous).and_then(|mut previous| {
            let length = log.metadata()?.len();
            log.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
            // Bounded: the daemon may write faster than this reads.
            io::copy(&mut (&log).take(2 * limit), &mut previous)
        });
        // Cut in any case, or a full disk would keep it long for ever.
        log.set_len(0)?;
        copied.map(drop)
    }

    /// Its length in bytes; 0 where there is none.
    #[must_use]
    pub fn length(&self) -> u64 {
        std::fs::metadata(&self.path).map_or(0, |log| log.len())
    }

    /// The last lines since it had `length` bytes, as one line that is safe to show; empty when there
    /// are none.
    #[must_use]
    pub fn end_since(&self, length: u64) -> String {
        tail(&self.path, length).unwrap_or_default()
    }
}

fn tail(path: &Path, since: u64) -> io::Result<String> {
    let (bytes, lines) = SHOWN;
    let mut log = File::open(path)?;
    let whole = log.metadata()?.len();
    // Cut since then: all of it is later.
    let since = if since <= whole { since } else { 0 };
    let length = whole - since;
    log.seek(SeekFrom::Start(since.max(whole.saturating_sub(bytes))))?;
    let mut end = Vec::new();
    log.take(bytes).read_to_end(&mut end)?;
    let end = String::from_utf8_lossy(&end);
    let all: Vec<_> = end.lines().filter(|line| !line.trim().is_empty()).collect();
    // The first may be half a line; it counts only where it is all there is.
    let first = usize::from(length > bytes && all.len() > 1);
    let shown = &all[first.max(all.len().saturating_sub(lines))..];
    Ok(shown.iter().map(|line| escape(line.trim(), 600)).collect::<Vec<_>>().join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_long_log_is_cut_under_its_writer() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::new(folder.path().join("x.log"));
        let mut writer = log.open().unwrap();
        writer.write_all(b"0123456789").unwrap();
        log.cut(10).unwrap();
        assert_eq!(std::fs::read(&log.path).unwrap(), b"0123456789");
        writer.write_all(b"ab").unwrap();
        log.cut(10).unwrap();
        writer.write_all(b"after").unwrap();
        assert_eq!(std::fs::read(&log.path).unwrap(), b"after");
        assert_eq!(std::fs::read(folder.path().join("x.log.1")).unwrap(), b"23456789ab");
        writer.write_all(b" and more").unwrap();
        log.cut(10).unwrap();
        assert_eq!(std::fs::read(folder.path().join("x.log.1")).unwrap(), b"r and more");
        assert_eq!(std::fs::metadata(&log.path).unwrap().len(), 0);
    }

    #[test]
    fn a_log_that_cannot_be_opened_stops_no_daemon() {
        let log = Log::new("/no/such/folder/x.log".into());
        log.open().unwrap().write_all(b"lost").unwrap();
        log.bound();
        assert_eq!(log.end_since(0), "");
    }

    #[test]
    fn the_end_is_short_and_harmless() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::new(folder.path().join("x.log"));
        std::fs::write(&log.path, b"\x1b[31mred\n\nlast\xff\n").unwrap();
        assert!(log.end_since(0).starts_with("\\u{1b}[31mred | last"));
        let lines: Vec<String> = (0..1000).map(|line| format!("line {line}\n")).collect();
        std::fs::write(&log.path, lines.concat()).unwrap();
        assert_eq!(log.end_since(0), "line 997 | line 998 | line 999");
        let length = log.length();
        assert_eq!(log.end_since(length), "");
        assert_eq!(log.end_since(length - 9), "line 999");
        assert_eq!(log.end_since(length + 1), "line 997 | line 998 | line 999");
        std::fs::write(&log.path, "x".repeat(1 << 20)).unwrap();
        let end = log.end_since(0);
        assert!(!end.is_empty() && end.len() < 1000, "{}", end.len());
    }
}
