//! Carries bytes between two sockets until both directions have ended, or one side was reset.
//!
//! ```text
//! EOF on one side   ─► the rest is written, then shutdown(WRITE) on the other: a half-close travels
//! reset of one side ─► both are cut at once
//! both have ended   ─► both are closed
//! ```
//! One task serves both directions. Small pieces are copied, out of one buffer that all relays of the
//! thread share: it is filled only when there is something to read, and only what the other side does
//! not take at once is kept. Bulk data is spliced (`pipe.rs`), which saves the kernel one of two copies and
//! carried 1.4 times as much into an emulated guest, 1.6 times out of it. A silent relay has neither buffer
//! nor pipe.
//!
//! While bulk data goes through it, a relay is on a thread for such ones (`bulk_lane.rs`), so that small requests
//! need not wait for its turns.
//!
//! A sockmap would join both sockets in the kernel, but loses or hoards: Linux (6.12) grants vsock's credit before
//! the data has a place to go (`virtio_transport_read_skb`), and what is redirected waits in a queue without a
//! limit, of which a half-close knows nothing (`sk_psock_skb_redirect`).

use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::task::Poll;

use super::bulk_lane;
use super::direction::Direction;
use super::lane::Lane;
use super::stream::Stream;

/// Reads until a relay is no longer new: an exchange has three or four, with both ends.
const NEW: u64 = 8;
/// From this mean size of reads on, in bytes, a relay carries bulk data.
const HEAVY: usize = 32 << 10;
/// Below this one it does no longer.
const LIGHT: usize = 8 << 10;

/// Bytes that went from the first side to the second, and back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Carried {
    /// From the first side.
    pub there: u64,
    /// From the second side.
    pub back: u64,
}

/// Relays until the end: on the caller's lane as long as it is new, then on `quick` and on the bulk lane.
///
/// # Errors
/// One side failed or was reset; the other was cut then.
pub(super) async fn relay_new(first: Stream, second: Stream, quick: &Lane) -> io::Result<Carried> {
    let moving = match Relay::new(first, second).run(Load::New).await {
        Step::Ended(ended) => return ended,
        Step::Leaves(relay) => relay.pack(),
    };
    let moved = quick.spawn(async move { go_on(moving.unpack()?).await });
    // It panicked, or the worker ends.
    moved.await.unwrap_or_else(|error| Err(error.into()))
}

/// Relays until the end, on the caller's lane and on the bulk lane.
///
/// # Errors
/// One side failed or was reset; the other was cut then.
pub async fn relay(first: Stream, second: Stream) -> io::Result<Carried> {
    go_on(Relay::new(first, second)).await
}

async fn go_on(mut relay: Relay) -> io::Result<Carried> {
    loop {
        relay = match relay.run(Load::Light).await {
            Step::Ended(ended) => return ended,
            Step::Leaves(relay) => relay,
        };
        relay = match bulk_lane::run(relay).await {
            Step::Ended(ended) => return ended,
            Step::Leaves(relay) => relay,
        };
    }
}

/// For which relays a lane is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    /// Those that have carried next to nothing yet: most end as such.
    New,
    /// Those that carry little at once.
    Light,
    /// Those that carry much.
    Bulk,
    /// All: there is no other lane.
    Any,
}

impl Load {
    /// Whether a relay belongs elsewhere that has read so often, `mean` bytes at once.
    fn is_left_at(self, reads: u64, mean: usize) -> bool {
        match self {
            Self::New => reads >= NEW,
            Self::Light => mean >= HEAVY,
            Self::Bulk => mean < LIGHT,
            Self::Any => false,
        }
    }
}

/// What became of a relay on a lane.
#[derive(Debug)]
pub(super) enum Step<R = Relay> {
    /// Both directions have ended, or it was cut.
    Ended(io::Result<Carried>),
    /// It goes on elsewhere.
    Leaves(R),
}

impl Step {
    /// As it leaves the lane.
    pub(super) fn pack(self) -> Step<Moving> {
        match self {
            Self::Ended(ended) => Step::Ended(ended),
            Self::Leaves(relay) => Step::Leaves(relay.pack()),
        }
    }
}

impl Step<Moving> {
    /// As it comes to a lane.
    pub(super) fn unpack(self) -> Step {
        match self {
            Self::Ended(ended) => Step::Ended(ended),
            Self::Leaves(moving) => match moving.unpack() {
                Ok(relay) => Step::Leaves(relay),
                Err(error) => Step::Ended(Err(error)),
            },
        }
    }
}

/// Two sockets of this thread's reactor, and what is under way between them.
#[derive(Debug)]
pub(super) struct Relay {
    first: Stream,
    second: Stream,
    there: Direction,
    back: Direction,
}

/// A relay on its way to another thread's reactor.
#[derive(Debug)]
pub(super) struct Moving {
    sockets: [OwnedFd; 2],
    there: Direction,
    back: Direction,
}

impl Relay {
    fn new(first: Stream, second: Stream) -> Self {
        Self { first, second, there: Direction::default(), back: Direction::default() }
    }

    /// Carries until the end, or until it belongs on another lane.
    pub(super) async fn run(mut self, load: Load) -> Step {
        let Self { first, second, there, back } = &mut self;
        let carried = poll_fn(|cx| {
            // Both are polled, whatever the first one says.
            let one = there.poll(first, second, back.done, cx)?;
            let other = back.poll(second, first, there.done, cx)?;
            match (one, other) {
                (Poll::Ready(()), Poll::Ready(())) => return Poll::Ready(Ok(true)),
                (Poll::Ready(()), Poll::Pending) => there.watch(first, cx)?,
                (Poll::Pending, Poll::Ready(())) => back.watch(second, cx)?,
                (Poll::Pending, Poll::Pending) => {}
            }
            if load.is_left_at(there.reads + back.reads, there.mean.max(back.mean)) {
                Poll::Ready(Ok(false))
            } else {
                Poll::Pending
            }
        });
        let ended: io::Result<bool> = carried.await;
        if let Ok(false) = ended {
            return Step::Leaves(self);
        }
        let Self { first, second, there, back } = self;
        Step::Ended(match ended.err().or(there.failed).or(back.failed) {
            None => Ok(Carried { there: there.carried, back: back.carried }),
            Some(error) => {
                first.cut();
                second.cut();
                Err(error)
            }
        })
    }

    /// Leaves this thread's reactor.
    pub(super) fn pack(self) -> Moving {
        let Self { first, second, there, back } = self;
        Moving { sockets: [first.into_fd(), second.into_fd()], there, back }
    }
}

impl Moving {
    /// Joins this thread's reactor.
    ///
    /// # Errors
    /// The reactor cannot take it; both sockets are closed.
    pub(super) fn unpack(self) -> io::Result<Relay> {
        let Self { sockets: [first, second], mut there, mut back } = self;
        there.look_again();
        back.look_again();
        Ok(Relay { first: Stream::new(first)?, second: Stream::new(second)?, there, back })
    }
}

#[cfg(test)]
#[path = "relay_tests.rs"]
mod tests;
