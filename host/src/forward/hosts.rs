//! `/etc/hosts`.

use std::collections::HashMap;
use std::net::IpAddr;

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
}
