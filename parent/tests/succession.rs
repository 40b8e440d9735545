//! A parent is killed and its worker takes its place, for real: both are this test binary, started
//! again.

#![allow(clippy::unwrap_used, reason = "a test helper may fail loudly")]

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dhow_parent::{Estate, Limits, Outcome, Parent, ParentLink, STATUS_UNKNOWN, Spawn};
use dhow_parent::{WorkerCommand, inherited_fds};
use rustix::fs::FlockOperation;

/// Environment variable with the folder that all share.
const FOLDER: &str = "DHOW_TEST_FOLDER";
const DEADLINE: Duration = Duration::from_secs(60);

/// The command line of a test of this binary that plays a part.
fn part(name: &str) -> Vec<OsString> {
    let program = std::env::current_exe().unwrap().into_os_string();
    [program].into_iter().chain([name, "--exact", "--ignored", "--nocapture"].map(OsString::from)).collect()
}

fn folder() -> Option<PathBuf> {
    std::env::var_os(FOLDER).map(PathBuf::from)
}

fn wait_for(path: &Path) -> String {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Ok(text) = std::fs::read_to_string(path) {
            return text;
        }
        assert!(Instant::now() < deadline, "{} did not come", path.display());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Makes a file that is seen with all its text or not at all.
fn put(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, path).unwrap();
}

fn locked(path: &Path) -> bool {
    let file = File::options().create(true).append(true).open(path).unwrap();
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
}

#[test]
fn a_worker_takes_the_place_of_its_killed_parent() {
    let dir = tempfile::tempdir().unwrap();
    let argv = part("first_parent");
    let mut first = Command::new(&argv[0])
        .args(&argv[1..])
        .env(FOLDER, dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let sleeper = wait_for(&dir.path().join("worker-1"));
    let lock = dir.path().join("lock");
    assert!(locked(&lock));
    first.kill().unwrap();
    first.wait().unwrap();
    // Nobody accepts until a second worker does: the client waits and is not refused.
    let mut client = UnixStream::connect(dir.path().join("socket")).unwrap();
    assert!(locked(&lock), "the lock was lost with the parent");
    let mut answer = String::new();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "second");
    let report = wait_for(&dir.path().join("worker-2"));
    assert_eq!(
        report,
        format!("first false, fds lock socket, child sleeper {sleeper}, ended {STATUS_UNKNOWN}")
    );
    let deadline = Instant::now() + DEADLINE;
    while locked(&lock) {
        assert!(Instant::now() < deadline, "the second parent did not end");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(wait_for(&dir.path().join("second-parent")), format!("{:?}", Outcome::ShutDown));
}

fn parent(dir: &Path) -> Parent {
    let env = vec![(FOLDER.to_owned(), dir.display().to_string())];
    Parent::new(WorkerCommand { argv: part("worker"), env }, Limits::default(), true).unwrap()
}

#[test]
#[ignore = "plays a part in the test above, not a test"]
fn first_parent() {
    let Some(dir) = folder() else { return };
    let mut parent = parent(&dir);
    let lock = File::options().create(true).append(true).open(dir.join("lock")).unwrap();
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
    parent.hold("lock", lock.into());
    parent.run();
}

#[test]
#[ignore = "plays a part in the test above, not a test"]
fn second_parent() {
    let Some(dir) = folder() else { return };
    let mut inherited = inherited_fds().unwrap();
    let mut parent = parent(&dir);
    parent.inherit(Estate::from_inherited(&mut inherited).unwrap());
    let outcome = parent.run();
    put(&dir.join("second-parent"), &format!("{outcome:?}"));
}

#[tokio::test]
#[ignore = "plays a part in the test above, not a test"]
async fn worker() {
    let Some(dir) = folder() else { return };
    let mut inherited = inherited_fds().unwrap();
    let (link, restored) = ParentLink::connect_as_heir(&mut inherited).unwrap();
    if restored.first {
        first_worker(&dir, link, restored).await
    } else {
        second_worker(&dir, link, restored).await
    }
}

async fn first_worker(dir: &Path, link: ParentLink, mut restored: dhow_parent::Restored) {
    let listener: OwnedFd = UnixListener::bind(dir.join("socket")).unwrap().into();
    link.hold("socket", listener.as_fd()).await.unwrap();
    link.hold("gone", listener.as_fd()).await.unwrap();
    link.release("gone").await.unwrap();
    for (name, seconds) in [("short", "0"), ("sleeper", "600")] {
        let argv = vec!["/bin/sleep".to_owned(), seconds.to_owned()];
        let child = link.spawn(Spawn { name: name.to_owned(), argv, ..Spawn::default() }).await.unwrap();
        if name == "sleeper" {
            put(&dir.join("worker-1"), &child.pid.to_string());
        } else {
            // It must not be in the estate.
            assert_eq!(restored.exits.recv().await.unwrap().pid, child.pid);
        }
    }
    link.gone().await;
    let error = link.estate().exec(&part("second_parent"));
    panic!("{error}");
}

async fn second_worker(dir: &Path, link: ParentLink, mut restored: dhow_parent::Restored) {
    let mut names: Vec<_> = restored.fds.keys().cloned().collect();
    names.sort();
    let listener = UnixListener::from(restored.fds.remove("socket").unwrap());
    listener.accept().unwrap().0.write_all(b"second").unwrap();
    let child = restored.children.iter().find(|child| child.name == "sleeper").unwrap();
    rustix::process::pidfd_send_signal(&child.pidfd, rustix::process::Signal::KILL).unwrap();
    let exit = loop {
        let exit = restored.exits.recv().await.unwrap();
        if exit.name == "sleeper" {
            break exit;
        }
    };
    let (first, fds, name) = (restored.first, names.join(" "), &child.name);
    let report = format!("first {first}, fds {fds}, child {name} {}, ended {}", exit.pid, exit.status);
    put(&dir.join("worker-2"), &report);
    link.shut_down().await.unwrap();
}
