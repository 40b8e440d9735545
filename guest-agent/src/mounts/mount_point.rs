//! Where a share is mounted: which paths may be, and mount(2) and umount2(2) themselves.
//!
//! All of it walks paths, which may lie in another share: only where blocking is allowed.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path};

use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

/// What the kernel reads ahead, in KiB: as much as one read can have.
const READ_AHEAD_KIB: &str = "1024";
/// File system type of a share's mount.
const TYPE: &str = "fuse.dhow";
/// Longest path in bytes (Linux, `PATH_MAX` without its NUL).
const MAX_PATH: usize = 4095;

/// Folders of the guest's system: a share that is one of them, or holds one, would hide it.
const SYSTEM: [&str; 21] = [
    "/bin",
    "/boot",
    "/data",
    "/dev",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/opt",
    "/proc",
    "/run",
    "/sbin",
    "/sys",
    "/tmp",
    "/usr/local/bin",
    "/usr/local/lib",
    "/usr/local/sbin",
    "/var/lib/containerd",
    "/var/lib/docker",
    "/var/log",
    "/var/run",
];
/// Folders of the guest below which nothing of the host has a place either.
const SYSTEM_TREES: [&str; 19] = [
    "/bin",
    "/boot",
    "/data",
    "/dev",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/proc",
    "/run",
    "/sbin",
    "/sys",
    "/usr/bin",
    "/usr/lib",
    "/usr/sbin",
    "/var/lib/containerd",
    "/var/lib/docker",
    "/var/lock",
    "/var/run",
];

/// Why a share cannot be mounted there.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// Not a plain absolute path.
    #[error("{0:?} is no absolute path without `.` and `..`")]
    Path(String),
    /// It has no place in the guest.
    #[error("{path:?} would hide the guest's own {system}; share a folder elsewhere or below it")]
    System {
        /// What was asked for.
        path: String,
        /// What it would hide.
        system: &'static str,
    },
    /// The folder to mount on.
    #[error("{path:?} cannot be made a folder in the guest")]
    Folder {
        /// The folder, or one above it.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// mount(2).
    #[error("{path:?} cannot be mounted in the guest")]
    Mount {
        /// The folder.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Checks that a share may be mounted at `path`.
///
/// # Errors
/// [`MountError::Path`] and [`MountError::System`].
pub fn check(path: &str) -> Result<(), MountError> {
    let bad = || MountError::Path(path.to_owned());
    let rest = path.strip_prefix('/').ok_or_else(bad)?;
    if path.len() > MAX_PATH || path.contains('\0') {
        return Err(bad());
    }
    if !rest.is_empty() && rest.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(bad());
    }
    let asked = Path::new(path);
    let hidden = SYSTEM.into_iter().find(|system| Path::new(system).starts_with(asked));
    match hidden.or_else(|| SYSTEM_TREES.into_iter().find(|tree| asked.starts_with(tree))) {
        Some(system) => Err(MountError::System { path: path.to_owned(), system }),
        None => Ok(()),
    }
}

/// Mounts a FUSE device at `path`; missing folders are made. Blocks while the path is walked.
///
/// # Errors
/// [`MountError::Folder`] and [`MountError::Mount`].
pub fn mount(device: BorrowedFd<'_>, path: &str, read_only: bool) -> Result<(), MountError> {
    let fail = |source: io::Error| MountError::Mount { path: path.to_owned(), source };
    let folder = make_folders(path)?;
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read={}",
        device.as_raw_fd(),
        dhow_protocol::files::MAX_IO,
    );
    let options = CString::new(options).map_err(|error| fail(io::Error::other(error)))?;
    // Device nodes of the host mean nothing here.
    let mut flags = MountFlags::NODEV;
    flags.set(MountFlags::RDONLY, read_only);
    // Through the fd, so that it is the folder that was checked.
    let target = format!("/proc/self/fd/{}", folder.as_raw_fd());
    rustix::mount::mount("dhow", target, TYPE, flags, options.as_c_str())
        .map_err(|error| fail(error.into()))?;
    // Containers with a bind mount above it are to see it come and go. Under a shared mount it is so
    // already, and where it cannot be they still see the files.
    if let Err(error) = rustix::mount::mount_change(path, MountPropagationFlags::SHARED) {
        tracing::warn!(%error, path, "a share's mounts do not propagate");
    }
    // Larger than the kernel's own choice: each read is a round trip to the host.
    let read_ahead = device_of(path)
        .and_then(|device| std::fs::write(format!("/sys/class/bdi/{device}/read_ahead_kb"), READ_AHEAD_KIB));
    if let Err(error) = read_ahead {
        tracing::warn!(%error, path, "a share's read-ahead stays small");
    }
    Ok(())
}

/// Unmounts the share at `path`, and detaches it when it is in use. Blocks while dirty pages are
/// written.
///
/// # Errors
/// umount2(2)'s; EINVAL when no share is mounted there.
pub fn unmount(path: &str) -> io::Result<()> {
    is_ours(path)?;
    match rustix::mount::unmount(path, UnmountFlags::NOFOLLOW) {
        Err(rustix::io::Errno::BUSY) => {
            rustix::mount::unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?;
        }
        result => result?,
    }
    Ok(())
}

/// Takes a share's mount away without asking its file server: whoever waits for it gets an error.
///
/// # Errors
/// umount2(2)'s; EINVAL when no share is mounted there.
pub fn unmount_by_force(path: &str) -> io::Result<()> {
    is_ours(path)?;
    // > MNT_FORCE: Ask the filesystem to abort pending requests before attempting the unmount
    // > (umount2(2))
    let flags = UnmountFlags::NOFOLLOW | UnmountFlags::DETACH | UnmountFlags::FORCE;
    Ok(rustix::mount::unmount(path, flags)?)
}

