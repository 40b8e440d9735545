//! Waiting on conditions, with deadlines that a loaded machine keeps, and the end of what goes on meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Between two looks at a condition.
const PAUSE: Duration = Duration::from_millis(50);
/// For what a healthy product does at once.
pub const SOON: Duration = Duration::from_secs(120);

/// Asks `condition` until it has a value.
///
/// # Panics
/// After `deadline`, naming `what` and what `condition` said last.
pub fn wait_for<T>(what: &str, deadline: Duration, mut condition: impl FnMut() -> Result<T, String>) -> T {
    let begin = Instant::now();
    loop {
        match condition() {
            Ok(value) => return value,
            Err(last) if begin.elapsed() > deadline => {
                panic!("waited {} s in vain for {what}; last: {last}", deadline.as_secs())
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// As [`wait_for`], for a plain yes or no.
pub fn wait_until(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) {
    wait_for(what, deadline, || if condition() { Ok(()) } else { Err("not yet".to_owned()) });
}

/// Set when it is dropped: what goes on meanwhile ends, also where a case fails.
#[derive(Debug)]
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
