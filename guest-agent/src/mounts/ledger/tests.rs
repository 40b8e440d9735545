//! Requests and replies without a kernel.

use dhow_protocol::codec::{from_bytes, to_bytes};
use dhow_protocol::files::{Attributes, FileKind, LinkTarget, Name, Space};

use super::super::answer::tests::{attributes, listed};
use super::super::uapi::{Message, opcode};
use super::*;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// A request of the kernel.
fn request(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let mut to = Message::default();
    to.u32(40 + body.len() as u32).u32(opcode).u64(unique).u64(node).u32(0).u32(0).u32(1).u32(0);
    to.0.extend_from_slice(body);
    to.0
}

fn numbers(words: &[u32], names: &str) -> Vec<u8> {
    let mut to = Message::default();
    words.iter().for_each(|word| {
        to.u32(*word);
    });
    to.0.extend_from_slice(names.as_bytes());
    to.0
}

fn mkdir(unique: u64) -> Vec<u8> {
    request(opcode::MKDIR, unique, 1, &numbers(&[0o755, 0], "new\0"))
}

fn rename(unique: u64, flags: u32) -> Vec<u8> {
    request(opcode::RENAME2, unique, 1, &numbers(&[1, 0, flags, 0], "a\0b\0"))
}

fn readdir(unique: u64, offset: u64) -> Vec<u8> {
    let mut to = Message::default();
    to.u64(0).u64(offset).u32(4096).u32(0).u64(0).u32(0).u32(0);
    request(opcode::READDIRPLUS, unique, 7, &to.0)
}

/// What goes to the host.
fn asked(step: Step<'_>) -> FileRequest {
    match step {
        Step::Ask(request) => request,
        Step::Write(write) => from_bytes(&to_bytes(&write).unwrap()).unwrap(),
        other => panic!("{other:?}"),
    }
}

fn told(next: Option<Next<'_>>) -> Answer<'_> {
    match next {
        Some(Next::Tell(answer)) => answer,
        other => panic!("{other:?}"),
    }
}

fn ok(ledger: &mut Ledger, unique: u64, answer: FileAnswer) -> Option<Next<'static>> {
    ledger.reply(Reply::Other(FileReply { unique, result: Ok(answer) }))
}

fn err(ledger: &mut Ledger, unique: u64, error: i32) -> Option<Next<'static>> {
    ledger.reply(Reply::Other(FileReply { unique, result: Err(Errno(error)) }))
}

fn folder(node: u64) -> Attributes {
    Attributes { kind: FileKind::Folder, ..attributes(node) }
}

#[test]
fn a_request_is_answered_once_and_under_its_latest_number() {
    let mut ledger = Ledger::default();
    assert_eq!(asked(ledger.request(&mkdir(8))).unique, 8);
    ledger.broken();
    // A reply of the stream that broke comes too late.
    assert_eq!(ok(&mut ledger, 8, FileAnswer::Entry(folder(9))), None);
    assert_eq!(ledger.attached(true), []);
    assert_eq!(asked(ledger.request(&mkdir(8 | UNIQUE_RESEND))).unique, 8);
    let answer = told(ok(&mut ledger, 8, FileAnswer::Entry(folder(9))));
    assert_eq!((answer.unique, answer.error, answer.given), (8 | UNIQUE_RESEND, 0, vec![NodeId(9)]));
    assert_eq!(ok(&mut ledger, 8, FileAnswer::Entry(folder(9))), None);
    assert_eq!(ledger.owed(), None);
}

