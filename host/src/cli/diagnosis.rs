//! A profile's processes as /proc shows them, whoever of them answers: what is stopped, and what is left.
//!
//! The keeper and its supervisor are those who hold the API's listening socket: unlike a pid that was
//! noted once, that is true also after one has taken the other's place.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::config::Paths;
use crate::supervisor::Record;
use dhow_parent::procfs::Stat;

/// `__SO_ACCEPTCON` of `<linux/net.h>`: the flag of a listening socket in /proc/net/unix.
const LISTENING: &str = "00010000";
/// Dhow's own roles: first arguments of its processes.
const KEEPER: &str = "keeper";
const ROLES: [&str; 4] = [KEEPER, "supervisor", "vsock-device", "file-server"];

/// A process that does nothing until it is continued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Halted {
    /// Its role ("supervisor"), or its program's name.
    pub name: String,
    /// Its pid.
    pub pid: i32,
}

impl Halted {
    /// What is wrong with it.
    #[must_use]
    pub fn problem(&self) -> String {
        format!("the {} process {} is stopped by a signal", self.name, self.pid)
    }
}

/// The stopped ones among a profile's processes.
#[must_use]
pub fn halted(paths: &Paths) -> Vec<Halted> {
    let mut halted: Vec<Halted> = processes(paths)
        .into_iter()
        .filter(|(_, stat)| stat.is_stopped())
        .map(|(pid, stat)| Halted { name: role(pid).unwrap_or_else(|| short(stat.name)), pid })
        .collect();
    halted.sort_by_key(|process| process.pid);
    halted
}

/// Pids of a profile's processes.
#[must_use]
pub fn pids(paths: &Paths) -> Vec<i32> {
    processes(paths).into_iter().map(|(pid, _)| pid).collect()
}

/// The keeper among them.
#[must_use]
pub fn keepers(paths: &Paths) -> Vec<i32> {
    pids(paths).into_iter().filter(|pid| role(*pid).as_deref() == Some(KEEPER)).collect()
}

/// Whether somebody listens on the profile's API socket.
#[must_use]
pub fn somebody_listens(paths: &Paths) -> bool {
    let socket = paths.api_socket();
    socket.exists() && !listening_sockets(&socket).is_empty()
}

/// Who holds the API's listening socket, their children, and what the VM's record has of earlier ones.
fn processes(paths: &Paths) -> Vec<(i32, Stat)> {
    let all: Vec<(i32, Stat)> = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(|pid| Some((pid, Stat::read(pid)?)))
        .collect();
    let sockets = listening_sockets(&paths.api_socket());
    let holders: HashSet<i32> =
        all.iter().map(|(pid, _)| *pid).filter(|pid| holds_any(*pid, &sockets)).collect();
    let recorded = Record::read(paths).map(|record| record.pids()).unwrap_or_default();
    let is_ours = |(pid, stat): &(i32, Stat)| {
        holders.contains(pid)
            || stat.parent().is_some_and(|parent| holders.contains(&parent))
            || recorded.contains(pid)
    };
    all.into_iter().filter(is_ours).collect()
}

/// The sockets that listen at `path`, as /proc/PID/fd links to them. /proc/net/unix has
/// `Num RefCount Protocol Flags Type St Inode Path`; one whose path was bound anew may still be there.
fn listening_sockets(path: &Path) -> Vec<PathBuf> {
    let table = std::fs::read("/proc/net/unix").unwrap_or_default();
    let table = String::from_utf8_lossy(&table);
    let path = format!(" {}", path.display());
    let lines = table.lines().filter_map(|line| line.strip_suffix(path.as_str()));
    lines
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace().skip(3);
            let listens = fields.next()? == LISTENING;
            listens.then(|| fields.nth(2).map(|inode| format!("socket:[{inode}]").into())).flatten()
        })
        .collect()
}

/// Whether a process has one of these sockets open; another user's does not tell.
fn holds_any(pid: i32, sockets: &[PathBuf]) -> bool {
    if sockets.is_empty() {
        return false;
    }
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    fds.filter_map(|fd| std::fs::read_link(fd.path()).ok()).any(|target| sockets.contains(&target))
}

/// "qemu" for `qemu-system-x86_64`, of which the kernel keeps 15 characters.
fn short(name: String) -> String {
    if name.starts_with("qemu-system-") { "qemu".to_owned() } else { name }
}

/// The role of one of our own processes: its first argument.
fn role(pid: i32) -> Option<String> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let word = String::from_utf8_lossy(line.split(|byte| *byte == 0).nth(1)?).into_owned();
    ROLES.contains(&word.as_str()).then_some(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_child_of_who_listens_is_found() {
        let folder = tempfile::tempdir_in("/tmp").unwrap();
        let paths = Paths::at(folder.path(), &"default".parse().unwrap()).unwrap();
        paths.create().unwrap();
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let signal = |signal| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
        signal(nix::sys::signal::Signal::SIGSTOP);
        assert!(!somebody_listens(&paths) && pids(&paths).is_empty());
        let listener = std::os::unix::net::UnixListener::bind(paths.api_socket()).unwrap();
        assert!(somebody_listens(&paths));
        assert!(pids(&paths).contains(&i32::try_from(std::process::id()).unwrap()));
        assert!(keepers(&paths).is_empty(), "this is no keeper");
        let found = until(|| halted(&paths).into_iter().find(|process| process.pid == pid));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found.unwrap().name, "sleep");
        drop(listener);
        // A child that another test is just starting may have it for a moment.
        assert!(until(|| (!somebody_listens(&paths) && pids(&paths).is_empty()).then_some(())).is_some());
    }

    fn until<T>(mut ask: impl FnMut() -> Option<T>) -> Option<T> {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        loop {
            let answer = ask();
            if answer.is_some() || std::time::Instant::now() > deadline {
                return answer;
            }
            std::thread::yield_now();
        }
    }
}
