//! Golden bytes and round trips of the file operations.

use super::*;
use crate::codec::{FILE_LIMIT, from_bytes, to_bytes, to_frame};
use proptest::prelude::*;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

#[test]
fn golden_bytes() {
    let request = |unique, op| to_bytes(&FileRequest { unique, op }).unwrap();
    assert_eq!(request(5, FileOp::Lookup(NodeId::ROOT, name("ab"))), [5, 1, 1, 2, b'a', b'b']);
    assert_eq!(
        request(6, FileOp::Read { node: NodeId(300), offset: 1, size: 1 << 20 }),
        [6, 5, 251, 44, 1, 1, 252, 0, 0, 16, 0]
    );
    assert_eq!(request(0, FileOp::Forget(vec![(NodeId(2), 3)])), [0, 18, 1, 2, 3]);
    let restored = RestoredNode { folder: NodeId::ROOT, name: name("ab"), node: NodeId(300), references: 2 };
    assert_eq!(request(1, FileOp::Restore(vec![restored])), [1, 19, 1, 1, 2, b'a', b'b', 251, 44, 1, 2]);
    let write = FileOp::Write { node: NodeId(2), offset: 0, data: vec![7, 8] };
    assert_eq!(request(9, write), [9, 6, 2, 0, 2, 7, 8]);
    let reply = FileReply { unique: 5, result: Err(Errno(2)) };
    assert_eq!(to_bytes(&reply).unwrap(), [5, 1, 4]);
    let reply = FileReply { unique: 5, result: Ok(FileAnswer::Attached { resumed: true }) };
    assert_eq!(to_bytes(&reply).unwrap(), [5, 0, 0, 1]);
}

#[test]
fn a_name_is_one_component() {
    for bad in [&b""[..], b".", b"..", b"/", b"a/b", b"/etc", b"a\0", &[b'x'; 256]] {
        assert!(Name::new(bad).is_err(), "{bad:?}");
        let mut wire = to_bytes(&FileOp::Lookup(NodeId::ROOT, name("x"))).unwrap();
        wire.truncate(2);
        wire.extend(to_bytes(&bad.to_vec()).unwrap());
        assert!(from_bytes::<FileOp>(&wire).is_err(), "{bad:?} decoded");
    }
    for good in [&b"a"[..], b"...", b".a", b"\xff\xfe", b"a b\n", &[b'x'; 255]] {
        assert_eq!(Name::new(good).unwrap().as_bytes(), good);
    }
}

#[test]
fn a_target_is_not_empty_and_has_no_nul() {
    assert!(LinkTarget::new(*b"").is_err());
    assert!(LinkTarget::new(*b"a\0b").is_err());
    assert!(LinkTarget::new(vec![b'x'; 4096]).is_err());
    assert!(LinkTarget::new(*b"../../etc/passwd").is_ok());
}

#[test]
fn the_largest_requests_and_answers_fit_a_frame() {
    let op = FileOp::Write { node: NodeId(u64::MAX), offset: u64::MAX, data: vec![1; MAX_IO] };
    assert!(to_frame(&FileRequest { unique: u64::MAX, op }, FILE_LIMIT).is_ok());
    let node = RestoredNode {
        folder: NodeId(u64::MAX),
        name: Name::new([b'x'; 255]).unwrap(),
        node: NodeId(u64::MAX),
        references: u64::MAX,
    };
    let op = FileOp::Restore(vec![node; MAX_RESTORED]);
    let frame = to_frame(&FileRequest { unique: u64::MAX, op }, FILE_LIMIT).unwrap();
    assert!(from_bytes::<FileRequest>(&frame[4..]).is_ok());
    let result = Ok(FileAnswer::Data(vec![1; MAX_IO]));
    assert!(to_frame(&FileReply { unique: u64::MAX, result }, FILE_LIMIT).is_ok());
}

fn any_name() -> impl Strategy<Value = Name> + Clone {
    proptest::collection::vec(any::<u8>(), 1..40).prop_filter_map("no name", |bytes| Name::new(bytes).ok())
}

fn any_target() -> impl Strategy<Value = LinkTarget> + Clone {
    proptest::collection::vec(1..=255u8, 1..60)
        .prop_filter_map("no target", |bytes| LinkTarget::new(bytes).ok())
}

fn any_node() -> impl Strategy<Value = NodeId> + Clone {
    any::<u64>().prop_map(NodeId)
}

fn any_restored() -> impl Strategy<Value = RestoredNode> {
    (any_node(), any_name(), any_node(), any::<u64>())
        .prop_map(|(folder, name, node, references)| RestoredNode { folder, name, node, references })
}

fn any_time() -> impl Strategy<Value = Time> + Clone {
    (any::<i64>(), 0..1_000_000_000u32).prop_map(|(seconds, nanos)| Time { seconds, nanos })
}

fn any_set_time() -> impl Strategy<Value = SetTime> + Clone {
    prop_oneof![Just(SetTime::Now), any_time().prop_map(SetTime::At)]
}

fn any_kind() -> impl Strategy<Value = FileKind> + Clone {
    proptest::sample::select(vec![
        FileKind::Regular,
        FileKind::Folder,
        FileKind::Symlink,
        FileKind::Fifo,
        FileKind::Socket,
        FileKind::CharDevice,
        FileKind::BlockDevice,
    ])
}

