//! Operations that change nothing, and the table of all.

use std::os::fd::AsFd;
use std::sync::Arc;

use dhow_protocol::files::{
    FileAnswer, FileKind, FileOp, FolderEntry, LinkTarget, MAX_IO, MAX_RESTORED, NodeId, RestoredNode, Space,
};
use rustix::fs::{self, OFlags};
use rustix::io::{Errno, Result};

use super::host_fs;
use super::share::{Share, attributes};
use super::{changes, ownership};

/// Most entries of one answer: with the longest names they fit a frame.
const MAX_ENTRIES: usize = 2048;

/// Does what is asked; `None` where there is no answer.
pub fn handle(share: &Share, op: FileOp) -> Option<Result<FileAnswer>> {
    Some(match op {
        FileOp::Forget(nodes) => {
            let mut table = share.nodes();
            nodes.into_iter().for_each(|(id, count)| table.forget(id, count));
            return None;
        }
        // Once, at the start of a stream; the server answers it.
        FileOp::Attach { .. } => Err(Errno::INVAL),
        FileOp::Restore(nodes) => restore(share, &nodes),
        FileOp::Lookup(parent, name) => {
            let _names = share.names_held();
            share.folder(parent).and_then(|folder| share.enter(parent, &folder, &name)).map(FileAnswer::Entry)
        }
        FileOp::GetAttributes(id) => get_attributes(share, id),
        FileOp::ReadFolder { node, cookie, limit } => read_folder(share, node, cookie, limit),
        FileOp::Read { node, offset, size } => read(share, node, offset, size),
        FileOp::ReadLink(id) => read_link(share, id),
        FileOp::Sync { node, data_only } => sync(share, node, data_only),
        FileOp::StatFs(id) => stat_fs(share, id),
        FileOp::SetAttributes(id, set) => changes::set_attributes(share, id, &set),
        FileOp::Write { node, offset, data } => changes::write(share, node, offset, &data),
        FileOp::CreateFile(folder, name, new) => changes::create_file(share, folder, &name, new),
        FileOp::CreateFifo(folder, name, new) => changes::create_fifo(share, folder, &name, new),
        FileOp::CreateFolder(folder, name, new) => changes::create_folder(share, folder, &name, new),
        FileOp::CreateSymlink(folder, name, to, _) => changes::create_symlink(share, folder, &name, &to),
        FileOp::Link { node, folder, name } => changes::link(share, node, folder, &name),
        FileOp::RemoveFile(folder, name) => changes::remove(share, folder, &name, fs::AtFlags::empty()),
        FileOp::RemoveFolder(folder, name) => changes::remove(share, folder, &name, fs::AtFlags::REMOVEDIR),
        FileOp::Rename { from, to, mode } => changes::rename(share, (from.0, &from.1), (to.0, &to.1), mode),
    })
}

/// What is not found in its place is left out; asking for it says ESTALE.
fn restore(share: &Share, nodes: &[RestoredNode]) -> Result<FileAnswer> {
    if nodes.len() > MAX_RESTORED {
        return Err(Errno::TOOBIG);
    }
    let _names = share.names_held();
    let lost = nodes.iter().filter(|node| share.restore(node).is_err()).count();
    if lost > 0 {
        tracing::info!(lost, of = nodes.len(), "files of an earlier file server are not where they were");
    }
    Ok(FileAnswer::Done)
}

fn get_attributes(share: &Share, id: NodeId) -> Result<FileAnswer> {
    let _names = share.names_held();
    let (spot, status) = share.find(id)?;
    Ok(FileAnswer::Attributes(attributes(id, &status, ownership::of(&spot, &status))))
}

fn read_folder(share: &Share, id: NodeId, cookie: u64, limit: u32) -> Result<FileAnswer> {
    let limit = usize::try_from(limit).unwrap_or(MAX_ENTRIES).clamp(1, MAX_ENTRIES);
    let _names = share.names_held();
    let folder = share.folder(id)?;
    let mut at = cookie;
    loop {
        let (listed, end) = share.opening(|| host_fs::list(folder.as_fd(), at, limit))?;
        at = listed.last().map_or(at, |last| last.cookie);
        let entries: Vec<_> = listed
            .into_iter()
            .filter_map(|listed| match share.enter(id, &folder, &listed.name) {
                Ok(attributes) => {
                    Some(Ok(FolderEntry { name: listed.name, cookie: listed.cookie, attributes }))
                }
                Err(Errno::STALE) => Some(Err(Errno::STALE)),
                // Masked, or removed since it was listed, or a mount point that does not answer: it
                // must not make the whole folder unreadable.
                Err(_) => None,
            })
            .collect::<Result<_>>()?;
        if end || !entries.is_empty() {
            return Ok(FileAnswer::Entries { entries, end });
        }
    }
}

fn read(share: &Share, id: NodeId, offset: u64, size: u32) -> Result<FileAnswer> {
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    if size > MAX_IO {
        return Err(Errno::INVAL);
    }
    let file = {
        let _names = share.names_held();
        let (fd, status) = share.open_node(id)?;
        host_fs::openable(status.kind)?;
        share.opening(|| host_fs::reopen(fd.as_fd(), OFlags::RDONLY))?
    };
    let mut data = vec![0; size];
    let mut have = 0;
    while have < size {
        match rustix::io::pread(&file, &mut data[have..], offset.saturating_add(have as u64)) {
            Ok(0) => break,
            Ok(got) => have += got,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    data.truncate(have);
    Ok(FileAnswer::Data(data))
}

fn read_link(share: &Share, id: NodeId) -> Result<FileAnswer> {
    let _names = share.names_held();
    let (fd, status) = share.open_node(id)?;
    if status.kind != FileKind::Symlink {
        return Err(Errno::INVAL);
    }
    // > If pathname is an empty string, then the call operates on the symbolic link referred to by
    // > dirfd (readlink(2))
    let target = fs::readlinkat(&fd, "", Vec::new())?;
    LinkTarget::new(target.into_bytes()).map(FileAnswer::Target).map_err(|_| Errno::NAMETOOLONG)
}

fn sync(share: &Share, id: NodeId, data_only: bool) -> Result<FileAnswer> {
    let file = {
        let _names = share.names_held();
        let (fd, status) = share.open_node(id)?;
        if status.kind != FileKind::Folder {
            host_fs::openable(status.kind)?;
        }
        share.opening(|| match status.kind {
            FileKind::Folder => host_fs::open_listing(fd.as_fd()),
            _ => match host_fs::reopen(fd.as_fd(), OFlags::RDONLY) {
                Err(Errno::ACCESS) => host_fs::reopen(fd.as_fd(), OFlags::WRONLY),
                other => other,
            },
        })?
    };
    if data_only {
        fs::fdatasync(&file)?
    } else {
        fs::fsync(&file)?
    }
    Ok(FileAnswer::Done)
}

fn stat_fs(share: &Share, id: NodeId) -> Result<FileAnswer> {
    let fd = {
        let _names = share.names_held();
        let (spot, _) = share.find(id)?;
        match spot {
            host_fs::Spot::Fd(fd) => fd,
            host_fs::Spot::Named(folder, _) => Arc::clone(&folder),
        }
    };
    let got = fs::fstatvfs(&fd)?;
    Ok(FileAnswer::Space(Space {
        block_size: u32::try_from(got.f_frsize).unwrap_or(4096),
        blocks: got.f_blocks,
        free: got.f_bfree,
        available: got.f_bavail,
        files: got.f_files,
        files_free: got.f_favail,
        name_max: 255,
    }))
}
