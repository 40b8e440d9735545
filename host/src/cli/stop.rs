//! `dhow stop`: the guest's power-off, and the end of everything on the host.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::client::{self, Connection, keeper_ended};
use super::diagnosis;
use super::errors::{CommandError, invocation};
use super::output::{escape, print, say};
use super::progress::Display;
use crate::api::{ApiReply, ApiRequest};
use crate::config::Paths;
use crate::docker;
use crate::keeper;
use crate::supervisor::{self, Record, has_ended};

/// How long the host's processes may take to end, once the VM is down.
const END_DEADLINE: Duration = Duration::from_secs(15);
/// How long the kernel may take to end what was killed.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks whether it has.
const LOOK: Duration = Duration::from_millis(10);

const EXAMPLES: &str = "\
Containers are stopped, the guest writes back and powers off; images, volumes and settings stay.
Docker's context before the start is restored. Stopping a VM that does not run is no error.

Examples:
  dhow stop
  dhow stop --force     where the guest or the supervisor hangs";

/// Stop the VM; its data stays.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// End it at once, as a power cut would: what containers have not yet written is lost
    /// [default: wait for the guest]
    #[arg(short, long)]
    force: bool,
}

/// Runs the command.
///
/// # Errors
/// As [`CommandError`] says.
pub async fn run(args: Args, paths: &Paths) -> Result<u8, CommandError> {
    let stopped = take_down(paths, args.force).await?;
    let text = if stopped { "is stopped" } else { "is not running" };
    print(&format!("The VM of profile {} {text}.\n", paths.profile()))?;
    Ok(0)
}

/// Stops a VM; whether there was one.
///
/// # Errors
/// When something of it may be left.
pub async fn take_down(paths: &Paths, force: bool) -> Result<bool, CommandError> {
    let Some(mut connection) = client::connect(paths).await? else {
        return Ok(false);
    };
    match ask(&mut connection, paths, force).await {
        // A connection that ends: it was ending already.
        Ok(()) | Err(CommandError::Gone) => {}
        Err(CommandError::Silent { .. }) if force => return kill(paths).await,
        Err(error) => return Err(error),
    }
    if keeper_ended(paths, END_DEADLINE).await {
        return Ok(true);
    }
    if force {
        return kill(paths).await;
    }
    Err(still_there(paths, END_DEADLINE))
}

async fn ask(connection: &mut Connection, paths: &Paths, force: bool) -> Result<(), CommandError> {
    let mut display = Display::new();
    connection.send(&ApiRequest::Stop { force }).await?;
    loop {
        match connection.next(paths).await? {
            ApiReply::Progress(progress) => display.show(&progress),
            ApiReply::Stopped => return Ok(()),
            _ => return Err(CommandError::Kind),
        }
    }
}

/// The way that needs nobody's answer: whatever state they are in, all processes of the profile end.
async fn kill(paths: &Paths) -> Result<bool, CommandError> {
    let open = |pid: &i32| pidfd_open(Pid::from_raw(*pid)?, PidfdFlags::empty()).ok();
    let keeper_pids = diagnosis::keepers(paths);
    let keepers: Vec<OwnedFd> = keeper_pids.iter().filter_map(open).collect();
    // A stopped keeper starts no new supervisor. It is killed last: a supervisor that sees its keeper go
    // takes its place.
    signal(&keepers, Signal::STOP);
    let others: Vec<OwnedFd> =
        diagnosis::pids(paths).iter().filter(|pid| !keeper_pids.contains(pid)).filter_map(open).collect();
    signal(&others, Signal::KILL);
    signal(&keepers, Signal::KILL);
    let ended = async {
        while !others.iter().chain(&keepers).all(has_ended) {
            tokio::time::sleep(LOOK).await;
        }
    };
    if tokio::time::timeout(KILL_DEADLINE, ended).await.is_err() {
        return Err(still_there(paths, KILL_DEADLINE));
    }
    // What the supervisor and the keeper would have done at their end, unless another command has begun a
    // new keeper: files are that one's then.
    let Some(_lock) = keeper::open_locked(&paths.keeper_lock())
        .map_err(|error| CommandError::other(crate::errors::chain(&error), "the VM has ended; try again"))?
    else {
        return if keepers.is_empty() { Err(still_there(paths, KILL_DEADLINE)) } else { Ok(true) };
    };
    for notice in docker::deactivate(paths.profile().as_str(), &supervisor::context_file(paths)).await {
        say(&format!("notice: {}", escape(&notice)));
    }
    Record::remove(paths);
    let sockets =
        [paths.api_socket(), paths.docker_socket(), paths.device_socket(), paths.device_control_socket()];
    for socket in sockets {
        // A new keeper replaces one that is still there.
        let _ = std::fs::remove_file(socket);
    }
    Ok(true)
}

fn signal(processes: &[OwnedFd], signal: Signal) {
    for process in processes {
        // ESRCH: it has ended, which is what is wanted.
        let _ = pidfd_send_signal(process, signal);
    }
}

fn still_there(paths: &Paths, deadline: Duration) -> CommandError {
    let reasons: Vec<String> =
        diagnosis::halted(paths).iter().map(|halted| format!(": {}", halted.problem())).collect();
    CommandError::other(
        format!(
            "the VM is down, but processes of profile {} are left after {} s{}",
            paths.profile(),
            deadline.as_secs(),
            reasons.concat()
        ),
        format!("`{} stop --force` ends them", invocation(paths.profile())),
    )
}
