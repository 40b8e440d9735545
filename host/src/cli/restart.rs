//! `dhow restart`: a stop and a start with the settings as they are in the profile's file.

use super::errors::CommandError;
use super::{start, stop};
use crate::config::{Overrides, Paths, save};

/// Stop the VM and start it again, with the settings as they are now.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:\n  dhow restart\n  dhow restart --force     where the guest hangs")]
pub struct Args {
    /// Do not wait for the guest to stop: as a power cut [default: wait]
    #[arg(short, long)]
    force: bool,
}

/// Runs the command.
///
/// # Errors
/// As [`CommandError`] says.
pub async fn run(args: Args, paths: &Paths) -> Result<u8, CommandError> {
    // A mistake in the settings must not cost the VM that runs.
    paths.create()?;
    let profile = save(paths, &Overrides::default())?;
    stop::take_down(paths, args.force).await?;
    start::bring_up(paths, &profile, false).await
}