#[test]
fn what_one_server_did_and_another_refuses_counts_as_done() {
    let mut ledger = Ledger::default();
    let lookup = |at: &str| FileOp::Lookup(NodeId::ROOT, name(at));
    let unlink = request(opcode::UNLINK, 4, 1, b"x\0");
    let link = request(opcode::LINK, 6, 1, &numbers(&[5, 0], "l\0"));
    let all = [mkdir(2), unlink, link, rename(8, 0), rename(10, 2)];
    all.iter().for_each(|request| drop(asked(ledger.request(request))));
    ledger.broken();
    assert_eq!(ledger.attached(false), []);
    let again = |unique: u64| {
        let mut request = all[unique as usize / 2 - 1].clone();
        request[8..16].copy_from_slice(&(unique | UNIQUE_RESEND).to_ne_bytes());
        request
    };
    [2, 4, 6, 8].into_iter().for_each(|unique| drop(asked(ledger.request(&again(unique)))));
    // Made: it is there.
    assert_eq!(
        err(&mut ledger, 2, libc::EEXIST),
        Some(Next::Ask(FileRequest { unique: 2, op: lookup("new") }))
    );
    let answer = told(ok(&mut ledger, 2, FileAnswer::Entry(folder(9))));
    assert_eq!((answer.error, answer.given), (0, vec![NodeId(9)]));
    // Removed: it is gone.
    assert_eq!(told(err(&mut ledger, 4, libc::ENOENT)).error, 0);
    // Linked: the name leads to the file.
    assert_eq!(
        err(&mut ledger, 6, libc::EEXIST),
        Some(Next::Ask(FileRequest { unique: 6, op: lookup("l") }))
    );
    assert_eq!(told(ok(&mut ledger, 6, FileAnswer::Entry(attributes(5)))).error, 0);
    // Moved: it is there, and the look at it is not the kernel's.
    assert_eq!(
        err(&mut ledger, 8, libc::ENOENT),
        Some(Next::Ask(FileRequest { unique: 8, op: lookup("b") }))
    );
    let answer = told(ok(&mut ledger, 8, FileAnswer::Entry(attributes(30))));
    assert_eq!((answer.error, answer.given), (0, vec![]));
    assert_eq!(ledger.owed().unwrap().op, FileOp::Forget(vec![(NodeId(30), 1)]));
    // Exchanged: nobody can tell.
    let Step::Tell(answer) = ledger.request(&again(10)) else { panic!("asked once more") };
    assert_eq!(answer.error, libc::EIO);
    assert!(ledger.doubtful.is_empty() && ledger.asked.is_empty() && ledger.open.is_empty());
}

#[test]
fn other_errors_of_a_second_look_stand() {
    for found in [Ok(FileAnswer::Entry(attributes(9))), Err(Errno(libc::ENOENT)), Ok(FileAnswer::Done)] {
        let mut ledger = Ledger::default();
        asked(ledger.request(&mkdir(2)));
        ledger.broken();
        ledger.attached(false);
        asked(ledger.request(&mkdir(2 | UNIQUE_RESEND)));
        assert!(matches!(err(&mut ledger, 2, libc::EEXIST), Some(Next::Ask(_))));
        // A file is no folder.
        let owes = matches!(found, Ok(FileAnswer::Entry(_)));
        let answer = told(ledger.reply(Reply::Other(FileReply { unique: 2, result: found })));
        assert_eq!((answer.error, answer.given), (libc::EEXIST, vec![]));
        assert_eq!(ledger.owed().is_some(), owes);
    }
}

#[test]
fn without_doubt_an_error_is_an_error() {
    let mut ledger = Ledger::default();
    // New here, and new after the server was replaced.
    for resumed in [true, false] {
        ledger.attached(resumed);
        asked(ledger.request(&mkdir(2)));
        assert_eq!(told(err(&mut ledger, 2, libc::EEXIST)).error, libc::EEXIST);
    }
    // Sent again to the same server, which remembers.
    asked(ledger.request(&mkdir(4)));
    ledger.broken();
    ledger.attached(true);
    asked(ledger.request(&mkdir(4 | UNIQUE_RESEND)));
    assert_eq!(told(err(&mut ledger, 4, libc::EEXIST)).error, libc::EEXIST);
}

#[test]
fn a_new_worker_doubts_what_it_did_not_see() {
    for (resumed, doubts) in [(true, false), (false, true)] {
        let mut ledger = Ledger::adopted();
        ledger.attached(resumed);
        asked(ledger.request(&mkdir(4 | UNIQUE_RESEND)));
        let next = err(&mut ledger, 4, libc::EEXIST);
        assert_eq!(matches!(next, Some(Next::Ask(_))), doubts, "{next:?}");
        asked(ledger.request(&mkdir(6)));
        assert_eq!(told(err(&mut ledger, 6, libc::EEXIST)).error, libc::EEXIST);
    }
}

