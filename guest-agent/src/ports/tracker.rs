//! From what there is to what is new: the pure part of the report. No I/O, no clock.

use std::collections::BTreeSet;
use std::time::Duration;

use dhow_protocol::ports::{Listener, PortsEvent};

/// More than that many are not reported: a guest's program may open 65,535 on each address.
pub(super) const MAX_LISTENERS: usize = 8192;

/// What the host knows.
#[derive(Debug, Default)]
pub(super) struct Tracker {
    known: Option<BTreeSet<Listener>>,
}

impl Tracker {
    /// Whether something is gone that the host knows.
    pub(super) fn misses(&self, now: &[Listener]) -> bool {
        let now: BTreeSet<&Listener> = now.iter().collect();
        self.known.iter().flatten().any(|known| !now.contains(known))
    }

    /// What the host knows.
    pub(super) fn known(&self) -> impl Iterator<Item = Listener> + '_ {
        self.known.iter().flatten().copied()
    }

    /// The event that brings the host from what it knows to `now`; none where nothing differs.
    pub(super) fn update(&mut self, now: impl IntoIterator<Item = Listener>) -> Option<PortsEvent> {
        let mut now: BTreeSet<Listener> = now.into_iter().collect();
        if now.len() > MAX_LISTENERS {
            // Who was there first stays: a flood does not take another program's port away.
            let empty = BTreeSet::new();
            let known = self.known.as_ref().unwrap_or(&empty);
            let new = now.difference(known);
            now = now.intersection(known).chain(new).take(MAX_LISTENERS).copied().collect();
        }
        let event = match &self.known {
            None => Some(PortsEvent::All(now.iter().copied().collect())),
            Some(known) => {
                let added: Vec<_> = now.difference(known).copied().collect();
                let removed: Vec<_> = known.difference(&now).copied().collect();
                (!added.is_empty() || !removed.is_empty()).then_some(PortsEvent::Changed { added, removed })
            }
        };
        self.known = Some(now);
        event
    }
}

/// When to look again. A trigger may come a moment before the socket can be listed, so after one
/// there are a few quick looks; bursts of triggers share them.
#[derive(Debug)]
pub(super) struct Pace {
    poll: Duration,
    /// Quick looks still to come.
    settling: &'static [Duration],
}

/// Between two looks at the least.
const GAP: Duration = Duration::from_millis(3);
/// Looks after the one that follows a trigger.
const SETTLE: &[Duration] = &[GAP, Duration::from_millis(25)];

impl Pace {
    pub(super) fn new(poll: Duration) -> Self {
        Self { poll, settling: &[] }
    }

    /// A trigger came.
    pub(super) fn triggered(&mut self) {
        self.settling = SETTLE;
    }

    /// How long after a look that no trigger interrupts the next one is due.
    pub(super) fn after_look(&mut self) -> Duration {
        match self.settling.split_first() {
            Some((next, rest)) => {
                self.settling = rest;
                *next
            }
            None => self.poll,
        }
    }

    /// How long after a look that took `took` the next one may be at the earliest: a storm of
    /// triggers costs a fifth of one CPU at the most.
    pub(super) fn gap(took: Duration) -> Duration {
        GAP.max(took * 4)
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
        assert_eq!(tracker.update([]), Some(PortsEvent::All(vec![])));
        assert_eq!(tracker.update([]), None);
    }

    #[test]
    fn a_flood_is_cut_and_stays_below_the_frames_limit() {
        let mut tracker = Tracker::default();
        let many = (1..=u16::MAX).map(|port| Listener {
            protocol: Protocol::Tcp,
            address: std::net::Ipv6Addr::from([0xff; 16]).into(),
            port,
        });
        let Some(event @ PortsEvent::All(_)) = tracker.update(many) else { panic!() };
        assert!(dhow_protocol::codec::to_frame(&event, dhow_protocol::codec::CONTROL_LIMIT).is_ok());
        // Twice as many differ at once: the old ones gone, new ones there.
        let others = (1..=u16::MAX).map(|port| Listener {
            protocol: Protocol::Tcp,
            address: std::net::Ipv6Addr::from([0xfe; 16]).into(),
            port,
        });
        let event = tracker.update(others).unwrap();
        assert!(dhow_protocol::codec::to_frame(&event, dhow_protocol::codec::CONTROL_LIMIT).is_ok());
    }

    #[test]
    fn who_was_there_before_a_flood_stays() {
        let mut tracker = Tracker::default();
        let first = Listener { address: [127, 0, 0, 1].into(), ..listener(60_000) };
        tracker.update([first]);
        // All of them sort before it.
        let flood: Vec<_> = (1..=10_000).map(listener).chain([first]).collect();
        let Some(PortsEvent::Changed { added, removed }) = tracker.update(flood) else { panic!() };
        assert_eq!((added.len(), removed.len()), (MAX_LISTENERS - 1, 0));
    }

    #[test]
    fn after_a_trigger_a_few_quick_looks_and_then_rest() {
        let mut pace = Pace::new(Duration::from_secs(5));
        assert_eq!(pace.after_look(), Duration::from_secs(5));
        assert_eq!(Pace::gap(Duration::from_micros(50)), GAP);
        assert_eq!(Pace::gap(Duration::from_millis(10)), Duration::from_millis(40));
        pace.triggered();
        assert_eq!(
            [pace.after_look(), pace.after_look(), pace.after_look()],
            [Duration::from_millis(3), Duration::from_millis(25), Duration::from_secs(5)]
        );
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
                match tracker.update(now.clone()) {
                    Some(event) => apply(&mut host, event),
                    None => prop_assert_eq!(&before, &now),
                }
                prop_assert_eq!(&host, &now);
            }
        }
    }
}
