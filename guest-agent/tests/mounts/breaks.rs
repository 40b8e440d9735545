//! What breaks: streams, the file server, the worker. Who waits goes on, and nothing happens twice.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use dhow_protocol::files::{FileAnswer, FileOp};

use crate::harness::hand::{Hand, file};
use crate::harness::relay::Relay;
use crate::harness::server::FileServer;
use crate::harness::{World, wait_for};

/// A world whose stream passes through the test.
fn relayed() -> (World, Relay) {
    let world = World::unmounted(false);
    let relay = Relay::new(&world);
    world.mount(false).unwrap();
    (world, relay)
}

/// Changes that fail when they are done twice, and how the host shows that they are done.
struct Change {
    name: &'static str,
    run: fn(&Path) -> io::Result<()>,
    is_done: fn(&Path) -> bool,
}

/// In an order in which each finds what it needs.
const CHANGES: [Change; 8] = [
    Change {
        name: "mkdir",
        run: |at| fs::create_dir(at.join("folder")),
        is_done: |at| at.join("folder").is_dir(),
    },
    Change {
        name: "create",
        run: |at| File::create_new(at.join("file")).map(drop),
        is_done: |at| at.join("file").is_file(),
    },
    Change {
        name: "symlink",
        run: |at| std::os::unix::fs::symlink("file", at.join("symlink")),
        is_done: |at| at.join("symlink").is_symlink(),
    },
    Change {
        name: "link",
        run: |at| fs::hard_link(at.join("file"), at.join("link")),
        is_done: |at| at.join("link").is_file(),
    },
    Change {
        name: "rename",
        run: |at| fs::rename(at.join("file"), at.join("moved")),
        is_done: |at| at.join("moved").is_file(),
    },
    Change {
        name: "exclusive rename",
        run: |at| {
            let (from, to) = (at.join("moved"), at.join("again"));
            let flags = rustix::fs::RenameFlags::NOREPLACE;
            Ok(rustix::fs::renameat_with(rustix::fs::CWD, from, rustix::fs::CWD, to, flags)?)
        },
        is_done: |at| at.join("again").is_file(),
    },
    Change {
        name: "unlink",
        run: |at| fs::remove_file(at.join("again")),
        is_done: |at| !at.join("again").exists(),
    },
    Change {
        name: "rmdir",
        run: |at| fs::remove_dir(at.join("folder")),
        is_done: |at| !at.join("folder").exists(),
    },
];

/// Does each change so that its answer is lost; `mend` then makes a new stream.
fn lose_each_answer(world: &mut World, mut relay: Relay, mend: fn(&mut World) -> Relay) {
    for change in CHANGES {
        let (host, mounted) = (world.host.clone(), world.mounted.clone());
        relay.lose_next_change();
        let running = thread::spawn(move || (change.run)(&mounted));
        wait_for(change.name, || (change.is_done)(&host).then_some(()));
        relay.cut();
        assert!(!running.is_finished(), "{} was answered", change.name);
        relay = mend(world);
        running.join().unwrap().unwrap_or_else(|error| panic!("{}: {error}", change.name));
    }
    assert_eq!(fs::read_dir(&world.mounted).unwrap().count(), 2);
}

#[test]
fn what_was_done_and_not_answered_is_not_done_again() {
    let (mut world, relay) = relayed();
    lose_each_answer(&mut world, relay, |world| Relay::new(world));
}

#[test]
fn what_a_killed_server_did_is_not_done_again() {
    let (mut world, relay) = relayed();
    lose_each_answer(&mut world, relay, |world| {
        world.server = FileServer::start(&world.host, false);
        Relay::new(world)
    });
}

/// Where its thread panics nobody mends the stream any more: whoever waits for it gets an error instead.
struct AbortOnPanic<'a>(&'a Path);

impl Drop for AbortOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            // Busy it is; its connection ends all the same.
            let _ = nix::mount::umount2(self.0, nix::mount::MntFlags::MNT_FORCE);
        }
    }
}

