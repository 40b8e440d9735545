//! Making, linking, renaming and removing names.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};

use dhow_protocol::files::{Creation, FileAnswer, FileKind, FileOp, NodeId, RenameMode, SetAttributes};

use super::guest::{ROOT_FILE, ROOT_FOLDER, guest_of, name, target};

/// Renames in the root, replacing.
pub fn rename(from: &str, to: &str) -> FileOp {
    rename_in(NodeId::ROOT, from, NodeId::ROOT, to, RenameMode::Replace)
}

fn rename_in(from: NodeId, old: &str, to: NodeId, new: &str, mode: RenameMode) -> FileOp {
    FileOp::Rename { from: (from, name(old)), to: (to, name(new)), mode }
}

/// One of each operation that changes something; `f` is a file in the root, `d` a folder.
pub fn all_changes(file: NodeId) -> Vec<FileOp> {
    let root = NodeId::ROOT;
    vec![
        FileOp::SetAttributes(file, SetAttributes { mode: Some(0o600), ..SetAttributes::default() }),
        FileOp::SetAttributes(file, SetAttributes::default()),
        FileOp::Write { node: file, offset: 0, data: b"x".to_vec() },
        FileOp::Write { node: file, offset: 0, data: Vec::new() },
        FileOp::CreateFile(root, name("n"), ROOT_FILE),
        FileOp::CreateFifo(root, name("n"), ROOT_FILE),
        FileOp::CreateFolder(root, name("n"), ROOT_FOLDER),
        FileOp::CreateSymlink(root, name("n"), target("f"), ROOT_FILE),
        FileOp::Link { node: file, folder: root, name: name("n") },
        FileOp::RemoveFile(root, name("f")),
        FileOp::RemoveFolder(root, name("d")),
        rename("f", "n"),
        rename_in(root, "f", root, "n", RenameMode::NoReplace),
        rename_in(root, "f", root, "d", RenameMode::Exchange),
    ]
}

#[test]
fn everything_can_be_made_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest_of(folder.path());
    let root = NodeId::ROOT;
    let make = |number: usize, text: &str| match number {
        0 => FileOp::CreateFile(root, name(text), ROOT_FILE),
        1 => FileOp::CreateFifo(root, name(text), ROOT_FILE),
        2 => FileOp::CreateFolder(root, name(text), ROOT_FOLDER),
        _ => FileOp::CreateSymlink(root, name(text), target("/nowhere"), ROOT_FILE),
    };
    let kinds = [FileKind::Regular, FileKind::Fifo, FileKind::Folder, FileKind::Symlink];
    for (number, kind) in kinds.into_iter().enumerate() {
        let text = format!("n{number}");
        let made = guest.entry(make(number, &text)).unwrap();
        assert_eq!(made.kind, kind);
        assert_eq!(guest.attributes(made.node).unwrap().kind, kind);
        for again in 0..4 {
            assert_eq!(guest.entry(make(again, &text)), Err(libc::EEXIST), "{again} over {number}");
        }
    }
    assert!(fs::symlink_metadata(folder.path().join("n1")).unwrap().file_type().is_fifo());
    assert_eq!(fs::read_link(folder.path().join("n3")).unwrap().to_str(), Some("/nowhere"));
    let long = "x".repeat(255);
    assert_eq!(guest.create(root, &long).unwrap().kind, FileKind::Regular);
    assert_eq!(guest.create(NodeId(55_555_555), "f"), Err(libc::ESTALE));
}

#[test]
fn a_file_is_no_folder() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest_of(folder.path());
    let file = guest.create(NodeId::ROOT, "f").unwrap().node;
    assert_eq!(guest.look(file, "x"), Err(libc::ENOTDIR));
    assert_eq!(guest.create(file, "x"), Err(libc::ENOTDIR));
    assert_eq!(guest.list(file, 0, 10), Err(libc::ENOTDIR));
    assert_eq!(guest.done(FileOp::RemoveFile(file, name("x"))), Err(libc::ENOTDIR));
    assert_eq!(guest.done(rename_in(NodeId::ROOT, "f", file, "x", RenameMode::Replace)), Err(libc::ENOTDIR));
}

#[test]
fn a_symlink_says_what_it_was_told() {
    let folder = tempfile::tempdir().unwrap();
    symlink("../../etc/passwd", folder.path().join("host")).unwrap();
    let mut guest = guest_of(folder.path());
    let host = guest.look(NodeId::ROOT, "host").unwrap();
    assert_eq!(host.kind, FileKind::Symlink);
    assert_eq!(
        guest.ask(FileOp::ReadLink(host.node)).unwrap(),
        FileAnswer::Target(target("../../etc/passwd"))
    );
    let long = "x/".repeat(2000);
    let op = FileOp::CreateSymlink(NodeId::ROOT, name("long"), target(&long), ROOT_FILE);
    let made = guest.entry(op).unwrap();
    assert_eq!(made.size, 4000);
    assert_eq!(guest.ask(FileOp::ReadLink(made.node)).unwrap(), FileAnswer::Target(target(&long)));
    let file = guest.create(NodeId::ROOT, "f").unwrap().node;
    assert_eq!(guest.ask(FileOp::ReadLink(file)), Err(libc::EINVAL));
    assert_eq!(guest.ask(FileOp::ReadLink(NodeId::ROOT)), Err(libc::EINVAL));
}

