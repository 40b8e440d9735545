//! A file server that is the test itself, so that it can answer late, wrongly or not at all.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use dhow_protocol::codec::{self, FILE_LIMIT};
use dhow_protocol::files::{
    Attributes, Errno, FileAnswer, FileKind, FileOp, FileReply, FileRequest, NodeId, Time,
};

use super::{DEADLINE, World};

/// The host's side of one stream.
pub struct Hand {
    stream: UnixStream,
    /// The id that the mount attached with.
    pub mount: [u8; 16],
}

impl Hand {
    /// A stream of share 1 that is not attached yet.
    pub fn connect(world: &World) -> Self {
        let stream = world.connect_by_hand();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Self { stream, mount: [0; 16] }
    }

    /// Attaches a stream of share 1. `resumed` is what the guest is told.
    pub fn attach(world: &World, resumed: bool) -> Self {
        let mut hand = Self::connect(world);
        let request = hand.next();
        let FileOp::Attach { mount } = request.op else { panic!("{request:?}") };
        hand.mount = mount;
        hand.answer(request.unique, Ok(FileAnswer::Attached { resumed }));
        hand
    }

    /// The next request.
    pub fn next(&mut self) -> FileRequest {
        let mut header = [0; 4];
        self.stream.read_exact(&mut header).unwrap();
        let mut body = vec![0; codec::body_length(header, FILE_LIMIT).unwrap()];
        self.stream.read_exact(&mut body).unwrap();
        codec::from_bytes(&body).unwrap()
    }

    /// The next request that is about something else than attributes of folders, which the kernel may
    /// ask for at any time, and that are answered here, and than forgotten nodes.
    pub fn next_of_interest(&mut self) -> FileRequest {
        loop {
            let request = self.next();
            match request.op {
                FileOp::Forget(_) => {}
                FileOp::GetAttributes(node) => {
                    self.answer(request.unique, Ok(FileAnswer::Attributes(folder(node.0))));
                }
                _ => return request,
            }
        }
    }

    /// Reads on until the guest ends the stream.
    pub fn until_ended(&mut self) {
        let mut buffer = [0; 4096];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return,
                Ok(_) => {}
                // The guest had not read everything.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return,
                Err(error) => panic!("the guest does not end the stream: {error}"),
            }
        }
    }

    /// Answers a request.
    pub fn answer(&mut self, unique: u64, result: Result<FileAnswer, Errno>) {
        self.send(&codec::to_frame(&FileReply { unique, result }, FILE_LIMIT).unwrap());
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }
}

/// Attributes of a folder.
pub fn folder(node: u64) -> Attributes {
    Attributes { kind: FileKind::Folder, mode: 0o755, ..file(node, 0) }
}

/// Attributes of a file.
pub fn file(node: u64, size: u64) -> Attributes {
    let time = Time { seconds: 1_700_000_000, nanos: 0 };
    Attributes {
        node: NodeId(node),
        kind: FileKind::Regular,
        mode: 0o644,
        size,
        blocks: 0,
        atime: time,
        mtime: time,
        ctime: time,
        links: 1,
        uid: 0,
        gid: 0,
        block_size: 4096,
    }
}