#[test]
fn streams_may_break_at_any_time() {
    let (world, mut relay) = relayed();
    let rounds = 60;
    let (done, over) = (AtomicU32::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|worker| {
                let (at, done) = (world.mounted.clone(), &done);
                scope.spawn(move || {
                    let mut log = File::options()
                        .append(true)
                        .create(true)
                        .open(at.join(format!("log-{worker}")))
                        .unwrap();
                    for round in 0..rounds {
                        let name = |what: &str| at.join(format!("{what}-{worker}-{round}"));
                        File::create_new(name("new")).unwrap().write_all(&[1; 100_000]).unwrap();
                        fs::create_dir(name("folder")).unwrap();
                        fs::rename(name("new"), name("folder").join("moved")).unwrap();
                        writeln!(log, "{round}").unwrap();
                        assert_eq!(fs::read(name("folder").join("moved")).unwrap().len(), 100_000);
                        fs::remove_file(name("folder").join("moved")).unwrap();
                        fs::remove_dir(name("folder")).unwrap();
                        done.fetch_add(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        let over = &over;
        let breaker = scope.spawn(|| {
            let _abort = AbortOnPanic(&world.mounted);
            let mut seen = 0;
            let mut cuts = 0;
            while !over.load(Ordering::SeqCst) {
                // Somewhere in the middle of something.
                thread::sleep(Duration::from_millis(7));
                relay.cut();
                cuts += 1;
                relay = Relay::new(&world);
                // Each stream gets something done, so that the test comes to its end. One that ended by
                // itself, because either side was not done with the last one, is replaced as the supervisor does.
                seen = wait_for("progress", || {
                    let now = done.load(Ordering::SeqCst);
                    (now > seen || over.load(Ordering::SeqCst) || relay.has_ended()).then_some(now)
                });
            }
            cuts
        });
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        over.store(true, Ordering::SeqCst);
        assert!(breaker.join().unwrap() > 3);
    });
    for worker in 0..4 {
        let log = fs::read_to_string(world.on_host(format!("log-{worker}"))).unwrap();
        assert_eq!(log, (0..rounds).map(|round| format!("{round}\n")).collect::<String>());
    }
    assert_eq!(fs::read_dir(&world.host).unwrap().count(), 4);
}

#[test]
fn a_mount_goes_on_with_a_new_server() {
    let (mut world, mut relay) = relayed();
    fs::create_dir_all(world.in_guest("a/b")).unwrap();
    fs::write(world.in_guest("a/b/file"), "0123456789").unwrap();
    let mut open = File::options().read(true).write(true).open(world.in_guest("a/b/file")).unwrap();
    let inode = std::os::unix::fs::MetadataExt::ino(&open.metadata().unwrap());
    relay.cut();
    let waiting = thread::spawn({
        let path = world.in_guest("a/b/new");
        move || fs::write(path, "made while nobody served")
    });
    world.server = FileServer::start(&world.host, false);
    let _relay = Relay::new(&world);
    waiting.join().unwrap().unwrap();
    assert_eq!(fs::read_to_string(world.on_host("a/b/new")).unwrap(), "made while nobody served");
    // What was open is the file that it was.
    open.seek(io::SeekFrom::Start(5)).unwrap();
    open.write_all(b"abc").unwrap();
    open.rewind().unwrap();
    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    assert_eq!(text, "01234abc89");
    assert_eq!(std::os::unix::fs::MetadataExt::ino(&open.metadata().unwrap()), inode);
}

#[test]
fn a_new_worker_takes_over_with_requests_in_flight() {
    let world = World::unmounted(false);
    let mut hand = Hand::attach(&world, false);
    let mount = hand.mount;
    let mounting = thread::scope(|scope| {
        let mounting = scope.spawn(|| world.mount(false));
        // The kernel needs no answer to begin.
        mounting.join().unwrap()
    });
    mounting.unwrap();
    let read = |name: &'static str| {
        let path = world.in_guest(name);
        thread::spawn(move || fs::read_to_string(path))
    };
    // Two programs wait; what they asked for has been read by the worker, and is not answered.
    let (one, two) = (read("one"), read("two"));
    let mut asked = [hand.next_of_interest(), hand.next_of_interest()];
    let old = world.guest.worker();
    assert_ne!(world.guest.kill_worker(), old);
    assert_eq!(world.guest.mounts(), [world.mount_path().to_str().unwrap()]);
    let three = read("three");
    let mut hand = Hand::attach(&world, true);
    assert_eq!(hand.mount, mount);
    let mut again = [hand.next_of_interest(), hand.next_of_interest()];
    asked.sort_by_key(|request| request.unique);
    again.sort_by_key(|request| request.unique);
    assert_eq!(again, asked);
    // And now everybody is served.
    let server = thread::spawn(move || {
        let mut open = again.to_vec();
        let mut read = 0;
        while read < 3 {
            let request = open.pop().unwrap_or_else(|| hand.next_of_interest());
            let answer = match request.op {
                FileOp::Lookup(_, name) => {
                    let node = match name.as_bytes() {
                        b"one" => 11,
                        b"two" => 12,
                        b"three" => 13,
                        other => panic!("{other:?}"),
                    };
                    FileAnswer::Entry(file(node, 2))
                }
                FileOp::Read { node, .. } => {
                    read += 1;
                    FileAnswer::Data(node.0.to_string().into_bytes())
                }
                other => panic!("{other:?}"),
            };
            hand.answer(request.unique, Ok(answer));
        }
        hand
    });
    assert_eq!(one.join().unwrap().unwrap(), "11");
    assert_eq!(two.join().unwrap().unwrap(), "12");
    assert_eq!(three.join().unwrap().unwrap(), "13");
    server.join().unwrap();
}

#[test]
fn the_worker_may_die_at_any_time() {
    let world = World::new();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..3)
            .map(|worker| {
                let at = world.mounted.clone();
                scope.spawn(move || {
                    for round in 0..40 {
                        let name = |what: &str| at.join(format!("{what}-{worker}-{round}"));
                        File::create_new(name("new")).unwrap().write_all(&[1; 50_000]).unwrap();
                        fs::create_dir(name("folder")).unwrap();
                        fs::rename(name("new"), name("folder").join("moved")).unwrap();
                        assert_eq!(fs::read(name("folder").join("moved")).unwrap().len(), 50_000);
                        fs::remove_dir_all(name("folder")).unwrap();
                    }
                })
            })
            .collect();
        let killer = scope.spawn(|| {
            let mut kills = 0;
            while !over.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(50));
                world.guest.kill_worker();
                world.connect();
                kills += 1;
            }
            kills
        });
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        over.store(true, Ordering::SeqCst);
        assert!(killer.join().unwrap() > 0);
    });
    assert_eq!(fs::read_dir(&world.host).unwrap().count(), 0);
}

