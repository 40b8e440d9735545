//! `dhow start`: settings, a keeper, and the steps of the supervisor until docker answers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::client::{self, Connection, keeper_ended};
use super::errors::{CommandError, invocation};
use super::output::{mib, print, say, span};
use super::progress::Display;
use super::signals::Signals;
use crate::api::{ApiReply, ApiRequest, StatusReport, VmState};
use crate::config::{Acceleration, Overrides, Paths, Profile, save};
use crate::docker::ContextName;
use crate::images::store::Image;
use crate::keeper;
use crate::qemu::acceleration::find_in_path;

/// How long a VM that is being stopped is waited for: its guest has 60 s.
const STOP_DEADLINE: Duration = Duration::from_secs(90);
/// How long a keeper may take to be ready.
const KEEPER_DEADLINE: Duration = Duration::from_secs(15);
/// How long an interrupted start may take to end.
const INTERRUPT_DEADLINE: Duration = Duration::from_secs(15);
/// Between two looks at a keeper that has the lock and does not listen, or no longer.
const LOOK: Duration = Duration::from_millis(50);

const EXAMPLES: &str = "\
Examples:
  dhow start
  dhow start --cpus 4 --memory 8GiB --disk 200GiB
  dhow start --mount ~ --mount /srv/data:ro
  dhow -p work start --no-activate && docker --context dhow-work ps

What is given is kept in the profile's file (see `dhow status`) and holds at every later start. A VM
that runs is left alone: its new settings hold after `dhow restart`. Ctrl-C stops the start.";

/// Start the VM, and make it if there is none.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Virtual CPUs [default: as in the profile, at first 2]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    cpus: Option<i64>,
    /// Memory: 4GiB, 512MiB; a bare number is GiB [default: as in the profile, at first 2GiB]
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// Size of the data disk; it can grow, not shrink [default: as in the profile, at first 100GiB]
    #[arg(long, value_name = "SIZE")]
    disk: Option<String>,
    /// A folder that the guest sees at the same path, writable unless `:ro` follows; once for each.
    /// They replace those of the profile [default: as in the profile, at first your home]
    #[arg(long, value_name = "PATH[:ro]")]
    mount: Vec<String>,
    /// Share no folder [default: as in the profile]
    #[arg(long, conflicts_with = "mount")]
    no_mounts: bool,
    /// Folder of the system image [default: as in the profile, else the newest one installed]
    #[arg(long, value_name = "DIR")]
    image: Option<PathBuf>,
    /// How the guest's code is run: KVM where it works, KVM or nothing, or emulation
    /// [default: as in the profile, at first auto]
    #[arg(long, value_name = "KIND", hide_default_value = true)]
    accel: Option<Acceleration>,
    /// Leave docker's current context as it is [default: as in the profile]
    #[arg(long)]
    no_activate: bool,
    /// Make `dhow` docker's current context, and restore the one before at stop
    /// [default: as in the profile, at first this]
    #[arg(long, conflicts_with = "no_activate")]
    activate: bool,
}

impl Args {
    fn overrides(self) -> Overrides {
        Overrides {
            cpus: self.cpus,
            memory: self.memory,
            disk: self.disk,
            mounts: match (self.no_mounts, self.mount) {
                (true, _) => Some(Vec::new()),
                (false, mounts) if mounts.is_empty() => None,
                (false, mounts) => Some(mounts),
            },
            image: self.image,
            activate: match (self.activate, self.no_activate) {
                (false, false) => None,
                (activate, _) => Some(activate),
            },
            acceleration: self.accel,
        }
    }
}

/// Runs the command.
///
/// # Errors
/// As [`CommandError`] says.
pub async fn run(args: Args, paths: &Paths) -> Result<u8, CommandError> {
    let overrides = args.overrides();
    if let Some(folder) = &overrides.image {
        // Before it is saved: a wrong folder in the profile would fail every later start, too.
        check_image(folder)?;
    }
    paths.create()?;
    let before = Profile::load(paths.profile(), paths).ok();
    let profile = save(paths, &overrides)?;
    let changed = before.is_some_and(|before| before != profile);
    bring_up(paths, &profile, changed).await
}

fn check_image(folder: &Path) -> Result<(), CommandError> {
    let folder = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
    Image::find(Some(&folder), Path::new("/"))?;
    Ok(())
}

