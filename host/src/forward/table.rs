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
use super::news::News;
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
const BURST: Duration = Duration::from_secs(2);
/// Until the first further attempt at addresses that are taken: mostly by a forward that has just ended …
const FIRST_RETRY: Duration = Duration::from_millis(15);
/// … and between later ones: something else on the host has it.
const RETRY: Duration = Duration::from_secs(3);

/// The port forwards of a VM.
#[derive(Debug)]
pub struct Forwards {
    table: Mutex<Table>,
    /// Counts changes.
    changes: watch::Sender<u64>,
}

#[derive(Debug)]
struct Table {
    policy: Policy,
    /// All that the guest reported.
    listeners: BTreeSet<Listener>,
    /// Host addresses that are bound.
    bound: BTreeMap<HostEnd, Bound>,
    /// Why the others have none.
    refused: BTreeMap<Listener, Refusal>,
    /// Sockets that outlive this process.
    kept: Kept,
    /// Attempts since something on the host stood in the way, whose going is not told; 0 where nothing does.
    retries: u32,
    /// For the clients of all UDP forwards.
    udp: udp::Budget,
    /// What the log says.
    news: News,
}

/// Why a listener has no host address.
#[derive(Debug, PartialEq, Eq)]
struct Refusal {
    /// A sentence for a person.
    why: String,
    until: Until,
}

/// How long a refusal holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Until {
    /// The policy changes.
    Ever,
    /// Another forward ends.
    Released,
    /// Something on the host leaves, of which nobody tells.
    Tried,
}

/// Of which listeners is to be decided.
#[derive(Debug)]
enum Open {
    All,
    /// These are new.
    Added(Vec<Listener>),
    /// Those that something on the host stands in the way of.
    Waiting,
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
            news: News::new(),
        };
        Arc::new(Self { table: Mutex::new(table), changes: watch::Sender::new(0) })
    }

    /// Has `policy` decide of all that is reported when a stream begins: a profile's rules are known after the sockets
    /// of an earlier supervisor were taken over.
    pub fn follow(&self, policy: Policy) {
        self.table().policy = policy;
    }

    /// What the guest listens on, and what became of it.
    #[must_use]
    pub fn reports(&self) -> Vec<ForwardReport> {
        let table = self.table();
        reports(&table.bound, &table.refused)
    }

    /// Hears when the reports have changed.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
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
        self.tell();
    }

    fn tell(&self) {
        self.changes.send_modify(|changes| *changes = changes.wrapping_add(1));
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
        // The next attempt, of which number; events do not put it off.
        let mut attempt: Option<(u32, Instant)> = None;
        loop {
            let frame = codec::read_frame::<PortsEvent, _>(stream, CONTROL_LIMIT);
            tokio::pin!(frame);
            let event = loop {
                let retries = self.table().retries;
                if attempt.is_none_or(|(number, _)| number != retries) {
                    // Each is four times as long as the one before; after eight it has long been the longest.
                    let pause = FIRST_RETRY.saturating_mul(1 << (2 * retries.min(8))).min(RETRY);
                    attempt = (retries > 0).then(|| (retries, Instant::now() + pause));
                }
                let due = attempt.map(|(_, at)| at);
                tokio::select! {
                    event = &mut frame => break event?,
                    () = until(due) => self.settle(Open::Waiting, opener),
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
        let open = {
            let mut table = self.table();
            let Table { policy, listeners, refused, news, .. } = &mut *table;
            let added = match event {
                PortsEvent::All(all) => {
                    listeners.clear();
                    refused.clear();
                    all
                }
                PortsEvent::Changed { added, removed } => {
                    let statics: BTreeSet<Listener> = policy.statics().collect();
                    for gone in &removed {
                        listeners.remove(gone);
                        if !statics.contains(gone) {
                            refused.remove(gone);
                        }
                    }
                    added
                }
            };
            let room = MAX_LISTENERS.saturating_sub(listeners.len());
            if added.len() > room {
                news.too_many(added.len(), room);
            }
            let added: Vec<_> = added.into_iter().take(room).collect();
            listeners.extend(&added);
            if whole { Open::All } else { Open::Added(added) }
        };
        self.settle(open, opener);
        if whole {
            self.table().kept.release_inherited();
        }
    }

    /// Brings the host's sockets in line with the listeners, and tells. What is refused for good stays so, and what has
    /// to wait is looked at again only when somebody has left: an event of one listener beside thousands costs little.
    fn settle<O: Opener>(&self, open: Open, opener: &O) {
        let mut table = self.table();
        let Table { policy, listeners, bound, refused, kept, retries, udp, news } = &mut *table;
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
        let waiting = |refused: &BTreeMap<Listener, Refusal>| -> Vec<Listener> {
            let due = |refusal: &Refusal| match refusal.until {
                Until::Ever => false,
                Until::Released => released,
                Until::Tried => true,
            };
            refused.iter().filter(|(_, refusal)| due(refusal)).map(|(guest, _)| *guest).collect()
        };
        let tried = matches!(open, Open::Waiting);
        let wanted: Vec<Listener> = match open {
            // Static ones first: what the guest does cannot take their place.
            Open::All => statics.iter().chain(listeners.difference(&statics)).copied().collect(),
            // Who has a part of what it wants, or has waited, comes first.
            Open::Added(added) if released => {
                let partly: BTreeSet<Listener> = bound.values().map(|bound| bound.guest).collect();
                partly.into_iter().chain(waiting(refused)).chain(added).collect()
            }
            Open::Added(added) => added,
            Open::Waiting => waiting(refused),
        };
        let mut taken: BTreeMap<HostEnd, Listener> =
            bound.iter().map(|(end, bound)| (*end, bound.guest)).collect();
        for guest in wanted {
            let before = refused.remove(&guest);
            let mut refuse = |why, until| _ = refused.insert(guest, Refusal { why, until });
            let ends = match policy.decide(&guest, &taken) {
                Decision::Refuse(why) => {
                    refuse(why, Until::Ever);
                    Vec::new()
                }
                Decision::Wait(why) => {
                    refuse(why, Until::Released);
                    Vec::new()
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
                        // An address of the host may come later, and a descriptor be free again.
                        let lasting = error.kind() == io::ErrorKind::PermissionDenied;
                        let until = if lasting { Until::Ever } else { Until::Tried };
                        refuse(sentence(end.address, &error), until);
                    }
                }
            }
            if let Some(refusal) = refused.get(&guest)
                && before.as_ref() != Some(refusal)
            {
                news.refused(&guest, &refusal.why);
            }
        }
        let taken_by_others = refused.values().any(|refusal| refusal.until == Until::Tried);
        *retries = match (taken_by_others, released) {
            (false, _) => 0,
            (true, true) => 1,
            (true, false) if tried => retries.saturating_add(1),
            (true, false) => (*retries).max(1),
        };
        drop(table);
        self.tell();
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for that moment; for ever where there is none.
async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
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

fn reports(bound: &BTreeMap<HostEnd, Bound>, refused: &BTreeMap<Listener, Refusal>) -> Vec<ForwardReport> {
    let mut reports: Vec<_> = bound
        .iter()
        .map(|(end, bound)| ForwardReport { guest: bound.guest, host: Some(end.address), reason: None })
        .collect();
    reports.extend(refused.iter().map(|(guest, refusal)| ForwardReport {
        guest: *guest,
        host: None,
        reason: Some(refusal.why.clone()),
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
