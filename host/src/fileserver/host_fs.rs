//! The system calls of the file server: everything is relative to an fd and one name.
//!
//! Nothing here follows a symlink, and only regular files and folders are ever opened for more than
//! `O_PATH`: opening a device or a fifo can block or act.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use dhow_protocol::files::{FileKind, Name, Time};
use rustix::fs::{self, AtFlags, Mode, OFlags, RawDir, ResolveFlags, SeekFrom, StatxFlags};
use rustix::io::{Errno, Result};

/// Beneath the folder it starts from, through no symlink of either kind.
const BENEATH: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS).union(ResolveFlags::NO_SYMLINKS);

/// How often, and how long apart, the holder of a lease is given time to return it.
const LEASE_TRIES: u32 = 50;
const LEASE_PAUSE: Duration = Duration::from_millis(10);

/// What makes a file the same file: a reused inode number has another birth time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Device.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Birth time, where the file system knows it.
    pub birth: Option<(i64, u32)>,
    /// Type bits of the mode.
    pub format: u32,
}

impl Identity {
    /// Device and inode number.
    pub fn key(&self) -> (u64, u64) {
        (self.device, self.inode)
    }

    /// Whether nothing but the birth time differs.
    pub fn differs_in_birth(&self, other: &Self) -> bool {
        self.birth != other.birth && Self { birth: other.birth, ..*self } == *other
    }
}

/// stat(2), and who it is.
#[derive(Debug, Clone, Copy)]
pub struct Status {
    /// Who.
    pub identity: Identity,
    /// Type.
    pub kind: FileKind,
    /// Lower twelve bits.
    pub mode: u32,
    /// Owner on the host.
    pub uid: u32,
    /// Group on the host.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Blocks of 512 bytes.
    pub blocks: u64,
    /// Hard links.
    pub links: u32,
    /// Preferred size.
    pub block_size: u32,
    /// Last access.
    pub atime: Time,
    /// Last change of data.
    pub mtime: Time,
    /// Last change.
    pub ctime: Time,
}

/// Where a node can be touched.
#[derive(Debug, Clone)]
pub enum Spot {
    /// By an fd of it, `O_PATH` at least.
    Fd(Arc<OwnedFd>),
    /// By its name in a folder.
    Named(Arc<OwnedFd>, Name),
}

impl Spot {
    /// A path for the calls that know no fd (xattrs, chmod of `O_PATH`): through our own fd table.
    /// For [`Spot::Fd`] it must be followed, for [`Spot::Named`] it must not.
    pub fn proc_path(&self) -> Vec<u8> {
        match self {
            Self::Fd(fd) => format!("/proc/self/fd/{}", fd.as_raw_fd()).into_bytes(),
            Self::Named(folder, name) => {
                let mut path = format!("/proc/self/fd/{}/", folder.as_raw_fd()).into_bytes();
                path.extend_from_slice(name.as_bytes());
                path
            }
        }
    }
}

/// Opens what a guest was granted; the one place where a path comes from outside the guest's reach.
pub fn open_root(path: &std::path::Path) -> Result<OwnedFd> {
    fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Opens a name `O_PATH`, whatever it is.
pub fn open_path(folder: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd> {
    fs::openat2(folder, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), BENEATH)
}

/// Opens a folder for reading its names.
pub fn open_listing(folder: BorrowedFd<'_>) -> Result<OwnedFd> {
    fs::openat2(folder, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), BENEATH)
}

/// Opens anew what `file` (`O_PATH`, known to be a regular file or a folder) is.
pub fn reopen(file: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    // O_NONBLOCK: a lease of a host program must not stop a thread of ours for its 45 seconds.
    let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    for _ in 0..LEASE_TRIES {
        match fs::open(&path, flags, Mode::empty()) {
            Err(Errno::WOULDBLOCK) => std::thread::sleep(LEASE_PAUSE),
            other => return other,
        }
    }
    fs::open(&path, flags, Mode::empty())
}

