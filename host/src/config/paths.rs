//! Where everything lies, resolved for one profile.
//!
//! ```text
//!            DHOW_HOME set     otherwise
//! settings   config/           XDG_CONFIG_HOME/dhow   profiles/NAME.toml
//! data       data/             XDG_DATA_HOME/dhow     images/  profiles/NAME/{disk.raw,log,state}
//! cache      cache/            XDG_CACHE_HOME/dhow
//! run        run/              XDG_RUNTIME_DIR/dhow   NAME/*.sock, keeper.lock
//! ```

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::{ConfigError, ProfileName};

/// Bytes that a unix socket's path may have: `sun_path` of 108, less the NUL.
const SOCKET_LIMIT: usize = 107;

/// Files and folders of one profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    profile: ProfileName,
    bases: Bases,
    run: PathBuf,
    data: PathBuf,
}

/// The four folders below which all of Dhow's files lie.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Bases {
    config: PathBuf,
    data: PathBuf,
    cache: PathBuf,
    run: PathBuf,
}

impl Bases {
    fn from_environment() -> Result<Self, ConfigError> {
        let uid = rustix::process::geteuid().as_raw();
        Self::resolve(&|name| std::env::var_os(name).map(PathBuf::from), uid, Path::new("/run/user"))
    }

    fn resolve(
        var: &dyn Fn(&str) -> Option<PathBuf>,
        uid: u32,
        run_user: &Path,
    ) -> Result<Self, ConfigError> {
        if let Some(home) = var("DHOW_HOME").filter(|path| !path.as_os_str().is_empty()) {
            let home = std::path::absolute(&home).map_err(|source| ConfigError::Io {
                action: "resolve",
                path: home,
                source,
            })?;
            let at = |name| home.join(name);
            return Ok(Self { config: at("config"), data: at("data"), cache: at("cache"), run: at("run") });
        }
        // XDG base directories: "If an implementation encounters a relative path ... it should
        // consider the path invalid and ignore it."
        let absolute = |name: &str| var(name).filter(|path| path.is_absolute());
        let xdg = |what, variable, below: &str| {
            absolute(variable)
                .or_else(|| absolute("HOME").map(|home| home.join(below)))
                .map(|base| base.join("dhow"))
                .ok_or(ConfigError::NoFolder { what, variable })
        };
        let ours = |path: &PathBuf| path.metadata().is_ok_and(|meta| meta.is_dir() && meta.uid() == uid);
        let run = absolute("XDG_RUNTIME_DIR")
            .or_else(|| Some(run_user.join(uid.to_string())).filter(ours))
            .map_or_else(|| PathBuf::from(format!("/tmp/dhow-{uid}")), |base| base.join("dhow"));
        Ok(Self {
            config: xdg("the settings", "XDG_CONFIG_HOME", ".config")?,
            data: xdg("the data", "XDG_DATA_HOME", ".local/share")?,
            cache: xdg("the cache", "XDG_CACHE_HOME", ".cache")?,
            run,
        })
    }
}

impl Paths {
    /// The paths of `profile`; nothing is made yet.
    ///
    /// # Errors
    /// When no place can be told, or the run folder is there and not safely ours.
    pub fn new(profile: &ProfileName) -> Result<Self, ConfigError> {
        Self::below(profile, Bases::from_environment()?)
    }

    fn below(profile: &ProfileName, bases: Bases) -> Result<Self, ConfigError> {
        check_private(&bases.run)?;
        let run = bases.run.join(profile.as_str());
        let data = bases.data.join("profiles").join(profile.as_str());
        Ok(Self { profile: profile.clone(), bases, run, data })
    }

    /// All of Dhow below one folder, as with `DHOW_HOME`.
    #[cfg(test)]
    pub(crate) fn at(home: &Path, profile: &ProfileName) -> Result<Self, ConfigError> {
        let home = Some(home.to_owned());
        let bases = Bases::resolve(
            &|name| home.clone().filter(|_| name == "DHOW_HOME"),
            rustix::process::geteuid().as_raw(),
            Path::new("/nonexistent"),
        )?;
        Self::below(profile, bases)
    }

    /// The profile that these are the paths of.
    #[must_use]
    pub fn profile(&self) -> &ProfileName {
        &self.profile
    }

