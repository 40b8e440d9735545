//! A file server that answers wrongly: who asked gets an error, and the mount lives on.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use dhow_protocol::files::{Errno, FileAnswer, FileOp, FileReply, FileRequest, FolderEntry, Name, NodeId};

use crate::harness::hand::{Hand, file, folder};
use crate::harness::{World, wait_for};

/// A mounted share whose server is the test.
fn by_hand() -> (World, Hand) {
    let world = World::unmounted(false);
    let hand = Hand::attach(&world, false);
    world.mount(false).unwrap();
    (world, hand)
}

/// The errno of what a path gives, and what was asked for it.
fn stat(path: PathBuf) -> thread::JoinHandle<Option<i32>> {
    thread::spawn(move || fs::symlink_metadata(path).err().and_then(|error| error.raw_os_error()))
}

/// The next request for a name.
fn next_lookup(hand: &mut Hand) -> FileRequest {
    let request = hand.next_of_interest();
    assert!(matches!(request.op, FileOp::Lookup(..)), "{request:?}");
    request
}

#[test]
fn errors_of_the_host_reach_who_asked() {
    let (world, mut hand) = by_hand();
    for (from_host, seen) in [
        (libc::EACCES, libc::EACCES),
        (libc::ENOSPC, libc::ENOSPC),
        (libc::EDQUOT, libc::EDQUOT),
        (libc::ENOSYS, libc::EOPNOTSUPP),
        (0, libc::EIO),
        (-5, libc::EIO),
        (512, libc::EIO),
        (i32::MAX, libc::EIO),
    ] {
        let waiting = stat(world.in_guest("name"));
        let request = next_lookup(&mut hand);
        hand.answer(request.unique, Err(Errno(from_host)));
        assert_eq!(waiting.join().unwrap(), Some(seen), "{from_host}");
    }
}

#[test]
fn a_wrong_answer_is_an_error_of_that_request_alone() {
    let (world, mut hand) = by_hand();
    let entries = |node| {
        let entry = FolderEntry { name: Name::new(*b"x").unwrap(), cookie: 7, attributes: file(node, 0) };
        FileAnswer::Entries { entries: vec![entry], end: true }
    };
    for wrong in [
        FileAnswer::Done,
        FileAnswer::Data(vec![0; 100_000]),
        FileAnswer::Attached { resumed: true },
        FileAnswer::Attributes(file(7, 0)),
        FileAnswer::Entry(file(0, 0)),
        FileAnswer::Entry(folder(1)),
        FileAnswer::Entry(file(5, u64::MAX)),
        entries(4),
    ] {
        let waiting = stat(world.in_guest("name"));
        let request = next_lookup(&mut hand);
        hand.answer(request.unique, Ok(wrong.clone()));
        assert_eq!(waiting.join().unwrap(), Some(libc::EIO), "{wrong:?}");
    }
    for wrong in [entries(0), entries(1), FileAnswer::Done] {
        let path = world.mounted.clone();
        let waiting = thread::spawn(move || fs::read_dir(path).and_then(|mut all| all.next().transpose()));
        let request = hand.next_of_interest();
        assert!(matches!(request.op, FileOp::ReadFolder { .. }), "{request:?}");
        hand.answer(request.unique, Ok(wrong.clone()));
        assert_eq!(waiting.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO), "{wrong:?}");
    }
    // Answers that nobody waits for, one of them for a request that was answered.
    let waiting = stat(world.in_guest("name"));
    let request = next_lookup(&mut hand);
    for unique in [0, 1, request.unique + 1, u64::MAX] {
        hand.answer(unique, Ok(FileAnswer::Done));
    }
    hand.answer(request.unique, Ok(FileAnswer::Entry(file(5, 3))));
    hand.answer(request.unique, Ok(FileAnswer::Entry(file(6, 3))));
    assert_eq!(waiting.join().unwrap(), None);
}

