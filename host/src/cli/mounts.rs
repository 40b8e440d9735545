//! `dhow mounts`: the shared folders and how they are.

use std::path::PathBuf;

use serde::Serialize;

use super::errors::CommandError;
use super::output::{print, print_json, table};
use super::{Format, client};
use crate::api::{ApiReply, ApiRequest, MountReport};
use crate::config::Paths;

const HELP: &str = "\
JSON: one array of objects: `path` (on host and guest), `read_only`, `mounted`, `problem`.

Examples:
  dhow mounts
  dhow mounts --json | jq -r '.[].path'";

/// List the host folders that the VM sees.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, Serialize)]
struct Entry {
    path: PathBuf,
    read_only: bool,
    mounted: bool,
    problem: Option<String>,
}

impl From<MountReport> for Entry {
    fn from(report: MountReport) -> Self {
        let MountReport { path, read_only, mounted, problem } = report;
        Self { path, read_only, mounted, problem }
    }
}

impl Entry {
    fn row(&self) -> Vec<String> {
        vec![
            self.path.display().to_string(),
            if self.read_only { "read-only" } else { "writable" }.to_owned(),
            if self.mounted { "mounted" } else { "not mounted" }.to_owned(),
            self.problem.clone().unwrap_or_default(),
        ]
    }
}

/// Runs the command.
///
/// # Errors
/// As [`CommandError`] says.
pub async fn run(args: Args, paths: &Paths) -> Result<u8, CommandError> {
    let ApiReply::Mounts(reports) = client::ask(paths, &ApiRequest::Mounts).await? else {
        return Err(CommandError::Kind);
    };
    let entries: Vec<Entry> = reports.into_iter().map(Entry::from).collect();
    if args.format.json {
        print_json(&entries)?;
    } else {
        let rows: Vec<_> = entries.iter().map(Entry::row).collect();
        print(&table(&["PATH", "MODE", "STATE", "PROBLEM"], &rows))?;
    }
    Ok(0)
}
