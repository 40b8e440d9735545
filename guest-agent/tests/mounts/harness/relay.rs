//! A stream that passes through the test, so that it can be cut, and answers can be lost on it.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use dhow_protocol::codec;
use dhow_protocol::files::{FileOp, FileRequest};

use super::World;

/// See the module's page.
pub struct Relay {
    ends: [UnixStream; 2],
    armed: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Relay {
    /// A stream of share 1 between the guest and its server, by way of the test.
    pub fn new(world: &World) -> Self {
        let guest = world.connect_by_hand();
        let (ours, theirs) = UnixStream::pair().unwrap();
        world.server.give(theirs.as_fd());
        let armed = Arc::new(AtomicBool::new(false));
        let lost = Arc::new(AtomicBool::new(false));
        let both = || (guest.try_clone().unwrap(), ours.try_clone().unwrap());
        let ((requests, to_server), (to_guest, replies)) = (both(), both());
        let threads = vec![
            std::thread::spawn({
                let (armed, lost) = (Arc::clone(&armed), Arc::clone(&lost));
                move || pass_requests(requests, to_server, &armed, &lost)
            }),
            std::thread::spawn(move || pass_replies(replies, to_guest, &lost)),
        ];
        Self { ends: [guest, ours], armed, threads }
    }

    /// From the next request that changes something on, that one included, all answers are lost.
    pub fn lose_next_change(&self) {
        self.armed.store(true, Ordering::SeqCst);
    }

    /// Whether either side has ended it.
    pub fn has_ended(&self) -> bool {
        self.threads.iter().any(std::thread::JoinHandle::is_finished)
    }

    /// Cuts it, wherever in a frame it may be.
    pub fn cut(&mut self) {
        for end in &self.ends {
            // It may be at its end already.
            let _ = end.shutdown(Shutdown::Both);
        }
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.cut();
    }
}

fn pass_requests(mut from: UnixStream, mut to: UnixStream, armed: &AtomicBool, lost: &AtomicBool) {
    let mut frame = Vec::new();
    loop {
        frame.resize(4, 0);
        if from.read_exact(&mut frame).is_err() {
            break;
        }
        let length = u32::from_le_bytes([frame[0], frame[1], frame[2], frame[3]]);
        frame.resize(4 + length as usize, 0);
        if from.read_exact(&mut frame[4..]).is_err() {
            break;
        }
        let request: FileRequest = codec::from_bytes(&frame[4..]).unwrap();
        if changes(&request.op) && armed.load(Ordering::SeqCst) {
            lost.store(true, Ordering::SeqCst);
        }
        if to.write_all(&frame).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

fn pass_replies(mut from: UnixStream, mut to: UnixStream, lost: &AtomicBool) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(got @ 1..) = from.read(&mut buffer) {
        if !lost.load(Ordering::SeqCst) && to.write_all(&buffer[..got]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

fn changes(op: &FileOp) -> bool {
    matches!(
        op,
        FileOp::SetAttributes(..)
            | FileOp::Write { .. }
            | FileOp::CreateFile(..)
            | FileOp::CreateFifo(..)
            | FileOp::CreateFolder(..)
            | FileOp::CreateSymlink(..)
            | FileOp::Link { .. }
            | FileOp::RemoveFile(..)
            | FileOp::RemoveFolder(..)
            | FileOp::Rename { .. }
    )
}