#[test]
fn a_new_server_is_told_what_the_kernel_knows() {
    let mut ledger = Ledger::default();
    asked(ledger.request(&mkdir(2)));
    told(ok(&mut ledger, 2, FileAnswer::Entry(folder(7))));
    let lookup = |unique, at: &[u8]| request(opcode::LOOKUP, unique, 7, at);
    asked(ledger.request(&lookup(4, b"in\0")));
    told(ok(&mut ledger, 4, FileAnswer::Entry(attributes(8))));
    asked(ledger.request(&lookup(6, b"lost\0")));
    let lost = told(ok(&mut ledger, 6, FileAnswer::Entry(attributes(9))));
    ledger.not_taken(lost.given);
    let restored = |ledger: &mut Ledger| match ledger.attached(false).pop() {
        Some(FileOp::Restore(nodes)) => nodes.iter().map(|node| (node.folder.0, node.node.0)).collect(),
        None => Vec::new(),
        other => panic!("{other:?}"),
    };
    assert_eq!(restored(&mut ledger), [(1, 7), (7, 8)]);
    // What was owed to the last server means nothing to the next.
    assert_eq!(ledger.owed(), None);
    let mut forget = Message::default();
    forget.u32(2).u32(0).u64(8).u64(1).u64(7).u64(1);
    let forget = request(opcode::BATCH_FORGET, 0, 0, &forget.0);
    assert_eq!(asked(ledger.request(&forget)).op, FileOp::Forget(vec![(NodeId(8), 1), (NodeId(7), 1)]));
    assert_eq!(restored(&mut ledger), []);
}

#[test]
fn a_large_folder_is_asked_for_once() {
    let mut ledger = Ledger::default();
    assert!(matches!(asked(ledger.request(&readdir(2, 0))).op, FileOp::ReadFolder { cookie: 0, .. }));
    let entries = (0..100).map(|n| listed(format!("name-{n}").as_bytes(), 100 + n, 1000 + n)).collect();
    let first = told(ok(&mut ledger, 2, FileAnswer::Entries { entries, end: true }));
    // All these names take as much room.
    let names = |answer: &Answer| answer.body.len() as u64 / 160;
    let (mut listed, mut given) = (names(&first) - 2, first.given.len());
    assert!((10..50).contains(&listed));
    // The guest changes one of those that wait, and removes another.
    asked(ledger.request(&request(opcode::WRITE, 50, 199, &[0; 40])));
    told(ok(&mut ledger, 50, FileAnswer::Written(0)));
    asked(ledger.request(&request(opcode::UNLINK, 52, 7, b"name-98\0")));
    told(ok(&mut ledger, 52, FileAnswer::Done));
    while listed < 99 {
        let Step::Tell(answer) = ledger.request(&readdir(54, 1000 + listed - 1)) else { panic!("asked") };
        assert_eq!(answer.error, 0);
        listed += names(&answer);
        given += answer.given.len();
    }
    assert_eq!((listed, given), (99, 98));
    let owed = FileOp::Forget(vec![(NodeId(198), 1), (NodeId(199), 1)]);
    assert_eq!(ledger.owed().unwrap().op, owed);
    // Its end is known, too.
    let Step::Tell(end) = ledger.request(&readdir(60, 1099)) else { panic!("asked for its end") };
    assert_eq!((end.error, end.body.len()), (0, 0));
    assert!(matches!(ledger.request(&readdir(62, 1099)), Step::Ask(_)));
}

#[test]
fn what_waits_of_a_folder_is_given_back_when_the_stream_breaks() {
    let mut ledger = Ledger::default();
    asked(ledger.request(&readdir(2, 0)));
    let entries = (0..100).map(|n| listed(format!("name-{n}").as_bytes(), 100 + n, 1000 + n)).collect();
    let given = told(ok(&mut ledger, 2, FileAnswer::Entries { entries, end: false })).given.len();
    ledger.broken();
    ledger.attached(true);
    let Some(FileRequest { op: FileOp::Forget(nodes), .. }) = ledger.owed() else { panic!("nothing owed") };
    assert_eq!(nodes.len(), 100 - given);
}

