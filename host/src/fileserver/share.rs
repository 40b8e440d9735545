//! A share: from node ids to places on the host, each checked before it is used.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use dhow_protocol::files::{Attributes, Name, NodeId, RestoredNode};
use rustix::io::{Errno, Result};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::host_fs::{self, Identity, Spot, Status};
use super::masks::Masks;
use super::nodes::{Nodes, Place};
use super::ownership;

/// Fds that are not the node table's: streams, files that are being read, the process's own.
const FDS_KEPT_FREE: u64 = 64;
/// More open files than this are not asked for.
const FDS_WANTED: u64 = 1 << 16;

/// The granted folder and what the guest knows of it.
pub struct Share {
    root: Arc<OwnedFd>,
    nodes: Mutex<Nodes>,
    /// Held for reading while a node is being found, for writing while a name changes: a file that
    /// one process of the guest renames is not lost to another.
    names: RwLock<()>,
    /// Dhow's own folders.
    pub masks: Masks,
    read_only: bool,
}

impl Share {
    /// Opens the folder and resolves the masks.
    ///
    /// EPERM for a folder that is or lies in one of Dhow's own.
    pub fn open(path: &Path, read_only: bool, masked: &[PathBuf]) -> Result<Self> {
        let root = Arc::new(host_fs::open_root(path)?);
        let identity = host_fs::status_of(root.as_fd())?.identity;
        let random = getrandom::u64().map_err(|_| Errno::IO)?;
        let nodes = Nodes::new(Arc::clone(&root), identity, fd_budget(), random);
        if Masks::cover(path, masked) {
            return Err(Errno::PERM);
        }
        let masks = Masks::new(path, masked);
        Ok(Self { root, nodes: Mutex::new(nodes), names: RwLock::new(()), masks, read_only })
    }

    /// The folder itself.
    pub fn root_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// The node table.
    pub fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// While it is held, no name changes by the guest's doing.
    pub fn names_held(&self) -> RwLockReadGuard<'_, ()> {
        self.names.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// While it is held, nobody looks for a node.
    pub fn names_changing(&self) -> RwLockWriteGuard<'_, ()> {
        self.names.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// EROFS where changes are refused.
    pub fn writable(&self) -> Result<()> {
        if self.read_only { Err(Errno::ROFS) } else { Ok(()) }
    }

    /// A folder's fd (`O_PATH`).
    pub fn folder(&self, id: NodeId) -> Result<Arc<OwnedFd>> {
        if self.nodes().identity(id)?.format != libc::S_IFDIR {
            return Err(Errno::NOTDIR);
        }
        let (mut fd, steps) = self.nodes().way(id)?;
        for (step, name, identity) in steps {
            let (opened, _) = self.open_checked(fd.as_fd(), &name, &identity)?;
            fd = Arc::new(opened);
            self.nodes().cache(step, Arc::clone(&fd));
        }
        Ok(fd)
    }

    /// Where a node is, without opening it, and its status.
    pub fn find(&self, id: NodeId) -> Result<(Spot, Status)> {
        let identity = self.nodes().identity(id)?;
        let spot = if identity.format == libc::S_IFDIR {
            Spot::Fd(self.folder(id)?)
        } else {
            let place = self.nodes().place(id)?;
            match place {
                Place::Open(fd) => Spot::Fd(fd),
                Place::Named { parent, name } => Spot::Named(self.folder(parent)?, name),
            }
        };
        let status = host_fs::status(&spot).map_err(stale)?;
        let (Spot::Fd(near) | Spot::Named(near, _)) = &spot;
        self.check(&status, &identity, near.as_fd())?;
        Ok((spot, status))
    }

    /// An fd of a node (`O_PATH`), and its status.
    pub fn open_node(&self, id: NodeId) -> Result<(Arc<OwnedFd>, Status)> {
        let identity = self.nodes().identity(id)?;
        if identity.format == libc::S_IFDIR {
            let fd = self.folder(id)?;
            let status = host_fs::status_of(fd.as_fd())?;
            return Ok((fd, status));
        }
        let place = self.nodes().place(id)?;
        match place {
            Place::Open(fd) => {
                let status = host_fs::status_of(fd.as_fd())?;
                Ok((fd, status))
            }
            Place::Named { parent, name } => {
                let folder = self.folder(parent)?;
                let (fd, status) = self.open_checked(folder.as_fd(), &name, &identity)?;
                Ok((Arc::new(fd), status))
            }
        }
    }

