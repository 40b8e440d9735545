//! The guest's clock follows the host's: slewed while it is near, stepped when it is not.

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Off by more than that, the clock is stepped.
const STEP: Duration = Duration::from_millis(500);

/// What to do with a clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    /// Go faster or slower until that many microseconds are made up for.
    Slew(i64),
    /// Show that time since 1970 at once.
    Step(Duration),
}

/// Sets the guest's clock to the host's, given in nanoseconds since 1970.
///
/// # Errors
/// As clock_settime(2) and adjtimex(2).
pub(super) fn set(unix_nanos: u64) -> io::Result<()> {
    let host = Duration::from_nanos(unix_nanos);
    // Before 1970 is as wrong as 1970.
    let guest = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    match change(host, guest) {
        Change::Slew(micros) => slew(micros),
        Change::Step(time) => {
            tracing::info!(?host, ?guest, "clock stepped");
            step(time)
        }
    }
}

fn change(host: Duration, guest: Duration) -> Change {
    let off = host.abs_diff(guest);
    // Below half a second, so it fits.
    let micros = i64::try_from(off.as_micros()).unwrap_or(i64::MAX);
    match off > STEP {
        true => Change::Step(host),
        false if host < guest => Change::Slew(-micros),
        false => Change::Slew(micros),
    }
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

    #[test]
    fn near_is_slewed_and_far_is_stepped() {
        let guest = Duration::from_secs(1_000);
        let micros = Duration::from_micros;
        assert_eq!(change(guest, guest), Change::Slew(0));
        assert_eq!(change(guest + micros(3), guest), Change::Slew(3));
        assert_eq!(change(guest - micros(500_000), guest), Change::Slew(-500_000));
        for host in [guest + micros(500_001), guest - micros(500_001), Duration::ZERO, Duration::MAX] {
            assert_eq!(change(host, guest), Change::Step(host));
        }
    }
}
