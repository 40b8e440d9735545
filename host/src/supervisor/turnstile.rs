//! Whose turn it is to open a stream: a few at a time, and in turns among the places that they lead to.
//!
//! To open a stream costs the guest far more than to carry its bytes, and who opens many at once would have all of the
//! guest for himself: a program that connects to one forward and leaves, again and again, slowed another forward down to
//! a hundredth. So few are under way at once, which is enough to keep the guest busy, and each place has its line.
//!
//! A place that lets who comes wait (a server that is stopped, or not there yet) never has the last free turn: it would
//! be held for nothing while others wait.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// The lines before a guest. Clones share them.
#[derive(Clone, Debug)]
pub struct Turnstile {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    free: usize,
    /// Where the last one who had to wait is waiting.
    slow: Option<u32>,
    /// Nobody in it is without somebody who waits; the first one is next.
    lines: VecDeque<Line>,
}

#[derive(Debug)]
struct Line {
    place: u32,
    waiting: VecDeque<oneshot::Sender<Turn>>,
}

/// A turn; over when it is dropped.
#[derive(Debug)]
pub struct Turn {
    turnstile: Turnstile,
    place: u32,
}

impl Turnstile {
    /// So many, two at the least, have their turn at once.
    #[must_use]
    pub fn new(at_once: usize) -> Self {
        let state = State { free: at_once.max(2), slow: None, lines: VecDeque::new() };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Waits in the line of `place`.
    pub async fn turn(&self, place: u32) -> Turn {
        let waiting = {
            let mut state = self.state();
            if state.free > usize::from(state.slow == Some(place)) {
                state.free -= 1;
                return Turn { turnstile: self.clone(), place };
            }
            let (sender, waiting) = oneshot::channel();
            match state.lines.iter_mut().find(|line| line.place == place) {
                Some(line) => line.waiting.push_back(sender),
                None => state.lines.push_back(Line { place, waiting: [sender].into() }),
            }
            waiting
        };
        match waiting.await {
            Ok(turn) => turn,
            // Who waits is in a line, and lines are left by a turn alone.
            Err(_) => std::future::pending().await,
        }
    }

    /// Who is next, and where; with nobody there the turn is free for whoever comes. Who has left is passed over.
    fn next(&self) -> Option<(oneshot::Sender<Turn>, u32)> {
        let mut state = self.state();
        let may_have = |state: &State, line: &Line| state.free > 0 || state.slow != Some(line.place);
        while let Some(at) = state.lines.iter().position(|line| may_have(&state, line)) {
            let mut line = state.lines.remove(at)?;
            let place = line.place;
            let next = std::iter::from_fn(|| line.waiting.pop_front()).find(|waiting| !waiting.is_closed());
            if !line.waiting.is_empty() {
                state.lines.push_back(line);
            }
            if let Some(next) = next {
                return Some((next, place));
            }
        }
        state.free += 1;
        None
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn {
    /// The stream is open: its place is not slow, or no longer.
    pub fn opened(self) {
        self.turnstile.state().slow.take_if(|slow| *slow == self.place);
    }

    /// The stream waits for its place: others go on.
    pub fn waits(self) {
        self.turnstile.state().slow = Some(self.place);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some((next, place)) = self.turnstile.next() {
            // Whoever leaves just now passes it on: what comes back is dropped.
            drop(next.send(Turn { turnstile: self.turnstile.clone(), place }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn places_take_turns_however_long_their_lines_are() {
        let turnstile = Turnstile::new(2);
        let (first, second) = (turnstile.turn(1).await, turnstile.turn(1).await);
        let (told, mut order) = tokio::sync::mpsc::unbounded_channel();
        let wait = |place: u32| {
            let (turnstile, told) = (turnstile.clone(), told.clone());
            tokio::spawn(async move {
                let turn = turnstile.turn(place).await;
                told.send(place).unwrap();
                drop(turn);
            })
        };
        for place in [1, 1, 1, 1, 2, 2, 3] {
            wait(place);
            tokio::task::yield_now().await;
        }
        // One that leaves the line takes nobody's turn.
        let leaver = wait(4);
        tokio::task::yield_now().await;
        leaver.abort();
        tokio::task::yield_now().await;
        drop(first);
        let mut seen = Vec::new();
        for _ in 0..7 {
            seen.push(order.recv().await.unwrap());
        }
        assert_eq!(seen, [1, 2, 3, 1, 2, 1, 1]);
        drop(second);
        assert_eq!(turnstile.state().free, 2);
    }

    #[tokio::test]
    async fn a_slow_place_leaves_a_turn_to_others() {
        let turnstile = Turnstile::new(3);
        turnstile.turn(1).await.waits();
        let held = [turnstile.turn(1).await, turnstile.turn(1).await];
        let slow = tokio::spawn({
            let turnstile = turnstile.clone();
            async move { turnstile.turn(1).await }
        });
        tokio::task::yield_now().await;
        for place in 2..10 {
            turnstile.turn(place).await.opened();
        }
        assert!(!slow.is_finished(), "there is one turn left, and it is not for that place");
        let [first, second] = held;
        first.waits();
        let third = slow.await.unwrap();
        third.opened();
        // It is as good as others again.
        let all = [turnstile.turn(1).await, turnstile.turn(1).await];
        drop((all, second));
        assert_eq!(turnstile.state().free, 3);
    }
}
