//! Takes over a VM that an earlier supervisor, and perhaps its keeper, left running.
//!
//! QEMU decides: while it lives the VM lives, and whatever else has died is brought back (`healing.rs`,
//! `shares.rs`). Where it is dead, what is left of the VM is ended.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use dhow_parent::{ParentLink, Restored, SpawnedChild};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::UnixListener;
use tokio::task::JoinSet;

use super::guest_setup::{self, Helpers};
use super::ledger::Ledger;
use super::processes::{DEVICE_NAME, PASST_NAME, QEMU_NAME, end, ended, file_server_name, has_ended};
use super::record::{Phase, Record};
use super::shares::Server;
use super::start::{self, StartError};
use super::state::State;
use super::stop;
use super::vm::{Parts, Running, Vm, sentence};
use crate::config::Paths;
use crate::forward::Forwards;
use dhow_parent::procfs::is_dying;

/// How long QEMU may take to give its memory back.
const DYING: std::time::Duration = std::time::Duration::from_secs(10);
/// How long a process that is of no use any more may take to end.
const GRACE: std::time::Duration = std::time::Duration::from_secs(2);

/// What an earlier supervisor left.
pub enum Found {
    /// Nothing, or only what was ended just now.
    Nothing,
    /// A VM that ran when this keeper's last supervisor did, and has ended; with how.
    Ended(String),
    /// Likewise, and its end had been asked for.
    Stopped,
    /// A VM that runs.
    Vm(Box<Orphan>),
}

/// A VM without a supervisor.
pub struct Orphan {
    /// How far it has come.
    pub phase: Phase,
    record: Record,
    qemu: SpawnedChild,
    helpers: Helpers,
}

/// Looks for a VM, and ends what is left of one whose QEMU is dead.
pub async fn find(link: &ParentLink, paths: &Paths, restored: &mut Restored, state: &State) -> Found {
    let record = Record::read(paths);
    let mut children = std::mem::take(&mut restored.children);
    children.retain(|child| !has_ended(&child.pidfd));
    adopt_strangers(link, paths, record.as_ref(), &mut children).await;
    if let Some(qemu) = children.iter().find(|child| child.name == QEMU_NAME && is_dying(child.pid)) {
        tracing::info!(pid = qemu.pid, "QEMU is dying");
        // Whether or not: it is of no use any more.
        let _ = tokio::time::timeout(DYING, ended(&qemu.pidfd)).await;
    }
    let alive = |child: &SpawnedChild| child.name == QEMU_NAME && !is_dying(child.pid);
    let at = children.iter().position(alive);
    if let (Some(record), Some(at)) = (&record, at) {
        let qemu = children.swap_remove(at);
        tracing::info!(pid = qemu.pid, phase = ?record.phase, "a VM runs; taking it over");
        for child in children.iter().chain([&qemu]) {
            state.learn(|facts| facts.processes.push((child.name.clone(), child.pid)));
        }
        let record = record.clone();
        let helpers = sort(children, &mut restored.fds, &record).await;
        return Found::Vm(Box::new(Orphan { phase: record.phase, record, qemu, helpers }));
    }
    stop::end_all(paths, &children, state).await;
    match record {
        Some(record) if !restored.first && record.phase == Phase::Stopping => Found::Stopped,
        Some(record) if !restored.first && record.phase == Phase::Started => {
            let mut status = None;
            while let Ok(exit) = restored.exits.try_recv() {
                status = (exit.name == QEMU_NAME).then_some(exit.status).or(status);
            }
            Found::Ended(sentence(status))
        }
        _ => Found::Nothing,
    }
}

