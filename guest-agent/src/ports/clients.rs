//! Which UDP sockets are clients: bound by the kernel to a port of its own choice, to be heard of by answers.
//!
//! The kernel does not tell whether a program has asked for a port. One of the range for clients
//! (`ip_local_port_range`, ip(7)) is taken for a client's, unless docker's proxy has it: people publish such
//! ports, too.

use std::collections::{HashMap, HashSet};
use std::ops::RangeInclusive;
use std::path::Path;

use dhow_protocol::ports::{Listener, Protocol};

/// The program that holds a published port.
const PROXY: &str = "docker-proxy";
/// Linux's own range, for a /proc that does not tell.
const RANGE: RangeInclusive<u16> = 32_768..=60_999;

/// Sockets in the range for clients, by inode.
#[derive(Debug)]
pub(super) struct Clients {
    range: RangeInclusive<u16>,
    /// `None` before the first look, at which all that are there are asked for.
    seen: Option<HashMap<u32, Seen>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// In one look. Most are gone before the next one: nobody is asked whose they are.
    Once,
    Client,
    Published,
}

impl Clients {
    pub(super) fn new() -> Self {
        let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
        Self { range: parse(&text).unwrap_or(RANGE), seen: None }
    }

    /// Leaves only servers; `found` has each socket's inode.
    pub(super) fn remove_from(&mut self, found: &mut Vec<(Listener, u32)>) {
        self.remove_with(found, || sockets_of(PROXY));
    }

    /// `published` is asked once at the most.
    fn remove_with(&mut self, found: &mut Vec<(Listener, u32)>, published: impl Fn() -> HashSet<u32>) {
        let range = self.range.clone();
        let doubtful =
            |listener: &Listener| listener.protocol == Protocol::Udp && range.contains(&listener.port);
        let (mut now, mut proxies) = (HashMap::new(), None);
        found.retain(|(listener, inode)| {
            if !doubtful(listener) {
                return true;
            }
            let known = match &self.seen {
                None => Some(Seen::Once),
                Some(seen) => seen.get(inode).copied(),
            };
            let seen = match known {
                None => Seen::Once,
                Some(Seen::Once) if proxies.get_or_insert_with(&published).contains(inode) => Seen::Published,
                Some(Seen::Once) => Seen::Client,
                Some(known) => known,
            };
            now.insert(*inode, seen);
            seen == Seen::Published
        });
        self.seen = Some(now);
    }
}

fn parse(text: &str) -> Option<RangeInclusive<u16>> {
    let mut words = text.split_ascii_whitespace().map(str::parse);
    Some(words.next()?.ok()?..=words.next()?.ok()?)
}

/// Inodes of the sockets that processes of this program have.
fn sockets_of(program: &str) -> HashSet<u32> {
    let is_one = |process: &Path| {
        let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
        name.trim_end() == program
    };
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
    let fds = processes
        .filter(|process| is_one(process))
        .filter_map(|process| std::fs::read_dir(process.join("fd")).ok());
    let links = fds.flatten().flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok());
    links
        .filter_map(|link| link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn udp(port: u16) -> Listener {
        Listener { protocol: Protocol::Udp, address: [0, 0, 0, 0].into(), port }
    }

    #[test]
    fn the_range_for_clients_has_servers_of_docker_only() {
        let mut clients = Clients { range: 40_000..=50_000, seen: Some(HashMap::new()) };
        let tcp = Listener { protocol: Protocol::Tcp, ..udp(45_000) };
        let all = [(udp(53), 1), (udp(45_000), 2), (udp(45_001), 3), (tcp, 4)];
        let mut look = |published: &[u32]| {
            let mut found = all.to_vec();
            clients.remove_with(&mut found, || published.iter().copied().collect());
            found.into_iter().map(|(_, inode)| inode).collect::<Vec<_>>()
        };
        assert_eq!(look(&[3]), [1, 4], "whose it is, is asked the second time");
        assert_eq!(look(&[3]), [1, 3, 4]);
        assert_eq!(look(&[]), [1, 3, 4], "and once");
        // A new worker does not take a published port away for a look.
        let mut clients = Clients { range: 40_000..=50_000, seen: None };
        let mut found = all.to_vec();
        clients.remove_with(&mut found, || [3].into());
        assert_eq!(found.len(), 3);
    }

    #[test]
    fn a_process_is_found_by_its_socket() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let file = std::fs::File::from(std::os::fd::OwnedFd::from(socket));
        let inode = u32::try_from(file.metadata().unwrap().ino()).unwrap();
        let own = std::fs::read_to_string("/proc/self/comm").unwrap();
        assert!(sockets_of(own.trim_end()).contains(&inode));
        assert!(!sockets_of("docker-proxy").contains(&inode));
        assert_eq!(parse("32768\t60999\n"), Some(RANGE));
        assert_eq!(parse("1"), None);
    }
}
