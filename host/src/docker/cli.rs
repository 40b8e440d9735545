//! Runs the host's own `docker` command for what only it should write: its contexts.

use std::ffi::OsString;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// A docker CLI that takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(10);

/// Why `docker` did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum CliError {
    #[error("there is no `docker` command on this host")]
    Missing,
    #[error("the `docker` command cannot be run")]
    Run(#[source] std::io::Error),
    #[error("`docker {command}` did not end within {} s", DEADLINE.as_secs())]
    Deadline { command: String },
    #[error("`docker {command}` failed: {reason}")]
    Failed { command: String, reason: String },
}

/// The docker CLI and what differs in its environment.
#[derive(Debug, Clone)]
pub(super) struct DockerCli {
    program: OsString,
    environment: Vec<(&'static str, OsString)>,
}

impl DockerCli {
    /// The one that a user's shell would find.
    pub(super) fn of_user() -> Self {
        Self { program: "docker".into(), environment: Vec::new() }
    }

    #[cfg(test)]
    pub(super) fn for_test(program: &str, config: &std::path::Path) -> Self {
        Self { program: program.into(), environment: vec![("DOCKER_CONFIG", config.into())] }
    }

    /// Runs it and returns what it printed.
    pub(super) async fn run(&self, arguments: &[&str]) -> Result<String, CliError> {
        let mut command = Command::new(&self.program);
        // They override the current context, and this is about what lies under them.
        command.env_remove("DOCKER_HOST").env_remove("DOCKER_CONTEXT");
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        let shown = arguments.iter().take(2).copied().collect::<Vec<_>>().join(" ");
        let output = match tokio::time::timeout(DEADLINE, command.output()).await {
            Err(_) => return Err(CliError::Deadline { command: shown }),
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => return Err(CliError::Missing),
            Ok(Err(error)) => return Err(CliError::Run(error)),
            Ok(Ok(output)) => output,
        };
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
        }
        let reason = String::from_utf8_lossy(&output.stderr);
        let reason = reason.lines().find(|line| !line.trim().is_empty()).unwrap_or("no reason given");
        Err(CliError::Failed { command: shown, reason: reason.trim().to_owned() })
    }
}
