//! A guest for the tests: asks over a stream, as the agent does.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dhow_protocol::codec::{self, FILE_LIMIT};
use dhow_protocol::files::{
    Attributes, Creation, FileAnswer, FileOp, FileReply, FileRequest, FolderEntry, LinkTarget, Name, NodeId,
    SetAttributes,
};

use crate::fileserver::server::Server;
use crate::fileserver::share::Share;

/// Long enough for a loaded machine; an answer that never comes fails the test.
const DEADLINE: Duration = Duration::from_secs(120);
/// The mount of a guest that does not care.
pub const MOUNT: [u8; 16] = [1; 16];
/// What a guest's root makes by default.
pub const ROOT_FILE: Creation = Creation { mode: 0o644, uid: 0, gid: 0 };
/// What a guest's root makes by default.
pub const ROOT_FOLDER: Creation = Creation { mode: 0o755, uid: 0, gid: 0 };

/// An answer, or the errno.
pub type Answer = Result<FileAnswer, i32>;

/// A name.
pub fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// A symlink's target.
pub fn target(text: &str) -> LinkTarget {
    LinkTarget::new(text).unwrap()
}

/// A server in this process, without its sandbox.
pub struct Host {
    /// What it serves.
    pub share: Arc<Share>,
    server: Server,
}

impl Host {
    /// Serves `root` for reading and writing.
    pub fn new(root: &Path) -> Self {
        Self::with(root, false, &[])
    }

    /// Serves `root`.
    pub fn with(root: &Path, read_only: bool, masked: &[PathBuf]) -> Self {
        let share = Arc::new(Share::open(root, read_only, masked).unwrap());
        Self { server: Server::new(Arc::clone(&share)), share }
    }

    /// A stream to it, nothing said yet.
    pub fn stream(&self) -> Stream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        // Not waited for: it ends with the stream.
        drop(self.server.serve(theirs.into()).unwrap());
        Stream::new(ours)
    }

    /// An attached guest.
    pub fn guest(&self) -> Guest {
        Guest::attach(self.stream(), MOUNT).0
    }
}

/// Waits until something holds; fails the test when it never does.
pub fn until(mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "it did not come about in time");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// A guest of a server that serves `root` for reading and writing.
pub fn guest_of(root: &Path) -> Guest {
    Host::new(root).guest()
}

/// Frames over a stream.
pub struct Stream(pub UnixStream);

impl Stream {
    /// Over a connected socket.
    pub fn new(socket: UnixStream) -> Self {
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.set_write_timeout(Some(DEADLINE)).unwrap();
        Self(socket)
    }

    /// Sends a request.
    pub fn send(&mut self, unique: u64, op: FileOp) {
        let frame = codec::to_frame(&FileRequest { unique, op }, FILE_LIMIT).unwrap();
        self.0.write_all(&frame).unwrap();
    }

    /// The next reply; `None` when the server ended the stream.
    pub fn receive(&mut self) -> Option<FileReply> {
        let mut header = [0; 4];
        match self.0.read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("no answer in time"),
            Err(_) => return None,
        }
        let mut body = vec![0; codec::body_length(header, FILE_LIMIT).unwrap()];
        self.0.read_exact(&mut body).unwrap();
        Some(codec::from_bytes(&body).unwrap())
    }
}

/// An attached guest that asks one thing after the other.
pub struct Guest {
    /// Its stream.
    pub stream: Stream,
    unique: u64,
}

impl Guest {
    /// Attaches; also what the server said of the mount.
    pub fn attach(mut stream: Stream, mount: [u8; 16]) -> (Self, bool) {
        stream.send(0, FileOp::Attach { mount });
        let reply = stream.receive().expect("the server ended the stream");
        let Ok(FileAnswer::Attached { resumed }) = reply.result else { panic!("not attached: {reply:?}") };
        (Self { stream, unique: 100 }, resumed)
    }

