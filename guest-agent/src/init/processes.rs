//! `/proc`: which processes are left at power-off.

/// `PF_KTHREAD` of `<linux/sched.h>`.
const KERNEL_THREAD: u32 = 0x0020_0000;

/// Names and pids of the processes but this one, without the kernel's threads and without those that
/// have ended and only wait for their parent.
pub(crate) fn others() -> Vec<String> {
    let own = std::process::id();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != own)
        .filter_map(|pid| running(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?))
        .collect()
}

/// "name (pid)" of a line of `/proc/PID/stat` (proc_pid_stat(5)): `12 (a (b) c) S ppid pgrp session
/// tty tpgid flags …`. `None` for what does not count.
fn running(stat: &str) -> Option<String> {
    let (pid, rest) = stat.split_once(" (")?;
    let (name, rest) = rest.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?;
    let flags: u32 = fields.nth(5)?.parse().ok()?;
    let counts = flags & KERNEL_THREAD == 0 && !matches!(state, "Z" | "X");
    counts.then(|| format!("{name} ({pid})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_threads_and_zombies_do_not_count() {
        let line = "77 (a) (b) S) S 1 77 77 0 -1 4194560 100 0 0 0";
        assert_eq!(running(line).as_deref(), Some("a) (b) S (77)"));
        assert_eq!(running("2 (kthreadd) S 0 0 0 0 -1 2129984 0 0"), None);
        assert_eq!(running("77 (sh) Z 1 77 77 0 -1 4194560 100"), None);
        assert_eq!(running(""), None);
        assert_eq!(running("77 (sh) S 1"), None);
    }

    #[test]
    fn a_child_is_seen_and_not_this_process() {
        let mut child = std::process::Command::new("/bin/sleep").arg("600").spawn().unwrap();
        let others = others();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(others.iter().any(|name| name.ends_with(&format!(" ({})", child.id()))), "{others:?}");
        assert!(!others.iter().any(|name| name.ends_with(&format!(" ({})", std::process::id()))));
    }
}
