//! What /proc says of a process, whosever child it is.

use std::io::Read;

/// proc_pid_stat(5): `pid (comm) state ppid …`, where comm may hold anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Its program's name, of which the kernel keeps 15 characters.
    pub name: String,
    /// The fields from the third on, as they are written.
    fields: String,
}

impl Stat {
    /// Of the process `pid`, unless there is none.
    #[must_use]
    pub fn read(pid: i32) -> Option<Self> {
        Self::parse(&String::from_utf8_lossy(&read(pid, "stat").ok()?))
    }

    fn parse(text: &str) -> Option<Self> {
        let (head, tail) = text.rsplit_once(')')?;
        let (_, name) = head.split_once('(')?;
        Some(Self { name: name.to_owned(), fields: tail.to_owned() })
    }

    /// The field with this number of the manual page.
    fn field(&self, number: usize) -> Option<&str> {
        self.fields.split_ascii_whitespace().nth(number.checked_sub(3)?)
    }

    /// Its parent's pid: field 4.
    #[must_use]
    pub fn parent(&self) -> Option<i32> {
        self.field(4)?.parse().ok()
    }

    /// When it started, in clock ticks since the host's boot: field 22.
    #[must_use]
    pub fn start_time(&self) -> Option<u64> {
        self.field(22)?.parse().ok()
    }

    /// Whether a signal or a debugger has stopped it: field 3, "T" or "t".
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        matches!(self.field(3), Some("T" | "t"))
    }

    /// Whether it has ended, or is exiting.
    fn is_over(&self) -> bool {
        /// `PF_EXITING` of the kernel's linux/sched.h, in field 9.
        const EXITING: u64 = 0x4;
        let flags = self.field(9).and_then(|flags| flags.parse::<u64>().ok());
        matches!(self.field(3), Some("Z" | "X")) || flags.is_some_and(|flags| flags & EXITING != 0)
    }
}

/// Whether a signal has stopped the process.
#[must_use]
pub fn is_stopped(pid: i32) -> bool {
    Stat::read(pid).is_some_and(|stat| stat.is_stopped())
}

/// Whether the process is on its way out, which takes a while where there is much memory to give back:
/// it has SIGKILL pending, or has begun to exit.
#[must_use]
pub fn is_dying(pid: i32) -> bool {
    // In this order: what is pending no longer has become the exit.
    has_pending(pid, libc::SIGKILL) || Stat::read(pid).is_none_or(|stat| stat.is_over())
}

/// A small file of a process. The kernel tells no size, for which `std::fs::read` would ask in ever larger pieces.
fn read(pid: i32, name: &str) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(4096);
    std::fs::File::open(format!("/proc/{pid}/{name}"))?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// proc_pid_status(5): "SigPnd, ShdPnd: Mask (expressed in hexadecimal) of signals pending for thread and
/// for process as a whole".
fn has_pending(pid: i32, signal: i32) -> bool {
    let status = read(pid, "status").unwrap_or_default();
    let status = String::from_utf8_lossy(&status);
    let masks =
        status.lines().filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")));
    masks
        .filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .any(|mask| mask & (1 << (signal - 1)) != 0)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let stat = Stat::parse("12 (a) b (c) T 7 1 1").unwrap();
        assert_eq!((stat.name.as_str(), stat.parent()), ("a) b (c", Some(7)));
        assert!(stat.is_stopped());
        assert!(Stat::parse("12 (x").is_none());
    }

    #[test]
    fn a_process_is_seen_to_run_to_stand_still_and_to_die() {
        let mut child = Command::new("/bin/sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(!is_stopped(pid) && !is_dying(pid));
        let process = nix::unistd::Pid::from_raw(pid);
        nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGSTOP).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        let wait_until = |condition: &dyn Fn() -> bool| {
            while !condition() && std::time::Instant::now() < deadline {
                std::thread::yield_now();
            }
            condition()
        };
        assert!(wait_until(&|| is_stopped(pid)));
        assert!(!is_dying(pid));
        child.kill().unwrap();
        assert!(wait_until(&|| is_dying(pid)));
        child.wait().unwrap();
        assert!(is_dying(pid));
    }
}
