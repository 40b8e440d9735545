//! Nothing outside the share is read, written or opened, and nothing in it that acts when opened.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use dhow_protocol::files::{FileKind, FileOp, NodeId, SetAttributes, SetTime, Time};

use super::guest::{Host, ROOT_FILE, guest_of, name, target};

/// A folder with `share` in it, and `outside` with a secret.
fn two() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("share")).unwrap();
    fs::create_dir(folder.path().join("outside")).unwrap();
    fs::write(folder.path().join("outside/secret"), b"secret").unwrap();
    folder
}

#[test]
fn a_symlink_is_never_followed() {
    let folder = two();
    let share = folder.path().join("share");
    symlink("../outside", share.join("folder")).unwrap();
    symlink("../outside/secret", share.join("file")).unwrap();
    symlink(folder.path().join("outside/new"), share.join("dangling")).unwrap();
    symlink("real", share.join("within")).unwrap();
    fs::write(share.join("real"), b"real").unwrap();
    let mut guest = guest_of(&share);
    let root = NodeId::ROOT;
    for text in ["folder", "file", "dangling", "within"] {
        let link = guest.look(root, text).unwrap();
        assert_eq!(link.kind, FileKind::Symlink);
        assert_eq!(guest.read(link.node, 0, 10), Err(libc::ELOOP));
        assert_eq!(guest.write(link.node, 0, b"x"), Err(libc::ELOOP));
        assert_eq!(guest.look(link.node, "secret"), Err(libc::ENOTDIR));
        assert_eq!(guest.create(link.node, "new"), Err(libc::ENOTDIR));
        assert_eq!(guest.list(link.node, 0, 10), Err(libc::ENOTDIR));
        assert_eq!(guest.create(root, text), Err(libc::EEXIST));
        assert_eq!(guest.folder(root, text), Err(libc::EEXIST));
        let size = SetAttributes { size: Some(0), ..SetAttributes::default() };
        assert_eq!(guest.set(link.node, size), Err(libc::ELOOP));
        let mode = SetAttributes { mode: Some(0o777), ..SetAttributes::default() };
        assert_eq!(guest.set(link.node, mode), Err(libc::EOPNOTSUPP));
    }
    assert_eq!(fs::read(folder.path().join("outside/secret")).unwrap(), b"secret");
    assert!(!folder.path().join("outside/new").exists());
    assert_eq!(fs::read(share.join("real")).unwrap(), b"real");
}

#[test]
fn changing_a_symlink_leaves_its_target_alone() {
    let folder = two();
    let share = folder.path().join("share");
    let secret = folder.path().join("outside/secret");
    let before = fs::metadata(&secret).unwrap();
    let mut guest = guest_of(&share);
    let op = FileOp::CreateSymlink(NodeId::ROOT, name("l"), target(secret.to_str().unwrap()), ROOT_FILE);
    let link = guest.entry(op).unwrap().node;
    let time = SetTime::At(Time { seconds: 1, nanos: 0 });
    let times = SetAttributes { atime: Some(time), mtime: Some(time), ..SetAttributes::default() };
    assert_eq!(guest.set(link, times).unwrap().mtime.seconds, 1);
    let owner = SetAttributes { uid: Some(12_345), gid: Some(12_345), ..SetAttributes::default() };
    guest.set(link, owner).unwrap();
    let other = guest.entry(FileOp::Link { node: link, folder: NodeId::ROOT, name: name("m") }).unwrap();
    assert_eq!((other.kind, other.node), (FileKind::Symlink, link));
    guest.done(FileOp::RemoveFile(NodeId::ROOT, name("l"))).unwrap();
    let after = fs::metadata(&secret).unwrap();
    assert_eq!((after.mtime(), after.uid(), after.nlink()), (before.mtime(), before.uid(), 1));
}

/// /dev is a share with devices that every machine has. Opening some of them acts or blocks.
#[test]
fn a_device_is_seen_and_never_opened() {
    let before = fs::metadata("/dev/null").unwrap();
    let mut guest = Host::new(Path::new("/dev")).guest();
    for text in ["null", "zero", "tty"] {
        let device = guest.look(NodeId::ROOT, text).unwrap();
        assert_eq!(device.kind, FileKind::CharDevice);
        assert_eq!(guest.read(device.node, 0, 10), Err(libc::ENXIO));
        assert_eq!(guest.write(device.node, 0, b"x"), Err(libc::ENXIO));
        assert_eq!(guest.done(FileOp::Sync { node: device.node, data_only: false }), Err(libc::ENXIO));
        for set in [
            SetAttributes { mode: Some(before.mode() & 0o7777), ..SetAttributes::default() },
            SetAttributes { uid: Some(before.uid()), ..SetAttributes::default() },
            SetAttributes { size: Some(0), ..SetAttributes::default() },
            SetAttributes { atime: Some(SetTime::Now), ..SetAttributes::default() },
        ] {
            assert_eq!(guest.set(device.node, set), Err(libc::EPERM));
        }
    }
}

