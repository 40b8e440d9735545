//! What the kernel asks of a mount: from the bytes of a request to an operation for the host, or to
//! an answer that is known here.
//!
//! Not implemented, so that the kernel goes on without asking again: OPEN, OPENDIR and FLUSH (opens
//! have no state, and no round trip), CREATE (it falls back to MKNOD), ACCESS, extended attributes,
//! LSEEK, locks (they are the guest's own), IOCTL, POLL, TMPFILE. INTERRUPT too: the kernel then
//! takes back by itself what a killed process has asked and nobody has read, and programs with
//! frequent signals (Go's preemption) never see an EINTR that no disk would give them.

use dhow_protocol::files::{
    Creation, FileKind, FileOp, LinkTarget, Name, NameError, NodeId, RenameMode, SetAttributes, SetTime, Time,
};

use super::uapi::{FSYNC_FDATASYNC, Fields, InHeader, InitIn, Short, fattr, opcode};

/// Names that are asked for at once; what the kernel has no room for waits (`listings.rs`).
const LISTED_AT_ONCE: u32 = 512;

/// What a request comes to.
#[derive(Debug, PartialEq, Eq)]
pub enum Asked<'a> {
    /// The host knows; how its answer becomes the kernel's.
    Host(FileOp, Expect),
    /// A write: node, offset and bytes, which are not copied here.
    Write(NodeId, u64, &'a [u8]),
    /// References given back. No answer.
    Forget(Vec<(NodeId, u64)>),
    /// The first request of a mount.
    Init(InitIn),
    /// Known here: done, nothing to add.
    Done,
    /// Known here: an error.
    Refused(i32),
}

/// What the host must answer, and what that changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expect {
    /// A node under this name.
    Entry(NodeId, Name, Origin),
    /// Attributes of this node.
    Attributes(NodeId),
    /// Names of a folder.
    Entries(Listing),
    /// At most so many bytes.
    Data(u32),
    /// So many bytes at the most were written.
    Written(u32),
    /// Nothing to add; this has changed.
    Done(Change),
    /// What a symlink says.
    Target,
    /// Space of the file system.
    Space,
}

/// Where a node comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// It was there.
    Found,
    /// It is made now.
    Made(FileKind),
    /// It was there, and gets one more name.
    Linked(NodeId),
}

/// A part of a folder that is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listing {
    /// The folder.
    pub node: NodeId,
    /// Where to go on, as the kernel counts ([`super::answer`]).
    pub offset: u64,
    /// Bytes of the kernel's buffer.
    pub size: u32,
    /// With attributes and a reference for each (READDIRPLUS).
    pub plus: bool,
}

/// What an operation does to the names that are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// A name is gone.
    Removed(NodeId, Name),
    /// A name has moved, and what was there is gone.
    Moved((NodeId, Name), (NodeId, Name)),
    /// Two names have changed places.
    Exchanged((NodeId, Name), (NodeId, Name)),
}

/// Reads a request. `body` is what follows its header.
pub fn read<'a>(header: &InHeader, body: &'a [u8]) -> Asked<'a> {
    parse(header, body).unwrap_or_else(|error| match error {
        Bad::Short => Asked::Refused(libc::EIO),
        Bad::Name(NameError::TooLong { .. }) => Asked::Refused(libc::ENAMETOOLONG),
        Bad::Name(_) => Asked::Refused(libc::EINVAL),
    })
}

enum Bad {
    Short,
    Name(NameError),
}

impl From<Short> for Bad {
    fn from(_: Short) -> Self {
        Self::Short
    }
}

impl From<NameError> for Bad {
    fn from(error: NameError) -> Self {
        Self::Name(error)
    }
}

