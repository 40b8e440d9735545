//! Which sockets listen in the guest: told to the host as it changes.
//!
//! ```text
//! tracefs, sock_diag groups ──hint──► look there ──► diag (the truth) ──► tracker ──► PortsEvent
//! slow poll ────────────────────────► look at all ──┘                   (what differs)
//! ```
//! The agent only reports; the host decides what it forwards. A hint names a port or a protocol (`scope.rs`), so
//! that a look costs the same however many others listen.
//!
//! **Linger.** docker's proxies end with dockerd, and are there again when it is. While it is away, what has
//! gone is not reported, for 10 s at the most: clients of the host wait instead of being refused.

mod clients;
mod diag;
mod linger;
mod scope;
mod tracker;
mod trigger;

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use dhow_protocol::codec::{self, CONTROL_LIMIT};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::broadcast::{self, error::{RecvError, TryRecvError}};
use tokio::time::Instant;

use linger::Linger;
use scope::{Hint, Scope};
use tracker::{Next, Pace, Tracker};

/// Between looks without a trigger: for what triggers miss (UDP, lost events).
const SLOW_POLL: Duration = Duration::from_secs(5);
/// Between looks while something lingers: the daemon's return is not a trigger.
const LINGER_POLL: Duration = Duration::from_millis(100);
/// Between looks where there can be no triggers.
const FAST_POLL: Duration = Duration::from_millis(250);

/// Hints that wait for a look; who misses some looks at everything.
const MOST_HINTS: usize = 64;

/// Whether the daemon that publishes ports is away.
pub type Away = Box<dyn Fn() -> bool + Send + Sync>;

/// The reporter of listening sockets.
pub struct Ports {
    /// What may have changed, as the triggers tell.
    hints: broadcast::Receiver<Hint>,
    poll: Duration,
    /// Addresses of the agent's own servers.
    own: Vec<IpAddr>,
    away: Away,
}

impl Ports {
    /// Sets up the triggers. What listens at one of the addresses `own` is the agent's; while `away`, what
    /// has gone lingers.
    ///
    /// # Errors
    /// The kernel has no `NETLINK_SOCK_DIAG`: nothing could ever be reported.
    pub fn start(own: Vec<IpAddr>, away: Away) -> io::Result<Arc<Self>> {
        diag::Diag::open(own.clone())?.dump(&Scope::all())?;
        let (sender, hints) = broadcast::channel(MOST_HINTS);
        let poll = match trigger::start(sender) {
            Ok(()) => SLOW_POLL,
            Err(error) => {
                tracing::warn!(%error, "no trigger for listening sockets: looking four times a second");
                FAST_POLL
            }
        };
        Ok(Arc::new(Self { hints, poll, own, away }))
    }

    /// Reports on `stream` until it ends: all at first, then what changes.
    pub async fn serve<S: AsyncRead + AsyncWrite>(&self, stream: S) {
        let (mut reader, writer) = tokio::io::split(stream);
        let mut byte = [0];
        tokio::select! {
            result = self.report(writer) => {
                if let Err(error) = result {
                    tracing::warn!(%error, "the report of listening sockets ended");
                }
            }
            // The host never writes here: whatever comes is its end.
            _ = reader.read(&mut byte) => {}
        }
    }

    async fn report<W: AsyncWrite + Unpin>(&self, mut writer: W) -> Result<(), codec::CodecError> {
        let mut hints = self.hints.resubscribe();
        let mut diag = diag::Diag::open(self.own.clone()).map_err(codec::CodecError::Io)?;
        let mut tracker = Tracker::default();
        let mut pace = Pace::new(self.poll);
        let mut linger = Linger::default();
        let mut lingering = false;
        let mut scope = Scope::all();
        loop {
            let began = Instant::now();
            let found = diag.dump(&scope);
            // A dump may be interrupted or overrun; a look at everything tells then.
            let failed = found.is_err();
            let mut open = true;
            match found {
                Ok(mut sockets) => {
                    let asked = scope.clone();
                    open = scope.settle(&sockets);
                    lingering = linger.holds(tracker.misses(&asked, &sockets), &self.away);
                    if lingering {
                        sockets.extend(tracker.known());
                    }
                    if let Some(event) = tracker.update(&asked, sockets) {
                        codec::write_frame(&mut writer, &event, CONTROL_LIMIT).await?;
                    }
                }
                Err(error) => tracing::warn!(%error, "listening sockets cannot be listed"),
            }
            let looked = Instant::now();
            let earliest = pace.earliest(began.into_std(), looked.into_std()).into();
            let (rest, next) = pace.after_look(open);
            let rest = looked + if lingering { LINGER_POLL } else { rest };
            let whole = failed || lingering || next == Next::Poll;
            tokio::select! {
                () = tokio::time::sleep_until(rest) => {
                    if whole {
                        scope = Scope::all();
                    }
                }
                hint = hints.recv() => {
                    if hint == Err(RecvError::Closed) {
                        // The trigger is gone for good; the poll goes on.
                        scope = Scope::all();
                        tokio::time::sleep_until(rest).await;
                        continue;
                    }
                    scope = match (failed || lingering, next) {
                        (true, _) => Scope::all(),
                        // What is not settled is looked at as well.
                        (false, Next::Settle) => scope,
                        (false, Next::Poll) => Scope::default(),
                    };
                    scope.add(hint.unwrap_or(Hint::Any));
                    pace.triggered();
                    tokio::time::sleep_until(earliest).await;
                    loop {
                        match hints.try_recv() {
                            Ok(hint) => scope.add(hint),
                            Err(TryRecvError::Lagged(_)) => scope.add(Hint::Any),
                            Err(TryRecvError::Empty | TryRecvError::Closed) => break,
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
