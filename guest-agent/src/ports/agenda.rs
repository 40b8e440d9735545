//! When to look, and where. Pure: it is told the time.
//!
//! A hint is followed at once. A socket that begins to listen may be told of before it can be listed, and whose a UDP
//! socket is can be asked the second time only: so there are some further looks, for each port by itself. All is looked
//! at now and then whatever the hints say, for what they miss.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use dhow_protocol::ports::{Listener, Protocol};

use super::scope::{Hint, Scope};

/// Looks that follow the first one, each so long after the one before. The last is for a guest whose processor was
/// taken away just then.
const AFTER_LISTENS: &[Duration] =
    &[Duration::from_millis(3), Duration::from_millis(25), Duration::from_millis(250)];
/// Likewise for UDP.
const AFTER_UDP: &[Duration] = &[Duration::from_millis(3), Duration::from_millis(25)];
/// With more ports than that on it, everything is looked at.
const MOST_PORTS: usize = 64;

/// Looks that are still to come.
#[derive(Debug)]
pub(super) struct Agenda {
    poll: Duration,
    /// At everything, whatever comes.
    whole: Instant,
    /// At everything, since a hint did not say at what.
    any: Option<Due>,
    udp: Option<Due>,
    /// Where something begins to listen.
    ports: BTreeMap<u16, Due>,
    /// Where something has ceased to, and since when that is known.
    gone: BTreeMap<u16, Instant>,
}

#[derive(Debug)]
struct Due {
    at: Instant,
    then: &'static [Duration],
    /// Sockets that were told of and have not been found.
    expected: usize,
}

impl Due {
    fn new(at: Instant, then: &'static [Duration]) -> Self {
        Self { at, then, expected: 0 }
    }

    /// Takes a look that is due off; false where it was the last one.
    fn passes(&mut self, now: Instant) -> bool {
        match self.then.split_first() {
            Some((next, then)) => {
                (self.at, self.then) = (now + *next, then);
                true
            }
            None => false,
        }
    }
}

impl Agenda {
    /// A look at everything now, and then every `poll`.
    pub(super) fn new(poll: Duration, now: Instant) -> Self {
        Self { poll, whole: now, any: None, udp: None, ports: BTreeMap::new(), gone: BTreeMap::new() }
    }

    /// From now on everything is looked at that often.
    pub(super) fn poll_every(&mut self, poll: Duration, now: Instant) {
        self.poll = poll;
        self.look_within(poll, now);
    }

    /// Everything is looked at then at the latest.
    pub(super) fn look_within(&mut self, duration: Duration, now: Instant) {
        self.whole = self.whole.min(now + duration);
    }

    /// A trigger has come.
    pub(super) fn add(&mut self, hint: Hint, now: Instant) {
        match hint {
            Hint::Listens(port) => {
                let due = self.ports.entry(port).or_insert(Due::new(now, AFTER_LISTENS));
                (due.at, due.then, due.expected) = (now, AFTER_LISTENS, due.expected + 1);
            }
            Hint::Gone(port) => _ = self.gone.entry(port).or_insert(now),
            Hint::Udp => self.udp = Some(Due::new(now, AFTER_UDP)),
            Hint::Any => self.any = Some(Due::new(now, AFTER_LISTENS)),
        }
        if self.ports.len() + self.gone.len() > MOST_PORTS {
            self.ports.clear();
            self.gone.clear();
            self.add(Hint::Any, now);
        }
    }

    /// When the next look is due.
    pub(super) fn next(&self) -> Instant {
        let ports = self.ports.values().map(|due| due.at);
        let others = self.any.iter().chain(&self.udp).map(|due| due.at);
        ports.chain(others).chain(self.gone.values().copied()).fold(self.whole, Instant::min)
    }

    /// What is due now, and is taken off.
    pub(super) fn take(&mut self, now: Instant) -> Scope {
        let mut scope = Scope::default();
        if self.whole <= now {
            self.whole = now + self.poll;
            scope = Scope::all();
        }
        if self.any.as_ref().is_some_and(|due| due.at <= now) {
            scope = Scope::all();
            self.any.take_if(|due| !due.passes(now));
        }
        if self.udp.as_ref().is_some_and(|due| due.at <= now) {
            scope.udp = true;
            self.udp.take_if(|due| !due.passes(now));
        }
        std::mem::take(&mut self.gone).into_keys().for_each(|port| scope.add_port(port));
        self.ports.retain(|port, due| {
            if due.at > now {
                return true;
            }
            scope.add_port(*port);
            due.passes(now)
        });
        scope
    }

