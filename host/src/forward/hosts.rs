//! `/etc/hosts`, read again when it changes.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// Time of the last change, and size.
type Stamp = (SystemTime, u64);

/// A small text file and what it means, parsed again when its time or size changes.
#[derive(Debug)]
pub(super) struct Watched<T> {
    path: PathBuf,
    parse: fn(&str) -> T,
    now: Mutex<(Option<Stamp>, Arc<T>)>,
}

impl<T> Watched<T> {
    pub(super) fn new(path: &Path, parse: fn(&str) -> T) -> Self {
        // Not read yet: whatever is there differs from no time at all.
        Self { path: path.to_owned(), parse, now: Mutex::new((None, Arc::new(parse("")))) }
    }

    /// What the file means now; that of an empty one where it cannot be read.
    pub(super) fn get(&self) -> Arc<T> {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let stamp = std::fs::metadata(&self.path)
            .ok()
            .and_then(|metadata| Some((metadata.modified().ok()?, metadata.len())));
        if now.0 != stamp {
            let text = std::fs::read(&self.path).unwrap_or_default();
            *now = (stamp, Arc::new((self.parse)(&String::from_utf8_lossy(&text))));
        }
        Arc::clone(&now.1)
    }
}

/// Addresses by name (lower case, without a final dot).
pub(super) type Hosts = HashMap<String, Vec<IpAddr>>;

/// hosts(5): an address and its names on each line, `#` begins a comment.
pub(super) fn parse(text: &str) -> Hosts {
    let mut hosts = Hosts::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_ascii_whitespace();
        let Some(Ok(address)) = words.next().map(str::parse) else { continue };
        for name in words {
            let name = name.trim_end_matches('.').to_ascii_lowercase();
            let addresses: &mut Vec<IpAddr> = hosts.entry(name).or_default();
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
    }
    hosts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_aliases() {
        let hosts =
            parse("127.0.0.1 localhost\n# no\n10.0.0.1\tDB.example db # x\n10.0.0.2 db\n::1 db\nbad x\n");
        assert_eq!(hosts["db.example"], ["10.0.0.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(hosts["db"].len(), 3);
        assert!(!hosts.contains_key("x") && !hosts.contains_key("no"));
    }

    #[test]
    fn a_change_is_seen_and_a_missing_file_is_empty() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hosts");
        let watched = Watched::new(&path, parse);
        assert!(watched.get().is_empty());
        std::fs::write(&path, "10.0.0.1 a\n").unwrap();
        assert!(watched.get().contains_key("a"));
        std::fs::write(&path, "10.0.0.1 a longer\n").unwrap();
        assert!(watched.get().contains_key("longer"));
        std::fs::remove_file(&path).unwrap();
        assert!(watched.get().is_empty());
    }
}
