//! A parent and its worker, for real: the worker is this test binary, started again.

#![allow(clippy::unwrap_used, reason = "a test helper may fail loudly")]

use std::ffi::OsString;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dhow_parent::{Limits, Outcome, Parent, ParentLink, Spawn, WorkerCommand, inherited_fds};

/// Environment variable with the folder that worker and test share.
const FOLDER: &str = "DHOW_TEST_FOLDER";

fn parent(entry: &str, folder: &Path, restarts: u32) -> Parent {
    let argv = [
        std::env::current_exe().unwrap().into_os_string(),
        OsString::from(entry),
        OsString::from("--exact"),
        OsString::from("--ignored"),
        OsString::from("--nocapture"),
    ];
    let env = vec![(FOLDER.to_owned(), folder.display().to_string())];
    let limits = Limits { restarts, window: Duration::from_secs(30) };
    Parent::new(WorkerCommand { argv: argv.into(), env }, limits, false).unwrap()
}

fn folder() -> Option<PathBuf> {
    std::env::var_os(FOLDER).map(PathBuf::from)
}

#[test]
fn fds_and_children_outlive_a_killed_worker() {
    let dir = tempfile::tempdir().unwrap();
    let mut parent = parent("worker_that_dies_once", dir.path(), 3);
    let mut file = tempfile::tempfile_in(dir.path()).unwrap();
    parent.hold("given", file.as_fd().try_clone_to_owned().unwrap());
    assert_eq!(parent.run(), Outcome::ShutDown);
    let report = std::fs::read_to_string(dir.path().join("second")).unwrap();
    assert!(report.contains("given made"), "{report}");
    assert!(report.contains("child sleeper"), "{report}");
    assert!(report.contains("exit sleeper 9"), "{report}");
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "first second ");
    assert!(parent.children().is_empty());
}

#[test]
fn a_worker_that_keeps_dying_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let mut parent = parent("worker_that_dies", dir.path(), 3);
    assert_eq!(parent.run(), Outcome::GaveUp);
    assert_eq!(std::fs::read_to_string(dir.path().join("starts")).unwrap().len(), 4);
    assert_eq!(parent.rest(Duration::from_millis(20)), None);
    // To this thread, which the parent has block it.
    nix::sys::signal::raise(nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(parent.rest(Duration::from_secs(600)), Some(Outcome::ShutDown));
    assert_eq!(std::fs::read_to_string(dir.path().join("starts")).unwrap().len(), 4);
}

#[tokio::test]
#[ignore = "the worker of the test above, not a test"]
async fn worker_that_dies_once() {
    let Some(dir) = folder() else { return };
    let mut inherited = inherited_fds().unwrap();
    let (link, mut restored) = ParentLink::connect(&mut inherited).unwrap();
    let mut given = std::fs::File::from(restored.fds.remove("given").unwrap());
    if !dir.join("first").exists() {
        std::fs::write(dir.join("first"), "").unwrap();
        given.write_all(b"first ").unwrap();
        link.hold("made", given.as_fd()).await.unwrap();
        link.hold("gone", given.as_fd()).await.unwrap();
        link.release("gone").await.unwrap();
        let argv = vec!["/bin/sleep".to_owned(), "600".to_owned()];
        let spawn = Spawn { name: "sleeper".to_owned(), argv, die_with_parent: true, ..Spawn::default() };
        link.spawn(spawn).await.unwrap();
        let missing = Spawn { name: "x".to_owned(), argv: vec!["/no/such".to_owned()], ..Spawn::default() };
        let error = link.spawn(missing).await.unwrap_err().to_string();
        assert!(error.contains("/no/such"), "{error}");
        std::process::abort();
    }
    given.write_all(b"second ").unwrap();
    let mut names: Vec<_> = restored.fds.keys().map(String::as_str).collect();
    names.push("given");
    names.sort_unstable();
    let child = &restored.children[0];
    let mut report = format!("{} child {} ", names.join(" "), child.name);
    rustix::process::pidfd_send_signal(&child.pidfd, rustix::process::Signal::KILL).unwrap();
    let exit = restored.exits.recv().await.unwrap();
    report.push_str(&format!("exit {} {}", exit.name, exit.status));
    std::fs::write(dir.join("second"), report).unwrap();
    link.shut_down().await.unwrap();
}

#[test]
#[ignore = "the worker of the test above, not a test"]
fn worker_that_dies() {
    let Some(dir) = folder() else { return };
    let mut file = std::fs::File::options().create(true).append(true).open(dir.join("starts")).unwrap();
    file.write_all(b"x").unwrap();
    std::process::abort();
}

