//! From what there is to what is new: the pure part of the report. No I/O, no clock.

use std::collections::BTreeSet;

use dhow_protocol::ports::{Listener, PortsEvent};

use super::scope::Scope;

/// More than that many are not reported: a guest's program may open 65,535 on each address.
pub(super) const MAX_LISTENERS: usize = 8192;

/// What the host knows.
#[derive(Debug, Default)]
pub(super) struct Tracker {
    known: Option<BTreeSet<Listener>>,
}

impl Tracker {
    /// Whether something that the host knows and a look of `scope` should have found is not among `found`.
    pub(super) fn misses(&self, scope: &Scope, found: &[Listener]) -> bool {
        let found: BTreeSet<&Listener> = found.iter().collect();
        self.known.iter().flatten().any(|known| scope.covers(known) && !found.contains(known))
    }

    /// What the host knows.
    pub(super) fn known(&self) -> impl Iterator<Item = Listener> + '_ {
        self.known.iter().flatten().copied()
    }

    /// The event that brings the host from what it knows to what a look of `scope` has found; none where nothing
    /// differs. The first look must be of all.
    pub(super) fn update(
        &mut self,
        scope: &Scope,
        found: impl IntoIterator<Item = Listener>,
    ) -> Option<PortsEvent> {
        let found: BTreeSet<Listener> = found.into_iter().collect();
        let Some(known) = &mut self.known else {
            let all: BTreeSet<_> = found.into_iter().take(MAX_LISTENERS).collect();
            let event = PortsEvent::All(all.iter().copied().collect());
            self.known = Some(all);
            return Some(event);
        };
        let removed: Vec<_> =
            known.iter().filter(|known| scope.covers(known) && !found.contains(known)).copied().collect();
        for gone in &removed {
            known.remove(gone);
        }
        // Who was there first stays: a flood does not take another program's port away.
        let room = MAX_LISTENERS.saturating_sub(known.len());
        let added: Vec<_> = found.difference(known).take(room).copied().collect();
        known.extend(&added);
        (!added.is_empty() || !removed.is_empty()).then_some(PortsEvent::Changed { added, removed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dhow_protocol::ports::Protocol;
    use proptest::prelude::*;

    fn listener(port: u16) -> Listener {
        Listener { protocol: Protocol::Tcp, address: [0, 0, 0, 0].into(), port }
    }

    fn apply(state: &mut BTreeSet<Listener>, event: PortsEvent) {
        match event {
            PortsEvent::All(all) => *state = all.into_iter().collect(),
            PortsEvent::Changed { added, removed } => {
                assert!(removed.iter().all(|gone| state.remove(gone)));
                assert!(added.into_iter().all(|new| state.insert(new)));
            }
        }
    }

    #[test]
    fn the_first_event_is_all_even_of_nothing() {
        let mut tracker = Tracker::default();
        assert_eq!(tracker.update(&Scope::all(), []), Some(PortsEvent::All(vec![])));
        assert_eq!(tracker.update(&Scope::all(), []), None);
    }

    #[test]
    fn a_flood_is_cut_and_stays_below_the_frames_limit() {
        let mut tracker = Tracker::default();
        let many = (1..=u16::MAX).map(|port| Listener {
            protocol: Protocol::Tcp,
            address: std::net::Ipv6Addr::from([0xff; 16]).into(),
            port,
        });
        let Some(event @ PortsEvent::All(_)) = tracker.update(&Scope::all(), many) else { panic!() };
        assert!(dhow_protocol::codec::to_frame(&event, dhow_protocol::codec::CONTROL_LIMIT).is_ok());
        // Twice as many differ at once: the old ones gone, new ones there.
        let others = (1..=u16::MAX).map(|port| Listener {
            protocol: Protocol::Tcp,
            address: std::net::Ipv6Addr::from([0xfe; 16]).into(),
            port,
        });
        let event = tracker.update(&Scope::all(), others).unwrap();
        assert!(dhow_protocol::codec::to_frame(&event, dhow_protocol::codec::CONTROL_LIMIT).is_ok());
    }

    #[test]
    fn who_was_there_before_a_flood_stays() {
        let mut tracker = Tracker::default();
        let first = Listener { address: [127, 0, 0, 1].into(), ..listener(60_000) };
        tracker.update(&Scope::all(), [first]);
        // All of them sort before it.
        let flood: Vec<_> = (1..=10_000).map(listener).chain([first]).collect();
        let Some(PortsEvent::Changed { added, removed }) = tracker.update(&Scope::all(), flood) else {
            panic!()
        };
        assert_eq!((added.len(), removed.len()), (MAX_LISTENERS - 1, 0));
    }

    #[test]
    fn a_look_at_some_says_nothing_of_others() {
        let mut tracker = Tracker::default();
        tracker.update(&Scope::all(), [1, 2].map(listener));
        let mut scope = Scope::default();
        scope.add_port(2);
        scope.add_port(3);
        assert!(tracker.misses(&scope, &[]) && !tracker.misses(&scope, &[listener(2)]));
        let event = tracker.update(&scope, [listener(3)]);
        let (added, removed) = (vec![listener(3)], vec![listener(2)]);
        assert_eq!(event, Some(PortsEvent::Changed { added, removed }));
        assert_eq!(tracker.known().collect::<Vec<_>>(), [1, 3].map(listener));
    }

    proptest! {
        #[test]
        fn the_host_always_ends_up_with_the_truth(
            looks in proptest::collection::vec(proptest::collection::vec(1u16..20, 0..10), 1..20)
        ) {
            let (mut tracker, mut host) = (Tracker::default(), BTreeSet::new());
            for look in looks {
                let now: BTreeSet<_> = look.into_iter().map(listener).collect();
                let before = host.clone();
                match tracker.update(&Scope::all(), now.clone()) {
                    Some(event) => apply(&mut host, event),
                    None => prop_assert_eq!(&before, &now),
                }
                prop_assert_eq!(&host, &now);
            }
        }
    }
}
