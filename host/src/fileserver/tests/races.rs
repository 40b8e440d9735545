//! Races with a host program (or another share's guest) that swaps names all the time.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use dhow_protocol::files::{FileOp, NodeId};
use rustix::fs::{CWD, RenameFlags};

use super::guest::{Guest, Host, ROOT_FILE, name, target, until};

/// Rounds of each race; each has a few requests.
const ROUNDS: u32 = 1500;

/// Swaps two names again and again while `with` runs.
fn while_swapping(one: &Path, two: &Path, with: impl FnOnce()) {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                rustix::fs::renameat_with(CWD, one, CWD, two, RenameFlags::EXCHANGE).unwrap();
            }
        });
        // Ends the swapping when `with` panics, too.
        let _end = End(&over);
        with();
    });
}

struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_folder_that_flips_to_a_symlink_never_leads_outside() {
    let folder = tempfile::tempdir().unwrap();
    let share = folder.path().join("share");
    let outside = folder.path().join("outside");
    fs::create_dir_all(share.join("a/d")).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(share.join("a/d/f"), b"inside").unwrap();
    fs::write(outside.join("f"), b"secret").unwrap();
    symlink("../../outside", share.join("a/l")).unwrap();
    let host = Host::new(&share);
    let mut guest = host.guest();
    let (mut read, mut round) = (0, 0);
    while_swapping(&share.join("a/d"), &share.join("a/l"), || {
        until(|| {
            round += 1;
            host.share.nodes().drop_cache();
            let above = guest.walk("a").unwrap();
            for text in ["d", "l"] {
                let Ok(node) = guest.look(above, text).map(|found| found.node) else { continue };
                if let Ok(file) = guest.look(node, "f") {
                    host.share.nodes().drop_cache();
                    if let Ok(data) = guest.read(file.node, 0, 100) {
                        assert_eq!(data, b"inside");
                        read += 1;
                    }
                    let _ = guest.write(file.node, 0, b"inside");
                }
                let text = format!("new-{round}");
                let _ = guest.create(node, &text);
                let _ = guest.entry(FileOp::CreateSymlink(node, name("s"), target("f"), ROOT_FILE));
                let _ = guest.done(FileOp::RemoveFile(node, name(&text)));
            }
            round >= ROUNDS && read > 0
        });
    });
    assert_eq!(fs::read(outside.join("f")).unwrap(), b"secret");
    let left: Vec<_> = fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["f"], "something was made outside");
}

#[test]
fn a_file_that_flips_to_a_symlink_or_a_fifo_is_read_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("outside"), b"secret").unwrap();
    for other in ["l", "fifo"] {
        let share = folder.path().join(format!("share-{other}"));
        fs::create_dir(&share).unwrap();
        fs::write(share.join("f"), b"inside").unwrap();
        symlink("../outside", share.join("l")).unwrap();
        rustix::fs::mkfifoat(CWD, share.join("fifo"), 0o600.into()).unwrap();
        let mut guest = Host::new(&share).guest();
        let (mut read, mut round) = (0, 0);
        while_swapping(&share.join("f"), &share.join(other), || {
            until(|| {
                round += 1;
                for text in ["f", other] {
                    read += u32::from(touch(&mut guest, text));
                }
                round >= ROUNDS && read > 0
            });
        });
    }
    assert_eq!(fs::read(folder.path().join("outside")).unwrap(), b"secret");
}

/// Reads and writes what a name is now; whether it could be read.
fn touch(guest: &mut Guest, text: &str) -> bool {
    let Ok(found) = guest.look(NodeId::ROOT, text) else { return false };
    if let Err(error) = guest.write(found.node, 0, b"inside") {
        assert!([libc::ESTALE, libc::ELOOP, libc::ENXIO].contains(&error), "{error}");
    }
    match guest.read(found.node, 0, 100) {
        Ok(data) => {
            assert_eq!(data, b"inside");
            true
        }
        Err(error) => {
            assert!([libc::ESTALE, libc::ELOOP, libc::ENXIO].contains(&error), "{error}");
            false
        }
    }
}

/// Requests of one guest, at once, on the same names: no hang, no panic, no lost node.
#[test]
fn many_requests_at_once_on_the_same_names() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::new(folder.path());
    let guest = host.guest();
    let mut sender = super::guest::Stream::new(guest.stream.0.try_clone().unwrap());
    let mut receiver = guest.stream;
    let root = NodeId::ROOT;
    let count = 4000;
    let asking = thread::spawn(move || {
        for number in 0..count {
            let text = name(&format!("n{}", number % 5));
            let other = name(&format!("n{}", number % 3));
            let op = match number % 6 {
                0 => FileOp::CreateFile(root, text, ROOT_FILE),
                1 => FileOp::CreateFolder(root, text, ROOT_FILE),
                2 => FileOp::Rename {
                    from: (root, text),
                    to: (root, other),
                    mode: dhow_protocol::files::RenameMode::Replace,
                },
                3 => FileOp::RemoveFile(root, text),
                4 => FileOp::RemoveFolder(root, text),
                _ => FileOp::ReadFolder { node: root, cookie: 0, limit: 100 },
            };
            sender.send(1000 + 2 * number, op);
        }
    });
    let mut answered: Vec<_> = (0..count).map(|_| receiver.receive().unwrap().unique).collect();
    asking.join().unwrap();
    answered.sort_unstable();
    assert_eq!(answered, (0..count).map(|number| 1000 + 2 * number).collect::<Vec<_>>());
}