#[test]
fn bytes_of_a_file_pass_as_they_are() {
    let mut read = Message::default();
    read.u64(0).u64(0).u32(5).u32(0).u64(0).u64(0);
    let reply = |unique, data| Reply::Data(DataReply { unique, data });
    for (data, fits) in [(&b""[..], true), (b"hello", true), (b"hello!", false)] {
        let mut ledger = Ledger::default();
        asked(ledger.request(&request(opcode::READ, 2, 7, &read.0)));
        assert_eq!(ledger.reply(reply(4, data)), None);
        let answer = told(ledger.reply(reply(2, data)));
        assert_eq!(answer.error, if fits { 0 } else { libc::EIO });
        assert_eq!(matches!(answer.body, Cow::Borrowed(body) if body == data), fits);
        assert_eq!(ledger.reply(reply(2, data)), None);
    }
    // To something else it is a wrong answer.
    let mut ledger = Ledger::default();
    asked(ledger.request(&mkdir(2)));
    assert_eq!(told(ledger.reply(reply(2, b"x"))).error, libc::EIO);
}

#[test]
fn no_answer_is_too_strange() {
    let target = LinkTarget::new(*b"x").unwrap();
    let space =
        Space { block_size: 0, blocks: 0, free: 0, available: 0, files: 0, files_free: 0, name_max: 0 };
    let entries = |node| FileAnswer::Entries { entries: vec![listed(b"a", node, 1)], end: false };
    let answers = [
        FileAnswer::Attached { resumed: false },
        FileAnswer::Done,
        FileAnswer::Entry(attributes(0)),
        FileAnswer::Entry(attributes(1)),
        FileAnswer::Entry(attributes(u64::MAX)),
        FileAnswer::Attributes(attributes(0)),
        entries(0),
        entries(1),
        FileAnswer::Entries { entries: Vec::new(), end: false },
        FileAnswer::Data(vec![0; 5000]),
        FileAnswer::Written(u32::MAX),
        FileAnswer::Target(target),
        FileAnswer::Space(space),
    ];
    let requests = |unique| {
        let mut read = Message::default();
        read.u64(0).u64(0).u32(4096).u32(0).u64(0).u64(0);
        let two = |opcode, body: &[u8]| request(opcode, unique, 7, body);
        [
            (two(opcode::LOOKUP, b"a\0"), 1),
            (two(opcode::GETATTR, &[0; 16]), 0),
            (two(opcode::SETATTR, &[0; 88]), 0),
            (two(opcode::READ, &read.0), 0),
            (two(opcode::WRITE, &[0; 40]), 0),
            (two(opcode::READLINK, &[]), 1),
            (two(opcode::STATFS, &[]), 1),
            (two(opcode::LINK, &numbers(&[5, 0], "l\0")), 0),
            (two(opcode::FSYNC, &[0; 16]), 1),
            (readdir(unique, 9), 0),
            (mkdir(unique), 1),
            (rename(unique, 0), 1),
        ]
    };
    let mut unique = 0;
    for at in 0..requests(0).len() {
        let mut fine = 0;
        for answer in answers.clone() {
            unique += 2;
            let (request, _) = &requests(unique)[at];
            let mut ledger = Ledger::default();
            asked(ledger.request(request));
            let answer = told(ok(&mut ledger, unique, answer));
            assert!(matches!(answer.error, 0 | libc::EIO), "{answer:?}");
            fine += usize::from(answer.error == 0);
        }
        assert_eq!(fine, requests(0)[at].1, "request {at}");
    }
    for error in [0, i32::MIN, i32::MAX, -2, 4000, libc::ENOSYS] {
        let mut ledger = Ledger::default();
        asked(ledger.request(&mkdir(2)));
        let told = told(err(&mut ledger, 2, error));
        assert!((1..512).contains(&told.error) && told.error != libc::ENOSYS);
    }
}