fn parse<'a>(header: &InHeader, body: &'a [u8]) -> Result<Asked<'a>, Bad> {
    let node = NodeId(header.node);
    let mut fields = Fields::new(body);
    let new = |mode| Creation { mode: mode & 0o7777, uid: header.uid, gid: header.gid };
    Ok(match header.opcode {
        opcode::LOOKUP => {
            let name = Name::new(fields.name()?)?;
            Asked::Host(FileOp::Lookup(node, name.clone()), Expect::Entry(node, name, Origin::Found))
        }
        opcode::FORGET => Asked::Forget(vec![(node, fields.u64()?)]),
        opcode::BATCH_FORGET => {
            let count = fields.u32()?;
            fields.skip(4)?;
            let each = |_| Ok((NodeId(fields.u64()?), fields.u64()?));
            Asked::Forget((0..count).map(each).collect::<Result<_, Short>>()?)
        }
        opcode::GETATTR => Asked::Host(FileOp::GetAttributes(node), Expect::Attributes(node)),
        opcode::SETATTR => {
            let set = set_attributes(&mut fields)?;
            Asked::Host(FileOp::SetAttributes(node, set), Expect::Attributes(node))
        }
        opcode::READLINK => Asked::Host(FileOp::ReadLink(node), Expect::Target),
        opcode::SYMLINK => {
            let name = Name::new(fields.name()?)?;
            let target = LinkTarget::new(fields.name()?)?;
            let op = FileOp::CreateSymlink(node, name.clone(), target, new(0o777));
            Asked::Host(op, Expect::Entry(node, name, Origin::Made(FileKind::Symlink)))
        }
        opcode::MKNOD => {
            let mode = fields.u32()?;
            // rdev; the umask, which the kernel has applied; padding.
            fields.skip(12)?;
            let name = Name::new(fields.name()?)?;
            let (op, kind) = match mode & libc::S_IFMT {
                0 | libc::S_IFREG => (FileOp::CreateFile(node, name.clone(), new(mode)), FileKind::Regular),
                libc::S_IFIFO => (FileOp::CreateFifo(node, name.clone(), new(mode)), FileKind::Fifo),
                _ => return Ok(Asked::Refused(libc::EPERM)),
            };
            Asked::Host(op, Expect::Entry(node, name, Origin::Made(kind)))
        }
        opcode::MKDIR => {
            let mode = fields.u32()?;
            fields.skip(4)?;
            let name = Name::new(fields.name()?)?;
            let op = FileOp::CreateFolder(node, name.clone(), new(mode));
            Asked::Host(op, Expect::Entry(node, name, Origin::Made(FileKind::Folder)))
        }
        opcode::UNLINK => {
            let name = Name::new(fields.name()?)?;
            let op = FileOp::RemoveFile(node, name.clone());
            Asked::Host(op, Expect::Done(Change::Removed(node, name)))
        }
        opcode::RMDIR => {
            let name = Name::new(fields.name()?)?;
            let op = FileOp::RemoveFolder(node, name.clone());
            Asked::Host(op, Expect::Done(Change::Removed(node, name)))
        }
        opcode::RENAME => {
            let to = NodeId(fields.u64()?);
            rename(node, to, 0, &mut fields)?
        }
        opcode::RENAME2 => {
            let to = NodeId(fields.u64()?);
            let flags = fields.u32()?;
            fields.skip(4)?;
            rename(node, to, flags, &mut fields)?
        }
        opcode::LINK => {
            let file = NodeId(fields.u64()?);
            let name = Name::new(fields.name()?)?;
            let op = FileOp::Link { node: file, folder: node, name: name.clone() };
            Asked::Host(op, Expect::Entry(node, name, Origin::Linked(file)))
        }
        opcode::READ => {
            fields.skip(8)?;
            let (offset, size) = (fields.u64()?, fields.u32()?);
            Asked::Host(FileOp::Read { node, offset, size }, Expect::Data(size))
        }
        opcode::WRITE => {
            fields.skip(8)?;
            let (offset, size) = (fields.u64()?, fields.u32()?);
            // write_flags, lock_owner, flags, padding.
            fields.skip(20)?;
            Asked::Write(node, offset, fields.bytes(usize::try_from(size).map_err(|_| Short)?)?)
        }
        opcode::FSYNC | opcode::FSYNCDIR => {
            fields.skip(8)?;
            let data_only = fields.u32()? & FSYNC_FDATASYNC != 0;
            Asked::Host(FileOp::Sync { node, data_only }, Expect::Done(Change::None))
        }
        opcode::STATFS => Asked::Host(FileOp::StatFs(node), Expect::Space),
        opcode::READDIR | opcode::READDIRPLUS => {
            fields.skip(8)?;
            let (offset, size) = (fields.u64()?, fields.u32()?);
            let listing = Listing { node, offset, size, plus: header.opcode == opcode::READDIRPLUS };
            let op = FileOp::ReadFolder {
                node,
                cookie: super::answer::host_cookie(offset),
                limit: LISTED_AT_ONCE,
            };
            Asked::Host(op, Expect::Entries(listing))
        }
        opcode::INIT => Asked::Init(InitIn::parse(body)?),
        opcode::RELEASE | opcode::RELEASEDIR | opcode::DESTROY => Asked::Done,
        opcode::FALLOCATE | opcode::COPY_FILE_RANGE => Asked::Refused(libc::EOPNOTSUPP),
        // > ENOSYS … the kernel will not send this request again
        _ => Asked::Refused(libc::ENOSYS),
    })
}

fn rename<'a>(from: NodeId, to: NodeId, flags: u32, fields: &mut Fields<'a>) -> Result<Asked<'a>, Bad> {
    let mode = match flags {
        0 => RenameMode::Replace,
        libc::RENAME_NOREPLACE => RenameMode::NoReplace,
        libc::RENAME_EXCHANGE => RenameMode::Exchange,
        _ => return Ok(Asked::Refused(libc::EINVAL)),
    };
    let from = (from, Name::new(fields.name()?)?);
    let to = (to, Name::new(fields.name()?)?);
    let change = match mode {
        RenameMode::Exchange => Change::Exchanged(from.clone(), to.clone()),
        RenameMode::Replace | RenameMode::NoReplace => Change::Moved(from.clone(), to.clone()),
    };
    Ok(Asked::Host(FileOp::Rename { from, to, mode }, Expect::Done(change)))
}

