//! What a node id means: a folder and a name to find it by, and who must be found there.
//!
//! A node costs no fd. Folders' fds are cached, so many at the most as the budget says; a node that
//! lost its name while the guest still knows it keeps one fd of its own until it is forgotten. The
//! counts are the server's: forgetting more than was given out ends at nothing.
//!
//! Node ids derive from device and inode number, so that they (and with them what stat(2) tells in
//! the guest) are the same after a restart of the server. A file that got the inode number of one that
//! the guest still remembers has an id that derives from its birth time, too. Where neither can be, ids
//! are counted up from a random start: no two servers give the same one to two files. Asking a new server
//! for an id that was not restored is answered with ESTALE, upon which the guest kernel looks names up again.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use dhow_protocol::files::{Name, NodeId};
use rustix::io::{Errno, Result};

use super::host_fs::Identity;

/// Ids with this bit are for inodes whose own number cannot be used: counted up, or …
const COUNTED: u64 = 1 << 63;
/// … with this one as well, hashed.
const HASHED: u64 = 1 << 62;
/// Inode numbers below this are used as they are.
const INODE_LIMIT: u64 = 1 << 48;
/// Numbers of devices other than the root's, above the inode number in an id.
const DEVICE_GROUPS: u64 = (1 << 14) - 1;
/// Longest chain of folders; also ends a loop that racing renames can leave in the hints.
const MAX_DEPTH: usize = 4096;

#[derive(Debug)]
struct Node {
    parent: NodeId,
    name: Option<Name>,
    identity: Identity,
    references: u64,
    children: u64,
    pinned: Option<Arc<OwnedFd>>,
}

/// Where to look for a node.
#[derive(Debug, Clone)]
pub enum Place {
    /// It has an fd.
    Open(Arc<OwnedFd>),
    /// It should be there.
    Named {
        /// In this folder.
        parent: NodeId,
        /// Under this name.
        name: Name,
    },
}

/// The table of nodes.
#[derive(Debug)]
pub struct Nodes {
    by_id: HashMap<NodeId, Node>,
    by_inode: HashMap<(u64, u64), NodeId>,
    device: u64,
    next: u64,
    folders: HashMap<NodeId, (Arc<OwnedFd>, u64)>,
    folders_limit: usize,
    clock: u64,
    pinned: usize,
    pinned_limit: usize,
}

impl Nodes {
    /// A table with the root alone. `fd_budget` bounds the fds that it keeps; `random` is where
    /// counted ids start.
    pub fn new(root: Arc<OwnedFd>, identity: Identity, fd_budget: usize, random: u64) -> Self {
        let mut nodes = Self {
            by_id: HashMap::new(),
            by_inode: HashMap::new(),
            device: identity.device,
            next: random >> 2,
            folders: HashMap::new(),
            folders_limit: (fd_budget / 2).max(8),
            clock: 0,
            pinned: 0,
            pinned_limit: (fd_budget / 2).max(8),
        };
        nodes.by_inode.insert(identity.key(), NodeId::ROOT);
        let root = Node {
            parent: NodeId::ROOT,
            name: None,
            identity,
            references: 1,
            children: 0,
            pinned: Some(root),
        };
        nodes.by_id.insert(NodeId::ROOT, root);
        nodes
    }

    /// Drops everything but the root.
    pub fn clear(&mut self) {
        self.by_id.retain(|id, _| *id == NodeId::ROOT);
        self.by_inode.retain(|_, id| *id == NodeId::ROOT);
        if let Some(root) = self.by_id.get_mut(&NodeId::ROOT) {
            root.children = 0;
        }
        self.folders.clear();
        self.pinned = 0;
    }

    /// Notes that `identity` was seen under this name, and gives one reference to its node.
    pub fn enter(&mut self, parent: NodeId, name: &Name, identity: &Identity) -> NodeId {
        let id = match self.by_inode.get(&identity.key()).copied() {
            Some(id) if self.by_id.get(&id).is_some_and(|node| node.identity == *identity) => id,
            known => {
                // Another file under a reused inode number: the old node stays, out of reach.
                let is_free = |id: &NodeId| !self.by_id.contains_key(id);
                let natural = self.natural(identity).filter(|id| known.is_none() && is_free(id));
                let id = natural.or_else(|| hashed(identity).filter(is_free));
                let id = id.unwrap_or_else(|| self.counted());
                self.insert(id, parent, name, identity);
                id
            }
        };
        if id != NodeId::ROOT {
            self.moved(id, parent, name);
            if let Some(node) = self.by_id.get_mut(&id) {
                node.references = node.references.saturating_add(1);
            }
        }
        id
    }

