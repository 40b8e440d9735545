//! `dhow delete`: a profile's settings, logs and context go; its data disk only where that is asked for.

use std::io::{self, BufRead, IsTerminal};
use std::path::Path;

use rustix::fs::FlockOperation;

use super::errors::{CommandError, invocation};
use super::output::{bytes, escape, print, say};
use super::{client, stop};
use crate::config::Paths;
use crate::{docker, supervisor};

const EXAMPLES: &str = "\
Removed are the profile's settings, logs, sockets and docker context. The data disk with all images
and volumes stays unless --data is given; `dhow start` finds it again.

Examples:
  dhow delete                       asks first
  dhow -p work delete --force       does not
  dhow delete --data                and everything that Docker has stored";

/// Delete a profile; a VM that runs is stopped first.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Remove the data disk, too: images, volumes, the guest's home [default: keep it]
    #[arg(short, long)]
    data: bool,
    /// Do not ask; a profile that is not there is no error then [default: ask]
    #[arg(short, long)]
    force: bool,
}

/// Runs the command.
///
/// # Errors
/// As [`CommandError`] says.
pub async fn run(args: Args, paths: &Paths) -> Result<u8, CommandError> {
    let profile = paths.profile();
    let running = client::connect(paths).await?.is_some();
    let exists =
        [paths.profile_file().as_path(), paths.data_dir(), paths.run_dir()].iter().any(|path| path.exists());
    if !running && !exists {
        if args.force {
            return Ok(0);
        }
        return Err(CommandError::NoProfile(profile.clone()));
    }
    if !args.force && !confirmed(paths, args.data, running)? {
        say("nothing was deleted");
        return Ok(1);
    }
    if running {
        // Its disk is removed or left alone: either way the guest should have finished with it.
        stop::take_down(paths, false).await?;
    }
    let _lock = lock(paths)?;
    if paths.data_dir().exists() {
        for notice in docker::remove(profile.as_str(), &supervisor::context_file(paths)).await {
            say(&format!("notice: {}", escape(&notice)));
        }
    }
    remove_file(&paths.profile_file())?;
    if args.data {
        remove_folder(paths.data_dir())?;
    } else {
        remove_folder(&paths.log_dir())?;
        remove_folder(&paths.state_dir())?;
        // Empty where there never was a disk.
        let _ = std::fs::remove_dir(paths.data_dir());
    }
    remove_folder(paths.run_dir())?;
    let disk = paths.disk();
    let kept =
        if disk.exists() { format!(" Its data disk is kept: {}", disk.display()) } else { String::new() };
    print(&format!("Profile {profile} is deleted.{kept}\n"))?;
    Ok(0)
}

fn confirmed(paths: &Paths, data: bool, running: bool) -> Result<bool, CommandError> {
    let profile = paths.profile();
    if !io::stdin().is_terminal() {
        return Err(CommandError::other(
            format!("nobody can be asked whether to delete profile {profile}: standard input is no terminal"),
            format!("`{} delete --force` deletes without asking", invocation(profile)),
        ));
    }
    let stops = if running { "is running and will be stopped; it " } else { "" };
    let disk = match (data, used(&paths.disk())) {
        (_, None) => String::new(),
        (true, Some(used)) => {
            format!(" Its data disk with {} of images and volumes IS REMOVED, too.", bytes(used))
        }
        (false, Some(used)) => format!(" Its data disk ({}) is kept.", bytes(used)),
    };
    say(&format!("Profile {profile} {stops}loses its settings and logs.{disk}"));
    let _ = super::output::write_all(std::os::fd::AsFd::as_fd(&io::stderr()), b"Delete it? [y/N] ");
    let mut answer = String::new();
    io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(|source| CommandError::system("read the answer", source))?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

/// Bytes that a sparse file takes on the host's disk.
fn used(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    Some(path.metadata().ok()?.blocks() * 512)
}

/// Takes the locks that a keeper and QEMU hold, where their files are there: nobody may start, or
/// still write, what is being deleted.
fn lock(paths: &Paths) -> Result<Vec<std::fs::File>, CommandError> {
    let mut locked = Vec::new();
    for path in [paths.keeper_lock(), paths.disk()] {
        let file = match std::fs::File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(CommandError::system(format!("open {}", path.display()), source)),
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => locked.push(file),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(CommandError::other(
                    format!("{} is in use by another process", path.display()),
                    "another command may be starting the VM, or a VM was left behind (`pgrep -af qemu`); end it first",
                ));
            }
            Err(error) => return Err(CommandError::system(format!("lock {}", path.display()), error)),
        }
    }
    Ok(locked)
}

fn absent_is_fine(result: io::Result<()>, path: &Path) -> Result<(), CommandError> {
    match result {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(CommandError::system(format!("remove {}", path.display()), source))
        }
        _ => Ok(()),
    }
}

fn remove_file(path: &Path) -> Result<(), CommandError> {
    absent_is_fine(std::fs::remove_file(path), path)
}

fn remove_folder(path: &Path) -> Result<(), CommandError> {
    absent_is_fine(std::fs::remove_dir_all(path), path)
}
