//! What a mount has asked of the host and what is still open: the part of a mount that knows no fd.
//!
//! ```text
//! kernel's request ──► request() ──► Ask (to the host) │ Tell (known here) │ Init │ Nothing
//! host's reply     ──► reply()   ──► Tell (to the kernel) and, seldom, Ask
//! stream broken    ──► broken()      the kernel is asked for everything open again (its RESEND)
//! stream attached  ──► attached()    Restore for a new server
//! ```
//! **Doubt.** A server that is killed may have applied what it did not answer, and the next one does
//! not know. What was open at that moment is asked again, and an error that it would then have is
//! looked at twice: a name that was to be made and is there (of the right kind) counts as made, one
//! that was to go and is gone as removed or moved. A file that the host made under that very name in
//! that very moment cannot be told apart. An exchange would undo itself, so it is not asked again:
//! EIO. Reads, writes and attributes can be repeated as they are.

use std::collections::{HashMap, HashSet};

use dhow_protocol::files::{Errno, FileAnswer, FileOp, FileReply, FileRequest, NodeId, RestoredNode};

use super::answer;
use super::known::Known;
use super::request::{self, Asked, Change, Expect, Listing, Origin};
use super::uapi::{InHeader, InitIn, UNIQUE_RESEND};

/// Nodes of one `Restore`: with the longest names they fit a frame.
const RESTORED_AT_ONCE: usize = 3000;

/// An answer for the kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The request's number as it was last read.
    pub unique: u64,
    /// 0, or an errno (positive).
    pub error: i32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// References that the kernel gets by it.
    pub given: Vec<(NodeId, u64)>,
}

impl Answer {
    fn new(unique: u64, body: Result<Vec<u8>, i32>) -> Self {
        let (error, body) = match body {
            Ok(body) => (0, body),
            Err(error) => (error, Vec::new()),
        };
        Self { unique, error, body, given: Vec::new() }
    }
}

/// What a request of the kernel comes to.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// It goes to the host.
    Ask(FileRequest),
    /// It is answered here.
    Tell(Answer),
    /// The mount begins; answered with this number.
    Init(u64, InitIn),
    /// Nothing: unreadable. The kernel never sends such.
    Nothing,
}

/// What a reply of the host comes to.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// The kernel's answer.
    Tell(Answer),
    /// Something more for the host.
    Ask(FileRequest),
}

#[derive(Debug)]
struct Pending {
    /// The number as it was read, which the answer must carry.
    raw: u64,
    expect: Expect,
    /// A server that is dead may have done it.
    doubt: bool,
    /// This error is being looked at again.
    second: Option<i32>,
}

/// See the module's page.
#[derive(Debug, Default)]
pub struct Ledger {
    asked: HashMap<u64, Pending>,
    /// Were open when a stream broke, and have not come again yet.
    open: HashSet<u64>,
    /// Were open when a server was gone.
    doubtful: HashSet<u64>,
    /// An earlier worker asked things that are not known here.
    adopted: bool,
    /// The server that is attached knows nothing of what was before.
    new_server: bool,
    known: Known,
}

impl Ledger {
    /// The ledger of a mount that an earlier worker made.
    pub fn adopted() -> Self {
        Self { adopted: true, ..Self::default() }
    }

    /// Takes a request of the kernel.
    pub fn request(&mut self, bytes: &[u8]) -> Step {
        let Ok((header, body)) = InHeader::split(bytes) else { return Step::Nothing };
        match request::read(&header, body) {
            Asked::Host(op, expect) => self.ask(header.unique, op, expect),
            Asked::Forget(nodes) => {
                nodes.iter().for_each(|(node, count)| self.known.forgotten(*node, *count));
                Step::Ask(FileRequest { unique: 0, op: FileOp::Forget(nodes) })
            }
            Asked::Init(init) => Step::Init(header.unique, init),
            Asked::Done => Step::Tell(Answer::new(header.unique, Ok(Vec::new()))),
            Asked::Refused(error) => Step::Tell(Answer::new(header.unique, Err(error))),
        }
    }

    fn ask(&mut self, raw: u64, op: FileOp, expect: Expect) -> Step {
        let unique = raw & !UNIQUE_RESEND;
        self.open.remove(&unique);
        let unseen = self.adopted && self.new_server && raw & UNIQUE_RESEND != 0;
        let doubt = unseen || self.doubtful.contains(&unique);
        if doubt && matches!(expect, Expect::Done(Change::Exchanged(..))) {
            self.doubtful.remove(&unique);
            return Step::Tell(Answer::new(raw, Err(libc::EIO)));
        }
        self.asked.insert(unique, Pending { raw, expect, doubt, second: None });
        Step::Ask(FileRequest { unique, op })
    }

    /// Takes a reply of the host. One that nobody waits for is dropped.
    pub fn reply(&mut self, reply: FileReply) -> Vec<Next> {
        let Some(pending) = self.asked.remove(&reply.unique) else { return Vec::new() };
        let mut next = Vec::new();
        let told = match (pending.second, reply.result) {
            (Some(error), result) => self.looked_again(&pending, error, result, &mut next),
            (None, Err(Errno(error))) => {
                if pending.doubt
                    && let Some(op) = second_look(&pending.expect, error)
                {
                    match op {
                        Some(op) => {
                            next.push(Next::Ask(FileRequest { unique: reply.unique, op }));
                            self.asked.insert(reply.unique, Pending { second: Some(error), ..pending });
                            return next;
                        }
                        None => self.take(&pending, FileAnswer::Done, &mut next),
                    }
                } else {
                    Answer::new(pending.raw, Err(answer::errno(error)))
                }
            }
            (None, Ok(answer)) => self.take(&pending, answer, &mut next),
        };
        self.doubtful.remove(&reply.unique);
        next.push(Next::Tell(told));
        next
    }

