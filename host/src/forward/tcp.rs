//! TCP forwards: keeps the host's listeners in step with what the guest reports, and hands over
//! what they accept.
//!
//! One `Forwards` lives as long as its VM; the streams that report come and go (the guest's worker
//! may restart), and what is bound stays meanwhile. A refused or failed listener stays listed with
//! its reason, and is tried again when an address may have become free.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dhow_protocol::codec::{self, CONTROL_LIMIT, CodecError};
use dhow_protocol::ports::{Listener, PortsEvent};
use dhow_protocol::stream::StreamHeader;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::AsyncRead;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use super::Opener;
use super::kept::Kept;
use super::policy::{Decision, Policy, endpoint};
use crate::api::ForwardReport;

/// More of the guest's listeners are not even remembered.
const MAX_LISTENERS: usize = 8192;
/// Between two events at the least: a guest that floods is slowed down by its own stream.
const EVENT_GAP: Duration = Duration::from_millis(1);
/// Between attempts at addresses that something else on the host holds.
const RETRY: Duration = Duration::from_secs(3);
/// Streams that are being opened at once, for each host address.
const MAX_OPENING: usize = 128;

/// The TCP forwards of a VM.
#[derive(Debug)]
pub struct Forwards {
    policy: Policy,
    table: Mutex<Table>,
    reports: watch::Sender<Vec<ForwardReport>>,
}

#[derive(Debug, Default)]
struct Table {
    /// All that the guest reported.
    listeners: BTreeSet<Listener>,
    /// Host addresses that are bound.
    bound: BTreeMap<SocketAddr, Bound>,
    /// Why the others have none.
    refused: BTreeMap<Listener, String>,
    /// Sockets that outlive this process.
    kept: Kept,
    /// Whether something on the host stood in the way, which may go unnoticed.
    retry: bool,
}

/// A bound host address; the socket is closed when this is dropped. Its connections live on.
#[derive(Debug)]
struct Bound {
    guest: Listener,
    accepting: JoinHandle<()>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Forwards {
    /// No forwards yet, and `policy` for those to come; `kept` has the sockets of an earlier supervisor.
    #[must_use]
    pub fn new(policy: Policy, kept: Kept) -> Arc<Self> {
        let table = Table { kept, ..Table::default() };
        Arc::new(Self { policy, table: Mutex::new(table), reports: watch::Sender::new(Vec::new()) })
    }

    /// What the guest listens on, and what became of it.
    #[must_use]
    pub fn reports(&self) -> Vec<ForwardReport> {
        self.reports.borrow().clone()
    }

    /// The reports as they change.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Vec<ForwardReport>> {
        self.reports.subscribe()
    }

