//! Places for sessions over UDP, of which all forwards have a number together.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// Clients of all forwards at once: each has a stream, of which the VM has four thousand for everything.
pub(super) const MAX_SESSIONS: usize = 256;

/// What a session and its forward both know.
#[derive(Debug)]
pub(super) struct Activity {
    begin: Instant,
    /// Milliseconds from `begin` to the last datagram.
    last: AtomicU64,
    /// Bytes in the queue.
    pub(super) queued: AtomicUsize,
}

impl Activity {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { begin: Instant::now(), last: AtomicU64::new(0), queued: AtomicUsize::new(0) })
    }

    /// A datagram has gone one way or the other.
    pub(super) fn note(&self) {
        let since = u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(since, Ordering::Relaxed);
    }

    /// When the last one did.
    pub(super) fn last(&self) -> Instant {
        self.begin + Duration::from_millis(self.last.load(Ordering::Relaxed))
    }
}

/// What all UDP forwards of a VM share: places for sessions.
#[derive(Debug, Clone)]
pub(in super::super) struct Budget(Arc<Places>);

#[derive(Debug)]
struct Places {
    free: Arc<Semaphore>,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    /// Forwards that there have been.
    forwards: u64,
    sessions: Vec<Place>,
}

/// A session's place.
#[derive(Debug)]
struct Place {
    forward: u64,
    state: Arc<Activity>,
    task: AbortHandle,
}

impl Default for Budget {
    fn default() -> Self {
        Self::of(MAX_SESSIONS)
    }
}

impl Budget {
    pub(super) fn of(places: usize) -> Self {
        Self(Arc::new(Places { free: Arc::new(Semaphore::new(places)), taken: Mutex::default() }))
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.0.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number for a forward.
    pub(super) fn join(&self) -> u64 {
        let mut taken = self.taken();
        taken.forwards += 1;
        taken.forwards
    }

    /// A place, until it is dropped; `None` where all are taken.
    pub(super) fn place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0.free).try_acquire_owned().ok()
    }

    /// Notes that a session of `forward` has a place; those that have ended are forgotten.
    pub(super) fn note(&self, forward: u64, state: &Arc<Activity>, task: AbortHandle) {
        let mut taken = self.taken();
        taken.sessions.retain(|place| !place.task.is_finished());
        taken.sessions.push(Place { forward, state: Arc::clone(state), task });
    }

    /// Ends a session, so that there is room for another client's next attempt: of the forward that has most, the one
    /// that was silent for longest. So a flood of one forward costs the others nothing.
    pub(super) fn make_room(&self) {
        let mut taken = self.taken();
        taken.sessions.retain(|place| !place.task.is_finished());
        let mut counts: HashMap<u64, usize> = HashMap::new();
        for place in &taken.sessions {
            *counts.entry(place.forward).or_default() += 1;
        }
        let idlest = taken
            .sessions
            .iter()
            .min_by_key(|place| (Reverse(counts.get(&place.forward).copied()), place.state.last()));
        if let Some(idlest) = idlest {
            idlest.task.abort();
        }
    }
}
