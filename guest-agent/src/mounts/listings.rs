//! Folders that are being listed: what the host sent and the kernel has not taken yet.
//!
//! The kernel takes about twenty names at a time, a round trip to the host gives hundreds. What is
//! left over waits here for the kernel's next request, for as long as names and attributes are
//! believed at all ([`super::answer::TTL`]).
//!
//! The kernel protects itself against attributes that are older than a change of its own by when it
//! sent its request. What waits here is older than the request that it answers, so it must be told
//! which nodes the guest has changed meanwhile: their names are listed without attributes.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use dhow_protocol::files::{FolderEntry, Name, NodeId};

use super::answer::TTL;
use super::request::{Change, Listing};

/// Most parts that wait.
const LIMIT: usize = 32;

/// A name that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// As the host sent it.
    pub entry: FolderEntry,
    /// Whether the guest changed the node since.
    pub changed: bool,
}

/// The rest of what the host sent of a folder.
#[derive(Debug, PartialEq, Eq)]
pub struct Part {
    /// The folder.
    pub folder: NodeId,
    /// The kernel's position that it begins at.
    pub offset: u64,
    /// The names.
    pub entries: VecDeque<Waiting>,
    /// Whether nothing follows them in the folder.
    pub end: bool,
    /// When it came.
    pub since: Instant,
}

/// See the module's page.
#[derive(Debug, Default)]
pub struct Listings {
    parts: VecDeque<Part>,
    /// Listings that the host has not answered.
    asked: usize,
    /// Counts changes.
    clock: u64,
    /// When nodes were changed, as long as a listing is open with the host that may be older.
    changed: HashMap<NodeId, u64>,
}

impl Listings {
    /// A listing goes to the host; the number is for [`Self::answered`].
    pub fn ask(&mut self) -> u64 {
        self.asked += 1;
        self.clock
    }

    /// The host answered, or never will (`entries` is empty then). Marks what was changed meanwhile.
    pub fn answered(&mut self, asked_at: u64, entries: Vec<FolderEntry>) -> VecDeque<Waiting> {
        let changed = |node| self.changed.get(&node).is_some_and(|at| *at > asked_at);
        let entries = entries
            .into_iter()
            .map(|entry| Waiting { changed: changed(entry.attributes.node), entry })
            .collect();
        self.asked = self.asked.saturating_sub(1);
        if self.asked == 0 {
            self.changed.clear();
        }
        entries
    }

    /// The part that the kernel asks for, if it waits here.
    pub fn take(&mut self, listing: &Listing, now: Instant) -> Option<Part> {
        let at = self.parts.iter().position(|part| {
            part.folder == listing.node
                && part.offset == listing.offset
                && now.saturating_duration_since(part.since) < TTL
        })?;
        self.parts.remove(at)
    }

    /// Keeps a part; returns references that nobody will want any more.
    pub fn keep(&mut self, part: Part, now: Instant) -> Vec<NodeId> {
        let mut dropped = Vec::new();
        while self.parts.len() >= LIMIT
            || self.parts.front().is_some_and(|oldest| now.saturating_duration_since(oldest.since) >= TTL)
        {
            let Some(oldest) = self.parts.pop_front() else { break };
            dropped.extend(oldest.entries.iter().map(|waiting| waiting.entry.attributes.node));
        }
        self.parts.push_back(part);
        dropped
    }

    /// Drops all; returns the references.
    pub fn clear(&mut self) -> Vec<NodeId> {
        let entries = self.parts.drain(..).flat_map(|part| part.entries);
        entries.map(|waiting| waiting.entry.attributes.node).collect()
    }

    /// The guest changed a node.
    pub fn touched(&mut self, node: NodeId) {
        self.clock += 1;
        if self.asked > 0 {
            self.changed.insert(node, self.clock);
        }
        for waiting in self.parts.iter_mut().flat_map(|part| &mut part.entries) {
            waiting.changed |= waiting.entry.attributes.node == node;
        }
    }

    /// The guest changed names; returns references to what is not listed any more. No listing of these
    /// folders is open with the host meanwhile: the kernel holds a folder's lock for either.
    pub fn renamed(&mut self, change: &Change) -> Vec<NodeId> {
        match change {
            Change::None => Vec::new(),
            Change::Removed(folder, name) => self.remove(*folder, name),
            Change::Moved(from, to) => {
                self.mark(to.0, &to.1);
                self.remove(from.0, &from.1)
            }
            Change::Exchanged(one, other) => {
                self.mark(one.0, &one.1);
                self.mark(other.0, &other.1);
                Vec::new()
            }
        }
    }

    fn of(&mut self, folder: NodeId) -> impl Iterator<Item = &mut Part> {
        self.parts.iter_mut().filter(move |part| part.folder == folder)
    }

    /// Another node is under this name now.
    fn mark(&mut self, folder: NodeId, name: &Name) {
        for waiting in self.of(folder).flat_map(|part| &mut part.entries) {
            waiting.changed |= waiting.entry.name == *name;
        }
    }

