//! The nodes that the kernel knows: where each was last seen, and how many references it has.
//!
//! Only for a file server that was restarted ([`dhow_protocol::files::FileOp::Restore`]). A node's
//! name is the one that was seen last; a file with several hard links has one of them here. A node
//! whose name is gone (deleted while open) stays without one: a new server cannot find it.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};

use dhow_protocol::files::{Name, NodeId, RestoredNode};

/// Longest chain of folders. Also ends a loop, which a hostile host could make.
const MAX_DEPTH: usize = 4096;

#[derive(Debug)]
struct Node {
    folder: NodeId,
    name: Option<Name>,
    references: u64,
}

/// The table.
#[derive(Debug, Default)]
pub struct Known {
    nodes: HashMap<NodeId, Node>,
    /// From a place's hash to who is there: names are kept once.
    places: HashMap<u64, NodeId>,
    hasher: RandomState,
}

impl Known {
    /// The kernel got one more reference to `node`, under this name.
    pub fn entered(&mut self, node: NodeId, folder: NodeId, name: &Name) {
        self.put(node, folder, name);
        if let Some(known) = self.nodes.get_mut(&node) {
            known.references = known.references.saturating_add(1);
        }
    }

    /// The kernel gave references back.
    pub fn forgotten(&mut self, node: NodeId, count: u64) {
        let Some(known) = self.nodes.get_mut(&node) else { return };
        known.references = known.references.saturating_sub(count);
        if known.references == 0 {
            self.leave(node);
            self.nodes.remove(&node);
        }
    }

    /// A name is gone.
    pub fn removed(&mut self, folder: NodeId, name: &Name) {
        if let Some(node) = self.at(folder, name) {
            self.leave(node);
        }
    }

    /// A name has moved, and what was there is gone.
    pub fn moved(&mut self, from: &(NodeId, Name), to: &(NodeId, Name)) {
        self.removed(to.0, &to.1);
        if let Some(node) = self.at(from.0, &from.1) {
            self.put(node, to.0, &to.1);
        }
    }

    /// Two names have changed places.
    pub fn exchanged(&mut self, one: &(NodeId, Name), other: &(NodeId, Name)) {
        let first = self.at(one.0, &one.1);
        let second = self.at(other.0, &other.1);
        self.removed(one.0, &one.1);
        self.removed(other.0, &other.1);
        if let Some(node) = first {
            self.put(node, other.0, &other.1);
        }
        if let Some(node) = second {
            self.put(node, one.0, &one.1);
        }
    }

    /// The folder that a node was last seen in.
    pub fn folder_of(&self, node: NodeId) -> Option<NodeId> {
        self.nodes.get(&node).map(|known| known.folder)
    }

    /// All that have a name, a folder before what lies in it.
    pub fn restored(&self) -> Vec<RestoredNode> {
        let mut listed = HashSet::with_capacity(self.nodes.len());
        let mut nodes = Vec::with_capacity(self.nodes.len());
        for start in self.nodes.keys() {
            let mut way = Vec::new();
            let mut at = *start;
            while at != NodeId::ROOT && !listed.contains(&at) && way.len() <= MAX_DEPTH {
                let Some(Node { folder, name: Some(name), references }) = self.nodes.get(&at) else { break };
                way.push(RestoredNode {
                    folder: *folder,
                    name: name.clone(),
                    node: at,
                    references: *references,
                });
                at = *folder;
            }
            // A way that does not come from the root leads nowhere.
            if at == NodeId::ROOT || listed.contains(&at) {
                listed.extend(way.iter().map(|step| step.node));
                nodes.extend(way.into_iter().rev());
            }
        }
        nodes
    }

    fn hash(&self, folder: NodeId, name: &Name) -> u64 {
        self.hasher.hash_one((folder, name))
    }

    fn at(&self, folder: NodeId, name: &Name) -> Option<NodeId> {
        let node = *self.places.get(&self.hash(folder, name))?;
        let known = self.nodes.get(&node)?;
        (known.folder == folder && known.name.as_ref() == Some(name)).then_some(node)
    }

    fn put(&mut self, node: NodeId, folder: NodeId, name: &Name) {
        match self.at(folder, name) {
            Some(here) if here == node => return,
            Some(other) => self.leave(other),
            None => {}
        }
        self.leave(node);
        self.places.insert(self.hash(folder, name), node);
        let known = self.nodes.entry(node).or_insert(Node { folder, name: None, references: 0 });
        known.folder = folder;
        known.name = Some(name.clone());
    }

