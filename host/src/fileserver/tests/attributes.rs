//! What the guest is told of files, and the times and modes it sets.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;

use dhow_protocol::files::{FileKind, NodeId, SetAttributes, SetTime, Time};

use super::guest::guest_of;

#[test]
fn attributes_are_those_of_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    fs::write(&path, vec![1; 5000]).unwrap();
    fs::hard_link(&path, folder.path().join("g")).unwrap();
    let mut guest = guest_of(folder.path());
    let entry = guest.look(NodeId::ROOT, "f").unwrap();
    let real = fs::metadata(&path).unwrap();
    assert_eq!(entry.kind, FileKind::Regular);
    assert_eq!(entry.node.0, real.ino(), "the inode number is the host's on the root's file system");
    assert_eq!((entry.size, entry.blocks), (5000, real.blocks()));
    assert_eq!(entry.mode, real.mode() & 0o7777);
    assert_eq!((entry.uid, entry.gid, entry.links), (real.uid(), real.gid(), 2));
    assert_eq!((entry.mtime.seconds, i64::from(entry.mtime.nanos)), (real.mtime(), real.mtime_nsec()));
    assert_eq!((entry.ctime.seconds, i64::from(entry.ctime.nanos)), (real.ctime(), real.ctime_nsec()));
    assert_eq!(guest.attributes(entry.node).unwrap(), entry);
    let other = guest.look(NodeId::ROOT, "g").unwrap();
    assert_eq!(other.node, entry.node);
    let root = guest.attributes(NodeId::ROOT).unwrap();
    assert_eq!((root.kind, root.node), (FileKind::Folder, NodeId::ROOT));
    assert_eq!(guest.look(NodeId::ROOT, "none"), Err(libc::ENOENT));
}

#[test]
fn a_socket_is_seen_and_not_more() {
    let folder = tempfile::tempdir().unwrap();
    let _listener = UnixListener::bind(folder.path().join("s")).unwrap();
    let mut guest = guest_of(folder.path());
    let socket = guest.look(NodeId::ROOT, "s").unwrap();
    assert_eq!(socket.kind, FileKind::Socket);
    assert_eq!(guest.read(socket.node, 0, 1), Err(libc::ENXIO));
    assert_eq!(guest.write(socket.node, 0, b"x"), Err(libc::ENXIO));
}

#[test]
fn times_can_be_set() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest_of(folder.path());
    let file = guest.create(NodeId::ROOT, "f").unwrap().node;
    let early = Time { seconds: -86_400, nanos: 999_999_999 };
    let late = Time { seconds: 4_000_000_000, nanos: 1 };
    let both = SetAttributes {
        atime: Some(SetTime::At(late)),
        mtime: Some(SetTime::At(early)),
        ..SetAttributes::default()
    };
    let set = guest.set(file, both).unwrap();
    assert_eq!((set.atime, set.mtime), (late, early));
    // One alone leaves the other.
    let now = SetAttributes { mtime: Some(SetTime::Now), ..SetAttributes::default() };
    let set = guest.set(file, now).unwrap();
    assert_eq!(set.atime, late);
    assert!(set.mtime.seconds > 1_600_000_000);
    let bad = Time { seconds: 0, nanos: 1_000_000_000 };
    let bad = SetAttributes { atime: Some(SetTime::At(bad)), ..SetAttributes::default() };
    assert_eq!(guest.set(file, bad), Err(libc::EINVAL));
    // UTIME_NOW and UTIME_OMIT are no numbers of a guest's.
    for nanos in [(1 << 30) - 1, (1 << 30) - 2, u32::MAX] {
        let sneaky = SetTime::At(Time { seconds: 0, nanos });
        let sneaky = SetAttributes { mtime: Some(sneaky), ..SetAttributes::default() };
        assert_eq!(guest.set(file, sneaky), Err(libc::EINVAL));
    }
    let folder_time = SetAttributes { mtime: Some(SetTime::At(late)), ..SetAttributes::default() };
    assert_eq!(guest.set(NodeId::ROOT, folder_time).unwrap().mtime, late);
}

#[test]
fn setting_nothing_tells_what_is() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest_of(folder.path());
    let made = guest.create(NodeId::ROOT, "f").unwrap();
    assert_eq!(guest.set(made.node, SetAttributes::default()).unwrap(), made);
    assert_eq!(guest.set(NodeId(66_666_666), SetAttributes::default()), Err(libc::ESTALE));
}
