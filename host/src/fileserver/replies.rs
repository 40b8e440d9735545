//! What was answered lately, so that a request that comes again is not applied again.
//!
//! Only changes are remembered: reading twice does no harm. A guest sends again what is unanswered,
//! which is far less than is kept here.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use dhow_protocol::files::FileOp;

/// Answers that are kept. They are small: no change answers with bulk data.
const KEPT: usize = 4096;

/// What to do with a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Admission {
    /// Do it.
    New,
    /// It is being done; whoever does it answers on this stream, too.
    Running,
    /// It was done; this frame was the answer.
    Done(Arc<Vec<u8>>),
    /// It is of a mount that is no more.
    Over,
}

/// The memory of one mount.
#[derive(Debug, Default)]
pub struct Replies {
    epoch: u64,
    /// Each with the stream that asked for it again, if one did.
    running: HashMap<u64, Option<u64>>,
    done: HashMap<u64, Arc<Vec<u8>>>,
    order: VecDeque<u64>,
}

impl Replies {
    /// Whether an operation must not be done twice.
    pub fn counts(op: &FileOp) -> bool {
        match op {
            FileOp::SetAttributes(..)
            | FileOp::Write { .. }
            | FileOp::CreateFile(..)
            | FileOp::CreateFifo(..)
            | FileOp::CreateFolder(..)
            | FileOp::CreateSymlink(..)
            | FileOp::Link { .. }
            | FileOp::RemoveFile(..)
            | FileOp::RemoveFolder(..)
            | FileOp::Rename { .. } => true,
            FileOp::Attach { .. }
            | FileOp::Lookup(..)
            | FileOp::GetAttributes(_)
            | FileOp::ReadFolder { .. }
            | FileOp::Read { .. }
            | FileOp::ReadLink(_)
            | FileOp::Sync { .. }
            | FileOp::StatFs(_)
            | FileOp::Forget(_)
            | FileOp::Restore(_) => false,
        }
    }

    /// Which mount this is the memory of.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Asks about a request of a mount that came by the stream with this number (they
    /// count up), and notes that it runs when it is new.
    pub fn admit(&mut self, epoch: u64, unique: u64, stream: u64) -> Admission {
        if epoch != self.epoch {
            return Admission::Over;
        }
        if let Some(frame) = self.done.get(&unique) {
            return Admission::Done(Arc::clone(frame));
        }
        match self.running.get_mut(&unique) {
            Some(again) => {
                // A thread of an older stream may be late.
                *again = (*again).max(Some(stream));
                Admission::Running
            }
            None => {
                self.running.insert(unique, None);
                Admission::New
            }
        }
    }

    /// Notes an answer; the stream by which it was asked for again meanwhile.
    pub fn finish(&mut self, epoch: u64, unique: u64, frame: &Arc<Vec<u8>>) -> Option<u64> {
        if epoch != self.epoch {
            return None;
        }
        let again = self.running.remove(&unique).flatten();
        self.done.insert(unique, Arc::clone(frame));
        self.order.push_back(unique);
        if self.order.len() > KEPT
            && let Some(oldest) = self.order.pop_front()
        {
            self.done.remove(&oldest);
        }
        again
    }

    /// Forgets all: another mount counts anew, and what runs for the one before says nothing to it.
    pub fn next_epoch(&mut self) {
        *self = Self { epoch: self.epoch + 1, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_done_once() {
        let mut replies = Replies::default();
        let frame = Arc::new(vec![1]);
        assert_eq!(replies.admit(0, 7, 1), Admission::New);
        assert_eq!(replies.admit(0, 7, 3), Admission::Running);
        assert_eq!(replies.admit(0, 7, 2), Admission::Running);
        assert_eq!(replies.finish(0, 7, &frame), Some(3));
        assert_eq!(replies.admit(0, 7, 1), Admission::Done(frame));
    }

    #[test]
    fn another_mount_learns_nothing_of_the_one_before() {
        let mut replies = Replies::default();
        let frame = Arc::new(vec![1]);
        assert_eq!(replies.admit(0, 7, 1), Admission::New);
        assert_eq!(replies.admit(0, 8, 1), Admission::New);
        assert_eq!(replies.finish(0, 8, &frame), None);
        replies.next_epoch();
        let now = replies.epoch();
        // Seven still runs for the old mount; its answer is none to the new one's seven.
        assert_eq!(replies.finish(0, 7, &frame), None);
        assert_eq!(replies.admit(now, 7, 1), Admission::New);
        assert_eq!(replies.admit(now, 8, 1), Admission::New);
        assert_eq!(replies.admit(0, 9, 1), Admission::Over);
    }

    #[test]
    fn the_memory_is_bounded() {
        let mut replies = Replies::default();
        let frame = Arc::new(Vec::new());
        for unique in 0..10_000 {
            assert_eq!(replies.admit(0, unique, 1), Admission::New);
            assert_eq!(replies.finish(0, unique, &frame), None);
        }
        assert_eq!(replies.done.len(), KEPT);
        assert_eq!(replies.order.len(), KEPT);
    }
}
