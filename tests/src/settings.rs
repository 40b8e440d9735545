//! Where the suite finds what it tests, from the environment or from where `make` puts it.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The files that every case needs; all are there once [`Settings::get`] has returned.
#[derive(Debug)]
pub struct Settings {
    /// The binary under test (`DHOW_BIN`); the agent lies beside it.
    pub dhow: PathBuf,
    /// Folder of the system image (`DHOW_IMAGE`).
    pub image: PathBuf,
    /// The static program for guest and containers (`DHOW_GUEST_TOOL`).
    pub guest_tool: PathBuf,
    /// A static busybox for container images (`DHOW_BUSYBOX`).
    pub busybox: PathBuf,
    /// fio and the libraries that it needs, a root folder (`DHOW_FIO`).
    pub fio: PathBuf,
    /// The docker CLI: that of the image's recipe, else of PATH.
    pub docker: PathBuf,
    /// The buildx plugin beside it, where there is one.
    pub buildx: Option<PathBuf>,
}

static SETTINGS: OnceLock<Settings> = OnceLock::new();

impl Settings {
    /// The settings of this run.
    ///
    /// # Panics
    /// With what is missing and how to make it: a suite that skips in silence tests nothing.
    pub fn get() -> &'static Self {
        SETTINGS.get_or_init(|| Self::find().unwrap_or_else(|missing| panic!("{missing}")))
    }

    fn find() -> Result<Self, String> {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("no workspace folder")?;
        let build = workspace.join("build");
        let image = there("DHOW_IMAGE", build.join("image"), Path::is_dir)?;
        let beside_image = |name: &str| {
            [&image, &build.join("image")]
                .map(|folder| folder.join(".cache/docker/cli").join(name))
                .into_iter()
                .find(|path| path.is_file())
        };
        let docker = beside_image("docker").or_else(|| in_path("docker")).ok_or_else(|| {
            "there is no docker CLI, neither beside the image nor in PATH: run `make test`, which builds the image"
                .to_owned()
        })?;
        Ok(Self {
            dhow: there("DHOW_BIN", build.join("bin/dhow"), Path::is_file)?,
            guest_tool: there("DHOW_GUEST_TOOL", build.join("bin/guest-tool"), Path::is_file)?,
            busybox: there("DHOW_BUSYBOX", build.join("hello/busybox"), Path::is_file)?,
            fio: there("DHOW_FIO", build.join("fio"), Path::is_dir)?,
            buildx: beside_image("docker-buildx"),
            docker,
            image,
        })
    }
}

fn there(variable: &str, otherwise: PathBuf, fits: fn(&Path) -> bool) -> Result<PathBuf, String> {
    let path = std::env::var_os(variable).map_or(otherwise, PathBuf::from);
    let path = std::path::absolute(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    if fits(&path) {
        Ok(path)
    } else {
        Err(format!("{} is missing: run `make test`, which makes it, or set {variable}", path.display()))
    }
}

/// The first `program` in PATH.
pub fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}