/// Starts a VM with settings that are saved, and shows how it goes.
///
/// # Errors
/// As [`CommandError`] says.
pub async fn bring_up(paths: &Paths, profile: &Profile, changed: bool) -> Result<u8, CommandError> {
    // From here on Ctrl-C stops the start rather than this command alone.
    let mut signals = Signals::listen(&[libc::SIGINT, libc::SIGTERM])?;
    let mut display = Display::new();
    let begun = tokio::time::Instant::now();
    let deadline = begun + STOP_DEADLINE;
    loop {
        let (mut connection, ours) = match reach(paths, profile, deadline, &mut signals, &display).await? {
            Reached::Running(report) => return already_running(&report, profile, changed),
            Reached::Starting { connection, ours } => (*connection, ours),
        };
        if changed && !ours {
            display.notice("the VM was being started already; new settings hold after `dhow restart`");
        }
        let followed = tokio::select! {
            followed = follow(&mut connection, paths, &mut display) => followed,
            signal = signals.next() => {
                drop(display);
                return interrupted(connection, paths, ours, signal).await;
            }
        };
        match followed {
            Ok(()) => break,
            // Another command's start failed before this one could follow it.
            Err(CommandError::Gone) if !ours && tokio::time::Instant::now() < deadline => {}
            Err(error) => return Err(error),
        }
    }
    drop(display);
    print(&what_next(paths, profile, begun.elapsed()))?;
    Ok(0)
}

/// What there is, after a keeper was started where there was none.
enum Reached {
    /// Nothing is left to do.
    Running(Box<StatusReport>),
    /// A start to follow.
    Starting {
        /// Nothing was asked on it yet.
        connection: Box<Connection>,
        /// This command has begun it.
        ours: bool,
    },
}

async fn reach(
    paths: &Paths,
    profile: &Profile,
    deadline: tokio::time::Instant,
    signals: &mut Signals,
    display: &Display,
) -> Result<Reached, CommandError> {
    let (mut ours, mut told_to_wait) = (false, false);
    loop {
        let Some(connection) = client::connect(paths).await? else {
            Image::find(profile.image.as_deref(), &paths.images_dir())?;
            match spawn_keeper(paths).await {
                Ok(()) => ours = true,
                Err(error) if is_taken(&error, paths) && tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(LOOK).await;
                }
                Err(error) => return Err(error),
            }
            continue;
        };
        match client::status(paths).await {
            Ok(Some(report)) => match report.state {
                VmState::Running | VmState::Degraded => return Ok(Reached::Running(Box::new(report))),
                VmState::Starting => {
                    return Ok(Reached::Starting { connection: Box::new(connection), ours });
                }
                VmState::Stopping | VmState::Stopped => {}
            },
            Ok(None) | Err(CommandError::Gone) => {}
            Err(error) => return Err(error),
        }
        // It is ending, or has ended just now.
        ours = false;
        drop(connection);
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        // One that has only to exit is not worth a word.
        if keeper_ended(paths, LOOK).await {
            continue;
        }
        if !told_to_wait {
            told_to_wait = true;
            display.notice("the VM is being stopped; starting again when it is down");
        }
        tokio::select! {
            ended = keeper_ended(paths, left) => if !ended {
                return Err(CommandError::other(
                    format!("the VM is still being stopped after {} s", STOP_DEADLINE.as_secs()),
                    format!("`{} stop --force` ends it", invocation(paths.profile())),
                ));
            },
            signal = signals.next() => return Err(CommandError::Interrupted(signal)),
        }
    }
}

/// Shows progress until docker answers.
async fn follow(
    connection: &mut Connection,
    paths: &Paths,
    display: &mut Display,
) -> Result<(), CommandError> {
    connection.send(&ApiRequest::WatchStart).await?;
    loop {
        match connection.next(paths).await? {
            ApiReply::Progress(progress) => display.show(&progress),
            ApiReply::Started => return Ok(()),
            _ => return Err(CommandError::Kind),
        }
    }
}

