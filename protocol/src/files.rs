//! File operations of one share: the guest asks, the host answers.
//!
//! ```text
//! guest ──► Attach { mount }                 first frame of every stream of a mount
//! guest ◄── Attached { resumed }
//! guest ──► FileRequest { unique, op }       any number at once, each frame ≤ FILE_LIMIT
//! guest ◄── FileReply   { unique, result }   in any order; `Forget` alone has none
//! ```
//! Nothing is named by a path. A folder or file is a [`NodeId`] that an earlier answer gave out, and
//! a [`Name`] is exactly one component, checked where it is decoded. Bytes, not UTF-8.
//!
//! **Exactly once.** `unique` is the guest kernel's number of the request. A stream may break: the
//! next one attaches with the same `mount`, and the guest sends again whatever is unanswered. The
//! server answers what it has already applied from memory, so nothing is applied twice as long as
//! it lives. `resumed` is false when it knows nothing of the mount (it is new, or was restarted).
//!
//! **Reference counts.** Each [`Attributes`] in an [`FileAnswer::Entry`] or in
//! [`FileAnswer::Entries`] is one reference to its node; [`FileOp::Forget`] gives them back. The
//! server owns the counts: a guest that forgets too much harms its own node ids only.
//!
//! To add an operation: append it to [`FileOp`] (the position is its number on the wire), its answer
//! to [`FileAnswer`], give it a golden test below, and announce it by a feature bit of the hello.

mod borrowed;
mod name;

use bincode::{Decode, Encode};

pub use borrowed::{DataReply, WriteRequest};
pub use name::{LinkTarget, Name, NameError};

/// Most bytes of one read or write.
pub const MAX_IO: usize = 1 << 20;
/// Most nodes of one [`FileOp::Restore`]: with the longest names they fit a frame.
pub const MAX_RESTORED: usize = 2048;

/// A folder or file that an answer gave out. Means something to the server alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The shared folder itself (uapi/linux/fuse.h, `FUSE_ROOT_ID`).
    pub const ROOT: Self = Self(1);
}

/// An error as Linux numbers it on x86-64 and arm64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
pub struct Errno(pub i32);

/// A point in time; before 1970 the seconds are negative and the nanoseconds count forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Time {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Nanoseconds, below 1,000,000,000.
    pub nanos: u32,
}

/// A time to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum SetTime {
    /// The host's clock, at the moment of setting.
    Now,
    /// This one.
    At(Time),
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A folder.
    Folder,
    /// A symlink.
    Symlink,
    /// A fifo. Seen, never opened.
    Fifo,
    /// A unix socket. Seen, never opened.
    Socket,
    /// A character device. Seen, never opened.
    CharDevice,
    /// A block device. Seen, never opened.
    BlockDevice,
}

/// What stat(2) tells, as the guest is to see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Attributes {
    /// The node; also its inode number.
    pub node: NodeId,
    /// What it is.
    pub kind: FileKind,
    /// The lower twelve bits of the mode.
    pub mode: u32,
    /// Size in bytes.
    pub size: u64,
    /// Blocks of 512 bytes.
    pub blocks: u64,
    /// Last access.
    pub atime: Time,
    /// Last change of the data.
    pub mtime: Time,
    /// Last change of data or attributes.
    pub ctime: Time,
    /// Hard links.
    pub links: u32,
    /// Owner, as the guest sees it.
    pub uid: u32,
    /// Group, as the guest sees it.
    pub gid: u32,
    /// Preferred size of a read or write.
    pub block_size: u32,
}

/// Attributes to set; what is absent stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
pub struct SetAttributes {
    /// The lower twelve bits of the mode.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<SetTime>,
    /// Last change of the data.
    pub mtime: Option<SetTime>,
}

/// Who creates a node, and with which mode (the umask is already applied).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Creation {
    /// The lower twelve bits of the mode.
    pub mode: u32,
    /// The guest process's file-system uid.
    pub uid: u32,
    /// Its gid.
    pub gid: u32,
}

/// What a rename does when the new name is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum RenameMode {
    /// Replaces it.
    Replace,
    /// Fails with EEXIST.
    NoReplace,
    /// Exchanges the two.
    Exchange,
}

