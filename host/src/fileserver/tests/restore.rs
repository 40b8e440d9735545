//! Nodes outlive the server: a new one takes back what the guest still knows.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use dhow_protocol::files::{FileOp, MAX_RESTORED, NodeId, RestoredNode};

use super::guest::{Guest, Host, MOUNT, name, until};

fn restored(folder: NodeId, text: &str, node: NodeId, references: u64) -> RestoredNode {
    RestoredNode { folder, name: name(text), node, references }
}

/// A new server of the same folder, to which the mount is new.
fn restarted(root: &Path) -> (Host, Guest) {
    let host = Host::new(root);
    let (guest, resumed) = Guest::attach(host.stream(), MOUNT);
    assert!(!resumed);
    (host, guest)
}

#[test]
fn what_is_in_its_place_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("a/b")).unwrap();
    fs::write(folder.path().join("a/b/f"), b"data").unwrap();
    symlink("f", folder.path().join("a/b/l")).unwrap();
    let mut guest = Host::new(folder.path()).guest();
    let a = guest.walk("a").unwrap();
    let b = guest.look(a, "b").unwrap().node;
    let file = guest.look(b, "f").unwrap();
    let link = guest.look(b, "l").unwrap();
    let (host, mut guest) = restarted(folder.path());
    for node in [a, b, file.node, link.node] {
        assert_eq!(guest.attributes(node), Err(libc::ESTALE));
    }
    let nodes = vec![
        restored(NodeId::ROOT, "a", a, 1),
        restored(a, "b", b, 1),
        restored(b, "f", file.node, 3),
        restored(b, "l", link.node, 1),
    ];
    guest.done(FileOp::Restore(nodes.clone())).unwrap();
    assert_eq!(guest.attributes(file.node).unwrap(), file);
    assert_eq!(guest.attributes(link.node).unwrap(), link);
    assert_eq!(guest.read(file.node, 0, 10).unwrap(), b"data");
    assert_eq!(guest.write(file.node, 4, b"!").unwrap(), 1);
    assert_eq!(guest.look(a, "b").unwrap().node, b);
    // Sent twice (its answer was lost), it counts once.
    guest.done(FileOp::Restore(nodes)).unwrap();
    guest.stream.send(0, FileOp::Forget(vec![(file.node, 2)]));
    guest.stream.send(0, FileOp::Forget(vec![(link.node, 1), (b, 2), (a, 1)]));
    until(|| guest.attributes(link.node) == Err(libc::ESTALE));
    assert_eq!(guest.read(file.node, 0, 10).unwrap(), b"data!");
    guest.stream.send(0, FileOp::Forget(vec![(file.node, 1)]));
    until(|| host.share.nodes().held() == (1, 0));
}

#[test]
fn what_is_not_in_its_place_is_stale_and_the_rest_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    for text in ["moved", "replaced", "removed", "same"] {
        fs::write(folder.path().join(text), text).unwrap();
    }
    fs::create_dir(folder.path().join("d")).unwrap();
    fs::write(folder.path().join("d/inner"), b"inner").unwrap();
    let mut guest = Host::new(folder.path()).guest();
    let texts = ["moved", "replaced", "removed", "d", "same"];
    let nodes = texts.map(|text| (text, guest.walk(text).unwrap()));
    let inner = guest.walk("d/inner").unwrap();
    drop(guest);
    fs::rename(folder.path().join("moved"), folder.path().join("elsewhere")).unwrap();
    fs::write(folder.path().join("new"), b"new").unwrap();
    fs::rename(folder.path().join("new"), folder.path().join("replaced")).unwrap();
    fs::remove_file(folder.path().join("removed")).unwrap();
    fs::rename(folder.path().join("d"), folder.path().join("was")).unwrap();
    symlink("was", folder.path().join("d")).unwrap();
    let (_host, mut guest) = restarted(folder.path());
    let mut asked: Vec<_> = nodes.iter().map(|(text, node)| restored(NodeId::ROOT, text, *node, 1)).collect();
    asked.push(restored(nodes[3].1, "inner", inner, 1));
    guest.done(FileOp::Restore(asked)).unwrap();
    for (text, node) in nodes {
        let expected = if text == "same" { Ok(b"same".to_vec()) } else { Err(libc::ESTALE) };
        assert_eq!(guest.read(node, 0, 10), expected, "{text}");
    }
    assert_eq!(guest.read(inner, 0, 10), Err(libc::ESTALE));
    // Where it is found again, it has its old id again.
    assert_eq!(guest.walk("elsewhere").unwrap(), nodes[0].1);
    assert_eq!(guest.read(nodes[0].1, 0, 10).unwrap(), b"moved");
}

