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
    /// It is being done; its answer will go to the newest stream too.
    Running,
    /// It was done; this frame was the answer.
    Done(Arc<Vec<u8>>),
}

/// The memory of one mount.
#[derive(Debug, Default)]
pub struct Replies {
    running: HashMap<u64, bool>,
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

    /// Asks about a request, and notes that it runs when it is new.
    pub fn admit(&mut self, unique: u64) -> Admission {
        if let Some(frame) = self.done.get(&unique) {
            return Admission::Done(Arc::clone(frame));
        }
        match self.running.get_mut(&unique) {
            Some(again) => {
                *again = true;
                Admission::Running
            }
            None => {
                self.running.insert(unique, false);
                Admission::New
            }
        }
    }

    /// Notes an answer; true when it was asked for again meanwhile.
    pub fn finish(&mut self, unique: u64, frame: &Arc<Vec<u8>>) -> bool {
        let again = self.running.remove(&unique).unwrap_or(false);
        self.done.insert(unique, Arc::clone(frame));
        self.order.push_back(unique);
        if self.order.len() > KEPT
            && let Some(oldest) = self.order.pop_front()
        {
            self.done.remove(&oldest);
        }
        again
    }

    /// Forgets all: another mount counts anew.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_done_once() {
        let mut replies = Replies::default();
        assert_eq!(replies.admit(7), Admission::New);
        assert_eq!(replies.admit(7), Admission::Running);
        let frame = Arc::new(vec![1]);
        assert!(replies.finish(7, &frame));
        assert_eq!(replies.admit(7), Admission::Done(frame));
        replies.clear();
        assert_eq!(replies.admit(7), Admission::New);
    }

    #[test]
    fn the_memory_is_bounded() {
        let mut replies = Replies::default();
        let frame = Arc::new(Vec::new());
        for unique in 0..10_000 {
            assert_eq!(replies.admit(unique), Admission::New);
            assert!(!replies.finish(unique, &frame));
        }
        assert_eq!(replies.done.len(), KEPT);
        assert_eq!(replies.order.len(), KEPT);
    }
}
