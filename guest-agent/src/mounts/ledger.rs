//! What a mount has asked of the host and what is still open: the part of a mount that knows no fd.
//!
//! ```text
//! kernel's request ──► request() ──► Ask (to the host) │ Tell (known here) │ Init │ Nothing
//! host's reply     ──► reply()   ──► Tell (to the kernel) │ Ask (a second look)
//! stream broken    ──► broken()      the kernel is asked for everything open again (its RESEND)
//! stream attached  ──► attached()    Restore for a new server
//! ```
//! **Doubt.** A server that is killed may have applied what it did not answer, and the next one does
//! not know. What was open at that moment is asked again, and an error that it would then have is
//! looked at twice: a name that was to be made and is there (of the right kind) counts as made, one
//! that was to go and is gone as removed or moved. A file that the host made under that very name in
//! that very moment cannot be told apart. An exchange would undo itself, so it is not asked again:
//! EIO. Reads, writes and attributes can be repeated as they are.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::time::Instant;

use dhow_protocol::files::{
    DataReply, Errno, FileAnswer, FileOp, FileReply, FileRequest, NodeId, RenameMode, WriteRequest,
};

use super::answer;
use super::known::Known;
use super::listings::{Listings, Part};
use super::request::{self, Asked, Change, Expect, Listing, Origin};
use super::stream::Reply;
use super::uapi::{InHeader, InitIn, UNIQUE_RESEND};

/// Nodes of one `Restore`: with the longest names they fit a frame.
const RESTORED_AT_ONCE: usize = 3000;
/// Nodes of one `Forget`: they fit a frame.
const FORGOTTEN_AT_ONCE: usize = 30_000;

/// An answer for the kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer<'a> {
    /// The request's number as it was last read.
    pub unique: u64,
    /// 0, or an errno (positive).
    pub error: i32,
    /// What follows the header.
    pub body: Cow<'a, [u8]>,
    /// References that the kernel gets by it, one to each.
    pub given: Vec<NodeId>,
}

impl Answer<'_> {
    /// An answer that gives no references.
    pub fn new(unique: u64, body: Result<Vec<u8>, i32>) -> Self {
        let (error, body) = match body {
            Ok(body) => (0, body),
            Err(error) => (error, Vec::new()),
        };
        Self { unique, error, body: Cow::Owned(body), given: Vec::new() }
    }
}

