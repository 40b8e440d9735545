//! Which UDP sockets are clients: bound by the kernel to a port of its own choice, to be heard of by answers.
//!
//! The kernel does not tell whether a program has asked for a port. One of the range for clients
//! (`ip_local_port_range`, ip(7)) is taken for a client's, unless docker's proxy has it: people publish such
//! ports, too.

use std::collections::HashMap;
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
    seen: HashMap<u32, Seen>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// In one dump. Most are gone before the next one: nobody is asked whose they are.
    Once,
    Client,
    Published,
}

impl Clients {
    pub(super) fn new() -> Self {
        let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
        Self { range: parse(&text).unwrap_or(RANGE), seen: HashMap::new() }
    }

    /// Leaves only servers; `found` has each socket's inode.
    pub(super) fn remove_from(&mut self, found: &mut Vec<(Listener, u32)>) {
        self.remove_with(found, |inode| is_held_by(inode, PROXY));
    }

    fn remove_with(&mut self, found: &mut Vec<(Listener, u32)>, is_published: impl Fn(u32) -> bool) {
        let range = self.range.clone();
        let doubtful =
            |listener: &Listener| listener.protocol == Protocol::Udp && range.contains(&listener.port);
        let mut now = HashMap::new();
        found.retain(|(listener, inode)| {
            if !doubtful(listener) {
                return true;
            }
            let seen = match self.seen.get(inode) {
                None => Seen::Once,
                Some(Seen::Once) if is_published(*inode) => Seen::Published,
                Some(Seen::Once) => Seen::Client,
                Some(known) => *known,
            };
            now.insert(*inode, seen);
            seen == Seen::Published
        });
        self.seen = now;
    }
}

fn parse(text: &str) -> Option<RangeInclusive<u16>> {
    let mut words = text.split_ascii_whitespace().map(str::parse);
    Some(words.next()?.ok()?..=words.next()?.ok()?)
}

/// Whether a process of this program has the socket.
fn is_held_by(inode: u32, program: &str) -> bool {
    let wanted = format!("socket:[{inode}]");
    let holds = |process: &Path| {
        let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
        name.trim_end() == program
            && std::fs::read_dir(process.join("fd")).is_ok_and(|fds| {
                fds.flatten().any(|fd| {
                    std::fs::read_link(fd.path()).is_ok_and(|target| target.as_os_str() == wanted.as_str())
                })
            })
    };
    std::fs::read_dir("/proc").is_ok_and(|entries| entries.flatten().any(|entry| holds(&entry.path())))
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
        let mut clients = Clients { range: 40_000..=50_000, seen: HashMap::new() };
        let tcp = Listener { protocol: Protocol::Tcp, ..udp(45_000) };
        let all = [(udp(53), 1), (udp(45_000), 2), (udp(45_001), 3), (tcp, 4)];
        let mut look = |published: &[u32]| {
            let mut found = all.to_vec();
            clients.remove_with(&mut found, |inode| published.contains(&inode));
            found.into_iter().map(|(_, inode)| inode).collect::<Vec<_>>()
        };
        assert_eq!(look(&[3]), [1, 4], "whose it is, is asked the second time");
        assert_eq!(look(&[3]), [1, 3, 4]);
        assert_eq!(look(&[]), [1, 3, 4], "and once");
    }

    #[test]
    fn a_process_is_found_by_its_socket() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let file = std::fs::File::from(std::os::fd::OwnedFd::from(socket));
        let inode = u32::try_from(file.metadata().unwrap().ino()).unwrap();
        let own = std::fs::read_to_string("/proc/self/comm").unwrap();
        assert!(is_held_by(inode, own.trim_end()));
        assert!(!is_held_by(inode, "docker-proxy"));
        assert_eq!(parse("32768\t60999\n"), Some(RANGE));
        assert_eq!(parse("1"), None);
    }
}