/// Fails unless what is mounted at `path`, and not hidden by another mount there, is a share: the data
/// disk's folders are mounts too.
fn is_ours(path: &str) -> io::Result<()> {
    device_of(path).map(drop)
}

/// The device number (`0:44`) of the share that is mounted at `path`. Touches no file system.
fn device_of(path: &str) -> io::Result<String> {
    // Of the thread, which may have a mount namespace of its own.
    let table = std::fs::read("/proc/thread-self/mountinfo")?;
    let lines = table.split(|byte| *byte == b'\n');
    match lines.filter_map(Mounted::parse).rfind(|mounted| mounted.at == path.as_bytes()) {
        Some(Mounted { device, kind, .. }) if kind == TYPE.as_bytes() => {
            Ok(String::from_utf8_lossy(device).into_owned())
        }
        _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

/// A line of mountinfo (proc_pid_mountinfo(5)).
#[derive(Debug, PartialEq, Eq)]
struct Mounted<'a> {
    device: &'a [u8],
    at: Vec<u8>,
    kind: &'a [u8],
}

impl<'a> Mounted<'a> {
    fn parse(line: &'a [u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let device = fields.nth(2)?;
        let at = unescape(fields.nth(1)?);
        // Optional fields, then a dash, then the type.
        let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
        Some(Self { device, at, kind })
    }
}

/// Blank, tab, line feed and backslash stand as `\ooo` there.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((byte, after)) = rest.split_first() {
        let code = after.get(..3).filter(|_| *byte == b'\\').and_then(|code| std::str::from_utf8(code).ok());
        match code.and_then(|code| u8::from_str_radix(code, 8).ok()) {
            Some(code) => {
                plain.push(code);
                rest = &after[3..];
            }
            None => {
                plain.push(*byte);
                rest = after;
            }
        }
    }
    plain
}

/// Opens the folder `path`, making what is missing. Follows no symlink: the host's path is without
/// them, and one of the guest's could lead into its system.
fn make_folders(path: &str) -> Result<OwnedFd, MountError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut so_far = String::from("/");
    let fail = |path: &str, error: rustix::io::Errno| MountError::Folder {
        path: path.to_owned(),
        source: error.into(),
    };
    let mut folder = rustix::fs::open("/", flags, Mode::empty()).map_err(|error| fail("/", error))?;
    for part in Path::new(path).components() {
        let Component::Normal(name) = part else { continue };
        if so_far.len() > 1 {
            so_far.push('/');
        }
        so_far.push_str(&name.to_string_lossy());
        let open = |folder: &OwnedFd| openat(folder.as_fd(), name, flags, Mode::empty());
        let opened = match open(&folder) {
            Err(rustix::io::Errno::NOENT) => {
                match rustix::fs::mkdirat(&folder, name, Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(rustix::io::Errno::EXIST) => open(&folder),
                    Err(error) => Err(error),
                }
            }
            other => other,
        };
        folder = opened.map_err(|error| fail(&so_far, error))?;
    }
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_hides_nothing_of_the_system() {
        for bad in
            ["/", "/usr", "/usr/local", "/etc", "/etc/x", "/proc", "/dev/shm", "/run/x", "/var", "/var/lib"]
        {
            assert!(matches!(check(bad), Err(MountError::System { .. })), "{bad}");
        }
        for bad in ["/bin", "/lib64", "/opt", "/boot", "/data", "/tmp", "/usr/lib/x", "/var/lib/docker/x"] {
            assert!(matches!(check(bad), Err(MountError::System { .. })), "{bad}");
        }
        for good in ["/home", "/home/u", "/root", "/root/x", "/tmp/x", "/usr/src/x", "/opt/x", "/binary"] {
            assert!(check(good).is_ok(), "{good}");
        }
    }

    #[test]
    fn a_path_is_plain_and_absolute() {
        for bad in ["", "home", "/home/", "//home", "/home/../etc", "/./home", "/a//b", "/a\0b"] {
            assert!(matches!(check(bad), Err(MountError::Path(_))), "{bad:?}");
        }
        assert!(matches!(check(&format!("/{}", "x/".repeat(3000))), Err(MountError::Path(_))));
        // A name is quoted where it is shown.
        assert!(!check("/etc/\x1b[2J").unwrap_err().to_string().contains('\x1b'));
    }

    #[test]
    fn a_line_of_mountinfo_is_read() {
        let line = br"36 35 98:0 / /mnt/a\040b\134c rw,noatime shared:1 master:2 - fuse.dhow dhow rw,fd=3";
        let mounted = Mounted { device: b"98:0", at: br"/mnt/a b\c".to_vec(), kind: b"fuse.dhow" };
        assert_eq!(Mounted::parse(line), Some(mounted));
        assert_eq!(Mounted::parse(b"36 35 98:0 / /mnt rw -"), None);
        assert_eq!(Mounted::parse(b""), None);
        assert_eq!(unescape(br"\9x\04"), br"\9x\04");
        // The root is always mounted, and never ours.
        assert_eq!(unmount("/").unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert_eq!(unmount_by_force("/no/such").unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn folders_are_made_and_symlinks_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        let path = base.join("a/b/c");
        make_folders(path.to_str().unwrap()).unwrap();
        assert!(path.is_dir());
        make_folders(path.to_str().unwrap()).unwrap();
        std::os::unix::fs::symlink("/etc", base.join("link")).unwrap();
        let through = base.join("link/x");
        let error = make_folders(through.to_str().unwrap()).unwrap_err();
        assert!(matches!(error, MountError::Folder { path, .. } if path.ends_with("/link")));
    }
}
