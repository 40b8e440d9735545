//! From what there is to what is new: the pure part of the report. No I/O, no clock.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use dhow_protocol::allowance::Allowance;
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

/// When to look again. A trigger may come a moment before the socket can be listed, so after one that is not borne out
/// there are a few quick looks; bursts of triggers share them.
#[derive(Debug)]
pub(super) struct Pace {
    poll: Duration,
    /// Quick looks still to come.
    settling: &'static [Duration],
    allowance: Allowance,
}

/// What a look that no trigger caused is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// To ask once more for the same sockets.
    Settle,
    /// For what no trigger told.
    Poll,
}

/// Between two looks at the least.
const GAP: Duration = Duration::from_millis(1);
/// Looks after the one that follows a trigger.
const SETTLE: &[Duration] = &[Duration::from_millis(3), Duration::from_millis(25)];
/// Looks take one part in so many of one CPU in the long run …
const ONE_IN: u32 = 5;
/// … and may run so far ahead of that: whoever listens right after somebody else is not to wait.
const BURST: Duration = Duration::from_millis(500);

impl Pace {
    pub(super) fn new(poll: Duration) -> Self {
        Self { poll, settling: &[], allowance: Allowance::new(ONE_IN, BURST) }
    }

    /// A trigger came.
    pub(super) fn triggered(&mut self) {
        self.settling = SETTLE;
    }

    /// How long after a look that no trigger interrupts the next one is due, and what for; `open`: the look has left
    /// something to ask for again.
    pub(super) fn after_look(&mut self, open: bool) -> (Duration, Next) {
        if !open {
            self.settling = &[];
        }
        match self.settling.split_first() {
            Some((next, rest)) => {
                self.settling = rest;
                (*next, Next::Settle)
            }
            None => (self.poll, Next::Poll),
        }
    }

    /// When there may be another look after one that a trigger caused, at the earliest: a storm of triggers costs a
    /// fifth of one CPU at the most.
    pub(super) fn earliest(&mut self, began: Instant, ended: Instant) -> Instant {
        self.allowance.spend(began, ended).max(ended + GAP)
    }
}

#[cfg(test)]
mod tests {
    use super::super::scope::Hint;
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
        let Some(PortsEvent::Changed { added, removed }) = tracker.update(&Scope::all(), flood) else { panic!() };
        assert_eq!((added.len(), removed.len()), (MAX_LISTENERS - 1, 0));
    }

    #[test]
    fn after_a_trigger_a_few_quick_looks_and_then_rest() {
        let (poll, ms) = (Duration::from_secs(5), Duration::from_millis);
        let mut pace = Pace::new(poll);
        assert_eq!(pace.after_look(true), (poll, Next::Poll));
        pace.triggered();
        assert_eq!(
            [true; 3].map(|open| pace.after_look(open)),
            [(ms(3), Next::Settle), (ms(25), Next::Settle), (poll, Next::Poll)]
        );
        pace.triggered();
        assert_eq!(
            [true, false, true].map(|open| pace.after_look(open)),
            [(ms(3), Next::Settle), (poll, Next::Poll), (poll, Next::Poll)]
        );
        let now = Instant::now();
        assert_eq!(pace.earliest(now, now + ms(10)), now + ms(10) + GAP);
        assert!(pace.earliest(now, now + ms(200)) > now + ms(400), "a storm waits");
    }

    #[test]
    fn a_look_at_some_says_nothing_of_others() {
        let mut tracker = Tracker::default();
        tracker.update(&Scope::all(), [1, 2].map(listener));
        let mut scope = Scope::default();
        scope.add(Hint::Gone(2));
        scope.add(Hint::Listens(3));
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