    fn remove(&mut self, folder: NodeId, name: &Name) -> Vec<NodeId> {
        let mut dropped = Vec::new();
        for part in self.of(folder) {
            if let Some(at) = part.entries.iter().position(|waiting| waiting.entry.name == *name) {
                dropped.extend(part.entries.remove(at).map(|waiting| waiting.entry.attributes.node));
            }
        }
        dropped
    }
}

#[cfg(test)]
mod tests {
    use super::super::answer::tests::listed;
    use super::*;
    use std::time::Duration;

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    fn part(
        listings: &mut Listings,
        folder: u64,
        offset: u64,
        names: &[(&str, u64)],
        since: Instant,
    ) -> Part {
        let asked = listings.ask();
        let entries = names.iter().map(|(name, node)| listed(name.as_bytes(), *node, *node)).collect();
        let entries = listings.answered(asked, entries);
        Part { folder: NodeId(folder), offset, entries, end: true, since }
    }

    fn wanted(folder: u64, offset: u64) -> Listing {
        Listing { node: NodeId(folder), offset, size: 4096, plus: true }
    }

    /// Names that wait, with a `*` where the attributes are of no use.
    fn names(part: &Part) -> Vec<String> {
        let show = |waiting: &Waiting| {
            let name = String::from_utf8_lossy(waiting.entry.name.as_bytes()).into_owned();
            name + if waiting.changed { "*" } else { "" }
        };
        part.entries.iter().map(show).collect()
    }

    #[test]
    fn a_part_is_taken_once_where_it_begins() {
        let mut listings = Listings::default();
        let now = Instant::now();
        let kept = part(&mut listings, 5, 9, &[("a", 10)], now);
        assert!(listings.keep(kept, now).is_empty());
        assert!(listings.take(&wanted(5, 8), now).is_none());
        assert!(listings.take(&wanted(4, 9), now).is_none());
        assert!(listings.take(&wanted(5, 9), now + TTL).is_none());
        assert_eq!(names(&listings.take(&wanted(5, 9), now).unwrap()), ["a"]);
        assert!(listings.take(&wanted(5, 9), now).is_none());
    }

    #[test]
    fn old_and_surplus_parts_are_given_back() {
        let mut listings = Listings::default();
        let now = Instant::now();
        for node in 100..100 + LIMIT as u64 {
            let kept = part(&mut listings, node, 9, &[("a", node)], now);
            assert!(listings.keep(kept, now).is_empty());
        }
        let kept = part(&mut listings, 5, 9, &[("a", 10)], now);
        assert_eq!(listings.keep(kept, now), [NodeId(100)]);
        let kept = part(&mut listings, 6, 9, &[("a", 11)], now);
        assert_eq!(listings.keep(kept, now + Duration::from_secs(9)).len(), LIMIT);
        assert_eq!(listings.clear(), [NodeId(11)]);
    }

    #[test]
    fn what_the_guest_changes_loses_its_attributes() {
        let mut listings = Listings::default();
        let now = Instant::now();
        let kept = part(&mut listings, 5, 9, &[("a", 10), ("b", 11), ("c", 12), ("d", 13)], now);
        listings.keep(kept, now);
        listings.touched(NodeId(11));
        listings.touched(NodeId(99));
        let place = |text: &str| (NodeId(5), name(text));
        assert_eq!(listings.renamed(&Change::Moved(place("a"), place("c"))), [NodeId(10)]);
        assert_eq!(listings.renamed(&Change::Removed(NodeId(6), name("d"))), []);
        assert_eq!(listings.renamed(&Change::Removed(NodeId(5), name("d"))), [NodeId(13)]);
        assert_eq!(names(&listings.take(&wanted(5, 9), now).unwrap()), ["b*", "c*"]);
        let kept = part(&mut listings, 5, 9, &[("a", 10), ("b", 11), ("c", 12)], now);
        listings.keep(kept, now);
        listings.renamed(&Change::Exchanged(place("a"), place("c")));
        assert_eq!(names(&listings.take(&wanted(5, 9), now).unwrap()), ["a*", "b", "c*"]);
    }

    #[test]
    fn a_change_while_the_host_lists_counts_too() {
        let mut listings = Listings::default();
        listings.touched(NodeId(10));
        let (early, entries) = (listings.ask(), vec![listed(b"a", 10, 1), listed(b"b", 11, 2)]);
        listings.touched(NodeId(11));
        let late = listings.ask();
        let marks = |waiting: VecDeque<Waiting>| waiting.iter().map(|w| w.changed).collect::<Vec<_>>();
        assert_eq!(marks(listings.answered(late, entries.clone())), [false, false]);
        assert_eq!(marks(listings.answered(early, entries.clone())), [false, true]);
        let again = listings.ask();
        assert_eq!(marks(listings.answered(again, entries)), [false, false]);
        assert!(listings.changed.is_empty());
    }
}