    /// Asks and waits for the answer.
    pub fn ask(&mut self, op: FileOp) -> Answer {
        self.unique += 2;
        self.stream.send(self.unique, op);
        let reply = self.stream.receive().expect("the server ended the stream");
        assert_eq!(reply.unique, self.unique);
        reply.result.map_err(|error| error.0)
    }

    /// Asks for something that is answered with a node.
    pub fn entry(&mut self, op: FileOp) -> Result<Attributes, i32> {
        match self.ask(op)? {
            FileAnswer::Entry(attributes) => Ok(attributes),
            other => panic!("no entry: {other:?}"),
        }
    }

    /// Looks a name up.
    pub fn look(&mut self, folder: NodeId, text: &str) -> Result<Attributes, i32> {
        self.entry(FileOp::Lookup(folder, name(text)))
    }

    /// The node at a path of several names.
    pub fn walk(&mut self, path: &str) -> Result<NodeId, i32> {
        path.split('/').try_fold(NodeId::ROOT, |folder, part| Ok(self.look(folder, part)?.node))
    }

    /// Attributes of a node.
    pub fn attributes(&mut self, node: NodeId) -> Result<Attributes, i32> {
        match self.ask(FileOp::GetAttributes(node))? {
            FileAnswer::Attributes(attributes) => Ok(attributes),
            other => panic!("no attributes: {other:?}"),
        }
    }

    /// Sets attributes.
    pub fn set(&mut self, node: NodeId, set: SetAttributes) -> Result<Attributes, i32> {
        match self.ask(FileOp::SetAttributes(node, set))? {
            FileAnswer::Attributes(attributes) => Ok(attributes),
            other => panic!("no attributes: {other:?}"),
        }
    }

    /// Makes a file.
    pub fn create(&mut self, folder: NodeId, text: &str) -> Result<Attributes, i32> {
        self.entry(FileOp::CreateFile(folder, name(text), ROOT_FILE))
    }

    /// Makes a folder.
    pub fn folder(&mut self, folder: NodeId, text: &str) -> Result<Attributes, i32> {
        self.entry(FileOp::CreateFolder(folder, name(text), ROOT_FOLDER))
    }

    /// Bytes of a file.
    pub fn read(&mut self, node: NodeId, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        match self.ask(FileOp::Read { node, offset, size })? {
            FileAnswer::Data(data) => Ok(data),
            other => panic!("no data: {other:?}"),
        }
    }

    /// Writes bytes.
    pub fn write(&mut self, node: NodeId, offset: u64, data: &[u8]) -> Result<u32, i32> {
        match self.ask(FileOp::Write { node, offset, data: data.to_vec() })? {
            FileAnswer::Written(count) => Ok(count),
            other => panic!("nothing written: {other:?}"),
        }
    }

    /// A part of a folder, and whether it was the last.
    pub fn list(&mut self, node: NodeId, cookie: u64, limit: u32) -> Result<(Vec<FolderEntry>, bool), i32> {
        match self.ask(FileOp::ReadFolder { node, cookie, limit })? {
            FileAnswer::Entries { entries, end } => Ok((entries, end)),
            other => panic!("no entries: {other:?}"),
        }
    }

    /// All names of a folder, sorted.
    pub fn names(&mut self, node: NodeId) -> Vec<String> {
        let (mut names, mut cookie) = (Vec::new(), 0);
        loop {
            let (entries, end) = self.list(node, cookie, 500).unwrap();
            cookie = entries.last().map_or(cookie, |last| last.cookie);
            names.extend(
                entries.iter().map(|entry| String::from_utf8(entry.name.as_bytes().to_vec()).unwrap()),
            );
            if end {
                names.sort();
                return names;
            }
        }
    }

    /// Does something that is answered with nothing.
    pub fn done(&mut self, op: FileOp) -> Result<(), i32> {
        match self.ask(op)? {
            FileAnswer::Done => Ok(()),
            other => panic!("not just done: {other:?}"),
        }
    }
}
