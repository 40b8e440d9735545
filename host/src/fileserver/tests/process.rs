//! The server as it really runs: a process of its own, confined, with few fds or as another user.
//!
//! The process is this test binary, started again to run [`server_process`] alone. Its settings are
//! environment variables, its control socket is its standard input.

use std::fs::{self, Permissions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use dhow_protocol::files::{Creation, FileOp, NodeId, SetAttributes};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Resource, Rlimit, setrlimit};

use super::guest::{Guest, MOUNT, Stream, name, until};
use crate::fileserver::{FileServerArgs, hand_over, run};

const ROOT: &str = "DHOW_TEST_ROOT";
const FDS: &str = "DHOW_TEST_FDS";
const FILE_SIZE: &str = "DHOW_TEST_FILE_SIZE";
const USER: &str = "DHOW_TEST_USER";
const READ_ONLY: &str = "DHOW_TEST_READ_ONLY";
const ESCAPE: &str = "DHOW_TEST_ESCAPE";
/// A user whom every system has, and who is not root.
const NOBODY: u32 = 65_534;

#[test]
#[ignore = "the process that the other tests start"]
fn server_process() {
    let variable = |name| std::env::var(name).ok();
    let number = |name| variable(name).map(|text| text.parse::<u64>().unwrap());
    let both = |limit| Rlimit { current: Some(limit), maximum: Some(limit) };
    if let Some(limit) = number(FDS) {
        setrlimit(Resource::Nofile, both(limit)).unwrap();
    }
    if let Some(limit) = number(FILE_SIZE) {
        setrlimit(Resource::Fsize, both(limit)).unwrap();
    }
    if let Some(user) = number(USER) {
        let user = u32::try_from(user).unwrap();
        nix::unistd::setgroups(&[]).unwrap();
        nix::unistd::setgid(user.into()).unwrap();
        nix::unistd::setuid(user.into()).unwrap();
    }
    let control = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let root = PathBuf::from(variable(ROOT).unwrap());
    let read_only = variable(READ_ONLY).is_some();
    let file = root.join("f");
    let args = FileServerArgs { root, read_only, masked: Vec::new(), control };
    run(args).unwrap();
    if read_only {
        assert_eq!(fs::write(file, b"x").unwrap_err().raw_os_error(), Some(libc::EACCES));
        println!("confined");
    }
    // Confined for good: what a guest that took the process over would try next.
    if let Some(outside) = variable(ESCAPE) {
        try_to_escape(Path::new(&outside));
    }
}

/// Everything here must fail, but what is in the share.
fn try_to_escape(outside: &Path) {
    let eacces = Some(libc::EACCES);
    let eperm = Some(libc::EPERM);
    let code = |error: std::io::Error| error.raw_os_error();
    assert_eq!(code(fs::read(outside).unwrap_err()), eacces);
    assert_eq!(code(fs::write(outside, b"x").unwrap_err()), eacces);
    assert_eq!(code(fs::read("/etc/passwd").unwrap_err()), eacces);
    assert_eq!(code(fs::read("/proc/self/environ").unwrap_err()), eacces);
    assert_eq!(code(fs::read_dir("/").unwrap_err()), eacces);
    assert_eq!(code(fs::remove_file(outside).unwrap_err()), eacces);
    let root = PathBuf::from(std::env::var(ROOT).unwrap());
    assert!(fs::rename(root.join("f"), outside.with_extension("new")).is_err());
    assert!(fs::hard_link(outside, root.join("linked")).is_err());
    assert_eq!(code(std::net::TcpListener::bind("127.0.0.1:0").unwrap_err()), eperm);
    assert_eq!(code(UnixStream::pair().unwrap_err()), eperm);
    assert_eq!(code(Command::new("/bin/true").status().unwrap_err()), eperm);
    assert!(
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::WINCH).is_err()
    );
    let device = rustix::fs::makedev(1, 3);
    let kind = rustix::fs::FileType::CharacterDevice;
    assert!(rustix::fs::mknodat(rustix::fs::CWD, root.join("null"), kind, 0o600.into(), device).is_err());
    assert!(root.join("f").exists());
    println!("confined");
}

/// A server process. Ends with the test.
struct Server {
    child: Child,
    control: Option<OwnedFd>,
}