    /// Opens something; once more, without the cached folders, when fds have run out.
    pub fn opening<T>(&self, open: impl Fn() -> Result<T>) -> Result<T> {
        match open() {
            Err(Errno::MFILE | Errno::NFILE) => {
                self.nodes().drop_cache();
                open()
            }
            other => other,
        }
    }

    /// Opens a name `O_PATH`.
    pub fn open_path(&self, folder: BorrowedFd<'_>, name: &Name) -> Result<OwnedFd> {
        self.opening(|| host_fs::open_path(folder, name.as_bytes()))
    }

    /// Looks a name up in an open folder; the guest gets one reference.
    pub fn enter(&self, parent: NodeId, folder: &Arc<OwnedFd>, name: &Name) -> Result<Attributes> {
        let status = self.look(parent, folder.as_fd(), name)?;
        let spot = Spot::Named(Arc::clone(folder), name.clone());
        let owner = ownership::of(&spot, &status);
        let id = self.nodes().enter(parent, name, &status.identity);
        Ok(attributes(id, &status, owner))
    }

    /// Gives a node of an earlier server its place again; ESTALE when it is not there.
    pub fn restore(&self, restored: &RestoredNode) -> Result<()> {
        let RestoredNode { folder: parent, name, node, references } = restored;
        let folder = self.folder(*parent)?;
        let status = self.look(*parent, folder.as_fd(), name)?;
        match self.nodes().restore(*parent, name, &status.identity, (*node, *references)) {
            true => Ok(()),
            false => Err(Errno::STALE),
        }
    }

    /// The status of a name, ENOENT when it is masked.
    fn look(&self, parent: NodeId, folder: BorrowedFd<'_>, name: &Name) -> Result<Status> {
        let above = self.nodes().identity(parent)?;
        if self.masks.hide(&above, name, None) {
            return Err(Errno::NOENT);
        }
        let status = host_fs::status_at(folder, name.as_bytes())?;
        if self.masks.hide(&above, name, Some(&status.identity)) {
            return Err(Errno::NOENT);
        }
        let known = self.nodes().known(&status.identity);
        if known.is_some_and(|known| known.differs_in_birth(&status.identity))
            && host_fs::births_change(folder)
        {
            self.nodes().reborn(&status.identity);
        }
        Ok(status)
    }

    /// ESTALE when it is not who it must be; `near` is on the same file system.
    fn check(&self, status: &Status, identity: &Identity, near: BorrowedFd<'_>) -> Result<()> {
        if status.identity == *identity {
            return Ok(());
        }
        if status.identity.differs_in_birth(identity) && host_fs::births_change(near) {
            self.nodes().reborn(&status.identity);
            return Ok(());
        }
        Err(Errno::STALE)
    }

    fn open_checked(
        &self,
        folder: BorrowedFd<'_>,
        name: &Name,
        identity: &Identity,
    ) -> Result<(OwnedFd, Status)> {
        let fd = self.open_path(folder, name).map_err(stale)?;
        let status = host_fs::status_of(fd.as_fd())?;
        self.check(&status, identity, fd.as_fd())?;
        Ok((fd, status))
    }
}

/// What the guest is told of a node.
pub fn attributes(id: NodeId, status: &Status, owner: ownership::Owner) -> Attributes {
    Attributes {
        node: id,
        kind: status.kind,
        mode: owner.mode,
        size: status.size,
        blocks: status.blocks,
        atime: status.atime,
        mtime: status.mtime,
        ctime: status.ctime,
        links: status.links,
        uid: owner.uid,
        gid: owner.gid,
        block_size: status.block_size,
    }
}

/// A known node that is not where it was: somebody on the host moved or removed it. ESTALE makes the
/// guest kernel look its name up again.
fn stale(error: Errno) -> Errno {
    match error {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV => Errno::STALE,
        other => other,
    }
}

/// Raises the soft limit of open files, and tells how many of them the node table may keep.
fn fd_budget() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(FDS_WANTED).min(FDS_WANTED);
    let now = limit.current.unwrap_or(FDS_WANTED);
    let raised = Rlimit { current: Some(most), maximum: limit.maximum };
    let got = match most > now && setrlimit(Resource::Nofile, raised).is_ok() {
        true => most,
        false => now.min(FDS_WANTED),
    };
    usize::try_from(got.saturating_sub(FDS_KEPT_FREE).max(16)).unwrap_or(16)
}
