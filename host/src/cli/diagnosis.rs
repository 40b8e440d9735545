//! Why somebody does not answer: processes of a profile that a signal has stopped, read from /proc.

use rustix::process::Pid;

use crate::config::Paths;
use crate::supervisor::Record;

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

/// The stopped ones among a profile's processes: `keeper`, its children, and what the VM's record has of
/// an earlier keeper.
#[must_use]
pub fn halted(keeper: Option<Pid>, paths: &Paths) -> Vec<Halted> {
    let recorded = Record::read(paths).map(|record| record.pids()).unwrap_or_default();
    halted_among(keeper, &recorded)
}

fn halted_among(keeper: Option<Pid>, recorded: &[i32]) -> Vec<Halted> {
    let keeper = keeper.map(|pid| pid.as_raw_nonzero().get());
    let is_ours =
        |pid: i32, stat: &Stat| Some(pid) == keeper || Some(stat.parent) == keeper || recorded.contains(&pid);
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut halted: Vec<Halted> = processes
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(|pid| Some((pid, Stat::read(pid)?)))
        .filter(|(pid, stat)| is_ours(*pid, stat) && stat.is_halted())
        .map(|(pid, stat)| Halted { name: role(pid).unwrap_or_else(|| short(stat.name)), pid })
        .collect();
    halted.sort_by_key(|process| process.pid);
    halted
}

/// What proc_pid_stat(5) says: `pid (comm) state ppid …`, where comm may hold anything.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    name: String,
    state: char,
    parent: i32,
}

impl Stat {
    fn read(pid: i32) -> Option<Self> {
        Self::parse(&String::from_utf8_lossy(&std::fs::read(format!("/proc/{pid}/stat")).ok()?))
    }

    fn parse(text: &str) -> Option<Self> {
        let (head, tail) = text.rsplit_once(')')?;
        let (_, name) = head.split_once('(')?;
        let mut fields = tail.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        Some(Self { name: name.to_owned(), state, parent: fields.next()?.parse().ok()? })
    }

    /// "T  Stopped (on a signal)", "t  Tracing stop".
    fn is_halted(&self) -> bool {
        matches!(self.state, 'T' | 't')
    }
}

/// "qemu" for `qemu-system-x86_64`, of which the kernel keeps 15 characters.
fn short(name: String) -> String {
    if name.starts_with("qemu-system-") { "qemu".to_owned() } else { name }
}

/// The role of one of our own processes: its first argument.
fn role(pid: i32) -> Option<String> {
    const ROLES: [&str; 4] = ["keeper", "supervisor", "vsock-device", "file-server"];
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let word = String::from_utf8_lossy(line.split(|byte| *byte == 0).nth(1)?).into_owned();
    ROLES.contains(&word.as_str()).then_some(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let stat = Stat::parse("12 (a) b (c) T 7 1 1").unwrap();
        assert_eq!(stat, Stat { name: "a) b (c".to_owned(), state: 'T', parent: 7 });
        assert!(stat.is_halted());
        assert!(Stat::parse("12 (x").is_none());
    }

    #[test]
    fn a_stopped_child_is_found() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
        let own = Pid::from_raw(i32::try_from(std::process::id()).unwrap());
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        let found = loop {
            let found = halted_among(own, &[]).into_iter().find(|process| process.pid == pid.as_raw());
            if found.is_some() || std::time::Instant::now() > deadline {
                break found;
            }
            std::thread::yield_now();
        };
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found.unwrap().name, "sleep");
        assert!(halted_among(None, &[]).is_empty());
    }
}
