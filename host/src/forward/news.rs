//! Says in the log what the guest is refused: some lines a minute, since it may ask for whatever it likes.

use std::time::{Duration, Instant};

use dhow_protocol::ports::Listener;

use super::policy::endpoint;

/// Lines in one [`PERIOD`]; the last one says that there is more.
const MOST: u32 = 32;
const PERIOD: Duration = Duration::from_secs(60);

/// How much was said lately.
#[derive(Debug)]
pub(super) struct News {
    since: Instant,
    said: u32,
}

impl News {
    pub(super) fn new() -> Self {
        Self { since: Instant::now(), said: 0 }
    }

    /// A listener has no host port, or another reason than before.
    pub(super) fn refused(&mut self, guest: &Listener, why: &str) {
        if self.may_say() {
            tracing::info!(guest = %endpoint(guest), protocol = ?guest.protocol, why, "a port is not forwarded");
        }
    }

    /// The guest has `reported` more listeners where there is room for `room`.
    pub(super) fn too_many(&mut self, reported: usize, room: usize) {
        if self.may_say() {
            tracing::warn!(reported, room, "the guest listens on too much: the rest is ignored");
        }
    }

    fn may_say(&mut self) -> bool {
        if self.since.elapsed() >= PERIOD {
            *self = Self::new();
        }
        self.said = self.said.saturating_add(1);
        if self.said == MOST {
            tracing::warn!("more ports are not forwarded: `dhow ports` lists them");
        }
        self.said < MOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_told_of_by_some_lines_a_minute() {
        let mut news = News::new();
        assert_eq!((0..1000).filter(|_| news.may_say()).count(), MOST as usize - 1);
        news.since = news.since.checked_sub(PERIOD).unwrap();
        assert!(news.may_say());
    }
}
