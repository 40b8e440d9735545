//! Connections whose client has left, or has said that nothing comes, before their turn: probes of ports, and floods.
//!
//! They are opened in the guest like others, since a server may count them, or greet who only listens. But to open one
//! costs the guest the time of ten exchanges, and a program that connects and leaves comes as often as it can: it slowed
//! everything else down to a tenth. So each place spends at most one part in eight of the time on such connections, one
//! after another. A few wait for that; further ones are refused.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dhow_protocol::allowance::Allowance;
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};

/// One part in so many of the time is spent on them …
const ONE_IN: u32 = 8;
/// … but for some hundred that come after a rest.
const BURST: Duration = Duration::from_secs(4);
/// So many wait for each place: less than a forward opens at once, so that others find their way past them.
pub(super) const WAITING: usize = 96;
/// Places that are remembered before the quiet ones are forgotten.
const PLACES: usize = 64;

/// What such connections have spent, by place. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Leavers {
    places: Arc<Mutex<HashMap<u32, Arc<Place>>>>,
}

/// One line.
#[derive(Debug)]
struct Place {
    waiting: Arc<Semaphore>,
    account: Arc<tokio::sync::Mutex<Account>>,
}

#[derive(Debug)]
struct Account {
    allowance: Allowance,
    next: Instant,
}

/// The right of one of them to be next.
#[derive(Debug)]
pub struct Next {
    account: OwnedMutexGuard<Account>,
    waiting: OwnedSemaphorePermit,
}

/// A turn of one of them: what it took is spent when this is dropped.
#[derive(Debug)]
pub struct Leave {
    account: OwnedMutexGuard<Account>,
    began: Instant,
    _waiting: OwnedSemaphorePermit,
}

impl Next {
    /// From now on it costs.
    pub fn begin(self) -> Leave {
        Leave { account: self.account, began: Instant::now(), _waiting: self.waiting }
    }
}

impl Leavers {
    /// Waits until `place` may have another one; `None` when too many wait for that.
    pub async fn turn(&self, place: u32) -> Option<Next> {
        let place = self.place(place);
        let waiting = Arc::clone(&place.waiting).try_acquire_owned().ok()?;
        let account = Arc::clone(&place.account).lock_owned().await;
        tokio::time::sleep_until(account.next.into()).await;
        Some(Next { account, waiting })
    }

    fn place(&self, number: u32) -> Arc<Place> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if places.len() >= PLACES && !places.contains_key(&number) {
            places.retain(|_, place| !place.is_quiet());
        }
        Arc::clone(places.entry(number).or_default())
    }
}

impl Place {
    /// Nobody waits, and nothing would be different for whoever comes.
    fn is_quiet(&self) -> bool {
        self.account.try_lock().is_ok_and(|account| account.next.elapsed() > BURST)
    }
}

impl Default for Place {
    fn default() -> Self {
        let account = Account { allowance: Allowance::new(ONE_IN, BURST), next: Instant::now() };
        Self {
            waiting: Arc::new(Semaphore::new(WAITING)),
            account: Arc::new(tokio::sync::Mutex::new(account)),
        }
    }
}

impl Drop for Leave {
    fn drop(&mut self) {
        self.account.next = self.account.allowance.spend(self.began, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_place_has_a_line_of_its_own_and_no_more_than_a_few_wait() {
        let leavers = Leavers::default();
        let turn = leavers.turn(1).await.unwrap();
        let waiting: Vec<_> = (1..WAITING)
            .map(|_| {
                let leavers = leavers.clone();
                tokio::spawn(async move { leavers.turn(1).await.map(drop) })
            })
            .collect();
        while leavers.place(1).waiting.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        assert!(leavers.turn(1).await.is_none());
        leavers.turn(2).await.unwrap();
        // What was spent within the burst is not waited for.
        drop(turn);
        for waiting in waiting {
            waiting.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn one_that_took_long_is_paid_for() {
        let leavers = Leavers::default();
        let mut turn = leavers.turn(1).await.unwrap().begin();
        turn.began = turn.began.checked_sub(BURST).unwrap();
        drop(turn);
        let account = Arc::clone(&leavers.place(1).account);
        assert!(account.lock().await.next > Instant::now() + BURST / 4);
    }

    #[tokio::test]
    async fn quiet_places_are_forgotten() {
        let leavers = Leavers::default();
        for place in 0..PLACES as u32 {
            leavers.place(place).account.lock().await.next = Instant::now().checked_sub(BURST * 2).unwrap();
        }
        let turn = leavers.turn(1).await.unwrap();
        leavers.place(1000);
        assert_eq!(leavers.places.lock().unwrap().len(), 2);
        drop(turn);
    }
}
