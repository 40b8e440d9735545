//! `dhow status`: how a VM is, also one that does not run or does not answer.

use std::path::PathBuf;

use dhow_protocol::control::{DaemonState, DaemonStatus, GuestInfo};
use serde::Serialize;

use super::errors::CommandError;
use super::output::{bytes, escape_lines, mib, pairs, print, print_json, say, span};
use super::{Format, client, diagnosis};
use crate::api::{StatusReport, VmState};
use crate::config::{Paths, Profile};
use crate::docker::ContextName;

const HELP: &str = "\
Exit status: 0 while the VM runs well, 1 otherwise (stopped, starting, stopping, degraded, silent).

JSON: one object. `profile`, `state` (stopped, starting, running, degraded, stopping, silent),
`problem`, `acceleration`, `cpus`, `memory_mib`, `disk_gib`, `docker_socket`, `docker_context`,
`profile_file`, `image`, `processes` [{name, pid}], `daemons` [{name, state, reason, restarts}],
`guest` {agent, kernel, uptime_ms, memory_total, memory_available, disk_total, disk_available, mounts}.
What is not known is null. Sizes are bytes unless the key says otherwise.

Examples:
  dhow status
  dhow status --json | jq -r .state
  dhow status >/dev/null || dhow start";

/// Show how the VM is; exit status 0 only while it runs well.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    #[command(flatten)]
    format: Format,
}

/// A profile as `--json` shows it.
#[derive(Debug, Serialize)]
struct Document {
    profile: String,
    state: &'static str,
    problem: Option<String>,
    acceleration: Option<String>,
    cpus: Option<u32>,
    memory_mib: Option<u64>,
    disk_gib: Option<u64>,
    docker_socket: PathBuf,
    docker_context: String,
    profile_file: PathBuf,
    image: Option<PathBuf>,
    processes: Vec<Process>,
    daemons: Vec<Daemon>,
    guest: Option<Guest>,
}

#[derive(Debug, Serialize)]
struct Process {
    name: String,
    pid: i32,
}

#[derive(Debug, Serialize)]
struct Daemon {
    name: String,
    state: &'static str,
    reason: Option<String>,
    restarts: u32,
}

#[derive(Debug, Serialize)]
struct Guest {
    agent: String,
    kernel: String,
    uptime_ms: u64,
    memory_total: u64,
    memory_available: u64,
    disk_total: u64,
    disk_available: u64,
    mounts: Vec<String>,
}

/// A state's name, in text and JSON.
#[must_use]
pub fn state_name(state: VmState) -> &'static str {
    match state {
        VmState::Stopped => "stopped",
        VmState::Starting => "starting",
        VmState::Running => "running",
        VmState::Degraded => "degraded",
        VmState::Stopping => "stopping",
    }
}

/// The state of one that does not answer.
pub const SILENT: &str = "silent";

/// Runs the command.
///
/// # Errors
/// As [`CommandError`] says.
pub async fn run(args: Args, paths: &Paths) -> Result<u8, CommandError> {
    let mut document = Document::of_profile(paths);
    let mut hint = None;
    match client::status(paths).await {
        Ok(Some(report)) => document.add_report(report, paths),
        // It has ended while it was asked.
        Ok(None) | Err(CommandError::Gone) => {
            document.problem = document.problem.or_else(|| crate::supervisor::last_end(paths))
        }
        Err(error @ CommandError::Silent { .. }) => {
            document.state = SILENT;
            document.problem = Some(crate::errors::chain(&error));
            hint = error.hint();
        }
        Err(error) => return Err(error),
    }
    let status = u8::from(document.state != state_name(VmState::Running));
    if args.format.json {
        print_json(&document)?;
    } else {
        print(&document.text())?;
        if let Some(hint) = hint {
            say(&format!("hint: {}", escape_lines(&hint)));
        }
    }
    Ok(status)
}

impl Document {
    /// What the settings say: of a VM that does not run.
    fn of_profile(paths: &Paths) -> Self {
        let (profile, problem) = match Profile::load(paths.profile(), paths) {
            Ok(profile) => (Some(profile), None),
            Err(error) => (None, Some(crate::errors::chain(&error))),
        };
        Self {
            profile: paths.profile().to_string(),
            state: state_name(VmState::Stopped),
            problem,
            acceleration: None,
            cpus: profile.as_ref().map(|profile| profile.cpus),
            memory_mib: profile.as_ref().map(|profile| profile.memory_mib),
            disk_gib: profile.as_ref().map(|profile| profile.disk_gib),
            docker_socket: paths.docker_socket(),
            docker_context: ContextName::of_profile(paths.profile().as_str()).to_string(),
            profile_file: paths.profile_file(),
            image: profile.and_then(|profile| profile.image),
            processes: Vec::new(),
            daemons: Vec::new(),
            guest: None,
        }
    }

