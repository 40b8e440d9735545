//! Operations that change the share.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use dhow_protocol::files::{
    Creation, FileAnswer, FileKind, LinkTarget, MAX_IO, Name, NodeId, RenameMode, SetAttributes, SetTime,
};
use rustix::fs::{self, AtFlags, Mode, OFlags, RenameFlags, Timespec, Timestamps};
use rustix::io::{Errno, Result};

use super::host_fs::{self, Identity, Spot, Status};
use super::ownership::{self, Owner, SET_GID, SET_ID};
use super::share::{Share, attributes};

/// Writes all of `data` or tells why not.
pub fn write(share: &Share, id: NodeId, offset: u64, data: &[u8]) -> Result<FileAnswer> {
    share.writable()?;
    if data.len() > MAX_IO {
        return Err(Errno::INVAL);
    }
    let file = {
        let _names = share.names_held();
        open_for_writing(share, id)?.0
    };
    let mut written = 0;
    while written < data.len() {
        match rustix::io::pwrite(&file, &data[written..], offset.saturating_add(written as u64)) {
            Ok(0) => return Err(Errno::IO),
            Ok(some) => written += some,
            Err(Errno::INTR) => {}
            // What was written counts; the error comes with the rest.
            Err(_) if written > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(FileAnswer::Written(u32::try_from(written).unwrap_or(u32::MAX)))
}

/// Sets size, owner and mode, times, in this order.
pub fn set_attributes(share: &Share, id: NodeId, set: &SetAttributes) -> Result<FileAnswer> {
    share.writable()?;
    let (uid, gid) = (given(set.uid)?, given(set.gid)?);
    let _names = share.names_held();
    let (fd, mut status) = share.open_node(id)?;
    if matches!(status.kind, FileKind::CharDevice | FileKind::BlockDevice) {
        // The host's devices are not the guest's to open up.
        return Err(Errno::PERM);
    }
    let spot = Spot::Fd(Arc::clone(&fd));
    if let Some(size) = set.size {
        let (file, _) = open_for_writing(share, id)?;
        fs::ftruncate(&file, size)?;
        status = host_fs::status_of(fd.as_fd())?;
    }
    if set.mode.is_some() || uid.is_some() || gid.is_some() {
        if set.mode.is_some() && status.kind == FileKind::Symlink {
            return Err(Errno::OPNOTSUPP);
        }
        let now = ownership::of(&spot, &status);
        let mode = match set.mode {
            Some(mode) => mode & 0o7777,
            // > When the owner or group of an executable file is changed by an unprivileged user,
            // > the S_ISUID and S_ISGID mode bits are cleared (chown(2)); Linux does it for root, too
            None if status.kind == FileKind::Regular => ownership::without_privilege(now.mode),
            None => now.mode,
        };
        let wanted = Owner { uid: uid.unwrap_or(now.uid), gid: gid.unwrap_or(now.gid), mode };
        ownership::set(&spot, &status, wanted)?;
    }
    if set.atime.is_some() || set.mtime.is_some() {
        let times = Timestamps { last_access: timespec(set.atime)?, last_modification: timespec(set.mtime)? };
        match status.kind {
            FileKind::Symlink => fs::utimensat(&fd, "", &times, AtFlags::EMPTY_PATH)?,
            _ => fs::utimensat(fs::CWD, spot.proc_path(), &times, AtFlags::empty())?,
        }
    }
    let status = host_fs::status_of(fd.as_fd())?;
    Ok(FileAnswer::Attributes(attributes(id, &status, ownership::of(&spot, &status))))
}

/// A new regular file.
pub fn create_file(share: &Share, parent: NodeId, name: &Name, new: Creation) -> Result<FileAnswer> {
    create(share, parent, name, Some((FileKind::Regular, new)), |folder, name, mode| {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        fs::openat(folder, name, flags, mode).map(drop)
    })
}

/// A new fifo.
pub fn create_fifo(share: &Share, parent: NodeId, name: &Name, new: Creation) -> Result<FileAnswer> {
    create(share, parent, name, Some((FileKind::Fifo, new)), |folder, name, mode| {
        fs::mkfifoat(folder, name, mode)
    })
}

/// A new folder.
pub fn create_folder(share: &Share, parent: NodeId, name: &Name, new: Creation) -> Result<FileAnswer> {
    create(share, parent, name, Some((FileKind::Folder, new)), |folder, name, mode| {
        fs::mkdirat(folder, name, mode)
    })
}

/// A new symlink. Its target is text: nothing on the host side ever follows it.
pub fn create_symlink(share: &Share, parent: NodeId, name: &Name, to: &LinkTarget) -> Result<FileAnswer> {
    create(share, parent, name, None, |folder, name, _| fs::symlinkat(to.as_bytes(), folder, name))
}

fn create(
    share: &Share,
    parent: NodeId,
    name: &Name,
    new: Option<(FileKind, Creation)>,
    make: impl Fn(BorrowedFd<'_>, &[u8], Mode) -> Result<()>,
) -> Result<FileAnswer> {
    share.writable()?;
    if let Some((_, new)) = new {
        given(Some(new.uid)).and(given(Some(new.gid)))?;
    }
    let _names = share.names_held();
    let folder = share.folder(parent)?;
    not_masked(share, parent, name, None)?;
    let mode = new.map_or(0, |(kind, new)| ownership::mode_on_host(kind, new.mode & 0o7777));
    share.opening(|| make(folder.as_fd(), name.as_bytes(), Mode::from_raw_mode(mode)))?;
    if let Some((kind, new)) = new {
        let above = host_fs::status_of(folder.as_fd())?;
        let above = ownership::of(&Spot::Fd(Arc::clone(&folder)), &above);
        let mut wanted = Owner { uid: new.uid, gid: new.gid, mode: new.mode & 0o7777 };
        if above.mode & SET_GID != 0 {
            wanted.gid = above.gid;
            wanted.mode |= if kind == FileKind::Folder { SET_GID } else { 0 };
        }
        if let Err(error) = own(share, &folder, name, kind, wanted) {
            // What the guest is told has failed must not be there.
            let flags = if kind == FileKind::Folder { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            let _ = fs::unlinkat(&folder, name.as_bytes(), flags);
            return Err(error);
        }
    }
    share.enter(parent, &folder, name).map(FileAnswer::Entry)
}

/// Gives a new file its owner. Where the file system cannot keep one, it stays the server's.
fn own(share: &Share, folder: &Arc<OwnedFd>, name: &Name, kind: FileKind, wanted: Owner) -> Result<()> {
    let status = host_fs::status_at(folder.as_fd(), name.as_bytes())?;
    if wanted == (Owner { uid: status.uid, gid: status.gid, mode: status.mode }) {
        return Ok(());
    }
    let fd = Arc::new(share.open_path(folder.as_fd(), name)?);
    let status = host_fs::status_of(fd.as_fd())?;
    if status.kind != kind {
        // A host program was quicker: what it put there is its own.
        return Ok(());
    }
    match ownership::set(&Spot::Fd(fd), &status, wanted) {
        Err(Errno::PERM | Errno::OPNOTSUPP) => Ok(()),
        other => other,
    }
}

/// One more name for a file.
pub fn link(share: &Share, id: NodeId, parent: NodeId, name: &Name) -> Result<FileAnswer> {
    share.writable()?;
    let _names = share.names_changing();
    let (fd, status) = share.open_node(id)?;
    if status.kind == FileKind::Folder {
        return Err(Errno::PERM);
    }
    let folder = share.folder(parent)?;
    not_masked(share, parent, name, None)?;
    // Through the fd, so that it is this file; the path is our own, and its last part a magic link.
    let file = Spot::Fd(fd);
    fs::linkat(fs::CWD, file.proc_path(), &folder, name.as_bytes(), AtFlags::SYMLINK_FOLLOW)?;
    share.enter(parent, &folder, name).map(FileAnswer::Entry)
}

/// Removes a name; with `REMOVEDIR`, an empty folder's.
pub fn remove(share: &Share, parent: NodeId, name: &Name, flags: AtFlags) -> Result<FileAnswer> {
    share.writable()?;
    let _names = share.names_changing();
    let folder = share.folder(parent)?;
    let status = host_fs::status_at(folder.as_fd(), name.as_bytes())?;
    not_masked(share, parent, name, Some(&status.identity)).map_err(|_| Errno::NOENT)?;
    not_kept(share, &status)?;
    let saved = save(share, parent, &folder, name, &status)?;
    fs::unlinkat(&folder, name.as_bytes(), flags)?;
    if let Some((id, fd)) = saved {
        share.nodes().pin(id, fd);
    }
    Ok(FileAnswer::Done)
}

/// Renames, with what `mode` says of a taken name.
pub fn rename(
    share: &Share,
    (old_parent, old_name): (NodeId, &Name),
    (new_parent, new_name): (NodeId, &Name),
    mode: RenameMode,
) -> Result<FileAnswer> {
    share.writable()?;
    let _names = share.names_changing();
    let old_folder = share.folder(old_parent)?;
    let new_folder = share.folder(new_parent)?;
    let old = host_fs::status_at(old_folder.as_fd(), old_name.as_bytes())?;
    not_masked(share, old_parent, old_name, Some(&old.identity)).map_err(|_| Errno::NOENT)?;
    not_kept(share, &old)?;
    let taken = match host_fs::status_at(new_folder.as_fd(), new_name.as_bytes()) {
        Ok(status) => Some(status),
        Err(Errno::NOENT) => None,
        Err(error) => return Err(error),
    };
    not_masked(share, new_parent, new_name, taken.as_ref().map(|taken| &taken.identity))?;
    taken.as_ref().map_or(Ok(()), |taken| not_kept(share, taken))?;
    let (flags, replaced) = match (mode, &taken) {
        (RenameMode::NoReplace, _) => (RenameFlags::NOREPLACE, None),
        (RenameMode::Exchange, _) => (RenameFlags::EXCHANGE, None),
        (RenameMode::Replace, Some(taken)) if taken.identity != old.identity => {
            (RenameFlags::empty(), save(share, new_parent, &new_folder, new_name, taken)?)
        }
        (RenameMode::Replace, _) => (RenameFlags::empty(), None),
    };
    fs::renameat_with(&old_folder, old_name.as_bytes(), &new_folder, new_name.as_bytes(), flags)?;
    if taken.as_ref().is_some_and(|taken| taken.identity == old.identity) {
        // > If oldpath and newpath are existing hard links referring to the same file, then
        // > rename() does nothing (rename(2))
        return Ok(FileAnswer::Done);
    }
    let mut nodes = share.nodes();
    if let Some((id, fd)) = replaced {
        nodes.pin(id, fd);
    }
    if mode == RenameMode::Exchange
        && let Some(id) = taken.and_then(|taken| nodes.named(new_parent, new_name, &taken.identity))
    {
        nodes.moved(id, old_parent, old_name);
    }
    if let Some(id) = nodes.find(&old.identity) {
        nodes.moved(id, new_parent, new_name);
    }
    Ok(FileAnswer::Done)
}

/// What lets a node live on when its name goes: ENFILE when too many of them do already.
fn save(
    share: &Share,
    parent: NodeId,
    folder: &Arc<OwnedFd>,
    name: &Name,
    status: &Status,
) -> Result<Option<(NodeId, Arc<OwnedFd>)>> {
    let Some(id) = share.nodes().named(parent, name, &status.identity) else { return Ok(None) };
    if !share.nodes().can_pin() {
        // A removed folder holds nothing that could be lost with it.
        return if status.kind == FileKind::Folder { Ok(None) } else { Err(Errno::NFILE) };
    }
    let fd = Arc::new(share.open_path(folder.as_fd(), name)?);
    let same = host_fs::status_of(fd.as_fd())?.identity == status.identity;
    Ok(same.then_some((id, fd)))
}

fn open_for_writing(share: &Share, id: NodeId) -> Result<(OwnedFd, Status)> {
    let (fd, status) = share.open_node(id)?;
    host_fs::openable(status.kind)?;
    let file = share.opening(|| host_fs::reopen(fd.as_fd(), OFlags::WRONLY))?;
    if status.mode & SET_ID != 0 {
        // Root's writes keep these bits on the host; nobody may put code under them.
        fs::fchmod(&file, Mode::from_raw_mode(status.mode & !SET_ID))?;
    }
    Ok((file, status))
}

fn not_masked(share: &Share, parent: NodeId, name: &Name, found: Option<&Identity>) -> Result<()> {
    let above = share.nodes().identity(parent)?;
    if share.masks.hide(&above, name, found) { Err(Errno::PERM) } else { Ok(()) }
}

fn not_kept(share: &Share, status: &Status) -> Result<()> {
    if share.masks.keep(&status.identity) { Err(Errno::PERM) } else { Ok(()) }
}

/// > (uid_t) -1 … not changed (chown(2)): on the wire that is `None`, so no owner can be it.
fn given(id: Option<u32>) -> Result<Option<u32>> {
    if id == Some(u32::MAX) { Err(Errno::INVAL) } else { Ok(id) }
}

fn timespec(time: Option<SetTime>) -> Result<Timespec> {
    Ok(match time {
        None => Timespec { tv_sec: 0, tv_nsec: fs::UTIME_OMIT },
        Some(SetTime::Now) => Timespec { tv_sec: 0, tv_nsec: fs::UTIME_NOW },
        Some(SetTime::At(time)) if time.nanos < 1_000_000_000 => {
            Timespec { tv_sec: time.seconds, tv_nsec: time.nanos.into() }
        }
        Some(SetTime::At(_)) => return Err(Errno::INVAL),
    })
}