    /// Gives a node of an earlier server its id again, and at least so many references. False when
    /// this file's id is another: then the guest's node is stale.
    pub fn restore(
        &mut self,
        parent: NodeId,
        name: &Name,
        identity: &Identity,
        (wanted, references): (NodeId, u64),
    ) -> bool {
        if references == 0 || wanted == NodeId::ROOT {
            return false;
        }
        match self.by_inode.get(&identity.key()).copied() {
            Some(known) if known == wanted => {
                if self.by_id.get(&known).is_none_or(|node| node.identity != *identity) {
                    return false;
                }
            }
            Some(_) => return false,
            None if [self.natural(identity), hashed(identity)].contains(&Some(wanted))
                && !self.by_id.contains_key(&wanted) =>
            {
                self.insert(wanted, parent, name, identity);
            }
            None => return false,
        }
        self.moved(wanted, parent, name);
        if let Some(node) = self.by_id.get_mut(&wanted) {
            node.references = node.references.max(references);
        }
        true
    }

    /// Notes a node's new folder and name.
    pub fn moved(&mut self, id: NodeId, parent: NodeId, name: &Name) {
        let elsewhere = self.by_id.get(&id).is_some_and(|node| node.parent != parent);
        // A bind mount can show a folder below itself: it stays where it can be found.
        if id == NodeId::ROOT || elsewhere && self.lies_in(parent, id) {
            return;
        }
        let Some(node) = self.by_id.get_mut(&id) else { return };
        if node.pinned.take().is_some() {
            self.pinned = self.pinned.saturating_sub(1);
        }
        if node.name.as_ref() != Some(name) {
            node.name = Some(name.clone());
        }
        let old = std::mem::replace(&mut node.parent, parent);
        if old != parent {
            self.add_child(parent);
            self.drop_child(old);
        }
    }

    /// The node that is known under this name, if it is wanted still.
    pub fn named(&self, parent: NodeId, name: &Name, identity: &Identity) -> Option<NodeId> {
        let id = *self.by_inode.get(&identity.key())?;
        let node = self.by_id.get(&id)?;
        let same = node.identity == *identity && node.parent == parent && node.name.as_ref() == Some(name);
        same.then_some(id)
    }

    /// The node of a file, if it is known.
    pub fn find(&self, identity: &Identity) -> Option<NodeId> {
        let id = *self.by_inode.get(&identity.key())?;
        self.by_id.get(&id).is_some_and(|node| node.identity == *identity).then_some(id)
    }

    /// What is known of the file with this inode number.
    pub fn known(&self, identity: &Identity) -> Option<Identity> {
        let id = self.by_inode.get(&identity.key())?;
        self.by_id.get(id).map(|node| node.identity)
    }

    /// Notes a file's new birth time (see [`super::host_fs::births_change`]).
    pub fn reborn(&mut self, identity: &Identity) {
        if let Some(id) = self.by_inode.get(&identity.key())
            && let Some(node) = self.by_id.get_mut(id)
            && node.identity.differs_in_birth(identity)
        {
            node.identity.birth = identity.birth;
        }
    }

    /// Whether one more node could keep an fd.
    pub fn can_pin(&self) -> bool {
        self.pinned < self.pinned_limit
    }

    /// Lets a node that lost its name live on by `fd`.
    pub fn pin(&mut self, id: NodeId, fd: Arc<OwnedFd>) {
        if let Some(node) = self.by_id.get_mut(&id)
            && node.pinned.replace(fd).is_none()
        {
            self.pinned += 1;
        }
    }

    /// Takes references back.
    pub fn forget(&mut self, id: NodeId, count: u64) {
        if id == NodeId::ROOT {
            return;
        }
        if let Some(node) = self.by_id.get_mut(&id) {
            node.references = node.references.saturating_sub(count);
            self.collect(id);
        }
    }

    /// Who a node must be.
    pub fn identity(&self, id: NodeId) -> Result<Identity> {
        self.by_id.get(&id).map(|node| node.identity).ok_or(Errno::STALE)
    }

    /// Where a node is.
    pub fn place(&self, id: NodeId) -> Result<Place> {
        let node = self.by_id.get(&id).ok_or(Errno::STALE)?;
        match (&node.pinned, &node.name) {
            (Some(fd), _) => Ok(Place::Open(Arc::clone(fd))),
            (None, Some(name)) => Ok(Place::Named { parent: node.parent, name: name.clone() }),
            (None, None) => Err(Errno::STALE),
        }
    }

    /// The way to a folder: the nearest folder above (or itself) with an fd, and what to open from
    /// there, in order.
    #[allow(clippy::type_complexity, reason = "a folder and the way to it, used once")]
    pub fn way(&mut self, folder: NodeId) -> Result<(Arc<OwnedFd>, Vec<(NodeId, Name, Identity)>)> {
        let mut steps = Vec::new();
        let mut at = folder;
        while steps.len() < MAX_DEPTH {
            if let Some(fd) = self.cached(at) {
                steps.reverse();
                return Ok((fd, steps));
            }
            let identity = self.identity(at)?;
            match self.place(at)? {
                Place::Open(fd) => {
                    steps.reverse();
                    return Ok((fd, steps));
                }
                Place::Named { parent, name } => {
                    steps.push((at, name, identity));
                    at = parent;
                }
            }
        }
        Err(Errno::LOOP)
    }

