//! `dhow shell`: a login shell, or a command, on a terminal in the guest.

use std::io::{self, IsTerminal};

use super::errors::CommandError;
use super::{exec, session};
use crate::config::Paths;

const HELP: &str = "\
With a terminal on standard input and output the guest gives it one, too; otherwise the shell reads its
commands from standard input. It begins in this folder where that is shared, else in the home.

Examples:
  dhow shell
  dhow shell htop
  echo 'docker ps | wc -l' | dhow shell";

/// Open a shell in the VM.
#[derive(Debug, clap::Args)]
#[command(visible_alias = "sh", after_long_help = HELP)]
pub struct Args {
    /// User in the VM [default: root]
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,
    /// Folder in the VM to begin in [default: this folder where it is shared, else the home]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// A command instead of the user's login shell
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Runs the command.
///
/// # Errors
/// As [`CommandError`] says.
pub async fn run(args: Args, paths: &Paths) -> Result<u8, CommandError> {
    let tty = io::stdin().is_terminal() && io::stdout().is_terminal();
    let start = exec::start(paths, args.command, tty, args.workdir, Vec::new(), args.user).await?;
    session::run(paths, start, true).await
}
