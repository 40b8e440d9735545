//! The kernel's own filesystems, and the standard descriptors on them.

use std::fs::OpenOptions;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use super::error::InitError;

struct Filesystem {
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const PLAIN: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);
/// `/run` has the agent's own program.
const RUN: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
const DEV: MsFlags = MsFlags::MS_NOSUID;
const SHM: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
const PTS: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC);

const fn filesystem(
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: &'static str,
) -> Filesystem {
    Filesystem { kind, target, flags, data }
}

/// They are moved to the system's root when it is there, with what is mounted below them.
const TREES: [Filesystem; 4] = [
    filesystem("proc", "/proc", PLAIN, ""),
    filesystem("sysfs", "/sys", PLAIN, ""),
    filesystem("devtmpfs", "/dev", DEV, "mode=0755"),
    filesystem("tmpfs", "/run", RUN, "mode=0755,size=25%"),
];

/// No debugfs and no securityfs: nothing of Dhow needs them, and with securityfs dockerd would ask
/// for AppArmor's tools.
const BELOW: [Filesystem; 4] = [
    // gid 5 is `tty` (Debian's base-passwd).
    filesystem("devpts", "/dev/pts", PTS, "gid=5,mode=0620,ptmxmode=0666"),
    filesystem("tmpfs", "/dev/shm", SHM, "mode=1777"),
    filesystem("cgroup2", "/sys/fs/cgroup", PLAIN, "nsdelegate,memory_recursiveprot"),
    filesystem("tracefs", "/sys/kernel/tracing", PLAIN, "mode=0700"),
];

/// Where the kernel may lack them. They are mounted before there is a modprobe, since the kernel
/// runs it for bpf even where bpf is built in, and that takes longer than all other mounts.
const OPTIONAL: [Filesystem; 2] =
    [filesystem("bpf", "/sys/fs/bpf", PLAIN, "mode=0700"), filesystem("mqueue", "/dev/mqueue", PLAIN, "")];

/// What udev would link.
const DEV_LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Where the trees are that the new root takes over.
pub(crate) fn trees() -> impl Iterator<Item = &'static str> {
    TREES.iter().map(|filesystem| filesystem.target)
}

/// Mounts all of them in the initramfs; returns why those are missing that a kernel may lack.
///
/// # Errors
/// When one that is needed cannot be mounted.
pub(crate) fn mount_all() -> Result<Vec<InitError>, InitError> {
    TREES.iter().chain(&BELOW).try_for_each(Filesystem::mount)?;
    for (to, link) in DEV_LINKS {
        symlink(to, link).map_err(InitError::at("link", link))?;
    }
    Ok(OPTIONAL.iter().filter_map(|filesystem| filesystem.mount().err()).collect())
}

/// Mounts below `/` are seen by containers that ask for it (`rshared`), as with systemd.
///
/// # Errors
/// As mount(2).
pub(crate) fn share_root() -> Result<(), InitError> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SHARED, None::<&str>)
        .map_err(InitError::at("share the mounts below", "/"))
}

/// Standard input from nowhere; output and error, which the worker inherits, to the kernel's log:
/// bounded, and seen by `dhow logs`.
///
/// # Errors
/// As open(2) and dup2(2).
pub(crate) fn redirect_stdio() -> Result<(), InitError> {
    let open = |path: &'static str, read: bool| {
        OpenOptions::new().read(read).write(!read).open(path).map_err(InitError::at("open", path))
    };
    let (null, kmsg) = (open("/dev/null", true)?, open("/dev/kmsg", false)?);
    rustix::stdio::dup2_stdin(&null).map_err(InitError::at("use as standard input", "/dev/null"))?;
    rustix::stdio::dup2_stdout(&kmsg).map_err(InitError::at("use as standard output", "/dev/kmsg"))?;
    rustix::stdio::dup2_stderr(&kmsg).map_err(InitError::at("use as standard error", "/dev/kmsg"))
}

impl Filesystem {
    fn mount(&self) -> Result<(), InitError> {
        make_folder(Path::new(self.target))?;
        mount(Some(self.kind), self.target, Some(self.kind), self.flags, Some(self.data))
            .map_err(InitError::at("mount", self.target))
    }
}

/// A folder that may be there already.
pub(crate) fn make_folder(path: &Path) -> Result<(), InitError> {
    match std::fs::create_dir(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(InitError::at("make the folder", path)(error))
        }
        _ => Ok(()),
    }
}
