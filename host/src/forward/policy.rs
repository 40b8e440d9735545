//! Which of the guest's listening sockets get a host endpoint, and where. Pure: no socket is opened.
//!
//! The guest proposes by listening; everything it says is hostile until this file has agreed.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use dhow_protocol::ports::{Listener, Protocol};

/// Endpoints on the host at the most.
pub const MAX_FORWARDS: usize = 256;
/// Where Linux lets ordinary users begin, unless told otherwise (`ip_unprivileged_port_start`).
const DEFAULT_UNPRIVILEGED_START: u16 = 1024;
/// Never forwarded: a host's own SSH clients and servers live there.
const DENIED: &[u16] = &[22];

/// What the host allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Ports below need a privilege that this process lacks; 0 where it has it.
    pub first_port: u16,
    /// Endpoints at the most.
    pub limit: usize,
    /// Ports that are never forwarded.
    pub denied: Vec<u16>,
}

/// What becomes of a listening socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Bind these host addresses, all on the loopback; none where it has all that it gets.
    Bind(Vec<SocketAddr>),
    /// Bind none; the reason is a sentence for a person.
    Refuse(String),
}

impl Policy {
    /// The policy for this process: what the kernel lets it bind.
    #[must_use]
    pub fn for_this_process() -> Self {
        let start = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(DEFAULT_UNPRIVILEGED_START);
        let first_port = if may_bind_all() { 0 } else { start };
        Self { first_port, limit: MAX_FORWARDS, denied: DENIED.to_vec() }
    }

    /// Decides about `listener`, while `taken` says which host addresses lead where already.
    #[must_use]
    pub fn decide(&self, listener: &Listener, taken: &BTreeMap<SocketAddr, Listener>) -> Decision {
        let port = listener.port;
        if listener.protocol == Protocol::Udp {
            return Decision::Refuse("UDP forwards are not there yet".into());
        }
        if port == 0 {
            return Decision::Refuse("0 is no port".into());
        }
        if self.denied.contains(&port) {
            return Decision::Refuse(format!("port {port} is never forwarded"));
        }
        if port < self.first_port {
            return Decision::Refuse(format!(
                "ports below {} need a privilege on the host: publish another one, or lower \
                 net.ipv4.ip_unprivileged_port_start there",
                self.first_port
            ));
        }
        let wanted = host_addresses(listener);
        let free: Vec<_> = wanted.iter().copied().filter(|address| !taken.contains_key(address)).collect();
        if free.is_empty() && wanted.iter().any(|address| taken.get(address) == Some(listener)) {
            return Decision::Bind(free);
        }
        if free.is_empty() {
            let holder = wanted.first().and_then(|address| taken.get(address));
            let holder = holder.map_or(port.to_string(), |holder| endpoint(holder).to_string());
            return Decision::Refuse(format!("port {port} leads to {holder} of the guest already"));
        }
        if taken.len() + free.len() > self.limit {
            return Decision::Refuse(format!("there are {} forwards already, the most allowed", taken.len()));
        }
        Decision::Bind(free)
    }
}

/// The loopback addresses that stand for a guest's address: of its family, and for the IPv6
/// wildcard, which mostly takes IPv4 too, of both.
fn host_addresses(listener: &Listener) -> Vec<SocketAddr> {
    let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, listener.port));
    let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, listener.port));
    match listener.address {
        IpAddr::V4(_) => vec![v4],
        IpAddr::V6(address) if address.to_ipv4_mapped().is_some() => vec![v4],
        IpAddr::V6(address) if address.is_unspecified() => vec![v4, v6],
        IpAddr::V6(_) => vec![v6],
    }
}

/// Where in the guest to connect to: a wildcard is reached by the guest's loopback.
#[must_use]
pub fn endpoint(listener: &Listener) -> SocketAddr {
    let address = match listener.address.to_canonical() {
        IpAddr::V4(address) if address.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(address) if address.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        address => address,
    };
    SocketAddr::new(address, listener.port)
}

