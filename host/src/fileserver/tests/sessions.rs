//! Streams: attaching, answers that come exactly once, and what is no frame.

use std::fs;
use std::io::Write;
use std::net::Shutdown;

use dhow_protocol::codec::FILE_LIMIT;
use dhow_protocol::files::{Errno, FileAnswer, FileOp, FileReply, NodeId};

use super::guest::{Guest, Host, MOUNT, ROOT_FILE, Stream, name};

#[test]
fn a_stream_begins_by_attaching() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::new(folder.path());
    let mut stream = host.stream();
    stream.send(6, FileOp::GetAttributes(NodeId::ROOT));
    assert_eq!(stream.receive(), Some(FileReply { unique: 6, result: Err(Errno(libc::EPROTO)) }));
    assert_eq!(stream.receive(), None);
    let (mut guest, resumed) = Guest::attach(host.stream(), MOUNT);
    assert!(!resumed);
    assert_eq!(guest.ask(FileOp::Attach { mount: MOUNT }), Err(libc::EINVAL));
    assert!(guest.attributes(NodeId::ROOT).is_ok());
}

#[test]
fn a_mount_goes_on_over_another_stream() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), b"data").unwrap();
    let host = Host::new(folder.path());
    let mut guest = host.guest();
    let file = guest.walk("f").unwrap();
    // The old stream is not even broken yet: the new one takes over.
    let (mut next, resumed) = Guest::attach(host.stream(), MOUNT);
    assert!(resumed);
    assert_eq!(next.read(file, 0, 10).unwrap(), b"data");
    assert_eq!(guest.stream.receive(), None);
    drop(next);
    let (mut next, resumed) = Guest::attach(host.stream(), MOUNT);
    assert!(resumed);
    assert_eq!(next.read(file, 0, 10).unwrap(), b"data");
}

#[test]
fn another_mount_knows_nothing_of_the_one_before() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("a/b/c")).unwrap();
    let host = Host::new(folder.path());
    let mut guest = host.guest();
    let known = guest.walk("a/b/c").unwrap();
    guest.create(known, "f").unwrap();
    assert!(host.share.nodes().held().0 > 4);
    let (mut next, resumed) = Guest::attach(host.stream(), [2; 16]);
    assert!(!resumed);
    assert_eq!(host.share.nodes().held(), (1, 0));
    assert_eq!(next.attributes(known), Err(libc::ESTALE));
    assert_eq!(next.walk("a/b/c").unwrap(), known);
    // Its requests are its own, though their numbers are those of the old mount.
    assert_eq!(next.create(known, "g").map(|_| ()), Ok(()));
}

/// Every request is a change that would show if it were done twice or not at all. The stream breaks
/// all the time, before, while or after it is done.
#[test]
fn changes_are_applied_exactly_once_over_breaking_streams() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::new(folder.path());
    let mut stream = host.guest().stream;
    let root = NodeId::ROOT;
    for number in 0..300_u64 {
        let old = name(&format!("f{number}"));
        let new = name(&format!("g{number}"));
        let ops = [
            FileOp::CreateFile(root, old.clone(), ROOT_FILE),
            FileOp::Rename {
                from: (root, old.clone()),
                to: (root, new.clone()),
                mode: dhow_protocol::files::RenameMode::NoReplace,
            },
            FileOp::CreateFolder(root, old.clone(), ROOT_FILE),
            FileOp::RemoveFolder(root, old),
            FileOp::RemoveFile(root, new),
        ];
        for (step, op) in (0..).zip(ops) {
            let unique = 10 + 20 * number + 2 * step;
            stream.send(unique, op.clone());
            let breaks = (number + step) % 3;
            for _ in 0..breaks {
                // With luck the answer is on its way, or the request is only half done.
                if (number / 3 + step) % 2 == 0 {
                    stream.0.shutdown(Shutdown::Both).unwrap();
                }
                let (guest, resumed) = Guest::attach(host.stream(), MOUNT);
                assert!(resumed);
                stream = guest.stream;
                stream.send(unique, op.clone());
            }
            let reply = stream.receive().unwrap();
            assert_eq!(reply.unique, unique);
            assert!(reply.result.is_ok(), "{op:?}: {reply:?}");
        }
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_request_sent_twice_on_one_stream_is_done_once() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::new(folder.path());
    let mut stream = host.guest().stream;
    let create = FileOp::CreateFile(NodeId::ROOT, name("f"), ROOT_FILE);
    stream.send(8, create.clone());
    let first = stream.receive().unwrap();
    assert!(matches!(first.result, Ok(FileAnswer::Entry(_))));
    stream.send(8, create.clone());
    assert_eq!(stream.receive().unwrap(), first);
    stream.send(10, create);
    assert_eq!(stream.receive().unwrap().result, Err(Errno(libc::EEXIST)));
}