#[test]
fn a_signal_lets_the_worker_put_things_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut parent = parent("worker_that_is_orderly", dir.path(), 3);
    parent.stop_orderly(Duration::from_secs(60));
    let ready = dir.path().join("ready");
    let own = rustix::process::getpid();
    // The parent's loop runs in this thread, whose signal mask takes SIGTERM: it must be sent to it.
    let thread = rustix::thread::gettid();
    let signaller = std::thread::spawn(move || {
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while !ready.exists() && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        let (own, thread) = (own.as_raw_nonzero().get(), thread.as_raw_nonzero().get());
        // SAFETY: tgkill(2) with the ids of a live thread of this process.
        unsafe { libc::syscall(libc::SYS_tgkill, own, thread, libc::SIGTERM) }
    });
    assert_eq!(parent.run(), Outcome::ShutDown);
    assert_eq!(signaller.join().unwrap(), 0);
    assert!(dir.path().join("in-order").exists());
}

#[tokio::test]
#[ignore = "the worker of the test above, not a test"]
async fn worker_that_is_orderly() {
    let Some(dir) = folder() else { return };
    let mut inherited = inherited_fds().unwrap();
    let (link, _restored) = ParentLink::connect(&mut inherited).unwrap();
    let mut signals = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
    std::fs::write(dir.join("ready"), "").unwrap();
    signals.recv().await.unwrap();
    std::fs::write(dir.join("in-order"), "").unwrap();
    link.shut_down().await.unwrap();
}

#[test]
fn a_parent_without_a_worker_waits_until_it_is_wanted_or_childless() {
    let dir = tempfile::tempdir().unwrap();
    let mut parent = parent("worker_that_leaves_a_child", dir.path(), 0);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    parent.hold("wanted", theirs.into());
    assert_eq!(parent.run(), Outcome::GaveUp);
    assert_eq!(parent.children().len(), 1);
    (&ours).write_all(b"x").unwrap();
    assert_eq!(parent.idle("wanted"), dhow_parent::Idle::Wanted);
    let pid = rustix::process::Pid::from_raw(parent.children()[0].1).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let mut byte = [0];
    std::os::unix::net::UnixStream::from(parent.held("wanted").unwrap().try_clone_to_owned().unwrap())
        .read_exact(&mut byte)
        .unwrap();
    assert_eq!(parent.idle("wanted"), dhow_parent::Idle::Childless);
}

#[tokio::test]
#[ignore = "the worker of the test above, not a test"]
async fn worker_that_leaves_a_child() {
    let Some(_) = folder() else { return };
    let mut inherited = inherited_fds().unwrap();
    let (link, _restored) = ParentLink::connect(&mut inherited).unwrap();
    let argv = vec!["/bin/sleep".to_owned(), "600".to_owned()];
    link.spawn(Spawn { name: "sleeper".to_owned(), argv, ..Spawn::default() }).await.unwrap();
    std::process::abort();
}

/// Children whose exits, with names as long as [`NAME`], are more than the socket to a worker holds.
const MANY: usize = 40;
const NAME: usize = 200_000;

/// Waits for `condition`, which a loaded machine may take its time for.
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_worker_that_stood_still_is_told_all_exits() {
    let dir = tempfile::tempdir().unwrap();
    let mut parent = parent("worker_that_stands_still", dir.path(), 3);
    let folder = dir.path().to_owned();
    let helper = std::thread::spawn(move || {
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
        let state = |pid: &str| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next())
        };
        until("the worker stands still", || state(read("worker").trim()) == Some('T'));
        std::fs::write(folder.join("go"), "").unwrap();
        until("the children are reaped", || read("children").lines().all(|pid| state(pid).is_none()));
        let worker = rustix::process::Pid::from_raw(read("worker").trim().parse().unwrap()).unwrap();
        rustix::process::kill_process(worker, rustix::process::Signal::CONT).unwrap();
    });
    assert_eq!(parent.run(), Outcome::ShutDown);
    helper.join().unwrap();
    assert_eq!(std::fs::read_to_string(dir.path().join("told")).unwrap(), MANY.to_string());
}

#[tokio::test]
#[ignore = "the worker of the test above, not a test"]
async fn worker_that_stands_still() {
    let Some(dir) = folder() else { return };
    let mut inherited = inherited_fds().unwrap();
    let (link, mut restored) = ParentLink::connect(&mut inherited).unwrap();
    let mut children = String::new();
    for _ in 0..MANY {
        let script = format!("until [ -e '{}' ]; do sleep 0.05; done", dir.join("go").display());
        let argv = vec!["/bin/sh".to_owned(), "-c".to_owned(), script];
        let env = vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())];
        let spawn = Spawn { name: "x".repeat(NAME), argv, env, die_with_parent: true, ..Spawn::default() };
        let child = link.spawn(spawn).await.unwrap();
        children.push_str(&format!("{}\n", child.pid));
    }
    std::fs::write(dir.join("children"), children).unwrap();
    std::fs::write(dir.join("worker"), std::process::id().to_string()).unwrap();
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP).unwrap();
    for _ in 0..MANY {
        restored.exits.recv().await.unwrap();
    }
    std::fs::write(dir.join("told"), MANY.to_string()).unwrap();
    link.shut_down().await.unwrap();
}