    /// What was asked after a doubtful error.
    fn looked_again(
        &mut self,
        pending: &Pending,
        error: i32,
        result: Result<FileAnswer, Errno>,
        next: &mut Vec<Next>,
    ) -> Answer {
        let Ok(FileAnswer::Entry(found)) = result else {
            return Answer::new(pending.raw, Err(answer::errno(error)));
        };
        match &pending.expect {
            Expect::Entry(_, _, Origin::Made(kind)) if found.kind == *kind => {
                return self.take(pending, FileAnswer::Entry(found), next);
            }
            Expect::Entry(_, _, Origin::Linked(node)) if found.node == *node => {
                return self.take(pending, FileAnswer::Entry(found), next);
            }
            _ => next.extend(give_back([found.node])),
        }
        match pending.expect {
            Expect::Done(Change::Moved(..)) => self.take(pending, FileAnswer::Done, next),
            _ => Answer::new(pending.raw, Err(answer::errno(error))),
        }
    }

    /// Makes the kernel's answer of the host's, and keeps the table of nodes right.
    fn take(&mut self, pending: &Pending, from_host: FileAnswer, next: &mut Vec<Next>) -> Answer {
        match (&pending.expect, from_host) {
            (Expect::Entry(folder, name, origin), FileAnswer::Entry(found)) => {
                let wrong = matches!(origin, Origin::Linked(node) if found.node != *node);
                match answer::entry(&found) {
                    Ok(body) if !wrong => {
                        self.known.entered(found.node, *folder, name);
                        Answer { given: vec![(found.node, 1)], ..Answer::new(pending.raw, Ok(body)) }
                    }
                    _ => {
                        next.extend(give_back([found.node]));
                        Answer::new(pending.raw, Err(libc::EIO))
                    }
                }
            }
            (Expect::Entries(listing), FileAnswer::Entries { entries, end }) => {
                if entries.is_empty() && !end {
                    return Answer::new(pending.raw, Err(libc::EIO));
                }
                self.list(pending.raw, listing, &entries, next)
            }
            (expect, from_host) => {
                let body = answer::body(expect, from_host);
                if let (Ok(_), Expect::Done(change)) = (&body, expect) {
                    match change {
                        Change::None => {}
                        Change::Removed(folder, name) => self.known.removed(*folder, name),
                        Change::Moved(from, to) => self.known.moved(from, to),
                        Change::Exchanged(one, other) => self.known.exchanged(one, other),
                    }
                }
                Answer::new(pending.raw, body)
            }
        }
    }

    fn list(
        &mut self,
        raw: u64,
        listing: &Listing,
        entries: &[dhow_protocol::files::FolderEntry],
        next: &mut Vec<Next>,
    ) -> Answer {
        let parent = self.known.folder_of(listing.node).unwrap_or(listing.node);
        let (body, taken) = match answer::entries(listing, parent, entries) {
            Ok((body, taken)) => (Ok(body), taken),
            Err(error) => (Err(error), 0),
        };
        let kept = if listing.plus { taken } else { 0 };
        let mut answer = Answer::new(raw, body);
        for entry in &entries[..kept] {
            self.known.entered(entry.attributes.node, listing.node, &entry.name);
            answer.given.push((entry.attributes.node, 1));
        }
        next.extend(give_back(entries[kept..].iter().map(|entry| entry.attributes.node)));
        answer
    }

    /// The kernel did not take an answer: its references go back.
    pub fn not_taken(&mut self, given: Vec<(NodeId, u64)>) -> Option<FileRequest> {
        given.iter().for_each(|(node, count)| self.known.forgotten(*node, *count));
        (!given.is_empty()).then_some(FileRequest { unique: 0, op: FileOp::Forget(given) })
    }

    /// The stream is gone. The kernel must be asked for what is open before the next one is served.
    pub fn broken(&mut self) {
        self.open.extend(self.asked.drain().map(|(unique, _)| unique));
    }

    /// A stream is attached: what the server must be told first, each answered before the next.
    pub fn attached(&mut self, resumed: bool) -> Vec<FileOp> {
        self.new_server = !resumed;
        if resumed {
            return Vec::new();
        }
        self.doubtful.extend(self.open.iter().copied());
        let nodes = self.known.restored();
        nodes.chunks(RESTORED_AT_ONCE).map(|some| FileOp::Restore(<[RestoredNode]>::to_vec(some))).collect()
    }

    /// Whether nothing is open.
    #[cfg(test)]
    pub fn is_idle(&self) -> bool {
        self.asked.is_empty() && self.open.is_empty() && self.doubtful.is_empty()
    }
}

/// What to ask about an error that a doubtful request has now: `None` when the error stands,
/// `Some(None)` when it means that it was done.
#[allow(clippy::option_option, reason = "three cases, used once")]
fn second_look(expect: &Expect, error: i32) -> Option<Option<FileOp>> {
    match (expect, error) {
        (Expect::Entry(folder, name, Origin::Made(_) | Origin::Linked(_)), libc::EEXIST) => {
            Some(Some(FileOp::Lookup(*folder, name.clone())))
        }
        (Expect::Done(Change::Removed(..)), libc::ENOENT) => Some(None),
        (Expect::Done(Change::Moved(_, to)), libc::ENOENT) => Some(Some(FileOp::Lookup(to.0, to.1.clone()))),
        _ => None,
    }
}

fn give_back(nodes: impl IntoIterator<Item = NodeId>) -> Option<Next> {
    let nodes: Vec<_> = nodes.into_iter().map(|node| (node, 1)).collect();
    (!nodes.is_empty()).then_some(Next::Ask(FileRequest { unique: 0, op: FileOp::Forget(nodes) }))
}
