//! `dhow stop`: the guest's power-off, and the end of everything on the host.

use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal};

use super::client::{self, Connection, keeper_ended};
use super::diagnosis;
use super::errors::{CommandError, invocation};
use super::output::print;
use super::progress::Display;
use crate::api::{ApiReply, ApiRequest};
use crate::config::Paths;

/// How long the host's processes may take to end, once the VM is down.
const END_DEADLINE: Duration = Duration::from_secs(15);
/// How long a keeper may take to end its children and itself: it gives them 5 s, twice.
const KEEPER_DEADLINE: Duration = Duration::from_secs(12);

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
    let keeper = connection.keeper();
    match ask(&mut connection, paths, force).await {
        // A connection that ends: it was ending already.
        Ok(()) | Err(CommandError::Gone) => {}
        Err(CommandError::Silent { .. }) if force => return kill(paths, keeper).await,
        Err(error) => return Err(error),
    }
    if keeper_ended(paths, keeper, END_DEADLINE).await {
        return Ok(true);
    }
    if force {
        return kill(paths, keeper).await;
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

/// The way that needs nobody's answer: the keeper ends its children, whatever state they are in.
async fn kill(paths: &Paths, keeper: Option<Pid>) -> Result<bool, CommandError> {
    let open = |pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok();
    let pidfd = keeper.and_then(open).ok_or(CommandError::Gone)?;
    // The keeper may be stopped itself, and a child of its that is would only keep SIGTERM pending.
    // They are looked for before: what the keeper leaves behind is no child of its any more.
    let halted: Vec<_> = diagnosis::halted(keeper, paths)
        .iter()
        .filter_map(|process| open(Pid::from_raw(process.pid)?))
        .collect();
    // Not SIGTERM, after which it would wait for its supervisor.
    // ESRCH, here and below: it has ended, which is what is wanted.
    let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::INT);
    for process in halted {
        let _ = rustix::process::pidfd_send_signal(process, Signal::CONT);
    }
    if keeper_ended(paths, keeper, KEEPER_DEADLINE).await {
        return Ok(true);
    }
    Err(still_there(paths, KEEPER_DEADLINE))
}

fn still_there(paths: &Paths, deadline: Duration) -> CommandError {
    CommandError::other(
        format!(
            "the VM is down, but processes of profile {} are left after {} s",
            paths.profile(),
            deadline.as_secs()
        ),
        format!("`{} stop --force` ends them", invocation(paths.profile())),
    )
}
