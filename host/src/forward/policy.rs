//! Which of the guest's listening sockets get a host endpoint, and where. Pure: no socket is opened.
//!
//! The guest proposes by listening; everything it says is hostile until this file has agreed.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use dhow_protocol::ports::{Listener, Protocol};

use super::rules::{Action, Rule};

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
    /// Ports of the host that are not forwarded unless a rule says so.
    pub denied: Vec<u16>,
    /// The profile's; the first that fits a listener decides.
    pub rules: Vec<Rule>,
}

/// An address of the host that leads into the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostEnd {
    /// Transport protocol.
    pub protocol: Protocol,
    /// Where the host listens.
    pub address: SocketAddr,
}

impl HostEnd {
    /// Whether both cannot be bound: a wildcard has every address of its family.
    fn collides(&self, other: &Self) -> bool {
        let (one, two) = (self.address.ip(), other.address.ip());
        let of_one_family = one.is_ipv4() == two.is_ipv4();
        self.protocol == other.protocol
            && self.address.port() == other.address.port()
            && (one == two || of_one_family && (one.is_unspecified() || two.is_unspecified()))
    }
}

/// What becomes of a listening socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Bind these host addresses; none where it has all that it gets. They are on the loopback unless a rule
    /// says otherwise.
    Bind(Vec<HostEnd>),
    /// Bind none now: somebody else has what it would get, who may leave. The reason is a sentence for a person.
    Wait(String),
    /// Bind none; likewise.
    Refuse(String),
}

impl Policy {
    /// The policy for this process: what the kernel lets it bind, and `rules`.
    #[must_use]
    pub fn for_this_process(rules: Vec<Rule>) -> Self {
        let start = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(DEFAULT_UNPRIVILEGED_START);
        let first_port = if may_bind_all() { 0 } else { start };
        Self { first_port, limit: MAX_FORWARDS, denied: DENIED.to_vec(), rules }
    }

    /// What is forwarded whether or not the guest listens.
    pub fn statics(&self) -> impl Iterator<Item = Listener> + '_ {
        self.rules.iter().flat_map(Rule::statics)
    }

    /// Decides about `listener`, while `taken` says which host addresses lead where already.
    #[must_use]
    pub fn decide(&self, listener: &Listener, taken: &BTreeMap<HostEnd, Listener>) -> Decision {
        if listener.port == 0 {
            return Decision::Refuse("0 is no port".into());
        }
        let wanted = match self.wanted(listener) {
            Ok(wanted) => wanted,
            Err(why) => return Decision::Refuse(why),
        };
        if let Some(low) = wanted.iter().find(|end| end.address.port() < self.first_port) {
            return Decision::Refuse(format!(
                "ports below {} need a privilege on the host, and this is {}: publish another one, or lower \
                 net.ipv4.ip_unprivileged_port_start there",
                self.first_port,
                low.address.port()
            ));
        }
        let is_free = |end: &HostEnd| !taken.keys().any(|other| other.collides(end));
        let free: Vec<_> = wanted.iter().copied().filter(is_free).collect();
        if free.is_empty() && wanted.iter().any(|end| taken.get(end) == Some(listener)) {
            return Decision::Bind(free);
        }
        if free.is_empty() {
            let (port, holder) = wanted.first().map_or((listener.port, None), |end| {
                let mut holders = taken.iter().filter(|(other, _)| other.collides(end));
                (end.address.port(), holders.next().map(|(_, holder)| endpoint(holder).to_string()))
            });
            let holder = holder.unwrap_or_else(|| "something".to_owned());
            return Decision::Wait(format!("port {port} leads to {holder} of the guest already"));
        }
        if taken.len() + free.len() > self.limit {
            return Decision::Wait(format!("there are {} forwards already, the most allowed", taken.len()));
        }
        Decision::Bind(free)
    }

    /// The host addresses that a listener is to have, as the first rule that fits says; `Err` with why none.
    fn wanted(&self, listener: &Listener) -> Result<Vec<HostEnd>, String> {
        let Listener { protocol, port, .. } = *listener;
        let ends = |addresses: Vec<IpAddr>, port| {
            let end = |address| HostEnd { protocol, address: SocketAddr::new(address, port) };
            addresses.into_iter().map(end).collect()
        };
        let Some(rule) = self.rules.iter().find(|rule| rule.fits(listener)) else {
            return match self.denied.contains(&port) {
                true => Err(format!("port {port} is forwarded only where a rule of the profile says so")),
                false => Ok(ends(loopback(listener.address), port)),
            };
        };
        match rule.action {
            Action::Ignore => Err("a rule of the profile ignores it".to_owned()),
            Action::Forward { address, first_port, .. } => {
                let Some(port) = first_port.checked_add(port - rule.ports.first) else {
                    return Err("the rule's range on the host ends before this port".to_owned());
                };
                Ok(ends(address.map_or_else(|| loopback(listener.address), |address| vec![address]), port))
            }
        }
    }
}

/// The loopback addresses that stand for a guest's address: of its family, and for the IPv6
/// wildcard, which mostly takes IPv4 too, of both.
fn loopback(address: IpAddr) -> Vec<IpAddr> {
    let (v4, v6) = (Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into());
    match address {
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
#[path = "policy_tests.rs"]
mod tests;
