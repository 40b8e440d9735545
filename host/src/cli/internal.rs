//! The processes that Dhow starts of itself: hidden commands, whose errors go to their logs.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use clap::Subcommand;

use super::{logging, profile_name};
use crate::config::ProfileName;
use crate::fileserver::{self, FileServerArgs};
use crate::vsock::device::{self, DeviceArgs};
use crate::{keeper, supervisor};

/// The guest's CID. Each profile has its own device, so that all can have the first one there is.
const GUEST_CID: u64 = 3;

/// Processes of a profile. Their fds come by name from the keeper.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Parent of a profile's processes
    #[command(hide = true)]
    Keeper {
        /// The profile
        #[arg(value_parser = profile_name)]
        name: ProfileName,
        /// Take over a VM that runs, start none
        #[arg(long)]
        adopt_only: bool,
    },
    /// Policy of a profile
    #[command(hide = true)]
    Supervisor {
        /// The profile
        #[arg(value_parser = profile_name)]
        name: ProfileName,
        /// Take over a VM that runs, start none
        #[arg(long)]
        adopt_only: bool,
    },
    /// vhost-user device of a profile
    #[command(hide = true)]
    VsockDevice {
        /// The profile, for `ps`
        #[arg(value_parser = profile_name)]
        name: ProfileName,
    },
    /// Server of one shared folder
    #[command(hide = true)]
    FileServer {
        /// The folder
        path: PathBuf,
        /// Refuse every change
        #[arg(long)]
        read_only: bool,
        /// A folder that the guest may not see
        #[arg(long, value_name = "PATH")]
        mask: Vec<PathBuf>,
    },
}

/// Runs one and returns the process's exit status.
pub fn run(command: Command) -> u8 {
    logging::for_process();
    let outcome: Result<(), Box<dyn Error>> = match command {
        Command::Keeper { name, adopt_only } => keeper::main(&name, adopt_only).map_err(Into::into),
        Command::Supervisor { name, adopt_only } => supervisor::main(&name, adopt_only).map_err(Into::into),
        Command::VsockDevice { .. } => vsock_device(),
        Command::FileServer { path, read_only, mask } => file_server(path, read_only, mask),
    };
    match outcome {
        Ok(()) => 0,
        Err(error) => {
            tracing::error!(error = crate::errors::chain(error.as_ref()), "ending");
            1
        }
    }
}

fn missing(name: &str) -> io::Error {
    io::Error::other(format!("no fd named {name} was handed over: this command is Dhow's own"))
}

fn vsock_device() -> Result<(), Box<dyn Error>> {
    let mut fds = dhow_parent::inherited_fds()?;
    let mut take = |name| fds.remove(name).ok_or_else(|| missing(name));
    let (vhost_listener, control_listener) = (take("vhost")?, take("control")?);
    Ok(device::run(DeviceArgs { vhost_listener, control_listener, guest_cid: GUEST_CID })?)
}

fn file_server(root: PathBuf, read_only: bool, masked: Vec<PathBuf>) -> Result<(), Box<dyn Error>> {
    let control = dhow_parent::inherited_fds()?.remove("control").ok_or_else(|| missing("control"))?;
    Ok(fileserver::run(FileServerArgs { root, read_only, masked, control })?)
}