    /// What the supervisor says: of a VM that runs.
    fn add_report(&mut self, report: StatusReport, paths: &Paths) {
        self.state = state_name(report.state);
        // What it has not learnt yet is empty or 0.
        self.acceleration = Some(report.acceleration).filter(|name| !name.is_empty());
        self.image = Some(report.image).filter(|path| !path.as_os_str().is_empty());
        if report.cpus > 0 {
            self.cpus = Some(report.cpus);
            self.memory_mib = Some(report.memory_mib);
            self.disk_gib = Some(report.disk_gib);
        }
        self.docker_socket = report.docker_socket;
        let halted = diagnosis::halted(paths);
        let problem = report.problem.unwrap_or_default();
        let mut problems = vec![problem.clone()];
        // The supervisor may have seen it, too.
        problems.extend(halted.iter().map(diagnosis::Halted::problem).filter(|seen| !problem.contains(seen)));
        problems.retain(|problem| !problem.is_empty());
        self.problem = (!problems.is_empty()).then(|| problems.join("; "));
        let keeper = diagnosis::keepers(paths).into_iter().map(|pid| ("keeper".to_owned(), pid));
        self.processes = keeper.chain(report.processes).map(|(name, pid)| Process { name, pid }).collect();
        // The guest's own words are newer than the events that were counted.
        let daemons = report.guest.as_ref().map(|guest| guest.daemons.clone()).unwrap_or(report.daemons);
        self.daemons = daemons.into_iter().map(Daemon::from).collect();
        self.guest = report.guest.map(Guest::from);
    }

    fn text(&self) -> String {
        let mut lines: Vec<(&str, String)> =
            vec![("profile", self.profile.clone()), ("state", self.state.to_owned())];
        lines.extend(self.problem.as_ref().map(|problem| ("problem", problem.clone())));
        if let Some(cpus) = self.cpus {
            lines.push(("resources", self.resources(cpus)));
        }
        lines.extend(self.acceleration.as_ref().map(|name| ("acceleration", acceleration(name))));
        lines.push((
            "docker",
            format!("unix://{} (context {})", self.docker_socket.display(), self.docker_context),
        ));
        if let Some(guest) = &self.guest {
            let up = span(guest.uptime_ms);
            lines.push(("guest", format!("agent {}, Linux {}, up {up}", guest.agent, guest.kernel)));
        }
        if !self.daemons.is_empty() {
            let daemons: Vec<String> = self.daemons.iter().map(Daemon::text).collect();
            lines.push(("daemons", daemons.join(", ")));
        }
        if !self.processes.is_empty() {
            let processes = self.processes.iter().map(|process| format!("{} {}", process.name, process.pid));
            lines.push(("processes", processes.collect::<Vec<_>>().join(", ")));
        }
        lines.extend(self.image.as_ref().map(|image| ("image", image.display().to_string())));
        lines.push(("settings", self.profile_file.display().to_string()));
        pairs(&lines)
    }

    fn resources(&self, cpus: u32) -> String {
        let free =
            |free: Option<u64>| free.map(|free| format!(" ({} free)", bytes(free))).unwrap_or_default();
        let guest = self.guest.as_ref();
        format!(
            "{cpus} {}, {} memory{}, {} disk{}",
            if cpus == 1 { "CPU" } else { "CPUs" },
            mib(self.memory_mib.unwrap_or_default()),
            free(guest.map(|guest| guest.memory_available)),
            mib(self.disk_gib.unwrap_or_default() << 10),
            free(guest.map(|guest| guest.disk_available)),
        )
    }
}

fn acceleration(name: &str) -> String {
    if name == "tcg" { "tcg (emulation: slow)".to_owned() } else { name.to_owned() }
}

impl From<DaemonStatus> for Daemon {
    fn from(status: DaemonStatus) -> Self {
        let (state, reason) = match status.state {
            DaemonState::Starting => ("starting", None),
            DaemonState::Ready => ("ready", None),
            DaemonState::BackingOff => ("backing-off", None),
            DaemonState::Stopped => ("stopped", None),
            DaemonState::Failed(reason) => ("failed", Some(reason)),
        };
        Self { name: status.name, state, reason, restarts: status.restarts }
    }
}

impl Daemon {
    fn text(&self) -> String {
        let mut text = format!("{} {}", self.name, self.state);
        if let Some(reason) = &self.reason {
            text.push_str(&format!(" ({reason})"));
        }
        if self.restarts > 0 {
            text.push_str(&format!(" after {} restarts", self.restarts));
        }
        text
    }
}

impl From<GuestInfo> for Guest {
    fn from(info: GuestInfo) -> Self {
        Self {
            agent: info.agent,
            kernel: info.kernel,
            uptime_ms: info.uptime_ms,
            memory_total: info.memory.0,
            memory_available: info.memory.1,
            disk_total: info.disk.0,
            disk_available: info.disk.1,
            mounts: info.mounts,
        }
    }
}
