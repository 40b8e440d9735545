//! Processes of the host: which ones belong to a home of Dhow's, and their ends.

use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use super::wait::wait_until;

/// How long an ended process may take to go.
const GONE: Duration = Duration::from_secs(60);

/// A process of the host.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its pid.
    pub pid: i32,
    /// Its command line.
    pub line: String,
}

/// Processes whose environment or command line names `home`; no zombies.
pub fn of_home(home: &Path) -> Vec<Process> {
    let home = home.as_os_str().as_encoded_bytes();
    let holds = |bytes: &[u8]| bytes.windows(home.len()).any(|part| part == home);
    let own = std::process::id();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if u32::try_from(pid) == Ok(own) {
            continue;
        }
        // Empty for a zombie, an error for one that has just gone.
        let read = |name: &str| std::fs::read(entry.path().join(name)).unwrap_or_default();
        let line = read("cmdline");
        if !line.is_empty() && (holds(&read("environ")) || holds(&line)) {
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            found.push(Process { pid, line });
        }
    }
    found
}

/// Whether `pid` is there and no zombie.
pub fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // proc_pid_stat(5): the name in brackets may hold anything; the state follows the last bracket.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Sends `signal`.
///
/// # Panics
/// When the process is gone.
pub fn send(pid: i32, signal: Signal) {
    signal::kill(Pid::from_raw(pid), signal).unwrap_or_else(|error| panic!("{signal} to {pid}: {error}"));
}

/// SIGKILL, and waits until it is gone.
pub fn kill(pid: i32) {
    send(pid, Signal::SIGKILL);
    wait_until(&format!("the end of {pid}"), GONE, || !is_alive(pid));
}

/// Ends what is left of `home`; returns what there was.
pub fn end_all(home: &Path) -> Vec<Process> {
    let mut ended: Vec<Process> = Vec::new();
    // A parent may restart a child before it is its turn.
    wait_until("the end of what was left", GONE, || {
        let left = of_home(home);
        for process in &left {
            let _ = signal::kill(Pid::from_raw(process.pid), Signal::SIGKILL);
            if ended.iter().all(|known| known.pid != process.pid) {
                ended.push(process.clone());
            }
        }
        // One that is just ending has no command line any more, and still holds its locks.
        left.is_empty() && !ended.iter().any(|process| is_alive(process.pid))
    });
    ended
}
