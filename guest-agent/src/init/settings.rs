//! Kernel settings and limits that images expect, the clock, and control groups.

use std::fs;
use std::path::Path;
use std::time::Duration;

use dhow_protocol::boot::BootConfig;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::stat::{Mode, umask};
use rustix::time::{ClockId, Timespec};

use super::error::InitError;
use super::filesystems::make_folder;

/// Below `/proc/sys`.
const SYSCTLS: [(&str, &str); 16] = [
    // Containers reach out through the guest.
    ("net/ipv4/ip_forward", "1"),
    // Unprivileged ping in containers (as systemd sets it).
    ("net/ipv4/ping_group_range", "0 2147483647"),
    ("net/core/somaxconn", "4096"),
    // QUIC and the like: 8 MiB of UDP buffer.
    ("net/core/rmem_max", "8388608"),
    ("net/core/wmem_max", "8388608"),
    // Many containers on one bridge.
    ("net/ipv4/neigh/default/gc_thresh2", "4096"),
    ("net/ipv4/neigh/default/gc_thresh3", "8192"),
    // Elasticsearch and others refuse to start below.
    ("vm/max_map_count", "1048576"),
    ("fs/inotify/max_user_watches", "1048576"),
    ("fs/inotify/max_user_instances", "8192"),
    ("fs/inotify/max_queued_events", "65536"),
    ("fs/aio-max-nr", "1048576"),
    ("kernel/pid_max", "4194304"),
    ("kernel/keys/maxkeys", "20000"),
    // Hard links and symlinks of others in /tmp, as every distribution sets them.
    ("fs/protected_hardlinks", "1"),
    ("fs/protected_symlinks", "1"),
];
/// The most file descriptors of a process.
const NOFILE: u64 = 1 << 20;
const CGROUPS: &str = "/sys/fs/cgroup";
/// The group of PID 1 and all that it starts. Containers are in groups beside it.
const OWN_CGROUP: &str = "/sys/fs/cgroup/dhow";

/// Lets the console take what is said there: the kernel drops after ten lines in five seconds.
pub(crate) fn unlimited_kmsg() {
    // Without it, at worst a line is missing.
    let _ = fs::write("/proc/sys/kernel/printk_devkmsg", "on\n");
}

/// Sets the kernel's settings and the limits that every process inherits. What this kernel does not
/// have is logged and left.
pub(crate) fn apply() {
    umask(Mode::from_bits_truncate(0o022));
    for (name, value) in SYSCTLS {
        if let Err(error) = fs::write(Path::new("/proc/sys").join(name), value) {
            tracing::warn!(%error, name, value, "cannot set a kernel setting");
        }
    }
    let limits = [
        (Resource::RLIMIT_NOFILE, NOFILE, NOFILE),
        (Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY),
        (Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY),
        // No core files unless a program asks for them.
        (Resource::RLIMIT_CORE, 0, RLIM_INFINITY),
    ];
    for (resource, soft, hard) in limits {
        if let Err(error) = setrlimit(resource, soft, hard) {
            tracing::warn!(%error, ?resource, "cannot set a limit");
        }
    }
    // Ctrl-Alt-Del would restart at once; the power button ends the VM in order.
    if let Err(error) = nix::sys::reboot::set_cad_enabled(false) {
        tracing::warn!(%error, "cannot switch off Ctrl-Alt-Del");
    }
}

/// Delegates every controller of the root group to its children, as dockerd with `cgroupfs` needs,
/// and moves this process to a group of its own.
///
/// # Errors
/// When the hierarchy cannot be used.
pub(crate) fn control_groups() -> Result<(), InitError> {
    let path = Path::new(CGROUPS).join("cgroup.controllers");
    let controllers = fs::read_to_string(&path).map_err(InitError::at("read", &path))?;
    for controller in controllers.split_whitespace() {
        // One at a time: one that cannot be delegated must not keep the others back.
        if let Err(error) =
            fs::write(Path::new(CGROUPS).join("cgroup.subtree_control"), format!("+{controller}"))
        {
            tracing::warn!(%error, controller, "cannot delegate a controller");
        }
    }
    make_folder(Path::new(OWN_CGROUP))?;
    // cgroup-v2.rst: 0 means the process that writes.
    fs::write(Path::new(OWN_CGROUP).join("cgroup.procs"), "0")
        .map_err(InitError::at("enter the control group", OWN_CGROUP))
}

/// Sets the clock to the host's, as it was when the host wrote the configuration, plus the time since
/// the kernel's start. The start of QEMU is missing in that; the host corrects it when it connects.
pub(crate) fn set_clock(config: &BootConfig) {
    let since_start = rustix::time::clock_gettime(ClockId::Boottime);
    let since_start = Duration::try_from(since_start).unwrap_or_default();
    let set = host_time(config.unix_nanos, since_start)
        .map_or(Ok(()), |time| rustix::time::clock_settime(ClockId::Realtime, time));
    if let Err(error) = set {
        tracing::warn!(%error, "cannot set the clock");
    }
}

/// The host's time `later`; `None` when the host has no sensible clock itself.
fn host_time(unix_nanos: u64, later: Duration) -> Option<Timespec> {
    let now = Duration::from_nanos(unix_nanos).checked_add(later).filter(|_| unix_nanos != 0)?;
    Timespec::try_from(now).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_is_the_hosts_plus_what_has_passed() {
        let time = host_time(1_700_000_000_900_000_000, Duration::from_millis(1_200)).unwrap();
        assert_eq!((time.tv_sec, time.tv_nsec), (1_700_000_002, 100_000_000));
        assert!(host_time(0, Duration::from_secs(1)).is_none());
        assert!(host_time(u64::MAX, Duration::from_secs(1)).is_some());
    }
}