/// What a request of the kernel comes to.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// It goes to the host.
    Ask(FileRequest),
    /// It goes to the host.
    Write(WriteRequest<'a>),
    /// It is answered here.
    Tell(Answer<'static>),
    /// The mount begins; answered with this number.
    Init(u64, InitIn),
    /// Nothing: unreadable. The kernel never sends such.
    Nothing,
}

/// What a reply of the host comes to.
#[derive(Debug, PartialEq, Eq)]
pub enum Next<'a> {
    /// The kernel's answer.
    Tell(Answer<'a>),
    /// A second look at the host.
    Ask(FileRequest),
}

#[derive(Debug)]
struct Pending {
    /// The number as it was read, which the answer must carry.
    raw: u64,
    expect: Expect,
    /// Nodes whose attributes it changes.
    touched: [Option<NodeId>; 2],
    /// For a listing: when it was asked ([`Listings::ask`]).
    asked_at: u64,
    /// A server that is dead may have done it.
    doubt: bool,
    /// This error is being looked at again.
    second: Option<i32>,
}

impl Pending {
    fn new(raw: u64, expect: Expect, touched: [Option<NodeId>; 2]) -> Self {
        Self { raw, expect, touched, asked_at: 0, doubt: false, second: None }
    }

    /// The request's number on the wire: the same when it is asked again.
    fn unique(&self) -> u64 {
        self.raw & !UNIQUE_RESEND
    }
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
    listings: Listings,
    /// References that the host gave and the kernel did not get.
    owed: Vec<NodeId>,
}

impl Ledger {
    /// The ledger of a mount that an earlier worker made.
    pub fn adopted() -> Self {
        Self { adopted: true, ..Self::default() }
    }

    /// Takes a request of the kernel.
    pub fn request<'a>(&mut self, bytes: &'a [u8]) -> Step<'a> {
        let Ok((header, body)) = InHeader::split(bytes) else { return Step::Nothing };
        match request::read(&header, body) {
            Asked::Host(op, expect) => self.ask(header.unique, op, expect),
            Asked::Write(node, offset, data) => {
                let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
                let pending = Pending::new(header.unique, Expect::Written(size), [Some(node), None]);
                let (unique, _) = self.note(pending);
                Step::Write(WriteRequest::new(unique, node, offset, data))
            }
            Asked::Forget(nodes) => {
                nodes.iter().for_each(|(node, count)| self.known.forgotten(*node, *count));
                Step::Ask(FileRequest { unique: 0, op: FileOp::Forget(nodes) })
            }
            Asked::Init(init) => Step::Init(header.unique, init),
            Asked::Done => Step::Tell(Answer::new(header.unique, Ok(Vec::new()))),
            Asked::Refused(error) => Step::Tell(Answer::new(header.unique, Err(error))),
        }
    }

    fn ask(&mut self, raw: u64, op: FileOp, expect: Expect) -> Step<'static> {
        let mut pending = Pending::new(raw, expect, touched(&op));
        if let Expect::Entries(listing) = &pending.expect {
            if let Some(part) = self.listings.take(listing, Instant::now()) {
                self.open.remove(&pending.unique());
                return Step::Tell(self.deal(raw, listing, part));
            }
            pending.asked_at = self.listings.ask();
        }
        let (unique, doubt) = self.note(pending);
        if doubt && matches!(op, FileOp::Rename { mode: RenameMode::Exchange, .. }) {
            self.asked.remove(&unique);
            self.doubtful.remove(&unique);
            return Step::Tell(Answer::new(raw, Err(libc::EIO)));
        }
        Step::Ask(FileRequest { unique, op })
    }

    /// Notes that a request goes to the host; its number there, and whether it may have been done.
    fn note(&mut self, pending: Pending) -> (u64, bool) {
        let unique = pending.unique();
        self.open.remove(&unique);
        let unseen = self.adopted && self.new_server && pending.raw & UNIQUE_RESEND != 0;
        let doubt = unseen || self.doubtful.contains(&unique);
        self.asked.insert(unique, Pending { doubt, ..pending });
        (unique, doubt)
    }

    /// Takes a reply of the host. One that nobody waits for is dropped.
    pub fn reply<'a>(&mut self, reply: Reply<'a>) -> Option<Next<'a>> {
        let reply = match reply {
            Reply::Data(reply) => match self.data(reply) {
                Some(answer) => return Some(Next::Tell(answer)),
                None => FileReply::from(Reply::Data(reply)),
            },
            Reply::Other(reply) => reply,
        };
        let pending = self.asked.remove(&reply.unique)?;
        let told = match (pending.second, reply.result) {
            (Some(error), result) => self.looked_again(&pending, error, result),
            (None, Err(Errno(error))) => match second_look(&pending, error) {
                Look::No => self.failed(&pending, error),
                Look::Done => self.take(&pending, FileAnswer::Done),
                Look::Ask(op) => {
                    self.asked.insert(reply.unique, Pending { second: Some(error), ..pending });
                    return Some(Next::Ask(FileRequest { unique: reply.unique, op }));
                }
            },
            (None, Ok(answer)) => self.take(&pending, answer),
        };
        self.doubtful.remove(&reply.unique);
        Some(Next::Tell(told))
    }

    /// The bytes that were asked for, as they came.
    fn data<'a>(&mut self, reply: DataReply<'a>) -> Option<Answer<'a>> {
        let pending = self.asked.get(&reply.unique)?;
        let fits = matches!(pending.expect, Expect::Data(size) if reply.data.len() as u64 <= u64::from(size));
        if !fits {
            return None;
        }
        let raw = pending.raw;
        self.asked.remove(&reply.unique);
        self.doubtful.remove(&reply.unique);
        Some(Answer { body: Cow::Borrowed(reply.data), ..Answer::new(raw, Ok(Vec::new())) })
    }

    fn failed(&mut self, pending: &Pending, error: i32) -> Answer<'static> {
        if let Expect::Entries(_) = pending.expect {
            self.listings.answered(pending.asked_at, Vec::new());
        }
        // A write may have been done in part.
        pending.touched.iter().flatten().for_each(|node| self.listings.touched(*node));
        Answer::new(pending.raw, Err(answer::errno(error)))
    }

    /// What was asked after a doubtful error.
    fn looked_again(
        &mut self,
        pending: &Pending,
        error: i32,
        result: Result<FileAnswer, Errno>,
    ) -> Answer<'static> {
        let Ok(FileAnswer::Entry(found)) = result else { return self.failed(pending, error) };
        let is_it = match &pending.expect {
            Expect::Entry(_, _, Origin::Made(kind)) => found.kind == *kind,
            Expect::Entry(_, _, Origin::Linked(node)) => found.node == *node,
            _ => false,
        };
        if is_it {
            return self.take(pending, FileAnswer::Entry(found));
        }
        self.owed.push(found.node);
        match pending.expect {
            Expect::Done(Change::Moved(..)) => self.take(pending, FileAnswer::Done),
            _ => self.failed(pending, error),
        }
    }

    /// Makes the kernel's answer of the host's, and keeps the tables right.
    fn take(&mut self, pending: &Pending, from_host: FileAnswer) -> Answer<'static> {
        match (&pending.expect, from_host) {
            (Expect::Entry(folder, name, origin), FileAnswer::Entry(found)) => {
                let wrong = matches!(origin, Origin::Linked(node) if found.node != *node);
                match answer::entry(&found) {
                    Ok(body) if !wrong => {
                        self.known.entered(found.node, *folder, name);
                        pending.touched.iter().flatten().for_each(|node| self.listings.touched(*node));
                        Answer { given: vec![found.node], ..Answer::new(pending.raw, Ok(body)) }
                    }
                    _ => {
                        self.owed.push(found.node);
                        self.failed(pending, libc::EIO)
                    }
                }
            }
            (Expect::Entries(listing), FileAnswer::Entries { entries, end })
                if end || !entries.is_empty() =>
            {
                let entries = self.listings.answered(pending.asked_at, entries);
                let (folder, offset) = (listing.node, listing.offset);
                self.deal(pending.raw, listing, Part { folder, offset, entries, end, since: Instant::now() })
            }
            (expect, from_host) => {
                let body = match answer::body(expect, from_host) {
                    Ok(body) => body,
                    Err(error) => return self.failed(pending, error),
                };
                pending.touched.iter().flatten().for_each(|node| self.listings.touched(*node));
                if let Expect::Done(change) = expect {
                    self.owed.extend(self.listings.renamed(change));
                    match change {
                        Change::None => {}
                        Change::Removed(folder, name) => self.known.removed(*folder, name),
                        Change::Moved(from, to) => self.known.moved(from, to),
                        Change::Exchanged(one, other) => self.known.exchanged(one, other),
                    }
                }
                Answer::new(pending.raw, Ok(body))
            }
        }
    }

    /// Gives the kernel what it has room for, and keeps the rest for its next request.
    fn deal(&mut self, raw: u64, listing: &Listing, mut part: Part) -> Answer<'static> {
        let parent = self.known.folder_of(listing.node).unwrap_or(listing.node);
        let age = part.since.elapsed();
        let nodes = |part: Part| part.entries.into_iter().map(|waiting| waiting.entry.attributes.node);
        let (body, taken, offset) = match answer::entries(listing, parent, &part.entries, age) {
            // > an empty answer is the end of the folder
            Ok((body, ..)) if body.is_empty() && !part.entries.is_empty() => {
                self.owed.extend(nodes(part));
                return Answer::new(raw, Err(libc::EINVAL));
            }
            Ok(given) => given,
            Err(error) => {
                self.owed.extend(nodes(part));
                return Answer::new(raw, Err(error));
            }
        };
        let mut answer = Answer::new(raw, Ok(body));
        for waiting in part.entries.drain(..taken) {
            let node = waiting.entry.attributes.node;
            if listing.plus && !waiting.changed {
                self.known.entered(node, listing.node, &waiting.entry.name);
                answer.given.push(node);
            } else {
                self.owed.push(node);
            }
        }
        let is_over = answer.body.is_empty();
        if !is_over && (part.end || !part.entries.is_empty()) {
            part.offset = offset;
            self.owed.extend(self.listings.keep(part, Instant::now()));
        }
        answer
    }

    /// The kernel did not take an answer: its references go back.
    pub fn not_taken(&mut self, given: Vec<NodeId>) {
        given.iter().for_each(|node| self.known.forgotten(*node, 1));
        self.owed.extend(given);
    }

    /// References that go back to the host with whatever is sent next: nothing waits for it.
    pub fn owed(&mut self) -> Option<FileRequest> {
        let from = self.owed.len().saturating_sub(FORGOTTEN_AT_ONCE);
        let nodes: Vec<_> = self.owed.drain(from..).map(|node| (node, 1)).collect();
        (!nodes.is_empty()).then_some(FileRequest { unique: 0, op: FileOp::Forget(nodes) })
    }

    /// The stream is gone. The kernel must be asked for what is open before the next one is served.
    pub fn broken(&mut self) {
        for (unique, pending) in self.asked.drain() {
            if let Expect::Entries(_) = pending.expect {
                self.listings.answered(pending.asked_at, Vec::new());
            }
            self.open.insert(unique);
        }
        self.owed.extend(self.listings.clear());
    }

    /// A stream is attached: what the server must be told first, each answered before the next.
    pub fn attached(&mut self, resumed: bool) -> Vec<FileOp> {
        self.new_server = !resumed;
        if resumed {
            return Vec::new();
        }
        self.owed.clear();
        self.doubtful.extend(self.open.iter().copied());
        let nodes = self.known.restored();
        nodes.chunks(RESTORED_AT_ONCE).map(|some| FileOp::Restore(some.to_vec())).collect()
    }
}

