//! From the host's answers to the kernel's bytes. A wrong kind of answer, or one that cannot be, is
//! EIO for the request that it was for.

use std::time::Duration;

use dhow_protocol::files::{Attributes, FileAnswer, FileKind, NodeId, Space, Time};

use super::listings::Waiting;
use super::request::{Expect, Listing};
use super::uapi::{self, Attr, ENTRY, Message, Valid};

/// How long the kernel believes a name and attributes: the bound on how late it sees what the host
/// has changed. That a name is *not* there is never believed for later.
pub const TTL: Duration = Duration::from_secs(1);

/// The kernel's position behind `.`. The host lists neither `.` nor `..`; wherever positions are
/// small counts, those two take these numbers.
const BEHIND_DOT: u64 = 1;
/// The kernel's position behind `..`.
const BEHIND_DOT_DOT: u64 = 2;

/// The host's position for the kernel's.
pub fn host_cookie(offset: u64) -> u64 {
    if offset <= BEHIND_DOT_DOT { 0 } else { offset }
}

/// The body of an answer with neither names to keep nor a folder's entries.
///
/// # Errors
/// EIO when `answer` is not what `expect` says.
pub fn body(expect: &Expect, answer: FileAnswer) -> Result<Vec<u8>, i32> {
    match (expect, answer) {
        (Expect::Attributes(node), FileAnswer::Attributes(attributes)) if attributes.node == *node => {
            let mut to = Message::default();
            uapi::put_attr(&mut to, &attr(&attributes), valid(TTL));
            Ok(to.0)
        }
        (Expect::Data(size), FileAnswer::Data(data)) if data.len() as u64 <= u64::from(*size) => Ok(data),
        (Expect::Written(size), FileAnswer::Written(written)) if written <= *size => {
            let mut to = Message::default();
            to.u32(written).u32(0);
            Ok(to.0)
        }
        (Expect::Done(_), FileAnswer::Done) => Ok(Vec::new()),
        (Expect::Target, FileAnswer::Target(target)) => Ok(target.as_bytes().to_vec()),
        (Expect::Space, FileAnswer::Space(space)) => Ok(statfs(&space)),
        _ => Err(libc::EIO),
    }
}

/// The body that gives the kernel a node.
///
/// # Errors
/// EIO for a node that cannot be: 0 would say that the name is free, and the root has no name.
pub fn entry(attributes: &Attributes) -> Result<Vec<u8>, i32> {
    check(attributes.node)?;
    let mut to = Message::default();
    uapi::put_entry(&mut to, &attr(attributes), valid(TTL));
    Ok(to.0)
}

/// The body of a part of a folder: `.` and `..` at its start, then as many of `entries` as fit; how
/// many did, and the kernel's position behind them. `parent` is the number that `..` shows, `age` how
/// old the entries are.
///
/// # Errors
/// As [`entry`].
pub fn entries<'a>(
    listing: &Listing,
    parent: NodeId,
    entries: impl IntoIterator<Item = &'a Waiting>,
    age: Duration,
) -> Result<(Vec<u8>, usize, u64), i32> {
    let room = usize::try_from(listing.size).unwrap_or(usize::MAX);
    let mut to = Message::default();
    let mut offset = listing.offset;
    for (at, node, name) in [(BEHIND_DOT, listing.node, &b"."[..]), (BEHIND_DOT_DOT, parent, b"..")] {
        if listing.offset < at && to.0.len() + size(listing, name) <= room {
            if listing.plus {
                // > zero nodeid … no lookup reference (fs/fuse/readdir.c)
                to.zeros(ENTRY);
            }
            uapi::put_dirent(&mut to, node.0, at, libc::S_IFDIR, name);
            offset = at;
        }
    }
    let mut taken = 0;
    for Waiting { entry, changed } in entries {
        let name = entry.name.as_bytes();
        if to.0.len() + size(listing, name) > room {
            break;
        }
        check(entry.attributes.node)?;
        let attr = attr(&entry.attributes);
        match (listing.plus, changed) {
            (true, true) => {
                to.zeros(ENTRY);
            }
            (true, false) => uapi::put_entry(&mut to, &attr, valid(TTL.saturating_sub(age))),
            (false, _) => {}
        }
        uapi::put_dirent(&mut to, attr.ino, entry.cookie, attr.mode, name);
        offset = entry.cookie;
        taken += 1;
    }
    Ok((to.0, taken, offset))
}

/// The errno for the kernel, which takes 1 to 511. ENOSYS would tell it never to ask again.
pub fn errno(host: i32) -> i32 {
    match host {
        libc::ENOSYS => libc::EOPNOTSUPP,
        1..=511 => host,
        _ => libc::EIO,
    }
}

fn size(listing: &Listing, name: &[u8]) -> usize {
    uapi::dirent_size(name.len()) + if listing.plus { ENTRY } else { 0 }
}

fn check(node: NodeId) -> Result<(), i32> {
    if node.0 == 0 || node == NodeId::ROOT { Err(libc::EIO) } else { Ok(()) }
}