/// `struct fuse_setattr_in`.
fn set_attributes(fields: &mut Fields<'_>) -> Result<SetAttributes, Short> {
    let valid = fields.u32()?;
    // padding, fh.
    fields.skip(12)?;
    let size = fields.u64()?;
    // lock_owner.
    fields.skip(8)?;
    let (atime, mtime, _ctime) = (fields.u64()?, fields.u64()?, fields.u64()?);
    let (atime_nanos, mtime_nanos, _ctime_nanos) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let (mode, _unused, uid, gid) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
    let given = |bit| valid & bit != 0;
    let time = |set, now, seconds: u64, nanos| match (given(now), given(set)) {
        (true, _) => Some(SetTime::Now),
        // Before 1970 the kernel's number is negative.
        (false, true) => Some(SetTime::At(Time { seconds: seconds as i64, nanos })),
        (false, false) => None,
    };
    Ok(SetAttributes {
        mode: given(fattr::MODE).then_some(mode & 0o7777),
        uid: given(fattr::UID).then_some(uid),
        gid: given(fattr::GID).then_some(gid),
        size: given(fattr::SIZE).then_some(size),
        atime: time(fattr::ATIME, fattr::ATIME_NOW, atime, atime_nanos),
        mtime: time(fattr::MTIME, fattr::MTIME_NOW, mtime, mtime_nanos),
    })
}

#[cfg(test)]
mod tests {
    use super::super::uapi::Message;
    use super::*;
    use proptest::prelude::*;

    fn header(opcode: u32) -> InHeader {
        InHeader { length: 0, opcode, unique: 2, node: 5, uid: 1000, gid: 100 }
    }

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    #[test]
    fn a_creation_carries_who_and_how() {
        let mut body = Message::default();
        body.u32(0o100644).u32(0).u32(0o022).u32(0);
        body.0.extend_from_slice(b"new\0");
        let creation = Creation { mode: 0o644, uid: 1000, gid: 100 };
        let asked = Asked::Host(
            FileOp::CreateFile(NodeId(5), name("new"), creation),
            Expect::Entry(NodeId(5), name("new"), Origin::Made(FileKind::Regular)),
        );
        assert_eq!(read(&header(opcode::MKNOD), &body.0), asked);
        body.0[..4].copy_from_slice(&0o020644u32.to_ne_bytes());
        assert_eq!(read(&header(opcode::MKNOD), &body.0), Asked::Refused(libc::EPERM));
    }

    #[test]
    fn a_symlink_has_its_name_first() {
        let Asked::Host(FileOp::CreateSymlink(folder, made, target, _), _) =
            read(&header(opcode::SYMLINK), b"name\0../target\0")
        else {
            panic!("no symlink")
        };
        assert_eq!(
            (folder, made.as_bytes(), target.as_bytes()),
            (NodeId(5), &b"name"[..], &b"../target"[..])
        );
    }

    #[test]
    fn a_rename_knows_its_flags() {
        for (flags, mode) in [
            (0, Some(RenameMode::Replace)),
            (1, Some(RenameMode::NoReplace)),
            (2, Some(RenameMode::Exchange)),
            (4, None),
            (3, None),
        ] {
            let mut body = Message::default();
            body.u64(9).u32(flags).u32(0);
            body.0.extend_from_slice(b"a\0b\0");
            match (read(&header(opcode::RENAME2), &body.0), mode) {
                (Asked::Host(FileOp::Rename { from, to, mode }, _), Some(wanted)) => {
                    assert_eq!((from, to, mode), ((NodeId(5), name("a")), (NodeId(9), name("b")), wanted));
                }
                (Asked::Refused(libc::EINVAL), None) => {}
                other => panic!("{flags}: {other:?}"),
            }
        }
    }

    #[test]
    fn names_that_are_too_long_say_so() {
        let mut long = vec![b'x'; 256];
        long.push(0);
        assert_eq!(read(&header(opcode::LOOKUP), &long), Asked::Refused(libc::ENAMETOOLONG));
        assert_eq!(read(&header(opcode::LOOKUP), b"..\0"), Asked::Refused(libc::EINVAL));
        assert_eq!(read(&header(opcode::LOOKUP), b"no end"), Asked::Refused(libc::EIO));
    }

    #[test]
    fn attributes_are_set_as_they_are_valid() {
        let mut body = Message::default();
        body.u32(fattr::SIZE | fattr::MTIME | fattr::ATIME_NOW | fattr::ATIME).u32(0).u64(0).u64(77).u64(0);
        body.u64(1).u64(-5i64 as u64).u64(3).u32(4).u32(5).u32(6).u32(0o777).u32(0).u32(8).u32(9).u32(0);
        assert_eq!(body.0.len(), 88);
        let set = SetAttributes {
            size: Some(77),
            atime: Some(SetTime::Now),
            mtime: Some(SetTime::At(Time { seconds: -5, nanos: 5 })),
            ..SetAttributes::default()
        };
        let asked = read(&header(opcode::SETATTR), &body.0);
        assert_eq!(asked, Asked::Host(FileOp::SetAttributes(NodeId(5), set), Expect::Attributes(NodeId(5))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(opcode in 0..60u32, body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&header(opcode), &body);
        }
    }
}
