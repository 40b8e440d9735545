//! Which sockets a look is about: what the triggers have named, or all.

use std::collections::BTreeSet;

use dhow_protocol::ports::{Listener, Protocol};

/// With more ports than that, asking for all is mostly cheaper: each takes a dump of either family.
const MOST_PORTS: usize = 3;

/// What a trigger says may have changed, in some network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hint {
    /// A TCP socket begins to listen at this port. It may come a moment before the socket can be listed.
    Listens(u16),
    /// A TCP socket listens there no longer.
    Gone(u16),
    /// Some UDP socket comes or goes.
    Udp,
    /// It does not say.
    Any,
}

/// The sockets that a look asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Scope {
    /// All TCP sockets, whatever `ports` says.
    pub(super) all_tcp: bool,
    /// TCP sockets at these ports.
    pub(super) ports: BTreeSet<u16>,
    /// All UDP sockets.
    pub(super) udp: bool,
}

impl Scope {
    /// All there are.
    pub(super) fn all() -> Self {
        Self { all_tcp: true, ports: BTreeSet::new(), udp: true }
    }

    /// Asks for TCP sockets at `port` as well.
    pub(super) fn add_port(&mut self, port: u16) {
        if self.all_tcp {
            return;
        }
        self.ports.insert(port);
        if self.ports.len() > MOST_PORTS {
            self.ports.clear();
            self.all_tcp = true;
        }
    }

    /// Whether a look tells if `listener` is there.
    pub(super) fn covers(&self, listener: &Listener) -> bool {
        match listener.protocol {
            Protocol::Tcp => self.all_tcp || self.ports.contains(&listener.port),
            Protocol::Udp => self.udp,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_is_covered_and_many_ports_are_all() {
        let at = |protocol, port| Listener { protocol, address: [0; 4].into(), port };
        let (tcp, udp) = (|port| at(Protocol::Tcp, port), |port| at(Protocol::Udp, port));
        let mut scope = Scope::default();
        assert!(!scope.covers(&tcp(80)) && !scope.covers(&udp(80)));
        scope.add_port(80);
        assert!(scope.covers(&tcp(80)) && !scope.covers(&tcp(81)) && !scope.covers(&udp(80)));
        scope.udp = true;
        assert!(scope.covers(&udp(80)) && !scope.covers(&tcp(81)));
        for port in 1..=3 {
            scope.add_port(port);
        }
        assert_eq!(scope, Scope::all());
        scope.add_port(4);
        assert_eq!(scope, Scope::all());
    }
}