fn valid(time: Duration) -> Valid {
    Valid(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

fn attr(from: &Attributes) -> Attr {
    // Before 1970 the kernel's number is negative.
    let time = |time: Time| (time.seconds as u64, time.nanos.min(999_999_999));
    let format = match from.kind {
        FileKind::Regular => libc::S_IFREG,
        FileKind::Folder => libc::S_IFDIR,
        FileKind::Symlink => libc::S_IFLNK,
        FileKind::Fifo => libc::S_IFIFO,
        FileKind::Socket => libc::S_IFSOCK,
        FileKind::CharDevice => libc::S_IFCHR,
        FileKind::BlockDevice => libc::S_IFBLK,
    };
    Attr {
        ino: from.node.0,
        size: from.size,
        blocks: from.blocks,
        times: [time(from.atime), time(from.mtime), time(from.ctime)],
        mode: format | (from.mode & 0o7777),
        links: from.links,
        uid: from.uid,
        gid: from.gid,
        block_size: from.block_size,
    }
}

/// `struct fuse_statfs_out`.
fn statfs(space: &Space) -> Vec<u8> {
    let mut to = Message::default();
    to.u64(space.blocks).u64(space.free).u64(space.available).u64(space.files).u64(space.files_free);
    let block = space.block_size.max(1);
    to.u32(block).u32(space.name_max).u32(block).zeros(28);
    to.0
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use dhow_protocol::files::{FolderEntry, Name};

    /// Attributes of a file, some of them strange.
    pub fn attributes(node: u64) -> Attributes {
        let time = Time { seconds: -1, nanos: 4_000_000_000 };
        Attributes {
            node: NodeId(node),
            kind: FileKind::Regular,
            mode: 0o177_644,
            size: 3,
            blocks: 8,
            atime: time,
            mtime: time,
            ctime: time,
            links: 1,
            uid: 2,
            gid: 3,
            block_size: 4096,
        }
    }

    /// A name in a folder.
    pub fn listed(name: &[u8], node: u64, cookie: u64) -> FolderEntry {
        FolderEntry { name: Name::new(name).unwrap(), cookie, attributes: attributes(node) }
    }

    #[test]
    fn only_the_expected_kind_of_answer_counts() {
        let answers = [
            FileAnswer::Attached { resumed: true },
            FileAnswer::Done,
            FileAnswer::Entry(attributes(7)),
            FileAnswer::Attributes(attributes(8)),
            FileAnswer::Data(vec![0; 11]),
            FileAnswer::Written(11),
        ];
        for expect in [Expect::Attributes(NodeId(7)), Expect::Data(10), Expect::Written(10), Expect::Target] {
            for answer in answers.clone() {
                assert_eq!(body(&expect, answer.clone()), Err(libc::EIO), "{expect:?} {answer:?}");
            }
        }
        assert_eq!(body(&Expect::Data(11), FileAnswer::Data(vec![5; 11])), Ok(vec![5; 11]));
        assert_eq!(body(&Expect::Attributes(NodeId(8)), answers[3].clone()).map(|body| body.len()), Ok(104));
        let space =
            Space { block_size: 0, blocks: 1, free: 1, available: 1, files: 1, files_free: 1, name_max: 255 };
        assert_eq!(body(&Expect::Space, FileAnswer::Space(space)).map(|body| body.len()), Ok(80));
    }

    #[test]
    fn no_node_is_zero_or_the_root() {
        assert_eq!(entry(&attributes(0)), Err(libc::EIO));
        assert_eq!(entry(&attributes(1)), Err(libc::EIO));
        assert_eq!(entry(&attributes(2)).map(|body| body.len()), Ok(ENTRY));
        let listing = Listing { node: NodeId(5), offset: 9, size: 4096, plus: true };
        let zero = Waiting { entry: listed(b"a", 0, 10), changed: false };
        assert_eq!(entries(&listing, NodeId(4), [&zero], Duration::ZERO), Err(libc::EIO));
    }

    #[test]
    fn a_listing_begins_with_itself_and_stops_where_it_is_full() {
        let waiting =
            |n: u64| Waiting { entry: listed(b"name", 10 + n, 100 + n), changed: n.is_multiple_of(3) };
        let names: Vec<_> = (0..100).map(waiting).collect();
        for plus in [false, true] {
            for offset in [0, 1, 2, 77] {
                let listing = Listing { node: NodeId(5), offset, size: 4096, plus };
                let (body, taken, behind) = entries(&listing, NodeId(4), &names, TTL / 2).unwrap();
                assert_eq!(behind, 99 + taken as u64);
                let one = uapi::dirent_size(4) + if plus { ENTRY } else { 0 };
                let dots = 2u64.saturating_sub(offset) as usize;
                assert_eq!(
                    body.len(),
                    taken * one + dots * (uapi::dirent_size(1) + one - uapi::dirent_size(4))
                );
                assert!(body.len() <= 4096 && (body.len() + one > 4096 || taken == 100), "{plus} {offset}");
            }
        }
        assert_eq!((host_cookie(0), host_cookie(2), host_cookie(3)), (0, 0, 3));
    }

    #[test]
    fn an_errno_is_one_that_the_kernel_takes() {
        assert_eq!(errno(libc::ENOSPC), libc::ENOSPC);
        for bad in [0, -1, 512, i32::MIN, i32::MAX] {
            assert_eq!(errno(bad), libc::EIO);
        }
        assert_ne!(errno(libc::ENOSYS), libc::ENOSYS);
    }
}