fn any_attributes() -> impl Strategy<Value = Attributes> + Clone {
    let times = (any_time(), any_time(), any_time());
    let numbers = any::<(u32, u64, u64, u32, u32, u32, u32)>();
    (any_node(), any_kind(), times, numbers).prop_map(|(node, kind, (atime, mtime, ctime), n)| Attributes {
        node,
        kind,
        mode: n.0,
        size: n.1,
        blocks: n.2,
        atime,
        mtime,
        ctime,
        links: n.3,
        uid: n.4,
        gid: n.5,
        block_size: n.6,
    })
}

fn any_op() -> impl Strategy<Value = FileOp> {
    let creation = any::<(u32, u32, u32)>().prop_map(|(mode, uid, gid)| Creation { mode, uid, gid });
    let place = (any_node(), any_name());
    let create = (any_node(), any_name(), creation);
    let set = (
        any::<(Option<u32>, Option<u32>, Option<u32>, Option<u64>)>(),
        proptest::option::of(any_set_time()),
        proptest::option::of(any_set_time()),
    )
        .prop_map(|((mode, uid, gid, size), atime, mtime)| SetAttributes {
            mode,
            uid,
            gid,
            size,
            atime,
            mtime,
        });
    let mode =
        proptest::sample::select(vec![RenameMode::Replace, RenameMode::NoReplace, RenameMode::Exchange]);
    let bytes = proptest::collection::vec(any::<u8>(), 0..100);
    prop_oneof![
        any::<[u8; 16]>().prop_map(|mount| FileOp::Attach { mount }),
        place.clone().prop_map(|(node, name)| FileOp::Lookup(node, name)),
        any_node().prop_map(FileOp::GetAttributes),
        (any_node(), set).prop_map(|(node, set)| FileOp::SetAttributes(node, set)),
        any::<(u64, u64, u32)>().prop_map(|(node, cookie, limit)| FileOp::ReadFolder {
            node: NodeId(node),
            cookie,
            limit
        }),
        any::<(u64, u64, u32)>().prop_map(|(node, offset, size)| FileOp::Read {
            node: NodeId(node),
            offset,
            size
        }),
        (any_node(), any::<u64>(), bytes).prop_map(|(node, offset, data)| FileOp::Write {
            node,
            offset,
            data
        }),
        create.clone().prop_map(|(node, name, new)| FileOp::CreateFile(node, name, new)),
        create.clone().prop_map(|(node, name, new)| FileOp::CreateFifo(node, name, new)),
        create.clone().prop_map(|(node, name, new)| FileOp::CreateFolder(node, name, new)),
        (create, any_target()).prop_map(|((node, name, new), to)| FileOp::CreateSymlink(node, name, to, new)),
        (any_node(), place.clone()).prop_map(|(node, (folder, name))| FileOp::Link { node, folder, name }),
        place.clone().prop_map(|(node, name)| FileOp::RemoveFile(node, name)),
        place.clone().prop_map(|(node, name)| FileOp::RemoveFolder(node, name)),
        (place.clone(), place, mode).prop_map(|(from, to, mode)| FileOp::Rename { from, to, mode }),
        any_node().prop_map(FileOp::ReadLink),
        (any_node(), any::<bool>()).prop_map(|(node, data_only)| FileOp::Sync { node, data_only }),
        any_node().prop_map(FileOp::StatFs),
        proptest::collection::vec((any_node(), any::<u64>()), 0..20).prop_map(FileOp::Forget),
        proptest::collection::vec(any_restored(), 0..20).prop_map(FileOp::Restore),
    ]
}

fn any_answer() -> impl Strategy<Value = FileAnswer> {
    let entry = (any_name(), any::<u64>(), any_attributes())
        .prop_map(|(name, cookie, attributes)| FolderEntry { name, cookie, attributes });
    let space = any::<(u32, u64, u64, u64, u64, u64, u32)>().prop_map(|n| Space {
        block_size: n.0,
        blocks: n.1,
        free: n.2,
        available: n.3,
        files: n.4,
        files_free: n.5,
        name_max: n.6,
    });
    prop_oneof![
        any::<bool>().prop_map(|resumed| FileAnswer::Attached { resumed }),
        Just(FileAnswer::Done),
        any_attributes().prop_map(FileAnswer::Entry),
        any_attributes().prop_map(FileAnswer::Attributes),
        (proptest::collection::vec(entry, 0..10), any::<bool>())
            .prop_map(|(entries, end)| FileAnswer::Entries { entries, end }),
        proptest::collection::vec(any::<u8>(), 0..100).prop_map(FileAnswer::Data),
        any::<u32>().prop_map(FileAnswer::Written),
        any_target().prop_map(FileAnswer::Target),
        space.prop_map(FileAnswer::Space),
    ]
}

proptest! {
    #[test]
    fn a_request_round_trips(unique: u64, op in any_op()) {
        let request = FileRequest { unique, op };
        prop_assert_eq!(from_bytes::<FileRequest>(&to_bytes(&request).unwrap()).unwrap(), request);
    }

    #[test]
    fn a_reply_round_trips(
        unique: u64,
        result in prop_oneof![any_answer().prop_map(Ok), any::<i32>().prop_map(|n| Err(Errno(n)))],
    ) {
        let reply = FileReply { unique, result };
        prop_assert_eq!(from_bytes::<FileReply>(&to_bytes(&reply).unwrap()).unwrap(), reply);
    }

    #[test]
    fn any_bytes_decode_or_fail_but_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = from_bytes::<FileRequest>(&bytes);
        let _ = from_bytes::<FileReply>(&bytes);
    }
}