/// What a hostile or broken guest could send. Each stream ends; the server does not.
#[test]
fn what_is_no_frame_ends_the_stream_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), b"data").unwrap();
    let host = Host::new(folder.path());
    let frame = |body: &[u8]| [&u32::try_from(body.len()).unwrap().to_le_bytes()[..], body].concat();
    let limit = u32::try_from(FILE_LIMIT).unwrap();
    let bad: Vec<Vec<u8>> = vec![
        (limit + 1).to_le_bytes().to_vec(),
        [0xff; 4].to_vec(),
        frame(b""),
        frame(b"\xff\xff\xff"),
        // Operation 99.
        frame(&[8, 99]),
        // A lookup of `..`, of `a/b`, of a NUL, of nothing.
        frame(b"\x08\x01\x01\x02.."),
        frame(b"\x08\x01\x01\x03a/b"),
        frame(b"\x08\x01\x01\x02a\0"),
        frame(b"\x08\x01\x01\x00"),
        // A list of 2^44 forgets.
        frame(&[0, 18, 253, 0, 0, 0, 0, 0, 16, 0, 0]),
        // Bytes after the request.
        frame(b"\x08\x02\x01\0"),
        // Noise.
        (0..100_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8).collect(),
    ];
    for attached in [true, false] {
        for bytes in &bad {
            let mut stream = if attached { host.guest().stream } else { host.stream() };
            // After the end the server does not read on, so that a write may fail.
            let _ = stream.0.write_all(bytes);
            let _ = stream.0.write_all(&frame(&[8, 2, 1]));
            assert_eq!(stream.receive(), None, "{:?}", &bytes[..bytes.len().min(20)]);
        }
    }
    // Truncated: the stream ends inside a frame.
    let mut stream = host.guest().stream;
    stream.0.write_all(&[200, 0, 0, 0, 1, 2]).unwrap();
    stream.0.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.receive(), None);
    let mut guest = host.guest();
    let file = guest.walk("f").unwrap();
    assert_eq!(guest.read(file, 0, 10).unwrap(), b"data");
}

/// A guest that asks and never reads holds up itself; the next stream of its mount frees it.
#[test]
fn a_guest_that_does_not_read_holds_up_nobody_else() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), vec![1; 1 << 20]).unwrap();
    let host = Host::new(folder.path());
    let mut guest = host.guest();
    let file = guest.walk("f").unwrap();
    for number in 0..16 {
        guest.stream.send(1000 + number * 2, FileOp::Read { node: file, offset: 0, size: 1 << 20 });
    }
    let (mut next, resumed) = Guest::attach(host.stream(), MOUNT);
    assert!(resumed);
    assert_eq!(next.read(file, 0, 1 << 20).unwrap().len(), 1 << 20);
}

#[test]
fn many_sessions_come_and_go() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::new(folder.path());
    for number in 0..200_u8 {
        let mut guest = Guest::attach(host.stream(), [number; 16]).0;
        assert!(guest.attributes(NodeId::ROOT).is_ok());
        if number % 2 == 0 {
            Stream::new(guest.stream.0.try_clone().unwrap()).0.shutdown(Shutdown::Both).unwrap();
        }
    }
    assert_eq!(host.share.nodes().held(), (1, 0));
}
