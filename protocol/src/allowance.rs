//! What a peer's events may cost: bursts are served at once, a flood gets its share of one CPU and no more.

use std::time::{Duration, Instant};

/// An account of time spent, kept as the moment up to which it is paid for (the generic cell rate algorithm of ITU-T
/// I.371, "virtual scheduling"): work pushes that moment forward by so many times what it took.
#[derive(Debug, Clone)]
pub struct Allowance {
    one_in: u32,
    burst: Duration,
    paid: Option<Instant>,
}

/// What [`Allowance::spend`] puts off at the most.
pub const LONGEST_REST: Duration = Duration::from_secs(2);

impl Allowance {
    /// One part in `one_in` of the time may be spent in the long run; `burst` is how far spending may run ahead of
    /// that, so that `burst / one_in` can be spent at once after a rest.
    #[must_use]
    pub fn new(one_in: u32, burst: Duration) -> Self {
        Self { one_in, burst, paid: None }
    }

    /// Work began and ended: says from when on there may be more. Not before its end, and at most [`LONGEST_REST`]
    /// after it: time that was taken away from this process counts as well, and nobody is to wait for ever.
    pub fn spend(&mut self, began: Instant, ended: Instant) -> Instant {
        let took = ended.saturating_duration_since(began);
        let from = self.paid.map_or(began, |paid| paid.max(began));
        let paid = (from + took.saturating_mul(self.one_in)).min(ended + self.burst + LONGEST_REST);
        self.paid = Some(paid);
        paid.checked_sub(self.burst).map_or(ended, |next| next.max(ended))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BURST: Duration = Duration::from_millis(100);

    #[test]
    fn a_burst_is_free_and_what_follows_is_not() {
        let start = Instant::now() + Duration::from_secs(3600);
        let mut allowance = Allowance::new(5, BURST);
        let at = |ms| start + Duration::from_millis(ms);
        // 10 ms cost 50: the burst is used up by two of them.
        assert_eq!(allowance.spend(at(0), at(10)), at(10));
        assert_eq!(allowance.spend(at(10), at(20)), at(20));
        assert_eq!(allowance.spend(at(20), at(30)), at(50));
        assert_eq!(allowance.spend(at(50), at(60)), at(100));
        // A rest brings it back.
        assert_eq!(allowance.spend(at(1000), at(1010)), at(1010));
        // One that takes long is paid for afterwards, up to a limit.
        assert_eq!(allowance.spend(at(2000), at(2100)), at(2400));
        assert_eq!(allowance.spend(at(5000), at(6000)), at(8000));
        // Also where it goes on without asking.
        for second in 10..20 {
            assert_eq!(allowance.spend(at(second * 1000), at(second * 1000 + 999)), at(second * 1000 + 2999));
        }
    }

    proptest! {
        #[test]
        fn a_flood_gets_its_share(costs in prop::collection::vec(1u64..50, 1..200)) {
            let start = Instant::now() + Duration::from_secs(3600);
            let mut allowance = Allowance::new(5, BURST);
            let (mut now, mut spent) = (start, Duration::ZERO);
            for cost in costs {
                let took = Duration::from_millis(cost);
                let next = allowance.spend(now, now + took);
                prop_assert!(next >= now + took);
                spent += took;
                now = next;
                // Paid for, but for the burst.
                prop_assert!(spent * 5 <= (now - start) + BURST);
            }
        }
    }
}
