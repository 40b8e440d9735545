//! The node table alone: ids, and hints that lead in circles.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use dhow_protocol::files::NodeId;

use super::guest::name;
use crate::fileserver::host_fs::Identity;
use crate::fileserver::nodes::Nodes;

const DEVICE: u64 = 1 << 32 | 5;

fn file(device: u64, inode: u64) -> Identity {
    Identity { device, inode, birth: Some((1, 2)), format: libc::S_IFREG }
}

fn folder(inode: u64) -> Identity {
    Identity { format: libc::S_IFDIR, ..file(DEVICE, inode) }
}

fn table_of(random: u64) -> Nodes {
    let root: OwnedFd = std::fs::File::open("/").unwrap().into();
    Nodes::new(Arc::new(root), folder(2), 1000, random)
}

#[test]
fn ids_are_the_same_in_every_server() {
    let files = [file(DEVICE, 77), file(DEVICE + 1, 77), file(DEVICE + 2, 77), file(7, 5), file(DEVICE, 5)];
    let ids = |order: &[usize]| {
        let mut table = table_of(order.len() as u64);
        let mut ids = vec![NodeId(0); files.len()];
        for index in order {
            ids[*index] = table.enter(NodeId::ROOT, &name(&index.to_string()), &files[*index]);
        }
        ids
    };
    let first = ids(&[0, 1, 2, 3, 4]);
    assert_eq!(first[0], NodeId(77), "on the root's device it is the inode number");
    assert_eq!(ids(&[4, 2, 0, 3, 1]), first);
    let mut sorted = first.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), first.len());
}

/// Ids that do not derive from inodes are never given out by two servers for two files.
#[test]
fn counted_ids_of_two_servers_differ() {
    // With a birth time its id would be hashed.
    let far = Identity { birth: None, ..file(DEVICE, 1 << 60) };
    let mut one = table_of(u64::MAX);
    let mut two = table_of(12_345);
    let ids = [&mut one, &mut two].map(|table| table.enter(NodeId::ROOT, &name("f"), &far));
    assert_ne!(ids[0], ids[1]);
    assert!(ids.iter().all(|id| id.0 >> 63 == 1));
    assert!(!one.restore(NodeId::ROOT, &name("f"), &far, (ids[1], 1)));
    // Inode numbers 0 and 1 would be nobody's and the root's id.
    for inode in [0, 1] {
        assert!(one.enter(NodeId::ROOT, &name("g"), &file(DEVICE, inode)).0 >> 63 == 1);
    }
}

#[test]
fn a_reused_inode_number_is_another_node() {
    let mut table = table_of(0);
    let old = table.enter(NodeId::ROOT, &name("f"), &file(DEVICE, 77));
    let reused = Identity { birth: Some((9, 9)), ..file(DEVICE, 77) };
    let new = table.enter(NodeId::ROOT, &name("f"), &reused);
    assert_ne!(new, old);
    assert!(!table.restore(NodeId::ROOT, &name("f"), &reused, (old, 1)));
    table.forget(old, 1);
    assert_eq!(table.enter(NodeId::ROOT, &name("f"), &reused), new);
    table.forget(new, 2);
    assert_eq!(table.held(), (1, 0));
}

/// Its id is the same in a new server, which does not know the old file any more.
#[test]
fn a_file_with_a_reused_inode_number_is_restored() {
    let mut table = table_of(0);
    let old = file(DEVICE, 77);
    table.enter(NodeId::ROOT, &name("old"), &old);
    let reused = Identity { birth: Some((9, 9)), ..old };
    let new = table.enter(NodeId::ROOT, &name("new"), &reused);
    let mut next = table_of(1);
    assert!(!next.restore(NodeId::ROOT, &name("new"), &Identity { birth: Some((9, 8)), ..old }, (new, 1)));
    assert!(next.restore(NodeId::ROOT, &name("new"), &reused, (new, 1)));
    assert_eq!(next.enter(NodeId::ROOT, &name("new"), &reused), new);
    // Without a birth time the two cannot be told apart later.
    let unborn = Identity { birth: None, ..old };
    let counted = table.enter(NodeId::ROOT, &name("unborn"), &unborn);
    assert!(!table_of(2).restore(NodeId::ROOT, &name("unborn"), &unborn, (counted, 1)));
}

/// A bind mount can show a folder within itself, and a host that renames can make the hints do so.
#[test]
fn no_circle_of_folders_is_noted() {
    let mut table = table_of(0);
    let a = table.enter(NodeId::ROOT, &name("a"), &folder(10));
    let b = table.enter(a, &name("b"), &folder(11));
    assert_eq!(table.enter(a, &name("a"), &folder(10)), a);
    assert_eq!(table.enter(b, &name("a"), &folder(10)), a);
    assert_eq!(table.enter(b, &name("root"), &folder(2)), NodeId::ROOT);
    let (_, way) = table.way(b).unwrap();
    assert_eq!(way.iter().map(|(id, ..)| *id).collect::<Vec<_>>(), [a, b]);
    table.moved(a, b, &name("x"));
    assert_eq!(table.way(b).unwrap().1.len(), 2);
    table.forget(a, 3);
    table.forget(b, 1);
    assert_eq!(table.held(), (1, 0));
}
