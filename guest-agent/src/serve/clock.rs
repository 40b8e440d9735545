//! The guest's clock follows the host's: slewed while it is near, stepped when it is not.
//!
//! The host's time is from when it was written, and may have been on its way for long where a process
//! was stopped or the machine is busy. So a host that seems to be ahead is ahead, but one that seems to
//! be behind may only be slow to speak: the clock goes back only when the host says so again later.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Off by more than that, the clock is stepped.
const STEP: Duration = Duration::from_millis(500);
/// Times that come closer together than that may have waited together.
const APART: Duration = Duration::from_secs(2);

/// What to do with a clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    /// Wait for what the host says next.
    None,
    /// Go faster, or slower, until that many microseconds are made up for.
    Slew(i64),
    /// Show that time since 1970 at once.
    Step(Duration),
}

/// The guest's clock, and what is not yet believed of the host's.
#[derive(Debug, Default)]
pub(super) struct Clock {
    doubt: Mutex<Option<Doubt>>,
}

/// The host seems to be behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Doubt {
    since: Instant,
    /// By that much, by the word that was the shortest time on its way.
    behind: Duration,
}

impl Clock {
    /// Follows the host's time, given in nanoseconds since 1970.
    ///
    /// # Errors
    /// As clock_settime(2) and adjtimex(2).
    pub(super) fn follow(&self, unix_nanos: u64) -> io::Result<()> {
        let host = Duration::from_nanos(unix_nanos);
        // Before 1970 is as wrong as 1970.
        let guest = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let change = {
            let mut doubt = self.doubt.lock().unwrap_or_else(PoisonError::into_inner);
            change(host, guest, Instant::now(), &mut doubt)
        };
        match change {
            Change::None => Ok(()),
            Change::Slew(micros) => slew(micros),
            Change::Step(time) => {
                tracing::info!(?host, ?guest, ?time, "clock stepped");
                step(time)
            }
        }
    }
}

fn change(host: Duration, guest: Duration, now: Instant, doubt: &mut Option<Doubt>) -> Change {
    let off = host.abs_diff(guest);
    if off <= STEP {
        *doubt = None;
        // Half a second at the most, so it fits.
        let micros = i64::try_from(off.as_micros()).unwrap_or_default();
        return Change::Slew(if host < guest { -micros } else { micros });
    }
    if host > guest {
        *doubt = None;
        return Change::Step(host);
    }
    let first = doubt.unwrap_or(Doubt { since: now, behind: off });
    let behind = first.behind.min(off);
    if now.saturating_duration_since(first.since) < APART {
        *doubt = Some(Doubt { behind, ..first });
        return Change::None;
    }
    *doubt = None;
    Change::Step(guest.saturating_sub(behind))
}

fn step(time: Duration) -> io::Result<()> {
    let time = rustix::time::Timespec {
        tv_sec: time.as_secs().try_into().map_err(io::Error::other)?,
        tv_nsec: time.subsec_nanos().into(),
    };
    Ok(rustix::time::clock_settime(rustix::time::ClockId::Realtime, time)?)
}

/// As adjtime(3): it replaces an adjustment that is still under way.
fn slew(micros: i64) -> io::Result<()> {
    // SAFETY: timex is plain numbers, for which zero is valid.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    timex.modes = libc::ADJ_OFFSET_SINGLESHOT;
    timex.offset = micros;
    // SAFETY: `timex` is valid and outlives the call.
    match unsafe { libc::adjtimex(&mut timex) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: Duration = Duration::from_secs(1_000);

    fn micros(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    #[test]
    fn near_is_slewed_and_ahead_is_stepped_to() {
        let (now, mut doubt) = (Instant::now(), None);
        let mut change = |host| change(host, GUEST, now, &mut doubt);
        assert_eq!(change(GUEST), Change::Slew(0));
        assert_eq!(change(GUEST + micros(3)), Change::Slew(3));
        assert_eq!(change(GUEST - micros(500_000)), Change::Slew(-500_000));
        for host in [GUEST + micros(500_001), Duration::MAX] {
            assert_eq!(change(host), Change::Step(host));
        }
    }

    #[test]
    fn the_clock_goes_back_only_when_it_is_said_again_later() {
        let (start, mut doubt) = (Instant::now(), None);
        let mut at = |after, behind| change(GUEST - behind, GUEST, start + after, &mut doubt);
        let second = Duration::from_secs(1);
        // Three that waited together, the last one for the shortest time.
        for behind in [60, 50, 40] {
            assert_eq!(at(Duration::ZERO, second * behind), Change::None);
        }
        // One that came in time clears the doubt.
        assert_eq!(at(10 * second, Duration::ZERO), Change::Slew(0));
        assert_eq!(at(20 * second, second * 30), Change::None);
        assert_eq!(at(20 * second + APART, second * 32), Change::Step(GUEST - second * 30));
        assert_eq!(at(40 * second, GUEST), Change::None);
        assert_eq!(at(50 * second, GUEST), Change::Step(Duration::ZERO));
    }
}