/// What to make of an error.
enum Look {
    /// It stands.
    No,
    /// What was asked for had been done.
    Done,
    /// This tells.
    Ask(FileOp),
}

fn second_look(pending: &Pending, error: i32) -> Look {
    match (&pending.expect, error) {
        _ if !pending.doubt => Look::No,
        (Expect::Entry(folder, name, Origin::Made(_) | Origin::Linked(_)), libc::EEXIST) => {
            Look::Ask(FileOp::Lookup(*folder, name.clone()))
        }
        (Expect::Done(Change::Removed(..)), libc::ENOENT) => Look::Done,
        (Expect::Done(Change::Moved(_, to)), libc::ENOENT) => Look::Ask(FileOp::Lookup(to.0, to.1.clone())),
        _ => Look::No,
    }
}

/// Nodes whose attributes an operation changes, and the kernel knows that it does.
fn touched(op: &FileOp) -> [Option<NodeId>; 2] {
    match op {
        FileOp::SetAttributes(node, _) => [Some(*node), None],
        FileOp::CreateFile(folder, ..)
        | FileOp::CreateFifo(folder, ..)
        | FileOp::CreateFolder(folder, ..)
        | FileOp::CreateSymlink(folder, ..)
        | FileOp::RemoveFile(folder, _)
        | FileOp::RemoveFolder(folder, _) => [Some(*folder), None],
        FileOp::Link { node, folder, .. } => [Some(*node), Some(*folder)],
        FileOp::Rename { from, to, .. } => [Some(from.0), Some(to.0)],
        _ => [None, None],
    }
}

#[cfg(test)]
mod tests;