/// Opening a fifo without a peer blocks, and with one takes its bytes.
#[test]
fn a_fifo_is_seen_and_never_opened() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest_of(folder.path());
    let fifo = guest.entry(FileOp::CreateFifo(NodeId::ROOT, name("fifo"), ROOT_FILE)).unwrap().node;
    assert_eq!(guest.read(fifo, 0, 1), Err(libc::ENXIO));
    assert_eq!(guest.write(fifo, 0, b"x"), Err(libc::ENXIO));
    assert_eq!(guest.done(FileOp::Sync { node: fifo, data_only: true }), Err(libc::ENXIO));
    let size = SetAttributes { size: Some(0), ..SetAttributes::default() };
    assert_eq!(guest.set(fifo, size), Err(libc::ENXIO));
    let mode = SetAttributes { mode: Some(0o600), ..SetAttributes::default() };
    assert_eq!(guest.set(fifo, mode).unwrap().mode, 0o600);
    assert_eq!(fs::metadata(folder.path().join("fifo")).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(guest.look(NodeId::ROOT, "fifo").unwrap().kind, FileKind::Fifo);
}

#[test]
fn a_folder_that_became_a_symlink_leads_nowhere() {
    let folder = two();
    let share = folder.path().join("share");
    fs::create_dir_all(share.join("a/b")).unwrap();
    fs::write(share.join("a/b/secret"), b"inner").unwrap();
    let host = Host::new(&share);
    let mut guest = host.guest();
    let below = guest.walk("a/b").unwrap();
    let file = guest.walk("a/b/secret").unwrap();
    fs::rename(share.join("a/b"), share.join("a/was")).unwrap();
    symlink("../../outside", share.join("a/b")).unwrap();
    // By the fd that the server still has, it is the old folder; without, the node is stale.
    assert_eq!(guest.read(file, 0, 10).unwrap(), b"inner");
    host.share.nodes().drop_cache();
    assert_eq!(guest.read(file, 0, 10), Err(libc::ESTALE));
    assert_eq!(guest.create(below, "x"), Err(libc::ESTALE));
    assert_eq!(guest.list(below, 0, 10), Err(libc::ESTALE));
    assert_eq!(guest.done(FileOp::RemoveFile(below, name("secret"))), Err(libc::ESTALE));
    assert_eq!(fs::read(folder.path().join("outside/secret")).unwrap(), b"secret");
    // Looked up anew, it is what it is now, and the moved folder is the node that it was.
    assert_eq!(guest.walk("a/b").and_then(|link| guest.attributes(link)).unwrap().kind, FileKind::Symlink);
    assert_eq!(guest.walk("a/was").unwrap(), below);
    assert_eq!(guest.read(file, 0, 10).unwrap(), b"inner");
}

#[test]
fn a_file_that_the_host_replaced_is_stale_and_never_the_other_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    fs::write(&path, b"first").unwrap();
    let mut guest = guest_of(folder.path());
    let first = guest.walk("f").unwrap();
    fs::write(folder.path().join("g"), b"second").unwrap();
    fs::rename(folder.path().join("g"), &path).unwrap();
    assert_eq!(guest.read(first, 0, 10), Err(libc::ESTALE));
    assert_eq!(guest.write(first, 0, b"x"), Err(libc::ESTALE));
    assert_eq!(guest.attributes(first), Err(libc::ESTALE));
    let second = guest.walk("f").unwrap();
    assert_eq!(guest.read(second, 0, 10).unwrap(), b"second");
    // Inode numbers come again: whatever has the old one is another node while the old is known.
    for number in 0..200 {
        fs::remove_file(&path).unwrap();
        fs::write(&path, format!("{number}")).unwrap();
        let node = guest.walk("f").unwrap();
        assert_eq!(guest.read(node, 0, 10).unwrap(), number.to_string().as_bytes());
        assert_ne!(node, first);
        assert_eq!(guest.read(first, 0, 10), Err(libc::ESTALE));
    }
}

#[test]
fn a_file_that_the_host_removed_is_stale() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("d")).unwrap();
    fs::write(folder.path().join("d/f"), b"x").unwrap();
    let host = Host::new(folder.path());
    let mut guest = host.guest();
    let file = guest.walk("d/f").unwrap();
    let below = guest.walk("d").unwrap();
    fs::remove_dir_all(folder.path().join("d")).unwrap();
    assert_eq!(guest.read(file, 0, 1), Err(libc::ESTALE));
    host.share.nodes().drop_cache();
    assert_eq!(guest.read(file, 0, 1), Err(libc::ESTALE));
    assert_eq!(guest.create(below, "x"), Err(libc::ESTALE));
    assert_eq!(guest.look(NodeId::ROOT, "d"), Err(libc::ENOENT));
}