#[test]
fn unmounting_lets_nobody_wait() {
    let (world, mut relay) = relayed();
    fs::write(world.in_guest("file"), "x").unwrap();
    let mut open = File::open(world.in_guest("file")).unwrap();
    relay.lose_next_change();
    // One that was asked and is never answered, and one that nobody even reads.
    let asked = thread::spawn({
        let path = world.in_guest("folder");
        move || fs::create_dir(path)
    });
    wait_for("the folder", || world.on_host("folder").exists().then_some(()));
    relay.cut();
    let unread = thread::spawn({
        let path = world.in_guest("other");
        move || fs::read(path)
    });
    world.guest.unmount(1).unwrap();
    assert!(asked.join().unwrap().is_err());
    assert!(unread.join().unwrap().is_err());
    assert!(open.read(&mut [0; 9]).is_err());
    assert_eq!(world.guest.mounts(), [""; 0]);
    assert!(world.guest.unmount(1).is_err());
    assert_eq!(fs::read_dir(&world.mounted).unwrap().count(), 0);
    // It can be mounted once more.
    let _relay = Relay::new(&world);
    world.mount(false).unwrap();
    assert_eq!(fs::read_to_string(world.in_guest("file")).unwrap(), "x");
    world.guest.unmount_all();
    assert_eq!(world.guest.mounts(), [""; 0]);
    // The parent holds nothing of it any more.
    world.guest.kill_worker();
    assert_eq!(world.guest.mounts(), [""; 0]);
}

#[test]
fn who_waits_for_a_stream_can_be_killed() {
    let (world, mut relay) = relayed();
    fs::write(world.in_guest("file"), "x").unwrap();
    relay.cut();
    let mut waiting = world.run("exec cat never-looked-up").spawn().unwrap();
    let state = |pid: u32| fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
    wait_for("it to wait for the share", || state(waiting.id()).contains("request_wait").then_some(()));
    waiting.kill().unwrap();
    let status = wait_for("its end", || waiting.try_wait().unwrap());
    assert!(!status.success());
    let _relay = Relay::new(&world);
    assert_eq!(fs::read_to_string(world.in_guest("file")).unwrap(), "x");
}

#[test]
fn signals_that_do_not_kill_do_not_disturb() {
    let world = World::unmounted(false);
    let mut hand = Hand::attach(&world, false);
    world.mount(false).unwrap();
    // A shell that catches the signal, and in the same process opens a file.
    let mut shell = world.run("trap ': > /dev/null' USR1; read line < file; echo \"$line\"");
    let mut shell = shell.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let pid = rustix::process::Pid::from_raw(shell.id() as i32).unwrap();
    let mut lookups = 0;
    loop {
        let request = hand.next_of_interest();
        rustix::process::kill_process(pid, rustix::process::Signal::USR1).unwrap();
        match request.op {
            FileOp::Lookup(..) => {
                lookups += 1;
                hand.answer(request.unique, Ok(FileAnswer::Entry(file(11, 6))));
            }
            FileOp::Read { .. } => {
                hand.answer(request.unique, Ok(FileAnswer::Data(b"lines\n".to_vec())));
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(lookups > 0);
    let mut text = String::new();
    shell.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "lines\n");
    assert!(shell.wait().unwrap().success());
}