/// What the guest asks.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum FileOp {
    /// First on every stream: which mount of the guest this is. Another `mount` than before drops
    /// all references of the one before.
    Attach {
        /// Random, chosen by the guest for one mount.
        mount: [u8; 16],
    },
    /// A name in a folder → `Entry`.
    Lookup(NodeId, Name),
    /// → `Attributes`.
    GetAttributes(NodeId),
    /// → `Attributes`.
    SetAttributes(NodeId, SetAttributes),
    /// Names with their attributes, in one answer → `Entries`.
    ReadFolder {
        /// The folder.
        node: NodeId,
        /// 0 for the start, then [`FolderEntry::cookie`] of the last entry seen.
        cookie: u64,
        /// At most so many entries (and no more than fit the frame).
        limit: u32,
    },
    /// → `Data`, shorter than asked at the end of the file only.
    Read {
        /// A regular file.
        node: NodeId,
        /// Where.
        offset: u64,
        /// At most [`MAX_IO`].
        size: u32,
    },
    /// → `Written`.
    Write {
        /// A regular file.
        node: NodeId,
        /// Where.
        offset: u64,
        /// At most [`MAX_IO`] bytes.
        data: Vec<u8>,
    },
    /// A new regular file; EEXIST when the name is taken (O_EXCL) → `Entry`.
    CreateFile(NodeId, Name, Creation),
    /// A new fifo. It works between processes of the guest → `Entry`.
    CreateFifo(NodeId, Name, Creation),
    /// A new folder → `Entry`.
    CreateFolder(NodeId, Name, Creation),
    /// A new symlink; the mode of `Creation` is not used → `Entry`.
    CreateSymlink(NodeId, Name, LinkTarget, Creation),
    /// One more name for a file → `Entry`.
    Link {
        /// The file.
        node: NodeId,
        /// Folder of the new name.
        folder: NodeId,
        /// The new name.
        name: Name,
    },
    /// → `Done`.
    RemoveFile(NodeId, Name),
    /// → `Done`.
    RemoveFolder(NodeId, Name),
    /// → `Done`.
    Rename {
        /// Old folder and name.
        from: (NodeId, Name),
        /// New folder and name.
        to: (NodeId, Name),
        /// When the new name is taken.
        mode: RenameMode,
    },
    /// → `Target`.
    ReadLink(NodeId),
    /// A file or folder to the disk → `Done` when it is there.
    Sync {
        /// The node.
        node: NodeId,
        /// Data, and no more of the attributes than are needed to read it.
        data_only: bool,
    },
    /// → `Space`.
    StatFs(NodeId),
    /// References given back, each with how many. No answer.
    Forget(Vec<(NodeId, u64)>),
    /// To a server that answered `Attached { resumed: false }`: nodes that the guest still knows, a
    /// folder before what lies in it, at most [`MAX_RESTORED`] → `Done`. One that is not found in its
    /// place any more is stale: using it is answered with ESTALE. Sent twice it does no harm.
    Restore(Vec<RestoredNode>),
}

/// A node that the guest knows of an earlier server: node ids outlive the server.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RestoredNode {
    /// Its folder.
    pub folder: NodeId,
    /// Its name there, as far as the guest knows.
    pub name: Name,
    /// The node itself.
    pub node: NodeId,
    /// References that the guest holds, all in all; not 0.
    pub references: u64,
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct FileRequest {
    /// The guest kernel's number of it, without its resend bit; 0 for `Attach` and `Forget`, any for
    /// `Restore`.
    pub unique: u64,
    /// What is asked.
    pub op: FileOp,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct FileReply {
    /// The request's.
    pub unique: u64,
    /// The result.
    pub result: Result<FileAnswer, Errno>,
}

/// What the host answers.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum FileAnswer {
    /// To `Attach`.
    Attached {
        /// The server knows this mount: node ids hold, and nothing is applied twice.
        resumed: bool,
    },
    /// Done; nothing to add.
    Done,
    /// A node, with one reference to it.
    Entry(Attributes),
    /// Attributes of a known node.
    Attributes(Attributes),
    /// A part of a folder.
    Entries {
        /// Each with one reference. Never `.` and `..`.
        entries: Vec<FolderEntry>,
        /// Nothing follows.
        end: bool,
    },
    /// Bytes of a file.
    Data(Vec<u8>),
    /// Bytes written.
    Written(u32),
    /// What a symlink says.
    Target(LinkTarget),
    /// Space of the file system.
    Space(Space),
}

/// A name in a folder.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct FolderEntry {
    /// The name.
    pub name: Name,
    /// Where the next entry is.
    pub cookie: u64,
    /// Its node.
    pub attributes: Attributes,
}

/// Space of a file system, as statfs(2) tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Space {
    /// Bytes of a block.
    pub block_size: u32,
    /// Blocks.
    pub blocks: u64,
    /// Free ones.
    pub free: u64,
    /// Free ones for the user that runs the server.
    pub available: u64,
    /// Inodes.
    pub files: u64,
    /// Free ones.
    pub files_free: u64,
    /// Longest name.
    pub name_max: u32,
}

#[cfg(test)]
mod tests;
