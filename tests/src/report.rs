//! What a failed case tells: its own words, and the ends of the logs of every VM that lives.

use std::fmt::Write as _;
use std::panic::PanicHookInfo;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Lines of a log that a failure shows.
const LINES: usize = 15;
/// Bytes from a log's end in which those are looked for.
const WINDOW: usize = 32 << 10;

/// A VM whose logs failures tell.
struct Watched {
    home: PathBuf,
    guest_log: Box<dyn Fn() -> String + Send>,
}

static WATCHED: Mutex<Vec<Watched>> = Mutex::new(Vec::new());
/// What the case at hand has to say of its failure: its words, and the logs.
static FAILURE: Mutex<Failure> = Mutex::new(Failure { words: String::new(), logs: String::new() });
/// What went wrong beside the cases; the suite fails for it.
static FAULTS: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Cases that passed the second time only.
static SECOND: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Why a case failed.
#[derive(Debug, Default)]
pub struct Failure {
    /// Its own words.
    pub words: String,
    /// The ends of the logs, as they were then.
    pub logs: String,
}

/// From now on failures tell the logs of `home`, and what `guest_log` returns.
pub fn watch(home: &Path, guest_log: impl Fn() -> String + Send + 'static) {
    lock(&WATCHED).push(Watched { home: home.to_owned(), guest_log: Box::new(guest_log) });
}

/// No longer.
pub fn forget(home: &Path) {
    lock(&WATCHED).retain(|known| known.home != home);
}

/// A fault that belongs to no case.
pub fn fault(text: String) {
    eprintln!("fault: {text}");
    lock(&FAULTS).push(text);
}

/// A case has passed, but not the first time.
pub fn second_time(case: &str) {
    lock(&SECOND).push(case.to_owned());
}

/// Such cases.
pub fn passed_the_second_time() -> Vec<String> {
    std::mem::take(&mut lock(&SECOND))
}

/// All such faults.
pub fn faults() -> Vec<String> {
    std::mem::take(&mut lock(&FAULTS))
}

/// What the last failed case said; see [`install`].
pub fn failure() -> Failure {
    std::mem::take(&mut lock(&FAILURE))
}

/// Runs a bench: whatever became of it, no VM of it is left, and a failure is told with the logs of those that lived.
pub fn bench(measure: fn()) {
    install();
    let result = std::panic::catch_unwind(measure);
    super::vm::clean_up();
    if result.is_err() {
        let failure = failure();
        eprintln!("{}{}", failure.words, failure.logs);
        std::process::exit(1);
    }
}

/// Has failures noted where they happen, as long as the VMs that they are about still live: unwinding
/// ends those.
pub fn install() {
    std::panic::set_hook(Box::new(note));
}

fn note(info: &PanicHookInfo<'_>) {
    let message = info.payload_as_str().unwrap_or("a panic without words");
    let place = info.location().map(|place| format!(" ({}:{})", place.file(), place.line()));
    let words = format!("{message}{}\n", place.unwrap_or_default());
    let main = std::thread::current().name() == Some("main");
    let logs = if main { logs() } else { String::new() };
    let mut failure = lock(&FAILURE);
    if !failure.words.is_empty() && main {
        failure.words.insert_str(0, "before that: ");
    }
    failure.words.insert_str(0, &words);
    failure.logs.push_str(&logs);
}

/// The logs of every VM that lives.
fn logs() -> String {
    // Not waited for: a panic within this must not end in a deadlock.
    let Ok(watched) = WATCHED.try_lock() else { return String::new() };
    watched
        .iter()
        .map(|vm| {
            let guest = (vm.guest_log)();
            format!("{}=== the agent's log\n{}", logs_of(&vm.home), indented(&guest))
        })
        .collect()
}

/// The ends of the logs below `home`, and the name of a known fault where one shows.
fn logs_of(home: &Path) -> String {
    let mut text = String::new();
    for profile in entries(&home.join("data/profiles")) {
        for log in entries(&profile.join("log")) {
            if log.ends_with("passt.log") {
                // How to use it, at every start.
                continue;
            }
            let bytes = std::fs::read(&log).unwrap_or_default();
            let end = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(WINDOW)..]).into_owned();
            if end.contains("Oops: int3") {
                let _ = writeln!(
                    text,
                    "=== {}: the guest panicked with `Oops: int3`, a known fault of the multi-threaded emulation \
                     before QEMU 8, and none of Dhow's",
                    log.display()
                );
            }
            if !end.trim().is_empty() {
                let _ = write!(text, "=== {}\n{}", log.display(), indented(&end));
            }
        }
    }
    text
}

fn indented(text: &str) -> String {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let end = &lines[lines.len().saturating_sub(LINES)..];
    end.iter()
        .map(|line| format!("  | {}\n", line.replace(|c: char| c.is_control() && c != '\t', "·")))
        .collect()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> =
        std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}
