//! When a daemon that ended is started again, and when it is given up. No clock of its own.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Pause before the first restart, in a row; it doubles. Short: while dockerd is away clients of published ports wait.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause.
const LAST_PAUSE: Duration = Duration::from_secs(30);
/// Before that of a daemon that has never answered: nobody waits for its ports.
const EARLY_PAUSE: Duration = Duration::from_secs(1);
/// So many restarts …
const RESTARTS: usize = 12;
/// … within this time; one more and the daemon is given up.
const WINDOW: Duration = Duration::from_secs(600);
/// Restarts of a daemon that has never answered: whoever started it waits for the result.
const EARLY_RESTARTS: usize = 1;
/// After answering for so long, what was before is forgotten.
pub const HEALTHY: Duration = Duration::from_secs(60);

/// The ends of one daemon.
#[derive(Debug)]
pub struct Restarts {
    recent: VecDeque<Instant>,
    pause: Duration,
    proven: bool,
}

impl Restarts {
    /// A daemon just started; `proven` when it is known to have answered before.
    #[must_use]
    pub fn new(proven: bool) -> Self {
        Self { recent: VecDeque::new(), pause: FIRST_PAUSE, proven }
    }

    /// It answers.
    pub fn ready(&mut self) {
        self.proven = true;
    }

    /// It has answered for [`HEALTHY`].
    pub fn healthy(&mut self) {
        self.recent.clear();
        self.pause = FIRST_PAUSE;
    }

    /// It ended at `now`: how long to wait before its restart; `None` when it is given up.
    pub fn ended(&mut self, now: Instant) -> Option<Duration> {
        while self.recent.front().is_some_and(|start| now.duration_since(*start) > WINDOW) {
            self.recent.pop_front();
        }
        let limit = if self.proven { RESTARTS } else { EARLY_RESTARTS };
        if self.recent.len() >= limit {
            return None;
        }
        self.recent.push_back(now);
        if !self.proven {
            return Some(EARLY_PAUSE);
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(LAST_PAUSE);
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(pause: Option<Duration>) -> Option<u128> {
        pause.map(|pause| pause.as_millis())
    }

    #[test]
    fn pauses_double_to_their_limit_and_the_thirteenth_restart_is_none() {
        let start = Instant::now();
        let mut restarts = Restarts::new(true);
        let pauses: Vec<_> = (0..12).map(|_| millis(restarts.ended(start)).unwrap()).collect();
        assert_eq!(
            pauses,
            [250, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000, 30_000, 30_000]
        );
        assert_eq!(restarts.ended(start + WINDOW), None);
        assert_eq!(millis(restarts.ended(start + WINDOW + Duration::from_secs(1))), Some(30_000));
    }

    #[test]
    fn health_forgets_what_was() {
        let now = Instant::now();
        let mut restarts = Restarts::new(true);
        while restarts.ended(now).is_some() {}
        restarts.healthy();
        assert_eq!(millis(restarts.ended(now)), Some(250));
    }

    #[test]
    fn one_that_never_answered_has_one_more_try() {
        let now = Instant::now();
        let mut restarts = Restarts::new(false);
        assert_eq!(millis(restarts.ended(now)), Some(1000));
        assert_eq!(restarts.ended(now), None);
        let mut restarts = Restarts::new(false);
        restarts.ended(now);
        restarts.ready();
        assert_eq!(millis(restarts.ended(now)), Some(250));
    }
}
