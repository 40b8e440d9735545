//! Reading, writing, size, sync and space.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;

use dhow_protocol::files::{FileAnswer, FileOp, MAX_IO, NodeId, SetAttributes};

use super::guest::{Host, guest_of, name, until};

#[test]
fn reading_ends_with_the_file() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), b"0123456789").unwrap();
    fs::write(folder.path().join("empty"), b"").unwrap();
    let mut guest = guest_of(folder.path());
    let file = guest.walk("f").unwrap();
    assert_eq!(guest.read(file, 0, 4).unwrap(), b"0123");
    assert_eq!(guest.read(file, 8, 100).unwrap(), b"89");
    assert_eq!(guest.read(file, 10, 1).unwrap(), b"");
    assert_eq!(guest.read(file, 1 << 40, 1).unwrap(), b"");
    assert_eq!(guest.read(file, 0, 0).unwrap(), b"");
    assert_eq!(guest.read(file, u64::MAX, 1), Err(libc::EINVAL));
    assert_eq!(guest.read(file, 0, MAX_IO as u32 + 1), Err(libc::EINVAL));
    assert_eq!(guest.read(file, 0, u32::MAX), Err(libc::EINVAL));
    let empty = guest.walk("empty").unwrap();
    assert_eq!(guest.read(empty, 0, MAX_IO as u32).unwrap(), b"");
    assert_eq!(guest.read(NodeId::ROOT, 0, 1), Err(libc::EISDIR));
    assert_eq!(guest.read(NodeId(99_999_999), 0, 1), Err(libc::ESTALE));
}

#[test]
fn the_largest_read_and_write_come_through_whole() {
    let folder = tempfile::tempdir().unwrap();
    let data: Vec<u8> = (0..MAX_IO).map(|index| (index * 7 % 251) as u8).collect();
    let mut guest = guest_of(folder.path());
    let file = guest.create(NodeId::ROOT, "big").unwrap().node;
    assert_eq!(guest.write(file, 3, &data).unwrap(), MAX_IO as u32);
    assert_eq!(guest.read(file, 3, MAX_IO as u32).unwrap(), data);
    let on_host = fs::read(folder.path().join("big")).unwrap();
    assert_eq!(on_host[3..], data[..]);
    assert_eq!(on_host[..3], [0; 3]);
}

#[test]
fn a_sparse_file_stays_sparse_and_far_offsets_work() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest_of(folder.path());
    let file = guest.create(NodeId::ROOT, "sparse").unwrap().node;
    let far = 1 << 40;
    assert_eq!(guest.write(file, far, b"end").unwrap(), 3);
    let attributes = guest.attributes(file).unwrap();
    assert_eq!(attributes.size, far + 3);
    assert!(attributes.blocks < 1000, "{} blocks", attributes.blocks);
    assert_eq!(guest.read(file, far - 2, 10).unwrap(), b"\0\0end");
    assert_eq!(guest.read(file, 0, 8).unwrap(), [0; 8]);
    assert_eq!(guest.write(file, u64::MAX, b"x"), Err(libc::EINVAL));
    assert!(guest.write(file, i64::MAX as u64, b"x").is_err());
    let negative = SetAttributes { size: Some(u64::MAX), ..SetAttributes::default() };
    assert_eq!(guest.set(file, negative), Err(libc::EINVAL));
    assert_eq!(guest.attributes(file).unwrap().size, far + 3);
}

#[test]
fn the_size_can_be_set() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), b"0123456789").unwrap();
    let mut guest = guest_of(folder.path());
    let file = guest.walk("f").unwrap();
    let size = |size| SetAttributes { size: Some(size), ..SetAttributes::default() };
    assert_eq!(guest.set(file, size(4)).unwrap().size, 4);
    assert_eq!(fs::read(folder.path().join("f")).unwrap(), b"0123");
    assert_eq!(guest.set(file, size(6)).unwrap().size, 6);
    assert_eq!(fs::read(folder.path().join("f")).unwrap(), b"0123\0\0");
    assert_eq!(guest.set(NodeId::ROOT, size(0)), Err(libc::EISDIR));
}

#[test]
fn a_change_of_the_host_is_read_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    fs::write(&path, b"before").unwrap();
    let mut guest = guest_of(folder.path());
    let file = guest.walk("f").unwrap();
    assert_eq!(guest.read(file, 0, 100).unwrap(), b"before");
    fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(b"beyond", 0).unwrap();
    assert_eq!(guest.read(file, 0, 100).unwrap(), b"beyond");
    fs::write(&path, b"").unwrap();
    assert_eq!(guest.read(file, 0, 100).unwrap(), b"");
}

