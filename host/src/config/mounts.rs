//! Shares as a person writes them: `PATH`, `PATH:ro`, `PATH:w`.

use std::path::{Path, PathBuf};

use super::ConfigError;

/// A host folder that the guest sees at the same path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountSpec {
    /// Canonical and absolute.
    pub path: PathBuf,
    /// Read-only for the guest.
    pub read_only: bool,
}

impl std::fmt::Display for MountSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = self.path.display();
        match self.read_only {
            true => write!(f, "{path}:ro"),
            // Says that the last `:ro` belongs to the name.
            false if split(&path.to_string()).1.is_some() => write!(f, "{path}:w"),
            false => write!(f, "{path}"),
        }
    }
}

/// Folders of the guest's system. A share that is one of them, or holds one, would hide it.
const SYSTEM: [&str; 21] = [
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/proc",
    "/run",
    "/sbin",
    "/sys",
    "/tmp",
    "/usr",
    "/usr/local/bin",
    "/usr/local/lib",
    "/usr/local/sbin",
    "/var/lib/containerd",
    "/var/lib/docker",
    "/var/lock",
    "/var/log",
    "/var/run",
];
/// Folders of the guest below which nothing of the host has a place either.
const SYSTEM_TREES: [&str; 10] =
    ["/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/run", "/sbin", "/sys"];

/// The path and, where its last `:` begins a mode, whether that is read-only.
fn split(text: &str) -> (&str, Option<bool>) {
    match text.rsplit_once(':') {
        Some((path, "ro")) if !path.is_empty() => (path, Some(true)),
        Some((path, "w" | "rw")) if !path.is_empty() => (path, Some(false)),
        _ => (text, None),
    }
}

/// Resolves one share. `home` replaces a leading `~`; `own` are Dhow's folders.
///
/// # Errors
/// [`ConfigError::Mount`] when it is not there, is no folder, or has no place in the guest.
pub(super) fn resolve(text: &str, home: Option<&Path>, own: &[PathBuf]) -> Result<MountSpec, ConfigError> {
    let (mut name, mut mode) = split(text);
    // A folder that is really called `x:ro`, and no `x`: the name is meant.
    if mode.is_some() && !expand(name, home).exists() && expand(text, home).is_dir() {
        (name, mode) = (text, None);
    }
    let given = expand(name, home);
    let fail = |problem: String, hint: &str| {
        Err(ConfigError::Mount { path: given.clone(), problem, hint: hint.to_owned() })
    };
    let path = match given.canonicalize() {
        Ok(path) => path,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            if let Some((before, mode)) = name.rsplit_once(':')
                && expand(before, home).exists()
            {
                return fail(
                    format!("{mode:?} is no mode"),
                    "write PATH, PATH:ro or PATH:w; the guest sees a folder at the path that it has on the host",
                );
            }
            return fail("it does not exist".to_owned(), "make the folder first, or correct the path");
        }
        Err(error) => return fail(error.to_string(), "it must be a folder that you may read"),
    };
    if !path.is_dir() {
        return fail("it is no folder".to_owned(), "share the folder that it is in");
    }
    if path.to_str().is_none() {
        return fail("its name is not UTF-8".to_owned(), "rename it, or share a folder above it");
    }
    if let Some(system) = SYSTEM.iter().find(|system| Path::new(system).starts_with(&path)) {
        return fail(
            format!("it would hide the guest's own {system}"),
            "share a folder below it that holds your files",
        );
    }
    if let Some(tree) = SYSTEM_TREES.iter().find(|tree| path.starts_with(tree)) {
        return fail(format!("the guest has a {tree} of its own"), "share a folder outside of it");
    }
    if let Some(own) = own.iter().find(|own| path.starts_with(own)) {
        return fail(
            format!("it lies in Dhow's own {}", own.display()),
            "share another folder; Dhow's own are hidden from the guest",
        );
    }
    Ok(MountSpec { path, read_only: mode.unwrap_or(false) })
}

/// `text` as an absolute path.
fn expand(text: &str, home: Option<&Path>) -> PathBuf {
    let path = match (text.strip_prefix('~'), home) {
        (Some(""), Some(home)) => home.to_owned(),
        (Some(rest), Some(home)) if rest.starts_with('/') => home.join(rest.trim_start_matches('/')),
        _ => PathBuf::from(text),
    };
    std::path::absolute(&path).unwrap_or(path)
}

