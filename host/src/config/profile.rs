//! The settings of a profile, checked: what the rest of Dhow works with.

use std::path::{Path, PathBuf};

use super::file::RawProfile;
use super::{ConfigError, MountSpec, Paths, ProfileName, Subnets, mounts, passages, size, subnets};
use crate::forward::rules::Passages;

/// Least memory that dockerd and the system come up in, in MiB.
const MEMORY_MIN: u64 = 512;
/// Largest data disk, in GiB (64 TiB: what one ext4 is tested with).
const DISK_MAX: u64 = 64 << 10;
const CPUS: u32 = 2;
const MEMORY: &str = "2GiB";
const DISK: &str = "100GiB";

/// How the guest's code is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Acceleration {
    /// KVM where a guest makes progress under it, else TCG.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Emulation.
    Tcg,
}

impl Acceleration {
    /// As in the profile file.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// A profile's settings, checked against this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// Its name.
    pub name: ProfileName,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Size of the data disk in GiB.
    pub disk_gib: u64,
    /// Shares; a folder comes before what lies in it.
    pub mounts: Vec<MountSpec>,
    /// Folder of the system image; the newest one in the data folder where absent.
    pub image: Option<PathBuf>,
    /// Make the docker context current at start.
    pub activate: bool,
    /// How the guest's code is run.
    pub acceleration: Acceleration,
    /// Environment of the guest's daemons and commands.
    pub environment: Vec<(String, String)>,
    /// Ports and sockets between host and guest.
    pub passages: Passages,
    /// Networks of the VM and of docker.
    pub subnets: Subnets,
    /// Lead a socket of the guest to the host's ssh-agent.
    pub forward_agent: bool,
}

/// What this machine has, and where the user's home is.
#[derive(Debug, Clone)]
pub(super) struct Host {
    pub cpus: u32,
    pub memory_mib: u64,
    pub home: Option<PathBuf>,
}

impl Host {
    pub fn current() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, |count| count.get() as u32);
        // Where the kernel does not tell, no size is refused for it.
        let memory_mib = nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |info| info.ram_total() >> 20);
        Self {
            cpus,
            memory_mib,
            home: std::env::var_os("HOME").map(PathBuf::from).filter(|home| home.is_absolute()),
        }
    }
}

impl Profile {
    /// The settings in the profile's file, and defaults for what it does not say.
    ///
    /// # Errors
    /// As [`ConfigError`] says.
    pub fn load(name: &ProfileName, paths: &Paths) -> Result<Self, ConfigError> {
        let raw = RawProfile::read(&paths.profile_file())?.unwrap_or_default();
        Self::resolve(name, paths, raw, &Host::current())
    }

    pub(super) fn resolve(
        name: &ProfileName,
        paths: &Paths,
        raw: RawProfile,
        host: &Host,
    ) -> Result<Self, ConfigError> {
        let own = paths.own_dirs();
        let home = host.home.as_deref();
        let given = raw.mounts.unwrap_or_else(|| vec!["~".to_owned()]);
        let mounts: Result<Vec<_>, _> = given.iter().map(|text| mounts::resolve(text, home, &own)).collect();
        Ok(Self {
            name: name.clone(),
            cpus: cpus(raw.cpus, host)?,
            memory_mib: memory(raw.memory.as_deref(), host)?,
            disk_gib: disk(raw.disk.as_deref(), &paths.disk())?,
            mounts: mounts::arrange(mounts?)?,
            image: raw.image.map(|path| image(&path, home)).transpose()?,
            activate: raw.activate.unwrap_or(true),
            acceleration: raw.acceleration.unwrap_or_default(),
            environment: environment(raw.environment)?,
            passages: passages::resolve(&raw.forwards, &raw.sockets, &raw.host_ports, home)?,
            subnets: subnets::resolve(raw.subnet.as_deref(), raw.docker_subnet.as_deref())?,
            forward_agent: raw.forward_agent.unwrap_or(false),
        })
    }
}

fn value(setting: &'static str, problem: String, hint: &str) -> ConfigError {
    ConfigError::Value { setting, problem, hint: hint.to_owned() }
}

fn cpus(raw: Option<i64>, host: &Host) -> Result<u32, ConfigError> {
    let Some(wanted) = raw else { return Ok(CPUS.min(host.cpus)) };
    match u32::try_from(wanted) {
        Ok(count) if (1..=host.cpus).contains(&count) => Ok(count),
        _ => Err(value(
            "cpus",
            format!("{wanted} CPUs were asked for and this host has {}", host.cpus),
            &format!("choose 1 to {}", host.cpus),
        )),
    }
}

fn memory(raw: Option<&str>, host: &Host) -> Result<u64, ConfigError> {
    let mib = size::mib("memory", raw.unwrap_or(MEMORY))?;
    if mib < MEMORY_MIN {
        let problem = format!("{} is below the {MEMORY_MIN}MiB that Docker needs", size::display(mib));
        return Err(value("memory", problem, "choose at least 512MiB, better 2GiB"));
    }
    if mib > host.memory_mib {
        let problem = format!("{} is more than this host's {}MiB", size::display(mib), host.memory_mib);
        return Err(value("memory", problem, "choose less: the host's other programs need some, too"));
    }
    Ok(mib)
}

fn disk(raw: Option<&str>, file: &Path) -> Result<u64, ConfigError> {
    let mib = size::mib("disk", raw.unwrap_or(DISK))?;
    let gib = mib >> 10;
    if !mib.is_multiple_of(1 << 10) || gib == 0 {
        let problem = format!("{} is not a whole number of GiB", size::display(mib));
        return Err(value(
            "disk",
            problem,
            "choose at least 1GiB; the file is sparse, so unused space costs nothing",
        ));
    }
    if gib > DISK_MAX {
        let problem = format!("{gib}GiB is above the limit of {DISK_MAX}GiB");
        return Err(value("disk", problem, "choose a smaller disk; it can grow later"));
    }
    let there = file.metadata().map_or(0, |meta| meta.len()).div_ceil(1 << 30);
    if gib < there {
        let problem =
            format!("{gib}GiB is smaller than the disk that is there, {there}GiB; a disk only grows");
        let hint = format!(
            "keep {there}GiB or more; `dhow delete --data` removes the disk and all images and volumes on it"
        );
        return Err(value("disk", problem, &hint));
    }
    Ok(gib)
}

fn image(path: &Path, home: Option<&Path>) -> Result<PathBuf, ConfigError> {
    let path = match (path.strip_prefix("~"), home) {
        (Ok(below), Some(home)) => home.join(below),
        _ => path.to_owned(),
    };
    let hint = "it is the folder that `make image` made; leave it out to use the newest one installed";
    match path.canonicalize() {
        Ok(path) if path.is_dir() => Ok(path),
        Ok(path) => Err(value("image", format!("{} is no folder", path.display()), hint)),
        Err(error) => Err(value("image", format!("{}: {error}", path.display()), hint)),
    }
}

fn environment(raw: Vec<(String, String)>) -> Result<Vec<(String, String)>, ConfigError> {
    let good = |name: &str| {
        name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            && name.bytes().next().is_some_and(|byte| !byte.is_ascii_digit())
    };
    for (name, content) in &raw {
        if !good(name) {
            let problem = format!("{name:?} cannot be a variable's name");
            return Err(value(
                "env",
                problem,
                "use letters, digits and underscores, not beginning with a digit",
            ));
        }
        if content.contains('\0') {
            return Err(value("env", format!("the value of {name} holds a NUL character"), "remove it"));
        }
    }
    Ok(raw)
}

#[cfg(test)]
#[path = "profile_tests.rs"]
mod tests;