/// Adds the record's processes that the keeper does not know: it is a new one, too.
async fn adopt_strangers(
    link: &ParentLink,
    paths: &Paths,
    record: Option<&Record>,
    children: &mut Vec<SpawnedChild>,
) {
    let Some(record) = record else { return };
    let mut strangers: Vec<SpawnedChild> = record
        .processes
        .iter()
        .filter(|process| children.iter().all(|child| child.pid != process.pid))
        .filter_map(|process| process.find())
        .collect();
    if strangers.iter().chain(children.iter()).all(|child| child.name != QEMU_NAME) {
        // Its supervisor may have been killed before it could note it.
        strangers.extend(qemu_at(&paths.qmp_socket()));
    }
    for child in strangers {
        tracing::info!(name = child.name, pid = child.pid, "a process of an earlier keeper");
        if let Err(error) = link.adopt(&child).await {
            // It is watched here all the same; only the keeper's own clean-up would miss it.
            tracing::warn!(error = crate::errors::chain(&error), "the keeper does not adopt it");
        }
        children.push(child);
    }
}

/// The QEMU that listens at `socket`: of a listening socket the kernel tells who made it listen.
fn qemu_at(socket: &Path) -> Option<SpawnedChild> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let connection = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).ok()?;
    rustix::net::connect(&connection, &SocketAddrUnix::new(socket).ok()?).ok()?;
    let pid = rustix::net::sockopt::socket_peercred(&connection).ok()?.pid;
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()?;
    let pid = pid.as_raw_nonzero().get();
    (!has_ended(&pidfd)).then(|| SpawnedChild { name: QEMU_NAME.to_owned(), pid, pidfd })
}

/// Gives each process its part; one that has none is ended.
async fn sort(children: Vec<SpawnedChild>, fds: &mut HashMap<String, OwnedFd>, record: &Record) -> Helpers {
    let mut helpers = Helpers { device_is_adopted: true, ..Helpers::default() };
    for child in children {
        let share = record.shares.iter().find(|share| file_server_name(share.number) == child.name);
        match (child.name.as_str(), share) {
            (DEVICE_NAME, _) if helpers.device.is_none() => helpers.device = Some(child),
            (PASST_NAME, _) if helpers.passt.is_none() => helpers.passt = Some(child),
            (name, Some(share)) if fds.contains_key(name) => {
                let control = fds.remove(name);
                helpers.servers.extend(control.map(|control| (share.number, Server { child, control })));
            }
            // A file server whose socket is lost with its keeper: it can be given no session. Its last
            // requests must be done, or never be done, before another server is given them.
            _ => drop(end(&child, GRACE).await),
        }
    }
    helpers
}

impl Orphan {
    /// Serves the VM from here on; where docker had not answered yet, goes on with its start.
    ///
    /// # Errors
    /// As [`StartError`] says.
    pub async fn adopt(
        self,
        link: ParentLink,
        paths: &Paths,
        docker: UnixListener,
        forwards: Arc<Forwards>,
        restored: Restored,
        state: &Arc<State>,
    ) -> Result<Running, StartError> {
        let Self { phase, record, qemu, mut helpers } = self;
        start::show(&record, state);
        let secret = start::read_secret(paths)?;
        let ledger = Ledger::of(paths, record);
        ledger.change(|record| record.note(&qemu));
        let (paths, state) = (paths.clone(), Arc::clone(state));
        let vm = Vm::new(Parts { link, paths, state, ledger, qemu, forwards, secret });
        if phase == Phase::Starting {
            return start::bring_docker(vm, helpers, docker, restored).await;
        }
        vm.state.started();
        vm.pass_over_qemu_log();
        let mut tasks = JoinSet::new();
        guest_setup::heal(&mut tasks, &vm, &mut helpers);
        guest_setup::resume(&mut tasks, &vm, &mut helpers, docker);
        Ok(Running { vm, tasks, exits: restored.exits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_listens_is_found_by_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        assert!(qemu_at(&socket).is_none());
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(qemu_at(&socket).unwrap().pid.unsigned_abs(), std::process::id());
        drop(listener);
        assert!(qemu_at(&socket).is_none(), "the socket of a dead process");
    }
}
