//! Forwards: keeps the host's sockets in step with what the guest reports and the profile's rules say.
//!
//! One `Forwards` lives as long as its VM; the streams that report come and go (the guest's worker
//! may restart), and what is bound stays meanwhile. A refused or failed listener stays listed with
//! its reason, and is tried again when an address may have become free.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dhow_protocol::allowance::Allowance;
use dhow_protocol::codec::{self, CONTROL_LIMIT, CodecError};
use dhow_protocol::ports::{Listener, PortsEvent, Protocol};
use tokio::io::AsyncRead;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::kept::Kept;
use super::policy::{Decision, HostEnd, Policy};
use super::{Opener, tcp, udp};
use crate::api::ForwardReport;

/// More of the guest's listeners are not even remembered.
const MAX_LISTENERS: usize = 8192;
/// Between two events at the least: a guest that floods is slowed down by its own stream …
const EVENT_GAP: Duration = Duration::from_millis(1);
/// … and takes a fifth of this thread at the most …
const ONE_IN: u32 = 5;
/// … once it has had so much in advance: a compose stack comes at once.
const BURST: Duration = Duration::from_millis(500);
/// Until the first further attempt at addresses that are taken: mostly by a forward that has just ended …
const FIRST_RETRY: Duration = Duration::from_millis(15);
/// … and between later ones: something else on the host has it.
const RETRY: Duration = Duration::from_secs(3);

/// The port forwards of a VM.
#[derive(Debug)]
pub struct Forwards {
    table: Mutex<Table>,
    reports: watch::Sender<Vec<ForwardReport>>,
}

#[derive(Debug)]
struct Table {
    policy: Policy,
    /// All that the guest reported.
    listeners: BTreeSet<Listener>,
    /// Host addresses that are bound.
    bound: BTreeMap<HostEnd, Bound>,
    /// Why the others have none.
    refused: BTreeMap<Listener, String>,
    /// Sockets that outlive this process.
    kept: Kept,
    /// Attempts since something on the host stood in the way, whose going is not told; 0 where nothing does.
    retries: u32,
    /// For the clients of all UDP forwards.
    udp: udp::Budget,
}

/// A bound host address; the socket is closed when this is dropped. Its connections live on.
#[derive(Debug)]
struct Bound {
    guest: Listener,
    serving: JoinHandle<()>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Forwards {
    /// No forwards yet, and `policy` for those to come; `kept` has the sockets of an earlier supervisor.
    #[must_use]
    pub fn new(policy: Policy, kept: Kept) -> Arc<Self> {
        let table = Table {
            policy,
            listeners: BTreeSet::new(),
            bound: BTreeMap::new(),
            refused: BTreeMap::new(),
            kept,
            retries: 0,
            udp: udp::Budget::default(),
        };
        Arc::new(Self { table: Mutex::new(table), reports: watch::Sender::new(Vec::new()) })
    }

    /// Has `policy` decide from the next event on: a profile's rules are known after the sockets of an
    /// earlier supervisor were taken over.
    pub fn follow(&self, policy: Policy) {
        self.table().policy = policy;
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
        let mut table = self.table();
        table.kept.release_inherited();
        for end in std::mem::take(&mut table.bound).into_keys() {
            table.kept.release(end);
        }
        table.listeners.clear();
        table.refused.clear();
        table.retries = 0;
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
        let mut allowance = Allowance::new(ONE_IN, BURST);
        loop {
            let frame = codec::read_frame::<PortsEvent, _>(stream, CONTROL_LIMIT);
            tokio::pin!(frame);
            let event = loop {
                let retries = self.table().retries;
                // Each is four times as long as the one before; after eight it has long been the longest.
                let pause = FIRST_RETRY.saturating_mul(1 << (2 * retries.min(8))).min(RETRY);
                tokio::select! {
                    event = &mut frame => break event?,
                    () = tokio::time::sleep(pause), if retries > 0 => self.settle(opener),
                }
            };
            let Some(event) = event else { return Ok(()) };
            let begun = Instant::now();
            self.apply(event, opener);
            let ended = Instant::now();
            let next = allowance.spend(begun, ended).max(ended + EVENT_GAP);
            tokio::time::sleep_until(next.into()).await;
        }
    }

    /// Takes an event of the guest.
    fn apply<O: Opener>(&self, event: PortsEvent, opener: &O) {
        let whole = matches!(event, PortsEvent::All(_));
        {
            let mut table = self.table();
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
            self.table().kept.release_inherited();
        }
    }

    /// Brings the host's sockets in line with the listeners, and tells.
    fn settle<O: Opener>(&self, opener: &O) {
        let mut table = self.table();
        let Table { policy, listeners, bound, refused, kept, retries, udp } = &mut *table;
        let statics: BTreeSet<Listener> = policy.statics().collect();
        let mut released = false;
        bound.retain(|end, bound| {
            let wanted = listeners.contains(&bound.guest) || statics.contains(&bound.guest);
            if !wanted {
                kept.release(*end);
                released = true;
            }
            wanted
        });
        // Static ones first: what the guest does cannot take their place.
        let wanted: Vec<Listener> = statics.iter().chain(listeners.difference(&statics)).copied().collect();
        refused.clear();
        let mut taken_by_others = false;
        let mut taken: BTreeMap<HostEnd, Listener> =
            bound.iter().map(|(end, bound)| (*end, bound.guest)).collect();
        for guest in wanted {
            let ends = match policy.decide(&guest, &taken) {
                Decision::Refuse(why) => {
                    refused.insert(guest, why);
                    continue;
                }
                Decision::Bind(ends) => ends,
            };
            for end in ends {
                match serve(kept, end, guest, opener, udp) {
                    Ok(serving) => {
                        bound.insert(end, Bound { guest, serving });
                        taken.insert(end, guest);
                    }
                    // The IPv6 wildcard has IPv4 as well, also on a host without IPv6.
                    Err(error)
                        if error.kind() == io::ErrorKind::AddrNotAvailable
                            && taken.values().any(|other| *other == guest) => {}
                    Err(error) => {
                        // An address of the host may come later, too.
                        taken_by_others |= matches!(
                            error.kind(),
                            io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable
                        );
                        refused.insert(guest, sentence(end.address, &error));
                    }
                }
            }
        }
        *retries = match (taken_by_others, released) {
            (false, _) => 0,
            (true, true) => 1,
            (true, false) => retries.saturating_add(1),
        };
        let reports = reports(bound, refused);
        drop(table);
        self.reports.send_if_modified(|known| {
            let differs = *known != reports;
            *known = reports;
            differs
        });
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Binds a host address and serves it.
fn serve<O: Opener>(
    kept: &mut Kept,
    end: HostEnd,
    guest: Listener,
    opener: &O,
    budget: &udp::Budget,
) -> io::Result<JoinHandle<()>> {
    Ok(match end.protocol {
        Protocol::Tcp => tokio::spawn(tcp::accept(kept.bind_tcp(end.address)?, guest, opener.clone())),
        Protocol::Udp => {
            let socket = kept.bind_udp(end.address)?;
            tokio::spawn(udp::serve(socket, guest, opener.clone(), budget.clone()))
        }
    })
}

fn reports(bound: &BTreeMap<HostEnd, Bound>, refused: &BTreeMap<Listener, String>) -> Vec<ForwardReport> {
    let mut reports: Vec<_> = bound
        .iter()
        .map(|(end, bound)| ForwardReport { guest: bound.guest, host: Some(end.address), reason: None })
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

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