#[test]
fn a_link_is_the_same_node() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest_of(folder.path());
    let below = guest.folder(NodeId::ROOT, "d").unwrap().node;
    let file = guest.create(NodeId::ROOT, "f").unwrap().node;
    let link = |node, folder, text| FileOp::Link { node, folder, name: name(text) };
    let linked = guest.entry(link(file, below, "g")).unwrap();
    assert_eq!((linked.node, linked.links), (file, 2));
    assert_eq!(guest.entry(link(file, below, "g")), Err(libc::EEXIST));
    assert_eq!(guest.entry(link(below, NodeId::ROOT, "h")), Err(libc::EPERM));
    assert_eq!(guest.entry(link(NodeId::ROOT, below, "h")), Err(libc::EPERM));
    // Either name may go; the other is found again.
    guest.done(FileOp::RemoveFile(below, name("g"))).unwrap();
    assert_eq!(guest.look(NodeId::ROOT, "f").unwrap().links, 1);
    assert_eq!(guest.write(file, 0, b"x").unwrap(), 1);
    assert_eq!(fs::metadata(folder.path().join("f")).unwrap().nlink(), 1);
    // A removed file has no name to come back by.
    guest.done(FileOp::RemoveFile(NodeId::ROOT, name("f"))).unwrap();
    assert_eq!(guest.entry(link(file, NodeId::ROOT, "back")), Err(libc::ENOENT));
}

#[test]
fn removing_says_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest_of(folder.path());
    let root = NodeId::ROOT;
    let below = guest.folder(root, "d").unwrap().node;
    guest.create(below, "f").unwrap();
    assert_eq!(guest.done(FileOp::RemoveFolder(root, name("d"))), Err(libc::ENOTEMPTY));
    assert_eq!(guest.done(FileOp::RemoveFile(root, name("d"))), Err(libc::EISDIR));
    assert_eq!(guest.done(FileOp::RemoveFolder(below, name("f"))), Err(libc::ENOTDIR));
    assert_eq!(guest.done(FileOp::RemoveFile(root, name("none"))), Err(libc::ENOENT));
    guest.done(FileOp::RemoveFile(below, name("f"))).unwrap();
    guest.done(FileOp::RemoveFolder(root, name("d"))).unwrap();
    assert_eq!(guest.names(root), Vec::<String>::new());
    // The removed folder is known still, and takes nothing new.
    assert_eq!(guest.attributes(below).unwrap().kind, FileKind::Folder);
    assert_eq!(guest.create(below, "x"), Err(libc::ENOENT));
    assert_eq!(guest.list(below, 0, 10), Err(libc::ENOENT));
}

#[test]
fn a_rename_takes_the_node_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest_of(folder.path());
    let root = NodeId::ROOT;
    let below = guest.folder(root, "d").unwrap().node;
    let inner = guest.create(below, "inner").unwrap().node;
    let file = guest.create(root, "f").unwrap().node;
    guest.write(file, 0, b"f").unwrap();
    guest.done(rename_in(root, "f", below, "g", RenameMode::NoReplace)).unwrap();
    assert_eq!(guest.read(file, 0, 10).unwrap(), b"f");
    assert_eq!(guest.look(below, "g").unwrap().node, file);
    // A folder, with what is known in it.
    guest.done(rename("d", "e")).unwrap();
    assert_eq!(guest.write(inner, 0, b"inner").unwrap(), 5);
    assert_eq!(fs::read(folder.path().join("e/inner")).unwrap(), b"inner");
    assert_eq!(guest.look(root, "e").unwrap().node, below);
    assert_eq!(guest.done(rename_in(below, "g", below, "inner", RenameMode::NoReplace)), Err(libc::EEXIST));
    assert_eq!(guest.done(rename_in(root, "e", below, "e", RenameMode::Replace)), Err(libc::EINVAL));
    assert_eq!(guest.done(rename("none", "x")), Err(libc::ENOENT));
}

#[test]
fn an_exchange_exchanges_the_nodes() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest_of(folder.path());
    let root = NodeId::ROOT;
    let below = guest.folder(root, "d").unwrap().node;
    let one = guest.create(root, "one").unwrap().node;
    let two = guest.create(below, "two").unwrap().node;
    guest.write(one, 0, b"1").unwrap();
    guest.write(two, 0, b"2").unwrap();
    guest.done(rename_in(root, "one", below, "two", RenameMode::Exchange)).unwrap();
    assert_eq!(fs::read(folder.path().join("one")).unwrap(), b"2");
    assert_eq!(guest.read(one, 0, 1).unwrap(), b"1");
    assert_eq!(guest.read(two, 0, 1).unwrap(), b"2");
    assert_eq!(guest.look(below, "two").unwrap().node, one);
    assert_eq!(guest.done(rename_in(root, "one", root, "none", RenameMode::Exchange)), Err(libc::ENOENT));
}

#[test]
fn a_rename_to_another_link_of_the_file_does_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest_of(folder.path());
    let file = guest.create(NodeId::ROOT, "f").unwrap().node;
    guest.entry(FileOp::Link { node: file, folder: NodeId::ROOT, name: name("g") }).unwrap();
    guest.done(rename("f", "g")).unwrap();
    assert_eq!(guest.names(NodeId::ROOT), ["f", "g"]);
    assert_eq!(guest.attributes(file).unwrap().links, 2);
}

#[test]
fn a_new_file_has_the_mode_it_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest_of(folder.path());
    for mode in [0o644, 0o600, 0o400, 0o777, 0o000, 0o4755] {
        let new = Creation { mode, uid: 0, gid: 0 };
        let made = guest.entry(FileOp::CreateFile(NodeId::ROOT, name(&format!("f{mode:o}")), new)).unwrap();
        assert_eq!(made.mode, mode, "{mode:o}");
    }
}
