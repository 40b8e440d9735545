//! One file a command: arguments → call → what a person or `--json` sees.
//!
//! `client.rs` speaks with the supervisor, `session.rs` with a command in the guest; `progress.rs`,
//! `output.rs`, `terminal.rs` and `signals.rs` are the user's side, `errors.rs` what failed and what
//! to do. `internal.rs` has the processes that Dhow starts of itself.

mod client;
mod delete;
mod diagnosis;
mod errors;
mod exec;
mod internal;
mod list;
mod logging;
mod logs;
mod mounts;
mod output;
mod ports;
mod progress;
mod restart;
mod session;
mod shell;
mod signals;
mod start;
mod status;
mod stop;
mod terminal;
mod version;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

use crate::config::{Paths, ProfileName};
use errors::CommandError;

/// Names the profile where `--profile` does not.
const PROFILE_VARIABLE: &str = "DHOW_PROFILE";

const AFTER_HELP: &str = "\
Exit status: 0 success, 1 failure, 2 wrong usage; `exec` and `shell` pass on the command's own,
128 + N where signal N ended it. `status` is 0 only while the VM runs well.

Environment: DHOW_PROFILE names the profile, DHOW_HOME a folder for all that Dhow keeps,
DHOW_LOG the level of its logs (error, warn, info, debug, trace; default info).";

const EXAMPLES: &str = "\
Examples:
  dhow start                              the default VM: 2 CPUs, 2 GiB, your home shared
  docker run --rm hello-world             docker just works: the context is `dhow`
  dhow start --cpus 4 --memory 8GiB       settings are kept in the profile's file
  dhow -p work start --mount ~/src:ro     a second VM
  dhow exec uname -a                      a command in the VM
  dhow stop";

/// Docker in a small Linux VM that feels local.
#[derive(Debug, Parser)]
#[command(name = "dhow", version, about, after_help = AFTER_HELP, after_long_help = format!("{EXAMPLES}\n\n{AFTER_HELP}"))]
#[command(disable_help_subcommand = true, subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    /// The VM to work with: a named set of settings and data [default: $DHOW_PROFILE, else "default"]
    #[arg(short, long, global = true, value_name = "NAME", value_parser = profile_name)]
    profile: Option<ProfileName>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Start(start::Args),
    Stop(stop::Args),
    Restart(restart::Args),
    Delete(delete::Args),
    Status(status::Args),
    List(list::Args),
    Exec(exec::Args),
    Shell(shell::Args),
    Logs(logs::Args),
    Ports(ports::Args),
    Mounts(mounts::Args),
    Version(version::Args),
    #[command(flatten)]
    Internal(internal::Command),
}

/// Whether a command prints for a person or for a script.
#[derive(Debug, Clone, Copy, clap::Args)]
struct Format {
    /// Print JSON, one document a line, for scripts; keys are only ever added [default: text]
    #[arg(long)]
    json: bool,
}

fn profile_name(text: &str) -> Result<ProfileName, String> {
    text.parse().map_err(|error: crate::config::ConfigError| match error.hint() {
        Some(hint) => format!("{error}: {hint}"),
        None => error.to_string(),
    })
}

/// Runs one command and returns the process's exit status. What failed has been printed.
#[must_use]
pub fn run(cli: Cli) -> u8 {
    let profile = match cli.profile.map_or_else(profile_of_environment, Ok) {
        Ok(profile) => profile,
        Err(problem) => {
            let message = format!("{PROFILE_VARIABLE}: {problem}\n");
            let error = Cli::command().error(ErrorKind::ValueValidation, message);
            let _ = error.print();
            return u8::try_from(error.exit_code()).unwrap_or(2);
        }
    };
    let outcome = match cli.command {
        Command::Internal(command) => return internal::run(command),
        command => run_command(command, &profile),
    };
    match outcome {
        Ok(status) => status,
        Err(error) => {
            if !error.is_silent() {
                report(&error);
            }
            error.status()
        }
    }
}

fn profile_of_environment() -> Result<ProfileName, String> {
    match std::env::var_os(PROFILE_VARIABLE).filter(|name| !name.is_empty()) {
        Some(name) => profile_name(&name.to_string_lossy()),
        None => Ok(ProfileName::default()),
    }
}

fn run_command(command: Command, profile: &ProfileName) -> Result<u8, CommandError> {
    logging::for_command();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| CommandError::system("begin", source))?;
    let outcome = runtime.block_on(async {
        let paths = Paths::new(profile)?;
        match command {
            Command::Start(args) => start::run(args, &paths).await,
            Command::Stop(args) => stop::run(args, &paths).await,
            Command::Restart(args) => restart::run(args, &paths).await,
            Command::Delete(args) => delete::run(args, &paths).await,
            Command::Status(args) => status::run(args, &paths).await,
            Command::List(args) => list::run(args).await,
            Command::Exec(args) => exec::run(args, &paths).await,
            Command::Shell(args) => shell::run(args, &paths).await,
            Command::Logs(args) => logs::run(args, &paths).await,
            Command::Ports(args) => ports::run(args, &paths).await,
            Command::Mounts(args) => mounts::run(args, &paths).await,
            Command::Version(args) => version::run(args, &paths).await,
            Command::Internal(command) => Ok(internal::run(command)),
        }
    });
    // A thread that waits for standard input must not keep the process.
    runtime.shutdown_background();
    outcome
}

/// The one place where an error is printed: what happened with its causes, then what to do.
fn report(error: &CommandError) {
    let message = output::escape_lines(&crate::errors::chain(error));
    output::say(&format!("dhow: {message}"));
    if let Some(hint) = error.hint() {
        output::say(&format!("hint: {}", output::escape_lines(&hint)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound_and_every_option_says_its_default() {
        let command = Cli::command();
        command.clone().debug_assert();
        let mut count = 0;
        let own = command.get_arguments();
        for argument in command
            .get_subcommands()
            .filter(|sub| !sub.is_hide_set())
            .flat_map(|sub| sub.get_arguments())
            .chain(own)
        {
            let Some(long) = argument.get_long() else { continue };
            let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("[default: "), "--{long}: {help}");
            count += 1;
        }
        assert!(count > 20, "{count}");
    }
}