#[test]
fn more_bytes_than_were_asked_for_are_an_error() {
    let (world, mut hand) = by_hand();
    let path = world.in_guest("name");
    let waiting = thread::spawn(move || fs::read(path));
    loop {
        let request = hand.next_of_interest();
        match request.op {
            FileOp::Lookup(..) => hand.answer(request.unique, Ok(FileAnswer::Entry(file(5, 3)))),
            FileOp::Read { size, .. } => {
                let data = vec![0; size as usize + 1];
                hand.answer(request.unique, Ok(FileAnswer::Data(data)));
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    // The kernel asks for the page that it needs once more.
    let end = thread::spawn(move || {
        loop {
            let request = hand.next_of_interest();
            match request.op {
                FileOp::Read { .. } => hand.answer(request.unique, Ok(FileAnswer::Data(b"abc".to_vec()))),
                FileOp::Lookup(_, name) if name.as_bytes() == b"end" => break,
                FileOp::Lookup(..) => hand.answer(request.unique, Ok(FileAnswer::Entry(file(5, 3)))),
                other => panic!("{other:?}"),
            }
        }
    });
    let result = waiting.join().unwrap();
    assert!(result.as_ref().is_ok_and(|data| data == b"abc") || result.is_err(), "{result:?}");
    drop(stat(world.in_guest("end")));
    end.join().unwrap();
}

#[test]
fn what_is_no_frame_ends_the_stream_and_not_the_mount() {
    let (world, mut hand) = by_hand();
    let waiting = stat(world.in_guest("name"));
    let first = next_lookup(&mut hand);
    let good = dhow_protocol::codec::to_frame(
        &FileReply { unique: first.unique, result: Ok(FileAnswer::Entry(file(5, 3))) },
        dhow_protocol::codec::FILE_LIMIT,
    )
    .unwrap();
    let mut garbage: Vec<Vec<u8>> = vec![
        vec![0xff; 4],
        vec![0; 4],
        b"HTTP/1.1 200 OK\r\n\r\n".to_vec(),
        [&3u32.to_le_bytes()[..], &[9, 9, 9]].concat(),
    ];
    // A good frame with more than its value in it.
    let longer = u32::try_from(good.len() - 4 + 1).unwrap();
    garbage.push([&longer.to_le_bytes()[..], &good[4..], &[0]].concat());
    for bytes in garbage {
        hand.send(&bytes);
        // The guest ends it; what is open comes on the next one.
        hand.until_ended();
        hand = Hand::attach(&world, true);
        let again = next_lookup(&mut hand);
        assert_eq!(again, first);
    }
    // One that is cut.
    hand.send(&good[..good.len() - 1]);
    drop(hand);
    let mut hand = Hand::attach(&world, true);
    assert_eq!(next_lookup(&mut hand), first);
    hand.send(&good);
    assert_eq!(waiting.join().unwrap(), None);
}

#[test]
fn a_newer_stream_replaces_an_older_one() {
    let (world, mut old) = by_hand();
    let waiting = stat(world.in_guest("name"));
    let first = next_lookup(&mut old);
    // The old one hangs; its server never notices.
    let mut new = Hand::attach(&world, true);
    assert_eq!(new.mount, old.mount);
    let again = next_lookup(&mut new);
    assert_eq!(again, first);
    old.until_ended();
    new.answer(again.unique, Ok(FileAnswer::Entry(file(5, 3))));
    assert_eq!(waiting.join().unwrap(), None);
}

#[test]
fn a_mount_says_why_it_fails() {
    let world = World::unmounted(false);
    let mount = |path: &str| world.guest.mount(1, Path::new(path), false).unwrap_err();
    assert!(mount("/etc").contains("would hide the guest's own /etc"));
    assert!(mount("/").contains("would hide"));
    assert!(mount("relative").contains("absolute"));
    let path = world.mount_path();
    let path = path.to_str().unwrap();
    assert!(mount(path).contains("no file server"));
    // One that does not attach as it should.
    let mut hand = Hand::connect(&world);
    let attach = hand.next();
    hand.answer(attach.unique, Ok(FileAnswer::Done));
    hand.until_ended();
    assert!(mount(path).contains("no file server"));
    assert_eq!(world.guest.mounts(), [""; 0]);
    // What is in the way.
    world.connect();
    fs::write(world.guest.path(&world.mount_path()), "a file").unwrap();
    assert!(mount(path).contains("cannot be made a folder"));
    fs::remove_file(world.guest.path(&world.mount_path())).unwrap();
    // After a failure, a new stream: the share begins anew.
    world.connect();
    world.mount(false).unwrap();
    world.mount(false).unwrap();
    assert!(world.mount(true).unwrap_err().contains("mounted already"));
    assert!(mount("/tmp/elsewhere").contains("mounted already"));
    fs::write(world.in_guest("file"), "x").unwrap();
    assert_eq!(fs::read_to_string(world.on_host("file")).unwrap(), "x");
}

#[test]
fn folders_are_made_on_the_way_and_shares_lie_in_each_other() {
    let world = World::new();
    let inner = world.on_host("inner/most");
    fs::create_dir_all(&inner).unwrap();
    let server = crate::harness::server::FileServer::start(&inner, false);
    server.give(std::os::fd::AsFd::as_fd(&world.guest.open_files(2)));
    // Its folder is made in the outer share, which the same worker serves.
    let path = world.mount_path().join("made/on/the way");
    world.guest.mount(2, &path, false).unwrap();
    assert!(world.on_host("made/on/the way").is_dir());
    fs::write(world.in_guest("made/on/the way/file"), "x").unwrap();
    assert_eq!(fs::read_to_string(inner.join("file")).unwrap(), "x");
    let mounts = world.guest.mounts();
    assert_eq!(mounts.len(), 2);
    world.guest.unmount_all();
    assert_eq!(world.guest.mounts(), [""; 0]);
}

#[test]
fn a_mount_that_somebody_else_takes_away_is_forgotten() {
    let world = World::new();
    fs::write(world.in_guest("file"), "x").unwrap();
    let mut unmount = world.guest.command("umount");
    assert!(unmount.arg(world.mount_path()).status().unwrap().success());
    wait_for("it to be forgotten", || world.guest.mounts().is_empty().then_some(()));
    world.connect();
    // The stream may come to a share that is just being forgotten.
    wait_for("it to be mounted again", || {
        world.connect();
        world.mount(false).ok()
    });
    assert_eq!(fs::read_to_string(world.in_guest("file")).unwrap(), "x");
}

#[test]
fn a_large_folder_is_listed_in_few_round_trips() {
    let (world, mut hand) = by_hand();
    let path = world.mounted.clone();
    let listing = thread::spawn(move || {
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>()
    });
    let mut asked = 0;
    let mut at = 0u64;
    while at < 1000 {
        let request = hand.next_of_interest();
        let FileOp::ReadFolder { node: NodeId::ROOT, cookie, limit } = request.op else {
            panic!("{request:?}")
        };
        assert_eq!(cookie, if at == 0 { 0 } else { at + 100 });
        asked += 1;
        let entries = (at..1000).take(limit as usize).map(|n| FolderEntry {
            name: Name::new(format!("name-{n}")).unwrap(),
            cookie: n + 101,
            attributes: file(n + 10, 0),
        });
        let entries: Vec<_> = entries.collect();
        at += entries.len() as u64;
        hand.answer(request.unique, Ok(FileAnswer::Entries { entries, end: at == 1000 }));
    }
    let names = listing.join().unwrap();
    assert_eq!((names.len(), asked), (1000, 2));
    assert!(names.iter().enumerate().all(|(n, name)| *name == *format!("name-{n}")));
}
