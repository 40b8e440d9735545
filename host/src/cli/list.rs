//! `dhow list`: all profiles and their states.

use serde::Serialize;
use tokio::task::JoinSet;

use super::errors::CommandError;
use super::output::{mib, print, print_json, say, table};
use super::status::{SILENT, state_name};
use super::{Format, client};
use crate::api::VmState;
use crate::config::{Paths, Profile, ProfileName, list_profiles};
use crate::docker::ContextName;

const HELP: &str = "\
JSON: one array of objects: `profile`, `state` (as in `dhow status`), `problem`, `cpus`, `memory_mib`,
`disk_gib`, `docker_socket`, `docker_context`, `settings` (false: only the data disk is left).

Examples:
  dhow list
  dhow list --json | jq -r '.[] | select(.state == \"running\") | .profile'";

/// List all profiles and their states.
#[derive(Debug, clap::Args)]
#[command(visible_alias = "ls", after_long_help = HELP)]
pub struct Args {
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, Serialize)]
struct Entry {
    profile: String,
    state: &'static str,
    problem: Option<String>,
    cpus: Option<u32>,
    memory_mib: Option<u64>,
    disk_gib: Option<u64>,
    docker_socket: std::path::PathBuf,
    docker_context: String,
    settings: bool,
}

/// Runs the command.
///
/// # Errors
/// As [`CommandError`] says.
pub async fn run(args: Args) -> Result<u8, CommandError> {
    // All at once: one that does not answer delays the list by its deadline, not each of them.
    let mut asking = JoinSet::new();
    for profile in list_profiles()? {
        asking.spawn(entry(profile));
    }
    let mut entries = Vec::new();
    while let Some(joined) = asking.join_next().await {
        let entry = joined.map_err(|error| CommandError::system("list", std::io::Error::other(error)))?;
        entries.push(entry?);
    }
    entries.sort_by(|a, b| a.profile.cmp(&b.profile));
    if args.format.json {
        print_json(&entries)?;
        return Ok(0);
    }
    if entries.is_empty() {
        say("there are no profiles yet; `dhow start` makes one");
        return Ok(0);
    }
    let rows: Vec<Vec<String>> = entries.iter().map(Entry::row).collect();
    print(&table(&["PROFILE", "STATE", "CPUS", "MEMORY", "DISK", "CONTEXT", "PROBLEM"], &rows))?;
    Ok(0)
}

async fn entry(name: ProfileName) -> Result<Entry, CommandError> {
    let paths = Paths::new(&name)?;
    let (profile, mut problem) = match Profile::load(&name, &paths) {
        Ok(profile) => (Some(profile), None),
        Err(error) => (None, Some(crate::errors::chain(&error))),
    };
    let mut resources = profile.map(|profile| (profile.cpus, profile.memory_mib, profile.disk_gib));
    let state = match client::status(&paths).await {
        Ok(Some(report)) => {
            if report.cpus > 0 {
                resources = Some((report.cpus, report.memory_mib, report.disk_gib));
            }
            problem = report.problem.or(problem);
            state_name(report.state)
        }
        Ok(None) | Err(CommandError::Gone) => state_name(VmState::Stopped),
        Err(error) => {
            problem = Some(crate::errors::chain(&error));
            SILENT
        }
    };
    Ok(Entry {
        profile: name.to_string(),
        state,
        problem,
        cpus: resources.map(|resources| resources.0),
        memory_mib: resources.map(|resources| resources.1),
        disk_gib: resources.map(|resources| resources.2),
        docker_socket: paths.docker_socket(),
        docker_context: ContextName::of_profile(name.as_str()).to_string(),
        settings: paths.profile_file().exists(),
    })
}

impl Entry {
    fn row(&self) -> Vec<String> {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        vec![
            self.profile.clone(),
            if self.settings {
                self.state.to_owned()
            } else {
                format!("{} (only its disk is left)", self.state)
            },
            or_dash(self.cpus.map(|cpus| cpus.to_string())),
            or_dash(self.memory_mib.map(mib)),
            or_dash(self.disk_gib.map(|gib| mib(gib << 10))),
            self.docker_context.clone(),
            // The rest is in `dhow status`.
            self.problem.as_deref().and_then(|problem| problem.lines().next()).unwrap_or_default().to_owned(),
        ]
    }
}