/// Whether a file may get another birth time while it lives: on overlayfs, when the first write
/// copies it up.
pub fn births_change(fd: BorrowedFd<'_>) -> bool {
    fs::fstatfs(fd).is_ok_and(|got| got.f_type == libc::OVERLAYFS_SUPER_MAGIC)
}

/// stat of an fd itself.
pub fn status_of(fd: BorrowedFd<'_>) -> Result<Status> {
    statx(fd, b"", AtFlags::EMPTY_PATH)
}

/// stat of a name, never of what a symlink leads to.
pub fn status_at(folder: BorrowedFd<'_>, name: &[u8]) -> Result<Status> {
    statx(folder, name, AtFlags::empty())
}

/// stat of a spot.
pub fn status(spot: &Spot) -> Result<Status> {
    match spot {
        Spot::Fd(fd) => status_of(fd.as_fd()),
        Spot::Named(folder, name) => status_at(folder.as_fd(), name.as_bytes()),
    }
}

fn statx(fd: BorrowedFd<'_>, path: &[u8], flags: AtFlags) -> Result<Status> {
    let flags = flags | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let got = fs::statx(fd, path, flags, mask)?;
    let time = |time: fs::StatxTimestamp| Time { seconds: time.tv_sec, nanos: time.tv_nsec };
    let mode = u32::from(got.stx_mode);
    let birth = (got.stx_mask & StatxFlags::BTIME.bits() != 0)
        .then_some((got.stx_btime.tv_sec, got.stx_btime.tv_nsec));
    Ok(Status {
        identity: Identity {
            device: u64::from(got.stx_dev_major) << 32 | u64::from(got.stx_dev_minor),
            inode: got.stx_ino,
            birth,
            format: mode & libc::S_IFMT,
        },
        kind: match mode & libc::S_IFMT {
            libc::S_IFDIR => FileKind::Folder,
            libc::S_IFLNK => FileKind::Symlink,
            libc::S_IFIFO => FileKind::Fifo,
            libc::S_IFSOCK => FileKind::Socket,
            libc::S_IFCHR => FileKind::CharDevice,
            libc::S_IFBLK => FileKind::BlockDevice,
            _ => FileKind::Regular,
        },
        mode: mode & 0o7777,
        uid: got.stx_uid,
        gid: got.stx_gid,
        size: got.stx_size,
        blocks: got.stx_blocks,
        links: got.stx_nlink,
        block_size: got.stx_blksize,
        atime: time(got.stx_atime),
        mtime: time(got.stx_mtime),
        ctime: time(got.stx_ctime),
    })
}

/// A name of a folder and the position behind it.
#[derive(Debug)]
pub struct Listed {
    /// The name; never `.` or `..`.
    pub name: Name,
    /// Where the next one is.
    pub cookie: u64,
}

/// At most `limit` names from `cookie` on, and whether nothing follows.
pub fn list(folder: BorrowedFd<'_>, cookie: u64, limit: usize) -> Result<(Vec<Listed>, bool)> {
    let fd = open_listing(folder)?;
    if cookie != 0 {
        fs::seek(&fd, SeekFrom::Start(cookie))?;
    }
    // getdents64 gives what fits: about as much as is wanted, and never less than one long name.
    let mut buffer = vec![MaybeUninit::uninit(); (limit * 48).clamp(1 << 10, 64 << 10)];
    let mut names = RawDir::new(&fd, &mut buffer);
    let mut listed = Vec::new();
    while listed.len() < limit {
        let Some(entry) = names.next() else { return Ok((listed, true)) };
        let entry = entry?;
        if let Ok(name) = Name::new(entry.file_name().to_bytes()) {
            listed.push(Listed { name, cookie: entry.next_entry_cookie() });
        }
    }
    Ok((listed, false))
}

/// Fails for what must not be opened.
pub fn openable(kind: FileKind) -> Result<()> {
    match kind {
        FileKind::Regular => Ok(()),
        FileKind::Folder => Err(Errno::ISDIR),
        FileKind::Symlink => Err(Errno::LOOP),
        FileKind::Fifo | FileKind::Socket | FileKind::CharDevice | FileKind::BlockDevice => Err(Errno::NXIO),
    }
}