/// Puts shares in the order of their paths, a folder before what lies in it, and drops doubles.
///
/// # Errors
/// The same folder in two modes, and a read-only share inside a writable one: the guest could
/// write to its files through the outer one.
pub(super) fn arrange(mut mounts: Vec<MountSpec>) -> Result<Vec<MountSpec>, ConfigError> {
    mounts.sort_by(|a, b| a.path.cmp(&b.path));
    let mut kept: Vec<MountSpec> = Vec::with_capacity(mounts.len());
    for mount in mounts {
        let outer = kept.iter().rev().find(|outer| mount.path.starts_with(&outer.path));
        match outer {
            Some(outer) if outer.path == mount.path && outer.read_only != mount.read_only => {
                return Err(ConfigError::Mount {
                    path: mount.path,
                    problem: "it is listed twice, once read-only and once writable".to_owned(),
                    hint: "list it once".to_owned(),
                });
            }
            Some(outer) if outer.read_only == mount.read_only => {}
            Some(outer) if mount.read_only => {
                return Err(ConfigError::Mount {
                    problem: format!(
                        "read-only would mean nothing inside {}, which is writable",
                        outer.path.display()
                    ),
                    path: mount.path,
                    hint: format!("share {}:ro, or folders beside each other", outer.path.display()),
                });
            }
            _ => kept.push(mount),
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(result: Result<MountSpec, ConfigError>) -> String {
        let error = result.unwrap_err();
        assert!(error.hint().is_some());
        error.to_string()
    }

    #[test]
    fn paths_modes_and_the_home() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let base = dir.path().canonicalize().unwrap();
        let base = base.as_path();
        for name in ["plain", "with space", "x:ro"] {
            std::fs::create_dir(base.join(name)).unwrap();
        }
        std::os::unix::fs::symlink(base.join("plain"), base.join("link")).unwrap();
        let go = |text: &str| resolve(text, Some(base), &[]).map(|spec| (spec.path, spec.read_only)).unwrap();
        let at = |name: &str| base.join(name);
        assert_eq!(go("~"), (base.to_owned(), false));
        assert_eq!(go("~/plain:ro"), (at("plain"), true));
        assert_eq!(go("~/plain:w"), (at("plain"), false));
        assert_eq!(go("~/with space"), (at("with space"), false));
        assert_eq!(go("~/link"), (at("plain"), false));
        assert_eq!(go("~/x:ro"), (at("x:ro"), false));
        assert_eq!(go("~/x:ro:ro"), (at("x:ro"), true));
        for spec in ["~/x:ro:ro", "~/x:ro", "~/plain"] {
            let spec = resolve(spec, Some(base), &[]).unwrap();
            assert_eq!(resolve(&spec.to_string(), None, &[]).unwrap(), spec, "{spec}");
        }
    }

    #[test]
    fn what_cannot_be_shared_is_said_in_words() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let base = dir.path();
        std::fs::write(base.join("file"), "").unwrap();
        let go = |text: &str, own: &[PathBuf]| problem(resolve(text, Some(base), own));
        assert!(go("~/absent", &[]).ends_with("it does not exist"));
        assert!(go("~/file", &[]).ends_with("it is no folder"));
        assert!(go("~:/elsewhere", &[]).contains("is no mode"));
        assert!(go("/", &[]).contains("hide the guest's own"));
        assert!(go("/usr", &[]).contains("hide the guest's own /usr"));
        assert!(go("/proc/self", &[]).contains("a /proc of its own"));
        assert!(go("~", &[base.to_owned()]).contains("Dhow's own"));
    }

    #[test]
    fn nested_shares() {
        let spec = |path: &str, read_only| MountSpec { path: path.into(), read_only };
        let arranged =
            arrange(vec![spec("/a/b", false), spec("/c", true), spec("/a", true), spec("/c/d", true)])
                .unwrap();
        assert_eq!(arranged, [spec("/a", true), spec("/a/b", false), spec("/c", true)]);
        assert!(arrange(vec![spec("/a", false), spec("/a/b", true)]).is_err());
        assert!(arrange(vec![spec("/a", false), spec("/a", true)]).is_err());
        assert_eq!(arrange(vec![spec("/a", false), spec("/ab", true)]).unwrap().len(), 2);
    }
}
