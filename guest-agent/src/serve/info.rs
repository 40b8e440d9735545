//! What the guest is: kernel, uptime, memory, data disk.

use std::path::Path;
use std::time::Duration;

/// Where the data disk is mounted.
pub(super) const DATA: &str = "/data";

/// The kernel's release, as `uname -r` says it.
pub(super) fn kernel() -> String {
    nix::sys::utsname::uname().map(|uname| uname.release().to_string_lossy().into_owned()).unwrap_or_default()
}

/// Since boot, with the time that the guest was suspended.
pub(super) fn uptime() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    Duration::from_secs(seconds) + Duration::from_nanos(u64::try_from(now.tv_nsec).unwrap_or_default())
}

/// Bytes of memory, total and available; zeros without a /proc.
pub(super) fn memory() -> (u64, u64) {
    std::fs::read_to_string("/proc/meminfo").map(|text| parse_memory(&text)).unwrap_or_default()
}

fn parse_memory(meminfo: &str) -> (u64, u64) {
    // "MemTotal:       16310136 kB" (proc_meminfo(5)).
    let field = |name: &str| {
        meminfo
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok())
            .map_or(0, |kib| kib.saturating_mul(1024))
    };
    (field("MemTotal"), field("MemAvailable"))
}

/// Bytes of the file system at `path`, total and available to ordinary users; zeros where there is none.
pub(super) fn disk(path: &Path) -> (u64, u64) {
    match rustix::fs::statvfs(path) {
        Ok(stat) => {
            (stat.f_blocks.saturating_mul(stat.f_frsize), stat.f_bavail.saturating_mul(stat.f_frsize))
        }
        Err(_) => (0, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_parsed_and_its_lack_is_zero() {
        let text = "MemTotal:       2048 kB\nMemFree:  1 kB\nMemAvailable:   1024 kB\n";
        assert_eq!(parse_memory(text), (2 << 20, 1 << 20));
        assert_eq!(parse_memory("MemTotal: many\nMemAvailable"), (0, 0));
        let (total, available) = memory();
        assert!(total >= available && available > 0);
    }

    #[test]
    fn a_disk_has_a_size() {
        let (total, available) = disk(Path::new("/"));
        assert!(total >= available && total > 0);
        assert_eq!(disk(Path::new("/nowhere")), (0, 0));
        assert!(!kernel().is_empty());
        assert!(uptime() > Duration::ZERO);
    }
}