/// Whether this process is root or has CAP_NET_BIND_SERVICE.
fn may_bind_all() -> bool {
    let capabilities = rustix::thread::capabilities(None);
    capabilities.is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::NET_BIND_SERVICE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn policy() -> Policy {
        Policy { first_port: 1024, limit: 4, denied: vec![22, 5000] }
    }

    fn listener(address: &str) -> Listener {
        let address: SocketAddr = address.parse().unwrap();
        Listener { protocol: Protocol::Tcp, address: address.ip(), port: address.port() }
    }

    fn bound(addresses: &[&str]) -> Decision {
        Decision::Bind(addresses.iter().map(|address| address.parse().unwrap()).collect())
    }

    #[test]
    fn whatever_the_guest_binds_the_host_binds_its_loopback() {
        let none = BTreeMap::new();
        for (guest, host) in [
            ("0.0.0.0:8080", &["127.0.0.1:8080"][..]),
            ("127.0.0.1:8080", &["127.0.0.1:8080"]),
            ("10.1.2.3:8080", &["127.0.0.1:8080"]),
            ("[::]:8080", &["127.0.0.1:8080", "[::1]:8080"]),
            ("[::1]:8080", &["[::1]:8080"]),
            ("[::ffff:1.2.3.4]:8080", &["127.0.0.1:8080"]),
        ] {
            assert_eq!(policy().decide(&listener(guest), &none), bound(host), "{guest}");
        }
    }

    #[test]
    fn both_wildcards_share_a_port() {
        let (v4, v6) = (listener("0.0.0.0:8080"), listener("[::]:8080"));
        let taken = BTreeMap::from([("127.0.0.1:8080".parse().unwrap(), v4)]);
        assert_eq!(policy().decide(&v6, &taken), bound(&["[::1]:8080"]));
        assert_eq!(policy().decide(&v4, &taken), bound(&[]));
        assert!(matches!(policy().decide(&listener("10.0.0.1:8080"), &taken), Decision::Refuse(why)
            if why == "port 8080 leads to 127.0.0.1:8080 of the guest already"));
    }

    #[test]
    fn refusals_say_why() {
        let none = BTreeMap::new();
        for (guest, part) in [
            ("0.0.0.0:80", "ip_unprivileged_port_start"),
            ("0.0.0.0:22", "never"),
            ("0.0.0.0:5000", "never"),
            ("0.0.0.0:0", "no port"),
        ] {
            let Decision::Refuse(why) = policy().decide(&listener(guest), &none) else { panic!("{guest}") };
            assert!(why.contains(part), "{why}");
        }
        let udp = Listener { protocol: Protocol::Udp, ..listener("0.0.0.0:8080") };
        assert!(matches!(policy().decide(&udp, &none), Decision::Refuse(_)));
        let root = Policy { first_port: 0, ..policy() };
        assert_eq!(root.decide(&listener("0.0.0.0:80"), &none), bound(&["127.0.0.1:80"]));
    }

    #[test]
    fn endpoints_are_reachable_in_the_guest() {
        for (guest, target) in [
            ("0.0.0.0:1", "127.0.0.1:1"),
            ("[::]:1", "[::1]:1"),
            ("10.0.0.1:1", "10.0.0.1:1"),
            ("[::ffff:10.0.0.1]:1", "10.0.0.1:1"),
        ] {
            assert_eq!(endpoint(&listener(guest)), target.parse().unwrap());
        }
    }

    proptest! {
        #[test]
        fn only_loopback_never_twice_never_too_many(
            guests in proptest::collection::vec((any::<IpAddr>(), any::<u16>()), 0..40)
        ) {
            let (policy, mut taken) = (policy(), BTreeMap::new());
            for (address, port) in guests {
                let guest = Listener { protocol: Protocol::Tcp, address, port };
                if let Decision::Bind(addresses) = policy.decide(&guest, &taken) {
                    prop_assert!(!addresses.is_empty() || taken.values().any(|own| *own == guest));
                    for address in addresses {
                        prop_assert!(address.ip().is_loopback());
                        prop_assert_eq!(address.port(), port);
                        prop_assert!(port >= 1024 && port != 5000);
                        prop_assert!(taken.insert(address, guest).is_none());
                    }
                }
            }
            prop_assert!(taken.len() <= policy.limit);
        }
    }
}