    /// Takes a node's name away.
    fn leave(&mut self, node: NodeId) {
        let Some(known) = self.nodes.get_mut(&node) else { return };
        let (folder, Some(name)) = (known.folder, known.name.take()) else { return };
        let hash = self.hash(folder, &name);
        if self.places.get(&hash) == Some(&node) {
            self.places.remove(&hash);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    fn place(folder: u64, text: &str) -> (NodeId, Name) {
        (NodeId(folder), name(text))
    }

    /// Node, folder, name and references of all, by node.
    fn listed(known: &Known) -> Vec<(u64, u64, String, u64)> {
        let mut all: Vec<_> = known
            .restored()
            .into_iter()
            .map(|node| {
                let name = String::from_utf8_lossy(node.name.as_bytes()).into_owned();
                (node.node.0, node.folder.0, name, node.references)
            })
            .collect();
        all.sort();
        all
    }

    #[test]
    fn a_folder_comes_before_what_lies_in_it() {
        let mut known = Known::default();
        for node in (2..200u64).rev() {
            known.entered(NodeId(node), NodeId(node - 1), &name("down"));
        }
        let restored = known.restored();
        assert_eq!(restored.len(), 198);
        for (index, node) in restored.iter().enumerate() {
            assert_eq!(node.folder.0, index as u64 + 1);
        }
    }

    #[test]
    fn references_are_counted_and_given_back() {
        let mut known = Known::default();
        known.entered(NodeId(2), NodeId::ROOT, &name("a"));
        known.entered(NodeId(2), NodeId::ROOT, &name("a"));
        assert_eq!(listed(&known), [(2, 1, "a".to_owned(), 2)]);
        known.forgotten(NodeId(2), 1);
        known.forgotten(NodeId(2), 5);
        known.forgotten(NodeId(9), 5);
        assert!(listed(&known).is_empty());
        assert!(known.places.is_empty());
    }

    #[test]
    fn names_follow_renames() {
        let mut known = Known::default();
        known.entered(NodeId(2), NodeId::ROOT, &name("a"));
        known.entered(NodeId(3), NodeId::ROOT, &name("b"));
        known.moved(&place(1, "a"), &place(1, "b"));
        // What was there lost its name.
        assert_eq!(listed(&known), [(2, 1, "b".to_owned(), 1)]);
        known.entered(NodeId(4), NodeId::ROOT, &name("c"));
        known.exchanged(&place(1, "b"), &place(1, "c"));
        assert_eq!(listed(&known), [(2, 1, "c".to_owned(), 1), (4, 1, "b".to_owned(), 1)]);
        known.exchanged(&place(1, "b"), &place(1, "unknown"));
        assert_eq!(listed(&known), [(2, 1, "c".to_owned(), 1), (4, 1, "unknown".to_owned(), 1)]);
        known.removed(NodeId::ROOT, &name("c"));
        known.removed(NodeId::ROOT, &name("never there"));
        assert_eq!(listed(&known), [(4, 1, "unknown".to_owned(), 1)]);
        assert_eq!(known.places.len(), 1);
    }

    #[test]
    fn a_hard_link_is_known_by_its_latest_name() {
        let mut known = Known::default();
        known.entered(NodeId(2), NodeId::ROOT, &name("a"));
        known.entered(NodeId(2), NodeId::ROOT, &name("b"));
        known.removed(NodeId::ROOT, &name("a"));
        assert_eq!(listed(&known), [(2, 1, "b".to_owned(), 2)]);
    }

    #[test]
    fn another_file_under_a_name_takes_it() {
        let mut known = Known::default();
        known.entered(NodeId(2), NodeId::ROOT, &name("a"));
        known.entered(NodeId(3), NodeId::ROOT, &name("a"));
        assert_eq!(listed(&known), [(3, 1, "a".to_owned(), 1)]);
        known.forgotten(NodeId(2), 1);
        assert_eq!(known.nodes.len(), 1);
    }

    #[test]
    fn a_loop_or_a_lost_folder_ends() {
        let mut known = Known::default();
        known.entered(NodeId(2), NodeId(3), &name("a"));
        known.entered(NodeId(3), NodeId(2), &name("b"));
        known.entered(NodeId(4), NodeId(77), &name("c"));
        assert!(known.restored().is_empty());
    }
}