    /// These were not known before: where as many were found as were told of, nothing more is looked for.
    pub(super) fn found(&mut self, added: &[Listener]) {
        for listener in added.iter().filter(|listener| listener.protocol == Protocol::Tcp) {
            if let Some(due) = self.ports.get_mut(&listener.port) {
                due.expected = due.expected.saturating_sub(1);
                if due.expected == 0 {
                    self.ports.remove(&listener.port);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use dhow_protocol::ports::PortsEvent;
    use proptest::prelude::*;

    use super::super::tracker::Tracker;
    use super::*;

    const POLL: Duration = Duration::from_secs(5);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn listener(port: u16, v6: bool) -> Listener {
        let address = if v6 { [0u16; 8].into() } else { [0u8; 4].into() };
        Listener { protocol: Protocol::Tcp, address, port }
    }

    fn ports(ports: &[u16]) -> Scope {
        Scope { ports: ports.iter().copied().collect(), ..Scope::default() }
    }

    #[test]
    fn a_hint_is_followed_until_it_is_borne_out() {
        let start = Instant::now();
        let mut agenda = Agenda::new(POLL, start);
        assert_eq!(agenda.take(start), Scope::all());
        assert_eq!(agenda.next(), start + POLL);
        agenda.add(Hint::Listens(80), start);
        agenda.add(Hint::Listens(80), start);
        for after in [0, 3, 28, 278] {
            assert_eq!(agenda.next(), start + ms(after));
            assert_eq!(agenda.take(start + ms(after)), ports(&[80]));
        }
        assert_eq!(agenda.next(), start + POLL);
        // Two were told of.
        agenda.add(Hint::Listens(80), start);
        agenda.add(Hint::Listens(80), start);
        agenda.take(start);
        agenda.found(&[listener(80, false)]);
        assert_eq!(agenda.next(), start + ms(3));
        agenda.take(start + ms(3));
        agenda.found(&[listener(80, true)]);
        assert_eq!(agenda.next(), start + POLL);
        // One that is gone is gone when it is told.
        agenda.add(Hint::Gone(81), start);
        assert_eq!(agenda.take(start), ports(&[81]));
        assert_eq!(agenda.next(), start + POLL);
    }

    #[test]
    fn hints_do_not_put_the_look_at_everything_off() {
        let start = Instant::now();
        let mut agenda = Agenda::new(POLL, start);
        agenda.take(start);
        let whole = (1..=100u64).filter(|tenth| {
            let now = start + ms(tenth * 100);
            agenda.add(Hint::Udp, now);
            agenda.take(now) == Scope::all()
        });
        assert_eq!(whole.count(), 2);
    }

    #[test]
    fn many_ports_are_everything_and_that_passes() {
        let start = Instant::now();
        let mut agenda = Agenda::new(POLL, start);
        agenda.take(start);
        (1..=100).for_each(|port| agenda.add(Hint::Listens(port), start));
        assert_eq!(agenda.take(start), Scope::all());
        let mut looks = 0;
        while agenda.next() < start + POLL {
            let now = agenda.next();
            agenda.take(now);
            looks += 1;
        }
        assert!(looks <= 6, "{looks}");
        agenda.poll_every(ms(250), start);
        assert_eq!(agenda.next(), start + ms(250));
    }

    /// A socket that listens, or ceases to: so long after the one before, and so long before it can be listed.
    type Happening = (u64, u16, bool, u64);

    /// Looks as the report does, and tells what the host knows in the end; nothing is polled for.
    fn follow(happenings: &[Happening]) -> (BTreeSet<Listener>, BTreeSet<Listener>) {
        let start = Instant::now();
        let mut agenda = Agenda::new(Duration::from_secs(3600), start);
        let (mut tracker, mut host, mut truth) = (Tracker::default(), BTreeSet::new(), BTreeSet::new());
        let mut begun = BTreeSet::new();
        // What is hashed when.
        let mut later: Vec<(Instant, Listener)> = Vec::new();
        let mut pending: Vec<(Instant, Listener, u64)> = Vec::new();
        let mut at = start;
        for (after, port, v6, delay) in happenings {
            at += ms(*after);
            pending.push((at, listener(*port, *v6), *delay));
        }
        let end = at + Duration::from_secs(1);
        let mut now = start;
        while now < end {
            for (_, listener, delay) in pending.extract_if(.., |(at, ..)| *at <= now) {
                if begun.insert(listener) {
                    later.push((now + ms(delay), listener));
                    agenda.add(Hint::Listens(listener.port), now);
                } else if truth.remove(&listener) {
                    begun.remove(&listener);
                    agenda.add(Hint::Gone(listener.port), now);
                }
            }
            for (_, listener) in later.extract_if(.., |(at, _)| *at <= now) {
                truth.insert(listener);
            }
            if agenda.next() <= now {
                let scope = agenda.take(now);
                let found: Vec<_> = truth.iter().copied().filter(|listener| scope.covers(listener)).collect();
                match tracker.update(&scope, found) {
                    Some(PortsEvent::All(all)) => host = all.into_iter().collect(),
                    Some(PortsEvent::Changed { added, removed }) => {
                        removed.iter().for_each(|gone| _ = host.remove(gone));
                        agenda.found(&added);
                        host.extend(added);
                    }
                    None => {}
                }
            }
            now += ms(1);
        }
        (host, truth)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_hints_tell_is_found_though_it_comes_later(
            happenings in prop::collection::vec((0u64..40, 1u16..5, any::<bool>(), 0u64..200), 1..40)
        ) {
            let (host, truth) = follow(&happenings);
            prop_assert_eq!(host, truth);
        }
    }
}