    /// Keeps a folder's fd, and drops those that were not used for longest when there are too many.
    pub fn cache(&mut self, id: NodeId, fd: Arc<OwnedFd>) {
        if !self.by_id.contains_key(&id) {
            return;
        }
        if self.folders.len() >= self.folders_limit {
            let mut ages: Vec<_> = self.folders.values().map(|(_, used)| *used).collect();
            ages.sort_unstable();
            let oldest = ages[ages.len() / 4];
            self.folders.retain(|_, (_, used)| *used > oldest);
        }
        self.clock += 1;
        self.folders.insert(id, (fd, self.clock));
    }

    /// Drops all cached fds.
    pub fn drop_cache(&mut self) {
        self.folders.clear();
    }

    /// Nodes and fds that the table holds.
    #[cfg(test)]
    pub fn held(&self) -> (usize, usize) {
        (self.by_id.len(), self.folders.len() + self.pinned)
    }

    fn cached(&mut self, id: NodeId) -> Option<Arc<OwnedFd>> {
        self.clock += 1;
        let (fd, used) = self.folders.get_mut(&id)?;
        *used = self.clock;
        Some(Arc::clone(fd))
    }

    /// The id that derives from device and inode number, where these leave room for it.
    fn natural(&self, identity: &Identity) -> Option<NodeId> {
        // Two other devices may meet in one group: then the second file of one number is counted.
        let group = match identity.device == self.device {
            true => 0,
            false => 1 + identity.device.wrapping_mul(0x9e37_79b9_7f4a_7c15) % DEVICE_GROUPS,
        };
        let natural = group << 48 | identity.inode;
        (natural > NodeId::ROOT.0 && identity.inode < INODE_LIMIT).then_some(NodeId(natural))
    }

    fn counted(&mut self) -> NodeId {
        self.next = self.next.wrapping_add(1);
        NodeId(COUNTED | self.next)
    }

    fn insert(&mut self, id: NodeId, parent: NodeId, name: &Name, identity: &Identity) {
        self.by_inode.insert(identity.key(), id);
        let node = Node {
            parent,
            name: Some(name.clone()),
            identity: *identity,
            references: 0,
            children: 0,
            pinned: None,
        };
        self.by_id.insert(id, node);
        self.add_child(parent);
    }

    /// Whether `inner` is `outer` or lies somewhere in it, as far as the hints go.
    fn lies_in(&self, inner: NodeId, outer: NodeId) -> bool {
        if self.by_id.get(&outer).is_none_or(|node| node.identity.format != libc::S_IFDIR) {
            return false;
        }
        let mut at = inner;
        for _ in 0..MAX_DEPTH {
            match self.by_id.get(&at) {
                _ if at == outer => return true,
                Some(node) if at != NodeId::ROOT => at = node.parent,
                _ => return false,
            }
        }
        true
    }

    fn add_child(&mut self, parent: NodeId) {
        if let Some(parent) = self.by_id.get_mut(&parent) {
            parent.children += 1;
        }
    }

    fn drop_child(&mut self, parent: NodeId) {
        if let Some(node) = self.by_id.get_mut(&parent) {
            node.children = node.children.saturating_sub(1);
            self.collect(parent);
        }
    }

    /// Drops a node that nobody refers to, then its folder likewise.
    fn collect(&mut self, mut id: NodeId) {
        while id != NodeId::ROOT {
            let Some(node) = self.by_id.get(&id) else { return };
            if node.references > 0 || node.children > 0 {
                return;
            }
            let Some(node) = self.by_id.remove(&id) else { return };
            let key = node.identity.key();
            if self.by_inode.get(&key) == Some(&id) {
                self.by_inode.remove(&key);
            }
            self.folders.remove(&id);
            self.pinned -= usize::from(node.pinned.is_some()).min(self.pinned);
            id = node.parent;
            if let Some(parent) = self.by_id.get_mut(&id) {
                parent.children = parent.children.saturating_sub(1);
            }
        }
    }
}

/// The id of a file whose inode number is another's id: of the birth time, where the file system knows it.
fn hashed(identity: &Identity) -> Option<NodeId> {
    let (seconds, nanos) = identity.birth?;
    let parts = [identity.device, identity.inode, seconds.cast_unsigned(), u64::from(nanos)];
    // FNV-1a over the parts, and a finish that spreads it (the one of MurmurHash3).
    let mut hash = parts
        .iter()
        .flat_map(|part| part.to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    hash = (hash ^ hash >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ hash >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    Some(NodeId(COUNTED | HASHED | (hash ^ hash >> 33) >> 2))
}
