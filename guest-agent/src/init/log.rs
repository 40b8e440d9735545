//! The agent's log: PID 1 and the worker append to one bounded file, and errors reach the console.
//!
//! A failed write never ends anything: lines that the disk does not take are lost. Until the data
//! disk is mounted the first lines wait in memory.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use nix::fcntl::{Flock, FlockArg};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Layer, SubscriberExt};

use super::console::{self, Console};

/// Where the log is, on the data disk.
pub const LOG_FILE: &str = "/data/log/agent.log";
/// Bytes after which the file becomes `agent.log.1`, and a new one begins.
const LIMIT: u64 = 4 << 20;
/// Bytes that wait in memory for the file; the oldest lines go first.
const EARLY_LIMIT: usize = 256 << 10;
const DEFAULT_FILTER: &str = "info";

static SINK: LazyLock<Sink> = LazyLock::new(|| Sink::new(Path::new(LOG_FILE), LIMIT));

/// Sends this process's `tracing` events and panics to [`LOG_FILE`], its errors to the console too.
/// For PID 1 and the worker, once, at their start. A malformed `filter` becomes "info".
pub fn to_file(filter: &str) {
    let parsed = EnvFilter::try_new(filter);
    let problem = parsed.as_ref().err().map(ToString::to_string);
    let file = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(|| &*SINK);
    // The kernel puts the time before its lines, and "dhow" is there already.
    let errors = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .without_time()
        .with_level(false)
        .with_target(false)
        .with_writer(|| Console)
        .with_filter(LevelFilter::ERROR);
    let file = file.with_filter(parsed.unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER)));
    let subscriber = tracing_subscriber::registry().with(file).with(errors);
    if tracing::subscriber::set_global_default(subscriber).is_err() {
        console::error("the log was set up twice");
        return;
    }
    std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    if let Some(problem) = problem {
        tracing::warn!(filter, problem, "the log filter is malformed; using {DEFAULT_FILTER:?}");
    }
}

/// Closes the file, so that its filesystem can be unmounted; later lines reach only the console.
pub(crate) fn close() {
    *SINK.state() = State { closed: true, ..State::default() };
}

struct Sink {
    path: PathBuf,
    limit: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    file: Option<File>,
    /// Lines that wait for the file.
    early: VecDeque<Vec<u8>>,
    early_bytes: usize,
    closed: bool,
}

impl Sink {
    fn new(path: &Path, limit: u64) -> Self {
        Self { path: path.to_owned(), limit, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn append(&self, line: &[u8]) {
        let mut state = self.state();
        if state.closed {
            return;
        }
        state.early_bytes += line.len();
        state.early.push_back(line.to_vec());
        if let Some(file) = self.current(state.file.take()) {
            while let Some(line) = state.early.pop_front() {
                // A full disk: the line is lost, as this module's page says.
                let _ = (&file).write_all(&line);
            }
            state.early_bytes = 0;
            state.file = Some(file);
        }
        while state.early_bytes > EARLY_LIMIT
            && let Some(line) = state.early.pop_front()
        {
            state.early_bytes -= line.len();
        }
    }

    /// The file to append to: the one in hand, or the next when it is full or no longer the log,
    /// because the other process has rotated. `None` when there is no folder for it (yet).
    fn current(&self, file: Option<File>) -> Option<File> {
        let Some(file) = file else {
            return self.open().ok();
        };
        let metadata = file.metadata().ok()?;
        let named = std::fs::metadata(&self.path).ok();
        let same = named.is_some_and(|named| (named.dev(), named.ino()) == (metadata.dev(), metadata.ino()));
        if same && metadata.len() < self.limit {
            return Some(file);
        }
        if same {
            return self.rotate(file);
        }
        self.open().ok().or(Some(file))
    }

    /// Renames a full file. Both processes may see it full: under its lock only the first renames.
    fn rotate(&self, file: File) -> Option<File> {
        let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            // The other process is at it; this line still goes into the old file.
            Err((file, _)) => return Some(file),
        };
        let id = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
        let named = std::fs::metadata(&self.path).ok().map(id);
        if named.is_some() && named == file.metadata().ok().map(id) {
            let mut older = self.path.clone().into_os_string();
            older.push(".1");
            if std::fs::rename(&self.path, older).is_err() {
                // Read-only or broken: the old file stays, and takes no more than the disk does.
                return file.unlock().ok();
            }
        }
        self.open().ok()
    }

    fn open(&self) -> io::Result<File> {
        OpenOptions::new().append(true).create(true).mode(0o640).open(&self.path)
    }
}

impl Write for &Sink {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.append(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &Path) -> String {
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn early_lines_wait_for_the_folder_and_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log/agent.log");
        let sink = Sink::new(&path, LIMIT);
        let line = [b'x'; 1024];
        for _ in 0..2 * EARLY_LIMIT / line.len() {
            sink.append(&line);
        }
        assert!(sink.state().early_bytes <= EARLY_LIMIT);
        std::fs::create_dir(dir.path().join("log")).unwrap();
        sink.append(b"last\n");
        let text = read(&path);
        assert!(text.len() > EARLY_LIMIT - 2048 && text.len() <= EARLY_LIMIT + 2048, "{}", text.len());
        assert!(text.ends_with("xlast\n"));
        assert!(sink.state().early.is_empty());
    }

    #[test]
    fn two_writers_rotate_once_and_lose_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.log");
        let (one, two) = (Sink::new(&path, 1000), Sink::new(&path, 1000));
        let line = [b'a'; 99];
        for _ in 0..6 {
            one.append(&line);
            two.append(&line);
        }
        let older = read(&dir.path().join("agent.log.1"));
        // The first to see it full begins a new file, and the other follows it there.
        assert_eq!((older.len(), read(&path).len()), (1089, 99));
        assert!(std::fs::metadata(&path).unwrap().len() < 1000);
    }

    #[test]
    fn a_closed_log_takes_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.log");
        let sink = Sink::new(&path, LIMIT);
        sink.append(b"one\n");
        *sink.state() = State { closed: true, ..State::default() };
        sink.append(b"two\n");
        assert_eq!(read(&path), "one\n");
    }

    #[test]
    fn a_full_disk_ends_nothing() {
        if std::fs::metadata("/dev/full").is_err() {
            eprintln!("skipped: there is no /dev/full");
            return;
        }
        let sink = Sink::new(Path::new("/dev/full"), LIMIT);
        sink.append(b"one\n");
        sink.append(b"two\n");
        assert!(sink.state().early.is_empty());
    }
}