    /// Ends all forwards: the VM is gone. Connections end by themselves.
    pub fn clear(&self) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.kept.release_inherited();
        for address in std::mem::take(&mut table.bound).into_keys() {
            table.kept.release(address);
        }
        let kept = std::mem::take(&mut table.kept);
        *table = Table { kept, ..Table::default() };
        drop(table);
        self.reports.send_replace(Vec::new());
    }

    /// Follows a `Ports` stream until it ends; what is bound stays.
    ///
    /// # Errors
    /// The stream failed, or what it said was no event.
    pub async fn serve<S, O>(&self, stream: &mut S, opener: &O) -> Result<(), CodecError>
    where
        S: AsyncRead + Unpin,
        O: Opener,
    {
        loop {
            let frame = codec::read_frame::<PortsEvent, _>(stream, CONTROL_LIMIT);
            tokio::pin!(frame);
            let event = loop {
                let retry = self.table.lock().unwrap_or_else(PoisonError::into_inner).retry;
                tokio::select! {
                    event = &mut frame => break event?,
                    () = tokio::time::sleep(RETRY), if retry => self.settle(opener),
                }
            };
            let Some(event) = event else { return Ok(()) };
            self.apply(event, opener);
            tokio::time::sleep(EVENT_GAP).await;
        }
    }

    /// Takes an event of the guest.
    fn apply<O: Opener>(&self, event: PortsEvent, opener: &O) {
        let whole = matches!(event, PortsEvent::All(_));
        {
            let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
            let listeners = &mut table.listeners;
            let added = match event {
                PortsEvent::All(all) => {
                    listeners.clear();
                    all
                }
                PortsEvent::Changed { added, removed } => {
                    for gone in &removed {
                        listeners.remove(gone);
                    }
                    added
                }
            };
            let room = MAX_LISTENERS.saturating_sub(listeners.len());
            if added.len() > room {
                tracing::warn!(reported = added.len(), room, "the guest listens on too much: rest ignored");
            }
            listeners.extend(added.into_iter().take(room));
        }
        self.settle(opener);
        if whole {
            self.table.lock().unwrap_or_else(PoisonError::into_inner).kept.release_inherited();
        }
    }

    /// Brings the host's sockets in line with the listeners, and tells.
    fn settle<O: Opener>(&self, opener: &O) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let Table { listeners, bound, refused, kept, retry } = &mut *table;
        bound.retain(|address, bound| {
            let wanted = listeners.contains(&bound.guest);
            if !wanted {
                kept.release(*address);
            }
            wanted
        });
        refused.clear();
        *retry = false;
        let mut taken: BTreeMap<SocketAddr, Listener> =
            bound.iter().map(|(address, bound)| (*address, bound.guest)).collect();
        for guest in listeners.iter().copied() {
            let addresses = match self.policy.decide(&guest, &taken) {
                Decision::Refuse(why) => {
                    refused.insert(guest, why);
                    continue;
                }
                Decision::Bind(addresses) => addresses,
            };
            for address in addresses {
                match kept.bind(address) {
                    Ok(listener) => {
                        let accepting = tokio::spawn(accept(listener, guest, opener.clone()));
                        bound.insert(address, Bound { guest, accepting });
                        taken.insert(address, guest);
                    }
                    // The IPv6 wildcard has IPv4 as well, also on a host without IPv6.
                    Err(error)
                        if error.kind() == io::ErrorKind::AddrNotAvailable
                            && taken.values().any(|other| *other == guest) => {}
                    Err(error) => {
                        *retry |= error.kind() == io::ErrorKind::AddrInUse;
                        refused.insert(guest, sentence(address, &error));
                    }
                }
            }
        }
        let reports = reports(bound, refused);
        drop(table);
        self.reports.send_if_modified(|known| {
            let differs = *known != reports;
            *known = reports;
            differs
        });
    }
}

fn reports(bound: &BTreeMap<SocketAddr, Bound>, refused: &BTreeMap<Listener, String>) -> Vec<ForwardReport> {
    let mut reports: Vec<_> = bound
        .iter()
        .map(|(host, bound)| ForwardReport { guest: bound.guest, host: Some(*host), reason: None })
        .collect();
    reports.extend(refused.iter().map(|(guest, why)| ForwardReport {
        guest: *guest,
        host: None,
        reason: Some(why.clone()),
    }));
    reports.sort_by_key(|report| (report.guest.port, report.guest, report.host));
    reports
}

/// Why `address` could not be bound, and what to do.
fn sentence(address: SocketAddr, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "port {} is in use on the host: stop what listens on {address}, or publish another port",
            address.port()
        ),
        io::ErrorKind::AddrNotAvailable => format!("the host has no address {}", address.ip()),
        _ => format!("the host cannot listen on {address}: {error}"),
    }
}

async fn accept<O: Opener>(listener: TcpListener, guest: Listener, opener: O) {
    let opening = Arc::new(Semaphore::new(MAX_OPENING));
    loop {
        // The permit comes first: who cannot be served yet waits in the kernel's queue.
        let Ok(permit) = Arc::clone(&opening).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                let opener = opener.clone();
                tokio::spawn(async move {
                    if let Err(error) = hand_over(client, guest, &opener).await {
                        tracing::debug!(%error, port = guest.port, "a forwarded connection was refused");
                    }
                    drop(permit);
                });
            }
            // Out of descriptors, or the client has left: others go on.
            Err(error) => {
                tracing::warn!(%error, port = guest.port, "a forward cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Makes `client` the host end of a stream. Where the guest refuses, the client sees a reset, as it
/// would from the guest itself, and not an empty success.
async fn hand_over<O: Opener>(client: TcpStream, guest: Listener, opener: &O) -> Result<(), String> {
    let told = |error: io::Error| error.to_string();
    client.set_nodelay(true).map_err(told)?;
    let client = client.into_std().map_err(told)?;
    // The fd is the opener's from here on; this one is for the reset.
    let held = client.try_clone().map_err(told)?;
    let target = endpoint(&guest);
    let header = StreamHeader::Tcp { address: target.ip(), port: target.port() };
    let opened = opener.open(header, client.into()).await;
    if opened.is_err() {
        // "l_onoff 1, l_linger 0": the close sends RST (socket(7), tcp(7)).
        let reset = libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(&held, sockopt::Linger, &reset).map_err(|error| error.to_string())?;
    }
    opened
}

#[cfg(test)]
#[path = "tcp_tests.rs"]
mod tests;
