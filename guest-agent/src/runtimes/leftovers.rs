//! What daemons leave running by intent (containers' shims), ended with their runtime.
//!
//! A shim is known by the file name of its program; containers are what it started. Their first
//! processes are asked to end, then all are killed, then the shims.

use std::collections::HashSet;
use std::fs;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::time::Instant;

/// How long what is killed may take to end.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
/// Between looks.
const PAUSE: Duration = Duration::from_millis(100);

/// A process as it was seen; its pid alone may be another's later.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Process {
    pid: i32,
    parent: i32,
    /// Clock ticks from the boot to its start.
    started: u64,
}

/// Ends all processes of these programs and what they started, which has `grace` for it.
pub async fn end(programs: &[String], grace: Duration) {
    let shims = find(programs);
    if shims.is_empty() {
        return;
    }
    let containers = descendants(&shims);
    tracing::info!(shims = shims.len(), processes = containers.len(), "ending what daemons left running");
    let first = containers.iter().filter(|process| shims.iter().any(|shim| shim.pid == process.parent));
    first.for_each(|process| signal(process, Signal::TERM));
    let asked = Instant::now();
    while asked.elapsed() < grace && !descendants(&shims).is_empty() {
        tokio::time::sleep(PAUSE).await;
    }
    let killed = Instant::now();
    while killed.elapsed() < KILL_PATIENCE {
        let mut left = descendants(&shims);
        if left.is_empty() {
            // Before its processes are gone, a shim's end would have them reparented out of sight.
            left = shims.iter().filter(|shim| see(shim.pid).as_ref() == Some(shim)).cloned().collect();
        }
        if left.is_empty() {
            return;
        }
        left.iter().for_each(|process| signal(process, Signal::KILL));
        tokio::time::sleep(PAUSE).await;
    }
    tracing::error!("processes that daemons left running do not end");
}

/// The processes whose program has one of these file names.
fn find(programs: &[String]) -> Vec<Process> {
    let is_one = |pid: &i32| {
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        // proc_pid_exe(5): a program that was removed has this behind its name.
        let name = name.strip_suffix(" (deleted)").unwrap_or(&name);
        programs.iter().any(|program| program == name)
    };
    pids().filter(is_one).filter_map(see).collect()
}

/// What these processes have started, and that in turn.
fn descendants(roots: &[Process]) -> Vec<Process> {
    let all: Vec<_> = pids().filter_map(see).collect();
    let mut family: HashSet<i32> = roots.iter().map(|root| root.pid).collect();
    let mut found = Vec::new();
    loop {
        let before = found.len();
        for process in &all {
            if family.contains(&process.parent) && family.insert(process.pid) {
                found.push(process.clone());
            }
        }
        if found.len() == before {
            return found;
        }
    }
}

fn pids() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The process, unless it has ended.
fn see(pid: i32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc_pid_stat(5): the program's name in parentheses may have any character in it; state,
    // parent, and 18 fields later the time of the start follow.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    let ended = matches!(fields.next()?, "Z" | "X");
    let parent = fields.next()?.parse().ok()?;
    let started = fields.nth(17)?.parse().ok()?;
    (!ended).then_some(Process { pid, parent, started })
}

/// Signals the process that was seen, and no other that has its pid by now.
fn signal(process: &Process, signal: Signal) {
    let Some(pid) = Pid::from_raw(process.pid) else { return };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    let same = see(process.pid).is_some_and(|now| now.started == process.started);
    if same && let Err(error) = pidfd_send_signal(&pidfd, signal) {
        tracing::debug!(%error, pid = process.pid, ?signal, "cannot signal a process");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    /// Kills what a failed test leaves.
    #[derive(Debug)]
    struct Family(Vec<Process>);

    impl Drop for Family {
        fn drop(&mut self) {
            self.0.iter().for_each(|process| signal(process, Signal::KILL));
        }
    }

    /// A shell under a name that nobody else has, with a child that ignores SIGTERM and one that
    /// does not.
    #[tokio::test]
    async fn a_shim_ends_with_all_that_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let name = format!("shim-{}", std::process::id());
        let program = folder.path().join(&name);
        fs::copy("/bin/sh", &program).unwrap();
        let script = "/bin/sh -c 'trap \"\" TERM; while :; do sleep 1000; done' & sleep 1000 & wait";
        let mut command = Command::new(&program);
        command.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut shim = command.spawn().unwrap();
        let mut family = Family(vec![see(shim.id() as i32).unwrap()]);
        let begun = Instant::now();
        // The shell, its sleep, the other sleep; none any more between fork and exec.
        while family.0.len() < 4 || find(std::slice::from_ref(&name)).len() > 1 {
            assert!(begun.elapsed() < Duration::from_secs(120), "{family:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
            family.0.truncate(1);
            let started = descendants(&family.0);
            family.0.extend(started);
        }
        assert_eq!(find(std::slice::from_ref(&name)), family.0[..1]);
        end(std::slice::from_ref(&name), Duration::from_millis(300)).await;
        assert_eq!(find(&[name]), []);
        for process in &family.0 {
            assert_ne!(see(process.pid).map(|now| now.started), Some(process.started), "{process:?} lives");
        }
        shim.wait().unwrap();
    }

    #[tokio::test]
    async fn nothing_left_is_nothing_done() {
        end(&["no-such-program".to_owned()], Duration::from_secs(600)).await;
        end(&[], Duration::from_secs(600)).await;
    }
}
