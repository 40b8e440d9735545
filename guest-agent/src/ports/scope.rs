//! Which sockets a look is about: what the triggers have named, or all.

use std::collections::BTreeMap;

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
    /// All TCP sockets.
    pub(super) all_tcp: bool,
    /// TCP sockets at these ports, and whether one is expected there.
    ports: BTreeMap<u16, bool>,
    /// All UDP sockets.
    pub(super) udp: bool,
}

impl Scope {
    /// All there are.
    pub(super) fn all() -> Self {
        Self { all_tcp: true, ports: BTreeMap::new(), udp: true }
    }

    /// Asks for what `hint` names as well.
    pub(super) fn add(&mut self, hint: Hint) {
        match hint {
            Hint::Listens(port) => self.add_port(port, true),
            Hint::Gone(port) => self.add_port(port, false),
            Hint::Udp => self.udp = true,
            Hint::Any => *self = Self::all(),
        }
    }

    fn add_port(&mut self, port: u16, expected: bool) {
        if self.all_tcp {
            return;
        }
        *self.ports.entry(port).or_default() |= expected;
        if self.ports.len() > MOST_PORTS {
            self.ports.clear();
            self.all_tcp = true;
        }
    }

    /// The ports at which TCP sockets are asked for.
    pub(super) fn ports(&self) -> impl Iterator<Item = u16> + '_ {
        self.ports.keys().copied()
    }

    /// Whether a look tells if `listener` is there.
    pub(super) fn covers(&self, listener: &Listener) -> bool {
        match listener.protocol {
            Protocol::Tcp => self.all_tcp || self.ports.contains_key(&listener.port),
            Protocol::Udp => self.udp,
        }
    }

    /// Leaves what a further look may yet find otherwise than the one that has `found` these; false where that is
    /// nothing. A port where a socket was expected and has been found is settled, and one where it is gone.
    pub(super) fn settle(&mut self, found: &[Listener]) -> bool {
        let there = |port: u16| {
            found.iter().any(|listener| listener.protocol == Protocol::Tcp && listener.port == port)
        };
        self.ports.retain(|port, expected| *expected && !there(*port));
        self.all_tcp || self.udp || !self.ports.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(protocol: Protocol, port: u16) -> Listener {
        Listener { protocol, address: [0; 4].into(), port }
    }

    #[test]
    fn what_is_named_is_covered_and_many_names_are_all() {
        let (tcp, udp) = (|port| at(Protocol::Tcp, port), |port| at(Protocol::Udp, port));
        let mut scope = Scope::default();
        assert!(!scope.covers(&tcp(80)) && !scope.covers(&udp(80)));
        scope.add(Hint::Listens(80));
        assert!(scope.covers(&tcp(80)) && !scope.covers(&tcp(81)) && !scope.covers(&udp(80)));
        scope.add(Hint::Udp);
        assert!(scope.covers(&udp(80)) && !scope.covers(&tcp(81)));
        for port in 1..=3 {
            scope.add(Hint::Gone(port));
        }
        assert_eq!(scope, Scope::all());
        let mut scope = Scope::default();
        scope.add(Hint::Any);
        scope.add(Hint::Listens(1));
        assert_eq!(scope, Scope::all());
    }

    #[test]
    fn only_what_may_yet_come_is_looked_for_again() {
        let mut scope = Scope::default();
        scope.add(Hint::Listens(80));
        scope.add(Hint::Listens(81));
        scope.add(Hint::Gone(82));
        assert!(scope.settle(&[at(Protocol::Tcp, 80), at(Protocol::Udp, 81)]));
        assert_eq!(scope.ports().collect::<Vec<_>>(), [81]);
        assert!(!scope.settle(&[at(Protocol::Tcp, 81)]));
        // Whose a UDP socket is, is asked the second time.
        scope.add(Hint::Udp);
        assert!(scope.settle(&[at(Protocol::Udp, 53)]));
        // One that went and came, in whichever order it is told.
        let mut scope = Scope::default();
        scope.add(Hint::Listens(80));
        scope.add(Hint::Gone(80));
        assert!(scope.settle(&[]));
    }
}