impl Server {
    fn start(root: &Path, settings: &[(&str, &str)]) -> Self {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "fileserver::tests::process::server_process"])
            .env(ROOT, root)
            .envs(settings.iter().copied())
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self { child, control: Some(ours) }
    }

    fn stream(&self) -> Stream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        hand_over(self.control.as_ref().unwrap().as_fd(), theirs.as_fd()).unwrap();
        Stream::new(ours)
    }

    fn guest(&self) -> Guest {
        Guest::attach(self.stream(), MOUNT).0
    }

    /// Closes its control socket, waits for its end, and returns what it said.
    fn end(mut self) -> String {
        drop(self.control.take());
        let mut text = String::new();
        std::io::Read::read_to_string(&mut self.child.stdout.take().unwrap(), &mut text).unwrap();
        assert!(self.child.wait().unwrap().success(), "{text}");
        text
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Where `end` was called, it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_server_cannot_leave_its_share() {
    let folder = tempfile::tempdir().unwrap();
    let share = folder.path().join("share");
    fs::create_dir(&share).unwrap();
    fs::write(share.join("f"), b"inside").unwrap();
    let outside = folder.path().join("outside");
    fs::write(&outside, b"secret").unwrap();
    let server = Server::start(&share, &[(ESCAPE, outside.to_str().unwrap())]);
    let mut guest = server.guest();
    let file = guest.walk("f").unwrap();
    assert_eq!(guest.read(file, 0, 10).unwrap(), b"inside");
    guest.create(NodeId::ROOT, "new").unwrap();
    drop(guest);
    assert!(server.end().contains("confined"));
    assert_eq!(fs::read(&outside).unwrap(), b"secret");
}

/// The fds that a server has of a folder lead nowhere once the folder has left the share.
#[test]
fn a_folder_that_left_the_share_is_out_of_reach() {
    let folder = tempfile::tempdir().unwrap();
    let share = folder.path().join("share");
    fs::create_dir_all(share.join("d")).unwrap();
    fs::write(share.join("d/f"), b"was shared").unwrap();
    let server = Server::start(&share, &[]);
    let mut guest = server.guest();
    let below = guest.walk("d").unwrap();
    let file = guest.walk("d/f").unwrap();
    fs::rename(share.join("d"), folder.path().join("away")).unwrap();
    assert_eq!(guest.read(file, 0, 10), Err(libc::EACCES));
    assert_eq!(guest.write(file, 0, b"x"), Err(libc::EACCES));
    assert_eq!(guest.create(below, "x"), Err(libc::EACCES));
    assert_eq!(guest.list(below, 0, 10), Err(libc::EACCES));
    drop(guest);
    server.end();
    assert_eq!(fs::read(folder.path().join("away/f")).unwrap(), b"was shared");
}

#[test]
fn a_read_only_server_could_not_write_if_it_wanted() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), b"same").unwrap();
    let server = Server::start(folder.path(), &[(READ_ONLY, "1")]);
    let mut guest = server.guest();
    let file = guest.walk("f").unwrap();
    assert_eq!(guest.read(file, 0, 10).unwrap(), b"same");
    assert_eq!(guest.write(file, 0, b"x"), Err(libc::EROFS));
    assert_eq!(guest.create(NodeId::ROOT, "g"), Err(libc::EROFS));
    drop(guest);
    assert!(server.end().contains("confined"));
    assert_eq!(fs::read(folder.path().join("f")).unwrap(), b"same");
}

#[test]
fn a_server_with_few_fds_serves_a_deep_and_wide_share_and_recovers() {
    let folder = tempfile::tempdir().unwrap();
    let mut deep = folder.path().to_owned();
    for level in 0..60 {
        deep.push(format!("d{level}"));
        fs::create_dir(&deep).unwrap();
        fs::write(deep.join("f"), level.to_string()).unwrap();
    }
    for number in 0..200 {
        fs::create_dir(folder.path().join(format!("w{number}"))).unwrap();
        fs::write(folder.path().join(format!("w{number}/f")), b"x").unwrap();
    }
    let server = Server::start(folder.path(), &[(FDS, "90")]);
    let mut guest = server.guest();
    let mut at = NodeId::ROOT;
    for level in 0..60 {
        at = guest.look(at, &format!("d{level}")).unwrap().node;
        let file = guest.look(at, "f").unwrap().node;
        assert_eq!(guest.read(file, 0, 10).unwrap(), level.to_string().as_bytes());
    }
    for number in 0..200 {
        let file = guest.walk(&format!("w{number}/f")).unwrap();
        assert_eq!(guest.read(file, 0, 10).unwrap(), b"x");
    }
    // Removed files that the guest knows cost one fd each: at some point no more.
    let mut removed = Vec::new();
    let refused = loop {
        let text = format!("r{}", removed.len());
        let file = guest.create(NodeId::ROOT, &text).unwrap().node;
        match guest.done(FileOp::RemoveFile(NodeId::ROOT, name(&text))) {
            Ok(()) => removed.push(file),
            Err(error) => {
                assert_eq!(error, libc::ENFILE);
                break text;
            }
        }
        assert!(removed.len() < 90, "the fds of removed files are not bounded");
    };
    for file in &removed {
        assert_eq!(guest.write(*file, 0, b"alive").unwrap(), 5);
    }
    // A removed folder needs none.
    guest.folder(NodeId::ROOT, "gone").unwrap();
    guest.done(FileOp::RemoveFolder(NodeId::ROOT, name("gone"))).unwrap();
    // Given back, all is well again.
    guest.stream.send(0, FileOp::Forget(removed.iter().map(|node| (*node, 1)).collect()));
    until(|| guest.done(FileOp::RemoveFile(NodeId::ROOT, name(&refused))).is_ok());
    assert_eq!(guest.walk("d0/d1/d2").map(|_| ()), Ok(()));
    drop(guest);
    server.end();
}