async fn spawn_keeper(paths: &Paths) -> Result<(), CommandError> {
    let own = paths.clone();
    let spawning = tokio::task::spawn_blocking(move || keeper::spawn(own.profile(), &own, false));
    match tokio::time::timeout(KEEPER_DEADLINE, spawning).await {
        Ok(Ok(spawned)) => Ok(spawned?),
        Ok(Err(panicked)) => Err(CommandError::system("start the keeper", std::io::Error::other(panicked))),
        Err(_) => Err(CommandError::other(
            format!("the keeper was not ready within {} s", KEEPER_DEADLINE.as_secs()),
            format!("`{} logs keeper` may say why", invocation(paths.profile())),
        )),
    }
}

/// Whether another keeper has the profile: one that is just starting, or just ending.
fn is_taken(error: &CommandError, paths: &Paths) -> bool {
    matches!(error, CommandError::Keeper(error) if error.is_locked(paths.profile()))
}

/// Ctrl-C: users expect that what they began ends, and that what another began goes on.
async fn interrupted(
    mut connection: Connection,
    paths: &Paths,
    ours: bool,
    signal: i32,
) -> Result<u8, CommandError> {
    let invocation = invocation(paths.profile());
    if !ours {
        say(&format!("notice: the start, begun by another command, goes on; `{invocation} status` shows it"));
        return Err(CommandError::Interrupted(signal));
    }
    say("stopping the start …");
    let ending = async {
        // The supervisor waits for somebody who reads why the start has failed: this connection.
        let told = async { while connection.next(paths).await.is_ok() {} };
        let stop = async {
            if let Some(mut stop) = client::connect(paths).await? {
                stop.send(&ApiRequest::Stop { force: true }).await?;
                while !matches!(stop.next(paths).await?, ApiReply::Stopped) {}
            }
            Ok::<(), CommandError>(())
        };
        let (stopped, ()) = tokio::join!(stop, told);
        keeper_ended(paths, INTERRUPT_DEADLINE).await && stopped.is_ok()
    };
    // The listener stays; a second Ctrl-C is for this wait.
    let mut again = Signals::listen(&[libc::SIGINT, libc::SIGTERM])?;
    let ended = tokio::select! {
        ended = tokio::time::timeout(INTERRUPT_DEADLINE, ending) => ended.unwrap_or(false),
        _ = again.next() => false,
    };
    if ended {
        say("the start was stopped; nothing is left running");
    } else {
        say(&format!("notice: the VM is still ending; `{invocation} stop --force` ends it at once"));
    }
    Err(CommandError::Interrupted(signal))
}

fn already_running(report: &StatusReport, profile: &Profile, changed: bool) -> Result<u8, CommandError> {
    let invocation = invocation(&profile.name);
    let differs = (report.cpus, report.memory_mib, report.disk_gib)
        != (profile.cpus, profile.memory_mib, profile.disk_gib);
    if changed || differs {
        say(&format!("notice: the settings have changed; they hold after `{invocation} restart`"));
    }
    if let Some(problem) = &report.problem {
        say(&format!("notice: {}", super::output::escape_lines(problem)));
    }
    print(&format!("The VM of profile {} is running already.\n", profile.name))?;
    Ok(0)
}

/// The last words of a start: what there is, and what to do with it.
fn what_next(paths: &Paths, profile: &Profile, took: Duration) -> String {
    let context = ContextName::of_profile(profile.name.as_str());
    let socket = paths.docker_socket();
    let milliseconds = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    let mut text = format!(
        "Docker is up in profile {} after {} ({} {}, {} memory).\n",
        profile.name,
        span(milliseconds),
        profile.cpus,
        if profile.cpus == 1 { "CPU" } else { "CPUs" },
        mib(profile.memory_mib),
    );
    let run = "run --rm hello-world";
    if find_in_path("docker").is_none() {
        text.push_str("  install the docker CLI, or point a client of your own at the socket\n");
    } else if current_context().as_deref() == Some(context.as_str()) {
        text.push_str(&format!("  docker {run}    (docker's context is now `{context}`)\n"));
    } else {
        text.push_str(&format!(
            "  docker --context {context} {run}    (docker's current context stays as it was)\n"
        ));
    }
    text.push_str(&format!("  socket: unix://{}\n", socket.display()));
    text
}

/// The context in the docker CLI's configuration.
fn current_context() -> Option<String> {
    let folder = std::env::var_os("DOCKER_CONFIG")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker")))?;
    let text = std::fs::read(folder.join("config.json")).ok()?;
    let config: serde_json::Value = serde_json::from_slice(&text).ok()?;
    Some(config.get("currentContext")?.as_str()?.to_owned())
}
