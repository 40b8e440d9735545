//! Which sockets listen in the guest: told to the host as it changes.
//!
//! ```text
//! tracefs, sock_diag groups ──trigger──► look now ──► diag (the truth) ──► tracker ──► PortsEvent
//! slow poll ─────────────────────────────────┘                            (what differs)
//! ```
//! The agent only reports; the host decides what it forwards.
//!
//! **Linger.** docker's proxies end with dockerd, and are there again when it is. While it is away, what has
//! gone is not reported, for 10 s at the most: clients of the host wait instead of being refused.

mod clients;
mod diag;
mod linger;
mod tracker;
mod trigger;

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use dhow_protocol::codec::{self, CONTROL_LIMIT};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::watch;
use tokio::time::Instant;

use linger::Linger;
use tracker::{Pace, Tracker};

/// Between looks without a trigger: for what triggers miss (UDP, lost events).
const SLOW_POLL: Duration = Duration::from_secs(5);
/// Between looks while something lingers: the daemon's return is not a trigger.
const LINGER_POLL: Duration = Duration::from_millis(100);
/// Between looks where there can be no triggers.
const FAST_POLL: Duration = Duration::from_millis(250);

/// Whether the daemon that publishes ports is away.
pub type Away = Box<dyn Fn() -> bool + Send + Sync>;

/// The reporter of listening sockets.
pub struct Ports {
    /// Counts triggers; a subscriber sees that there were some.
    triggers: watch::Receiver<u64>,
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
        diag::Diag::open(own.clone())?.dump()?;
        let (sender, triggers) = watch::channel(0);
        let poll = match trigger::start(sender) {
            Ok(()) => SLOW_POLL,
            Err(error) => {
                tracing::warn!(%error, "no trigger for listening sockets: looking four times a second");
                FAST_POLL
            }
        };
        Ok(Arc::new(Self { triggers, poll, own, away }))
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
        let mut triggers = self.triggers.clone();
        let mut diag = diag::Diag::open(self.own.clone()).map_err(codec::CodecError::Io)?;
        let mut tracker = Tracker::default();
        let mut pace = Pace::new(self.poll);
        let mut linger = Linger::default();
        let mut lingering = false;
        loop {
            triggers.mark_unchanged();
            let began = Instant::now();
            match diag.dump() {
                Ok(mut sockets) => {
                    lingering = linger.holds(tracker.misses(&sockets), &self.away);
                    if lingering {
                        sockets.extend(tracker.known());
                    }
                    if let Some(event) = tracker.update(sockets) {
                        codec::write_frame(&mut writer, &event, CONTROL_LIMIT).await?;
                    }
                }
                // A dump may be interrupted or overrun; the next look tells.
                Err(error) => tracing::warn!(%error, "listening sockets cannot be listed"),
            }
            let looked = Instant::now();
            let gap = Pace::gap(looked - began);
            let rest = pace.after_look();
            let next = looked + if lingering { LINGER_POLL } else { rest };
            tokio::select! {
                () = tokio::time::sleep_until(next) => {}
                changed = triggers.changed() => {
                    if changed.is_err() {
                        // The trigger is gone for good; the poll goes on.
                        tokio::time::sleep_until(next).await;
                        continue;
                    }
                    pace.triggered();
                    tokio::time::sleep_until(looked + gap).await;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