#[test]
fn sync_reaches_files_and_folders_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    symlink("f", folder.path().join("link")).unwrap();
    let mut guest = guest_of(folder.path());
    let file = guest.create(NodeId::ROOT, "f").unwrap().node;
    guest.write(file, 0, b"data").unwrap();
    for data_only in [true, false] {
        guest.done(FileOp::Sync { node: file, data_only }).unwrap();
        guest.done(FileOp::Sync { node: NodeId::ROOT, data_only }).unwrap();
    }
    let link = guest.walk("link").unwrap();
    assert_eq!(guest.done(FileOp::Sync { node: link, data_only: false }), Err(libc::ELOOP));
}

/// Files of procfs cannot be synced: the kernel's error is to reach the guest.
#[test]
fn the_error_of_a_sync_is_told() {
    let mut guest = Host::with(Path::new("/proc/sys/kernel"), true, &[]).guest();
    let file = guest.walk("ostype").unwrap();
    assert_eq!(guest.read(file, 0, 100).unwrap(), b"Linux\n");
    assert_eq!(guest.done(FileOp::Sync { node: file, data_only: false }), Err(libc::EINVAL));
    assert_eq!(guest.done(FileOp::Sync { node: file, data_only: true }), Err(libc::EINVAL));
}

#[test]
fn the_space_is_that_of_the_file_system() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), b"x").unwrap();
    let mut guest = guest_of(folder.path());
    let file = guest.walk("f").unwrap();
    let real = rustix::fs::statvfs(folder.path()).unwrap();
    for node in [NodeId::ROOT, file] {
        let Ok(FileAnswer::Space(space)) = guest.ask(FileOp::StatFs(node)) else { panic!("no space") };
        assert_eq!(space.blocks, real.f_blocks);
        assert_eq!(u64::from(space.block_size), real.f_frsize);
        assert_eq!(space.files, real.f_files);
        assert_eq!(space.name_max, 255);
        assert!(space.available <= space.free && space.free <= space.blocks);
    }
    assert_eq!(guest.ask(FileOp::StatFs(NodeId(77_777_777))).unwrap_err(), libc::ESTALE);
}

#[test]
fn a_removed_file_lives_on_while_the_guest_knows_it() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::new(folder.path());
    let mut guest = host.guest();
    let file = guest.create(NodeId::ROOT, "f").unwrap().node;
    guest.write(file, 0, b"kept").unwrap();
    guest.done(FileOp::RemoveFile(NodeId::ROOT, name("f"))).unwrap();
    assert!(!folder.path().join("f").exists());
    assert_eq!(guest.read(file, 0, 100).unwrap(), b"kept");
    assert_eq!(guest.write(file, 4, b"!").unwrap(), 1);
    let size = SetAttributes { size: Some(2), mode: Some(0o600), ..SetAttributes::default() };
    let attributes = guest.set(file, size).unwrap();
    assert_eq!((attributes.links, attributes.size), (0, 2));
    guest.done(FileOp::Sync { node: file, data_only: false }).unwrap();
    // Another file of the name is another file.
    let other = guest.create(NodeId::ROOT, "f").unwrap().node;
    assert_ne!(other, file);
    assert_eq!(guest.read(file, 0, 100).unwrap(), b"ke");
    guest.stream.send(0, FileOp::Forget(vec![(file, 1)]));
    until(|| host.share.nodes().held() == (2, 0));
    assert_eq!(guest.read(file, 0, 1), Err(libc::ESTALE));
}

#[test]
fn a_file_that_was_replaced_while_known_keeps_its_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest_of(folder.path());
    let old = guest.create(NodeId::ROOT, "f").unwrap().node;
    guest.write(old, 0, b"old").unwrap();
    let new = guest.create(NodeId::ROOT, "f.new").unwrap().node;
    guest.write(new, 0, b"new").unwrap();
    guest.done(super::names::rename("f.new", "f")).unwrap();
    assert_eq!(guest.read(old, 0, 10).unwrap(), b"old");
    assert_eq!(guest.read(new, 0, 10).unwrap(), b"new");
    assert_eq!(fs::read(folder.path().join("f")).unwrap(), b"new");
    assert_eq!(fs::metadata(folder.path().join("f")).unwrap().nlink(), 1);
}

#[test]
fn a_read_only_share_refuses_every_change() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), b"same").unwrap();
    fs::create_dir(folder.path().join("d")).unwrap();
    let mut guest = Host::with(folder.path(), true, &[]).guest();
    let file = guest.walk("f").unwrap();
    assert_eq!(guest.read(file, 0, 10).unwrap(), b"same");
    for change in super::names::all_changes(file) {
        assert_eq!(guest.ask(change.clone()), Err(libc::EROFS), "{change:?}");
    }
    assert_eq!(guest.names(NodeId::ROOT), ["d", "f"]);
    assert_eq!(fs::read(folder.path().join("f")).unwrap(), b"same");
}