#[test]
fn a_guest_cannot_choose_ids() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), b"f").unwrap();
    fs::write(folder.path().join("g"), b"g").unwrap();
    let host = Host::new(folder.path());
    let mut guest = host.guest();
    let file = guest.walk("f").unwrap();
    let other = NodeId(file.0 + 1_000_000);
    let counted = NodeId(1 << 63 | 5);
    guest
        .done(FileOp::Restore(vec![
            restored(NodeId::ROOT, "g", file, 1),
            restored(NodeId::ROOT, "g", other, 1),
            restored(NodeId::ROOT, "g", counted, 1),
            restored(NodeId::ROOT, "g", NodeId::ROOT, 1),
            restored(NodeId::ROOT, "g", NodeId(0), 1),
            restored(other, "g", other, 1),
            restored(file, "g", other, 1),
        ]))
        .unwrap();
    assert_eq!(host.share.nodes().held().0, 2);
    assert_eq!(guest.read(file, 0, 1).unwrap(), b"f");
    for node in [other, counted, NodeId(0)] {
        assert_eq!(guest.attributes(node), Err(libc::ESTALE));
    }
    // Without a reference there is nothing to restore.
    let unknown = guest.walk("g").unwrap();
    guest.stream.send(0, FileOp::Forget(vec![(unknown, 1)]));
    until(|| host.share.nodes().held().0 == 2);
    guest.done(FileOp::Restore(vec![restored(NodeId::ROOT, "g", unknown, 0)])).unwrap();
    assert_eq!(guest.attributes(unknown), Err(libc::ESTALE));
}

#[test]
fn a_request_restores_a_bounded_number() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), b"f").unwrap();
    let mut guest = Host::new(folder.path()).guest();
    let file = guest.walk("f").unwrap();
    let (_host, mut guest) = restarted(folder.path());
    let mut nodes = vec![restored(NodeId::ROOT, "f", file, 1); MAX_RESTORED + 1];
    assert_eq!(guest.done(FileOp::Restore(nodes.clone())), Err(libc::E2BIG));
    assert_eq!(guest.attributes(file), Err(libc::ESTALE));
    nodes.pop();
    guest.done(FileOp::Restore(nodes)).unwrap();
    assert_eq!(guest.read(file, 0, 1).unwrap(), b"f");
}

/// A file that got the inode number of one that the guest remembers goes on, too.
#[test]
fn a_reused_inode_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = |text: &str| folder.path().join(text);
    let inode = |text: &str| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path(text)).unwrap());
    let mut guest = Host::new(folder.path()).guest();
    // Most file systems give the number to the next file; one that never does has nothing to show here.
    let reused = (0..200).find_map(|number| {
        let (old, new) = (format!("old-{number}"), format!("new-{number}"));
        fs::write(path(&old), b"old").unwrap();
        guest.walk(&old).unwrap();
        let freed = inode(&old);
        fs::remove_file(path(&old)).unwrap();
        fs::write(path(&new), b"new").unwrap();
        (inode(&new) == freed).then_some(new)
    });
    let Some(text) = reused else {
        eprintln!("left out: this file system gives no inode number twice; the table's own test has it");
        return;
    };
    let node = guest.walk(&text).unwrap();
    let (_host, mut guest) = restarted(folder.path());
    guest.done(FileOp::Restore(vec![restored(NodeId::ROOT, &text, node, 1)])).unwrap();
    assert_eq!(guest.read(node, 0, 10).unwrap(), b"new");
}
