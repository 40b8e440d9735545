//! Which sockets listen in the guest: told to the host as it changes.
//!
//! ```text
//! tracefs, sock_diag groups ──hint──► agenda ──► diag (the truth) ──► tracker ──► PortsEvent
//! slow poll ──────────────────────────┘ (when, where)               (what differs)
//! ```
//! The agent only reports; the host decides what it forwards. A hint names a port or a protocol (`scope.rs`), so
//! that a look costs the same however many others listen.
//!
//! **Linger.** docker's proxies end with dockerd, and are there again when it is. While it is away, what has
//! gone is not reported, for 10 s at the most: clients of the host wait instead of being refused.

mod agenda;
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

use dhow_protocol::allowance::Allowance;
use dhow_protocol::codec::{self, CONTROL_LIMIT};
use dhow_protocol::ports::PortsEvent;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::broadcast::{
    self,
    error::{RecvError, TryRecvError},
};
use tokio::time::Instant;

use agenda::Agenda;
use linger::Linger;
use scope::{Hint, Scope};
use tracker::Tracker;

/// Between looks at everything: for what triggers miss.
const SLOW_POLL: Duration = Duration::from_secs(15);
/// Between looks while something lingers: the daemon's return is not a trigger.
const LINGER_POLL: Duration = Duration::from_millis(100);
/// Between looks where there can be no triggers.
const FAST_POLL: Duration = Duration::from_millis(250);

/// Between two looks at the least.
const GAP: Duration = Duration::from_millis(1);
/// Looks take one part in so many of one CPU in the long run …
const ONE_IN: u32 = 5;
/// … and may run so far ahead of that: whoever listens right after somebody else is not to wait.
const BURST: Duration = Duration::from_secs(2);
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
        let mut agenda = Agenda::new(self.poll, Instant::now().into_std());
        let mut allowance = Allowance::new(ONE_IN, BURST);
        let mut linger = Linger::default();
        let mut triggered = true;
        loop {
            let began = Instant::now();
            let scope = agenda.take(began.into_std());
            match diag.dump(&scope) {
                Ok(mut sockets) => {
                    if linger.holds(tracker.misses(&scope, &sockets), &self.away) {
                        sockets.extend(tracker.known());
                        agenda.look_within(LINGER_POLL, began.into_std());
                    }
                    let event = tracker.update(&scope, sockets);
                    if let Some(PortsEvent::Changed { added, .. }) = &event {
                        agenda.found(added);
                    }
                    if let Some(event) = event {
                        codec::write_frame(&mut writer, &event, CONTROL_LIMIT).await?;
                    }
                }
                // A dump may be interrupted or overrun; the next look tells.
                Err(error) => {
                    tracing::warn!(%error, "listening sockets cannot be listed");
                    agenda.look_within(LINGER_POLL, began.into_std());
                }
            }
            let ended = Instant::now();
            let paid = allowance.spend(began.into_std(), ended.into_std());
            let earliest = Instant::from_std(paid).max(ended + GAP);
            let next = Instant::from_std(agenda.next()).max(earliest);
            tokio::select! {
                () = tokio::time::sleep_until(next) => {}
                hint = hints.recv(), if triggered => {
                    triggered = hint != Err(RecvError::Closed);
                    if triggered {
                        agenda.add(hint.unwrap_or(Hint::Any), Instant::now().into_std());
                    } else {
                        agenda.poll_every(FAST_POLL, Instant::now().into_std());
                    }
                    tokio::time::sleep_until(earliest).await;
                }
            }
            loop {
                match hints.try_recv() {
                    Ok(hint) => agenda.add(hint, Instant::now().into_std()),
                    Err(TryRecvError::Lagged(_)) => agenda.add(Hint::Any, Instant::now().into_std()),
                    Err(TryRecvError::Empty | TryRecvError::Closed) => break,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
