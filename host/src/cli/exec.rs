//! `dhow exec`: a command in the guest as if it were one of the host.

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use dhow_protocol::exec::ExecStart;

use super::errors::CommandError;
use super::{client, session, terminal};
use crate::api::{ApiReply, ApiRequest, MountReport};
use crate::config::Paths;

const HELP: &str = "\
Standard input, output and error are apart, the exit status is the command's own (128 + N where
signal N ended it), and SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 are passed on; after the
third Ctrl-C this command leaves. The working folder is the host's where that is shared, else the
guest user's home.

Examples:
  dhow exec uname -a
  dhow exec -w /var/lib/docker -- du -sh .
  tar c . | dhow exec -- tar t
  dhow exec -t top
  dhow exec -e LANG=C -- sh -c 'echo $LANG'";

/// Run a command in the VM.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Accepted for docker's habits: standard input is passed on anyhow [default: it is]
    #[arg(short, long, conflicts_with = "no_stdin")]
    interactive: bool,
    /// Give the command no standard input; in loops that read their own [default: pass it on]
    #[arg(short, long)]
    no_stdin: bool,
    /// Give the command a terminal; standard input must be one [default: none]
    #[arg(short, long)]
    tty: bool,
    /// Folder in the VM to run it in [default: this folder where it is shared, else the home]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Variable for the command; NAME alone takes the host's value; once for each [default: none]
    #[arg(short, long, value_name = "NAME[=VALUE]", value_parser = variable)]
    env: Vec<(String, Option<String>)>,
    /// User in the VM to run it as [default: root]
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,
    /// The command and its arguments, exactly as they are: no shell reads them
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    command: Vec<String>,
}

fn variable(text: &str) -> Result<(String, Option<String>), String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, None),
    };
    if name.is_empty() {
        return Err("a variable needs a name: NAME=VALUE".to_owned());
    }
    Ok((name.to_owned(), value))
}

/// Runs the command.
///
/// # Errors
/// As [`CommandError`] says.
pub async fn run(args: Args, paths: &Paths) -> Result<u8, CommandError> {
    if args.tty && !io::stdin().is_terminal() {
        return Err(CommandError::other(
            "-t needs a terminal, and standard input is none",
            "leave -t out: the command then reads what comes in",
        ));
    }
    let env = args.env.into_iter().filter_map(|(name, value)| {
        // One that the host has not is none in the guest, as with docker.
        let value = value.or_else(|| std::env::var(&name).ok())?;
        Some((name, value))
    });
    let start = start(paths, args.command, args.tty, args.workdir, env.collect(), args.user).await?;
    session::run(paths, start, !args.no_stdin).await
}

/// What to ask the guest for, with the host's working folder where it is shared.
///
/// # Errors
/// When the supervisor does not tell the shares.
pub(super) async fn start(
    paths: &Paths,
    argv: Vec<String>,
    tty: bool,
    workdir: Option<String>,
    mut env: Vec<(String, String)>,
    user: Option<String>,
) -> Result<ExecStart, CommandError> {
    if tty && !env.iter().any(|(name, _)| name == "TERM") {
        env.extend(std::env::var("TERM").ok().map(|term| ("TERM".to_owned(), term)));
    }
    let here = match client::ask(paths, &ApiRequest::Mounts).await? {
        // A folder that was deleted is no folder to run in.
        ApiReply::Mounts(mounts) => std::env::current_dir().ok().and_then(|here| shared(&here, &mounts)),
        _ => return Err(CommandError::Kind),
    };
    let (cwd, cwd_optional) = match (workdir, here) {
        // A relative one is meant from this folder, where the guest has it.
        (Some(folder), Some(here)) => (here.join(folder).to_str().map(str::to_owned), false),
        (Some(folder), None) => (Some(folder), false),
        // Dhow's own folders are hidden in a share: then it is the home.
        (None, here) => (here.and_then(|here| here.to_str().map(str::to_owned)), true),
    };
    let tty = tty.then(terminal::size);
    Ok(ExecStart { argv, env, cwd, cwd_optional, tty, user })
}

/// `here`, where the guest sees it.
fn shared(here: &Path, mounts: &[MountReport]) -> Option<PathBuf> {
    mounts.iter().any(|mount| mount.mounted && here.starts_with(&mount.path)).then(|| here.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_shared_whole_components_at_a_time() {
        let mount =
            |path: &str, mounted| MountReport { path: path.into(), read_only: false, mounted, problem: None };
        let mounts = [mount("/home/me", true), mount("/srv", false)];
        assert_eq!(shared(Path::new("/home/me/x"), &mounts), Some("/home/me/x".into()));
        assert_eq!(shared(Path::new("/home/me"), &mounts), Some("/home/me".into()));
        assert_eq!(shared(Path::new("/home/mean"), &mounts), None);
        assert_eq!(shared(Path::new("/srv/x"), &mounts), None);
    }

    #[test]
    fn variables_have_names() {
        assert_eq!(variable("A=b=c").unwrap(), ("A".to_owned(), Some("b=c".to_owned())));
        assert_eq!(variable("A").unwrap(), ("A".to_owned(), None));
        assert!(variable("=x").is_err());
    }
}