/// More streams than fds: some are refused, and when they are gone new ones work.
#[test]
fn a_flood_of_streams_does_not_end_the_server() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), b"data").unwrap();
    let server = Server::start(folder.path(), &[(FDS, "80")]);
    let flood: Vec<Stream> = (0..60).map(|_| server.stream()).collect();
    drop(flood);
    // Those that were not taken are closed, so this may be one of them, too.
    until(|| {
        let mut stream = server.stream();
        stream.send(0, FileOp::Attach { mount: MOUNT });
        stream.receive().is_some()
    });
    let mut guest = server.guest();
    let file = guest.walk("f").unwrap();
    assert_eq!(guest.read(file, 0, 10).unwrap(), b"data");
    drop(guest);
    server.end();
}

#[test]
fn a_write_beyond_the_file_size_limit_is_an_error_and_not_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path(), &[(FILE_SIZE, "65536")]);
    let mut guest = server.guest();
    let file = guest.create(NodeId::ROOT, "f").unwrap().node;
    assert_eq!(guest.write(file, 65_530, b"0123456789").unwrap(), 6);
    assert_eq!(guest.write(file, 65_536, b"x"), Err(libc::EFBIG));
    let size = SetAttributes { size: Some(1 << 20), ..SetAttributes::default() };
    assert_eq!(guest.set(file, size), Err(libc::EFBIG));
    assert_eq!(guest.attributes(file).unwrap().size, 65_536);
    drop(guest);
    server.end();
}

/// A server of an ordinary user. Where the tests are run by root it becomes one first.
#[test]
fn an_unprivileged_server_keeps_the_guests_owners_and_modes() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let share = folder.path().join("share");
    fs::create_dir(&share).unwrap();
    let root = rustix::process::geteuid().is_root();
    let foreign = share.join("foreign");
    fs::write(&foreign, b"root's").unwrap();
    let mut settings = Vec::new();
    let nobody = NOBODY.to_string();
    if root {
        std::os::unix::fs::chown(&share, Some(NOBODY), Some(NOBODY)).unwrap();
        settings.push((USER, nobody.as_str()));
    }
    let me = fs::metadata(&share).unwrap().uid();
    let server = Server::start(&share, &settings);
    let mut guest = server.guest();
    let on_host = |text: &str| {
        let got = fs::metadata(share.join(text)).unwrap();
        (got.uid(), got.mode() & 0o7777)
    };
    let new = |uid, mode| Creation { mode, uid, gid: uid };
    let file = guest.entry(FileOp::CreateFile(NodeId::ROOT, name("f"), new(0, 0o444))).unwrap();
    assert_eq!((file.uid, file.gid, file.mode), (0, 0, 0o444));
    assert_eq!(on_host("f"), (me, 0o644));
    // The guest's kernel decides who may write; the server can.
    assert_eq!(guest.write(file.node, 0, b"data").unwrap(), 4);
    let set = SetAttributes { mode: Some(0), uid: Some(1234), ..SetAttributes::default() };
    let now = guest.set(file.node, set).unwrap();
    assert_eq!((now.uid, now.gid, now.mode), (1234, 0, 0));
    assert_eq!(on_host("f"), (me, 0o600));
    assert_eq!(guest.read(file.node, 0, 10).unwrap(), b"data");
    let dir = guest.entry(FileOp::CreateFolder(NodeId::ROOT, name("d"), new(33, 0o2500))).unwrap();
    assert_eq!((dir.uid, dir.mode), (33, 0o2500));
    assert_eq!(on_host("d"), (me, 0o700));
    let inner = guest.entry(FileOp::CreateFile(dir.node, name("i"), new(44, 0o4755))).unwrap();
    assert_eq!((inner.uid, inner.gid, inner.mode), (44, 33, 0o4755));
    assert_eq!(on_host("d/i"), (me, 0o755));
    let set = SetAttributes { size: Some(0), ..SetAttributes::default() };
    guest.set(inner.node, set).unwrap();
    // A fifo cannot carry another owner: it is the server's.
    let fifo = guest.entry(FileOp::CreateFifo(NodeId::ROOT, name("p"), new(77, 0o622))).unwrap();
    assert_eq!((fifo.uid, fifo.mode), (me, 0o622));
    let set = SetAttributes { uid: Some(77), ..SetAttributes::default() };
    assert_eq!(guest.set(fifo.node, set), Err(libc::EPERM));
    if root {
        // What another user of the host owns stays what it is.
        let theirs = guest.look(NodeId::ROOT, "foreign").unwrap();
        assert_eq!((theirs.uid, theirs.mode), (0, 0o644));
        assert_eq!(guest.write(theirs.node, 0, b"x"), Err(libc::EACCES));
        let set = SetAttributes { mode: Some(0o666), ..SetAttributes::default() };
        assert_eq!(guest.set(theirs.node, set), Err(libc::EPERM));
        let set = SetAttributes { uid: Some(5), ..SetAttributes::default() };
        assert_eq!(guest.set(theirs.node, set), Err(libc::EACCES));
        assert_eq!(fs::read(&foreign).unwrap(), b"root's");
    }
    drop(guest);
    server.end();
}
