//! How long what has gone may be withheld while the daemon that publishes ports is away.

use std::time::{Duration, Instant};

use super::Away;

/// A daemon that takes longer is not coming back soon.
const LINGER: Duration = Duration::from_secs(10);

/// Since when something has been missed in this absence.
#[derive(Debug, Default)]
pub(super) struct Linger {
    since: Option<Instant>,
}

impl Linger {
    /// Whether what is missing (`missed`) is to be withheld. The daemon is looked at only then.
    pub(super) fn holds(&mut self, missed: bool, away: &Away) -> bool {
        if !missed && self.since.is_none() {
            return false;
        }
        if !away() {
            self.since = None;
            return false;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        missed && since.elapsed() < LINGER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missed_is_held_while_the_daemon_is_away() {
        let (here, away): (Away, Away) = (Box::new(|| false), Box::new(|| true));
        let mut linger = Linger::default();
        assert!(!linger.holds(true, &here) && !linger.holds(false, &away));
        assert!(linger.holds(true, &away) && !linger.holds(false, &away) && linger.holds(true, &away));
        // One absence is forgiven once.
        linger.since = Instant::now().checked_sub(LINGER);
        assert!(!linger.holds(true, &away));
        assert!(!linger.holds(true, &here) && linger.since.is_none());
    }
}