    /// Sockets and locks of the profile; 0700.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        &self.run
    }

    /// The profile's data.
    #[must_use]
    pub fn data_dir(&self) -> &Path {
        &self.data
    }

    /// The profile's settings.
    #[must_use]
    pub fn profile_file(&self) -> PathBuf {
        self.bases.config.join("profiles").join(format!("{}.toml", self.profile))
    }

    /// Where `dhow` commands reach the supervisor.
    #[must_use]
    pub fn api_socket(&self) -> PathBuf {
        self.run.join("api.sock")
    }

    /// Where docker's CLI reaches the guest's dockerd.
    #[must_use]
    pub fn docker_socket(&self) -> PathBuf {
        self.run.join("docker.sock")
    }

    /// Where QEMU reaches the vsock device (vhost-user).
    #[must_use]
    pub fn device_socket(&self) -> PathBuf {
        self.run.join("device.sock")
    }

    /// Where the supervisor hands fds to the vsock device.
    #[must_use]
    pub fn device_control_socket(&self) -> PathBuf {
        self.run.join("device-control.sock")
    }

    /// QEMU's monitor.
    #[must_use]
    pub fn qmp_socket(&self) -> PathBuf {
        self.run.join("qmp.sock")
    }

    /// Where QEMU reaches passt.
    #[must_use]
    pub fn passt_socket(&self) -> PathBuf {
        self.run.join("passt.sock")
    }

    /// Locked (flock) as long as a keeper lives.
    #[must_use]
    pub fn keeper_lock(&self) -> PathBuf {
        self.run.join("keeper.lock")
    }

    /// The data disk.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.data.join("disk.raw")
    }

    /// Logs of the host's processes: `NAME.log`.
    #[must_use]
    pub fn log_dir(&self) -> PathBuf {
        self.data.join("log")
    }

    /// What the supervisor remembers over a restart.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.data.join("state")
    }

    /// System images, shared by all profiles.
    #[must_use]
    pub fn images_dir(&self) -> PathBuf {
        self.bases.data.join("images")
    }

    /// What can be made again.
    #[must_use]
    pub fn cache_dir(&self) -> PathBuf {
        self.bases.cache.clone()
    }

    /// All of Dhow's own folders, to be masked in shares, with symlinks resolved where they exist.
    #[must_use]
    pub fn own_dirs(&self) -> Vec<PathBuf> {
        let Bases { config, data, cache, run } = &self.bases;
        [config, data, cache, run]
            .into_iter()
            .map(|path| path.canonicalize().unwrap_or_else(|_| path.clone()))
            .collect()
    }

    /// Makes the folders with their modes.
    ///
    /// # Errors
    /// When a folder cannot be made or is not safely ours, or a socket's path is too long.
    pub fn create(&self) -> Result<(), ConfigError> {
        for socket in [self.device_control_socket(), self.docker_socket()] {
            let got = socket.as_os_str().len();
            if got > SOCKET_LIMIT {
                return Err(ConfigError::SocketPath { path: socket, got, limit: SOCKET_LIMIT });
            }
        }
        let profiles = self.bases.config.join("profiles");
        let (log, state, images, cache) =
            (self.log_dir(), self.state_dir(), self.images_dir(), self.cache_dir());
        for path in [&profiles, &self.data, &log, &state, &images, &cache, &self.bases.run, &self.run] {
            make_private(path)?;
        }
        check_private(&self.bases.run)?;
        check_private(&self.run)
    }
}

/// Profiles that have settings or data, in the order of their names.
///
/// # Errors
/// When the folders cannot be told or read.
pub fn list_profiles() -> Result<Vec<ProfileName>, ConfigError> {
    Bases::from_environment()?.profiles()
}

impl Bases {
    fn profiles(&self) -> Result<Vec<ProfileName>, ConfigError> {
        let mut names = std::collections::BTreeSet::new();
        for entry in entries(&self.config.join("profiles"))? {
            names.extend(entry.strip_suffix(".toml").and_then(|name| name.parse::<ProfileName>().ok()));
        }
        for entry in entries(&self.data.join("profiles"))? {
            names.extend(entry.parse::<ProfileName>().ok());
        }
        Ok(names.into_iter().collect())
    }
}

/// Names in a folder; none where it does not exist.
fn entries(folder: &Path) -> Result<Vec<String>, ConfigError> {
    let fail = |source| ConfigError::Io { action: "list", path: folder.to_owned(), source };
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(fail)?,
    };
    entries.map(|entry| Ok(entry.map_err(fail)?.file_name().to_string_lossy().into_owned())).collect()
}

fn make_private(path: &Path) -> Result<(), ConfigError> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| ConfigError::Io {
        action: "create",
        path: path.to_owned(),
        source,
    })
}

/// Passes when `path` is absent, or a real folder of ours that nobody else may enter.
fn check_private(path: &Path) -> Result<(), ConfigError> {
    let meta = match path.symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        meta => meta.map_err(|source| ConfigError::Io { action: "check", path: path.to_owned(), source })?,
    };
    let uid = rustix::process::geteuid().as_raw();
    let problem = if meta.is_symlink() {
        "it is a symbolic link".to_owned()
    } else if !meta.is_dir() {
        "it is no folder".to_owned()
    } else if meta.uid() != uid {
        format!("it belongs to user {}, and you are {uid}", meta.uid())
    } else if meta.mode() & 0o077 != 0 {
        format!("its mode {:03o} lets others in", meta.mode() & 0o777)
    } else {
        return Ok(());
    };
    Err(ConfigError::Unsafe { path: path.to_owned(), problem })
}

#[cfg(test)]
#[path = "paths_tests.rs"]
mod tests;
