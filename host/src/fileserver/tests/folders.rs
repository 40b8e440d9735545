//! Listing folders.

use std::collections::HashSet;
use std::fs;

use dhow_protocol::files::{FileKind, FileOp, NodeId};

use super::guest::{Host, guest_of, until};

#[test]
fn a_large_folder_is_listed_once_in_parts_of_any_size() {
    let folder = tempfile::tempdir().unwrap();
    for number in 0..3000 {
        fs::write(folder.path().join(format!("file-{number:04}")), b"x").unwrap();
    }
    let mut guest = guest_of(folder.path());
    for limit in [7, 100, 2048, u32::MAX] {
        let (mut seen, mut cookie) = (HashSet::new(), 0);
        loop {
            let (entries, end) = guest.list(NodeId::ROOT, cookie, limit).unwrap();
            assert!(entries.len() <= usize::try_from(limit).unwrap());
            for entry in &entries {
                assert!(seen.insert(entry.name.clone()), "{:?} comes twice", entry.name);
                assert_eq!((entry.attributes.kind, entry.attributes.size), (FileKind::Regular, 1));
            }
            cookie = entries.last().map_or(cookie, |last| last.cookie);
            if end {
                break;
            }
            assert!(!entries.is_empty());
        }
        assert_eq!(seen.len(), 3000, "in parts of {limit}");
    }
    assert_eq!(guest.list(NodeId::ROOT, 0, 0).unwrap().0.len(), 1, "no limit of 0 loops for ever");
}

#[test]
fn a_listed_node_is_the_one_that_is_looked_up() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("d")).unwrap();
    fs::write(folder.path().join("d/f"), b"inside").unwrap();
    let mut guest = guest_of(folder.path());
    let (entries, end) = guest.list(NodeId::ROOT, 0, 10).unwrap();
    assert!(end);
    let below = entries[0].attributes.node;
    let (inner, _) = guest.list(below, 0, 10).unwrap();
    assert_eq!(guest.look(below, "f").unwrap(), inner[0].attributes);
    assert_eq!(guest.read(inner[0].attributes.node, 0, 10).unwrap(), b"inside");
}

#[test]
fn a_cookie_that_nobody_gave_out_does_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    for number in 0..50 {
        fs::write(folder.path().join(format!("{number}")), b"x").unwrap();
    }
    let mut guest = guest_of(folder.path());
    for cookie in [1, 12_345, u64::from(u32::MAX), 1 << 62, i64::MAX as u64, u64::MAX] {
        match guest.list(NodeId::ROOT, cookie, 100) {
            Ok((entries, _)) => assert!(entries.len() <= 50),
            Err(error) => assert_eq!(error, libc::EINVAL),
        }
    }
    assert_eq!(guest.names(NodeId::ROOT).len(), 50);
}

#[test]
fn names_that_are_no_text_are_listed() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let odd = b"\xff\x1b[31m\n";
    fs::write(folder.path().join(std::ffi::OsStr::from_bytes(odd)), b"odd").unwrap();
    let mut guest = guest_of(folder.path());
    let (entries, _) = guest.list(NodeId::ROOT, 0, 10).unwrap();
    assert_eq!(entries[0].name.as_bytes(), odd);
    let looked = guest.entry(FileOp::Lookup(NodeId::ROOT, entries[0].name.clone())).unwrap();
    assert_eq!(looked, entries[0].attributes);
}

/// Each entry is one reference, each lookup another; when all are given back nothing is left.
#[test]
fn references_given_back_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for number in 0..20 {
        fs::create_dir_all(folder.path().join(format!("a/{number}/b"))).unwrap();
    }
    let host = Host::new(folder.path());
    let mut guest = host.guest();
    let mut known = Vec::new();
    let mut folders = vec![NodeId::ROOT];
    while let Some(at) = folders.pop() {
        for entry in guest.list(at, 0, 1000).unwrap().0 {
            let node = entry.attributes.node;
            assert_eq!(guest.entry(FileOp::Lookup(at, entry.name)).unwrap().node, node);
            known.push((node, 2));
            folders.push(node);
        }
    }
    assert_eq!(known.len(), 41);
    assert_eq!(host.share.nodes().held().0, 42);
    // Folders first: they must stay until nothing known lies in them.
    guest.stream.send(0, FileOp::Forget(known));
    until(|| host.share.nodes().held() == (1, 0));
}

/// A guest's counts are not trusted: too many, unknown nodes, the root.
#[test]
fn a_flood_of_forgets_harms_the_guest_alone() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), b"x").unwrap();
    let host = Host::new(folder.path());
    let mut guest = host.guest();
    let file = guest.walk("f").unwrap();
    let flood: Vec<_> = (0..30_000).map(|number| (NodeId(1 << 60 | number), u64::MAX)).collect();
    for _ in 0..20 {
        guest.stream.send(0, FileOp::Forget(flood.clone()));
    }
    guest.stream.send(0, FileOp::Forget(vec![(file, u64::MAX), (file, 1), (NodeId::ROOT, u64::MAX)]));
    // Forgets are not answered, and other threads may be quicker.
    until(|| guest.read(file, 0, 1).is_err());
    assert_eq!(guest.attributes(file), Err(libc::ESTALE));
    assert_eq!(guest.attributes(NodeId::ROOT).unwrap().kind, FileKind::Folder);
    let again = guest.look(NodeId::ROOT, "f").unwrap().node;
    assert_eq!(again, file, "the id derives from the inode");
    assert_eq!(guest.read(again, 0, 1).unwrap(), b"x");
}
